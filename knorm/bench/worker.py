"""A process that generates on command, for `knorm bench --against`. Started as a file, a commit on PYTHONPATH.

    python -P bench_worker.py PACKAGE     # the folder `knorm` that has to be the one imported

Lines of JSON come in and go out. How to time and count is this file's neighbours'; how to compress is the commit's.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any


def _beside(name: str) -> Any:
    """The neighbouring module of this file, under another name: the commit may have one of its own, or none."""
    spec = spec_from_file_location(f"bench_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def serve(lines: Any, answer: Any, package: Path) -> None:
    """Set up by the first line, then answer one line after another until there are no more.

    Args:
        lines: an iterator of JSON: the fields of Setup, then [what, arm, number] each.
        answer: called with "ready", then with what each line asked for.
        package: the folder `knorm` that has to be the one imported.

    Raises:
        ImportError: another one was.
    """
    import knorm

    if Path(knorm.__file__).parent.resolve() != package.resolve():
        raise ImportError(f"knorm was imported from {Path(knorm.__file__).parent}, not from {package}")
    policy_class = import_module("knorm.policy").Policy  # before anything heavy: a broken commit says so at once
    import torch

    from knorm.models import hush, load_model

    latency, counters = _beside("latency"), _beside("counters")
    setup = json.loads(next(lines))
    torch.set_num_threads(setup["threads"])
    hush()
    model, _ = load_model(setup["model"], dtype=getattr(torch, setup["dtype"]), device=setup["device"])
    prompts = [
        latency.Prompt(torch.tensor(p["ids"], device=setup["device"]), p["new_tokens"]) for p in setup["prompts"]
    ]
    policies = [policy_class(**fields) for fields in setup["policies"]]
    arms = [latency.Arm(model, prompts, policy) for policy in policies]
    answer("ready")
    with latency.attending(model):
        for line in lines:
            what, arm, number = json.loads(line)
            if what == "prompt":
                answer(arms[arm].prompt(number))
            elif what == "steps":
                answer(arms[arm].steps(number))
            else:
                answer(asdict(counters.count(arms[arm], number, arms[arm].alone(number))))


def main() -> None:
    """Answers go to what was stdout; whatever a library prints goes to stderr."""
    out = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)

    def answer(result: Any) -> None:
        out.write(json.dumps(result) + "\n")

    serve(iter(sys.stdin), answer, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
