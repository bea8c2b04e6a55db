"""Do the gates of declared cases fire when they should, and only then? A section of docs/golden-power.md.

    python tools/declared_power.py reference DIR        # what runs are compared with: recorded as a user's case is
    python tools/declared_power.py runs DIR COUNT       # in each setting of the CPU, runs in which nothing matters
    python tools/declared_power.py changes DIR COUNT    # in each setting, COUNT runs of each injected change
    python tools/declared_power.py table DIR            # judge what lies in DIR, and write the section

The cases are a press, a cache and a quantised cache (SUBJECTS); an environment measures those whose packages it has.
Run it with several versions of transformers against one DIR. Settings are those of tools/cpus.py; threads, batch and
attention implementation are drawn within each. Nothing is judged before `table`.
"""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import torch  # noqa: E402
import transformers  # noqa: E402
from cpus import SETTINGS, capability, possible  # noqa: E402
from golden_power import DOCUMENT, HEADING, table  # noqa: E402
from safetensors.numpy import load  # noqa: E402
from transformers import cache_utils  # noqa: E402

from knorm.golden.cases import Case  # noqa: E402
from knorm.golden.declared import load_cases  # noqa: E402
from knorm.golden.files import pack  # noqa: E402
from knorm.golden.format import Environment, Metric  # noqa: E402
from knorm.golden.gates import Finding, Results, judge, where  # noqa: E402
from knorm.golden.project import Declared, Project  # noqa: E402
from knorm.golden.shift import shift_of  # noqa: E402
from knorm.golden.store import Checkout, Store, hash_of_code, read_candidate  # noqa: E402
from knorm.golden.verify import environment_of, record  # noqa: E402
from knorm.models import hush  # noqa: E402

OPTIONS = {"model": "embedded-llama", "window": 128, "windows": 4}


@dataclass(frozen=True)
class Subject:
    """A declared case: its target, what may go wrong with it, and whether it can be measured here."""

    target: str
    changes: Mapping[str, str]
    here: bool
    options: Mapping[str, Any]
    batches: tuple[int, ...] = (1, 2, 3, 4)


SUBJECTS = {
    "press": Subject(
        "kvpress:SnapKVPress(window_size=16)",
        {
            "a window shorter by one": "golden_methods.py:Snap(window_size=15)",
            "the count rounded up": 'golden_methods.py:Snap(window_size=16, rounding="ceil")',
            "a layer forgotten": "golden_methods.py:Snap(window_size=16, plain=3)",
            "queries scaled by 1.01": "golden_methods.py:Snap(window_size=16, scale=1.01)",
        },
        find_spec("kvpress") is not None,
        {"keep_ratio": ["0.7", "0.3"]},
    ),
    "cache": Subject(
        "golden_methods.py:Norms",
        {
            "a window shorter by one": "golden_methods.py:Norms(window=7)",
            "the count rounded down": 'golden_methods.py:Norms(rounding="floor")',
            "a layer forgotten": "golden_methods.py:Norms(plain=3)",
            "keys scaled by 1.001": "golden_methods.py:Norms(scale=1.001)",
        },
        True,
        {"keep_ratio": ["0.7", "0.3"]},
    ),
    "quantised cache": Subject(
        'transformers:QuantizedCache(backend="fp8")',
        {
            "one token of the prompt left exact": "golden_methods.py:Fp8(exact=1)",
            "rounded towards zero": 'golden_methods.py:Fp8(rounding="down")',
            "a layer forgotten": "golden_methods.py:Fp8(plain=3)",
            "the scale off by 1.01": "golden_methods.py:Fp8(scale=1.01)",
        },
        hasattr(cache_utils, "Fp8QuantizedLayer"),
        {},
        batches=(1,),  # its scale is that of a whole batch, which changes its numbers: that is no noise
    ),
}


def case_of(name: str, target: str | None = None) -> Case:
    subject = SUBJECTS[name]
    declared = Declared(target=target or subject.target, **OPTIONS, **subject.options)
    tools = ROOT / "tools"
    key = name.replace(" ", "-")
    return load_cases(Project(tools / "knorm.toml", tools / "golden", {key: declared}))[key]


def reference(folder: Path) -> None:
    torch.set_num_threads(1)
    for name, subject in SUBJECTS.items():
        case = case_of(name) if subject.here else None
        if case is not None and not [*(folder / case.id).glob("*.candidate")]:
            (folder / case.id / "runs").mkdir(parents=True, exist_ok=True)
            recorded = record(case, "cpu", Checkout("0" * 40, True, hash_of_code()))
            assert recorded is not None
            print(Store(folder).write_candidate(recorded.golden, recorded.measured.tensors))


@lru_cache
def _other_attention(model: Any, attention: str) -> Any:
    other = copy.deepcopy(model)
    other.set_attn_implementation(attention)
    return other


def one_run(name: str, change: str | None, seed: int, first: bool, file: Path) -> None:
    """Measure a case once, in a way that is drawn; the first one of a setting as it was declared."""
    draw, subject = random.Random(f"{name} {seed}"), SUBJECTS[name]
    threads, batch, attention = draw.choice((1, 2, 4)), draw.choice(subject.batches), draw.choice(("sdpa", "eager"))
    if first:
        threads, batch, attention = 1, 1, "sdpa"
    torch.set_num_threads(threads)
    case = case_of(name, subject.changes[change] if change else None)
    usual = batch == 1 and attention == "sdpa"
    how = case.how if usual else replace(case.how, batch=batch, numerics=f"{batch} at a time; {attention}")
    if attention != "sdpa":
        how = replace(how, model=lambda model: _other_attention(model, attention))
    measured = case.measure("cpu", how)
    content = {
        "change": change,
        "attention": attention,
        "metrics": [metric.model_dump() for metric in measured.metrics],
        "environment": environment_of(case, "cpu", how).model_dump(),
    }
    file.write_bytes(pack(dict(measured.tensors), {"run": json.dumps(content)}))


def measure(folder: Path, count: int, changes: bool, setting: str) -> None:
    hush()
    for name, subject in SUBJECTS.items():
        runs = folder / name.replace(" ", "-") / "runs"
        runs.mkdir(parents=True, exist_ok=True)
        for change in (subject.changes if changes else [None]) if subject.here else []:
            for number in range(count):
                key = f"{setting}-{transformers.__version__}-{(change or 'nothing').replace(' ', '_')}"
                file = runs / f"{key}-{number}.run"
                if not file.exists():
                    one_run(name, change, hash_of(f"{key} {number}"), number % 4 == 0, file)


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode()[-7:], "little") ^ sum(text.encode())


def in_each_setting(verb: str, folder: Path, count: str) -> int:
    able, codes = capability(), []
    for number, setting in enumerate(SETTINGS):
        if possible(setting, able):
            variables = {key: value for key, value in setting.variables().items() if key != "KNORM_THREADS"}
            command = [sys.executable, __file__, f"{verb}-here", str(folder), count, str(number)]
            codes.append(subprocess.run(command, env={**os.environ, **variables}, check=False).returncode)
    return max(codes)


# Judging


@dataclass(frozen=True)
class Row:
    """A run, judged: by the case's own gates, and by those that come from knorm's own cases."""

    change: str | None
    near: str
    transformers: str
    fired: list[Finding]
    plain: list[Finding]
    moved: Mapping[str, float]


def rows_of(folder: Path, name: str) -> Iterator[Row]:
    place = folder / name.replace(" ", "-")
    (candidate,) = place.glob("*.candidate")
    golden, tensors = read_candidate(candidate)
    for file in sorted((place / "runs").glob("*.run")):
        data = file.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        content = json.loads(header["__metadata__"]["run"])
        metrics = tuple(Metric.model_validate(metric) for metric in content["metrics"])
        here, again = Environment.model_validate(content["environment"]), load(data)
        shifts = [shift_of(again[key], tensors[key]) for key in tensors]
        moved = {of: max(abs(getattr(shift, of)) for shift in shifts) for of in ("mean", "typical", "worst")}
        old = Results.of(golden, tensors)
        gates = {metric.name: metric.gate for metric in metrics}
        plain = replace(old, metrics=tuple(m.model_copy(update={"gate": gates[m.name]}) for m in old.metrics))
        fired = [
            [finding for finding in judge(by, Results(metrics, again, here)) if finding.verdict == "moved"]
            for by in (old, plain)
        ]
        yield Row(content["change"], where(golden.environment, here), here.transformers, *fired, moved)


def section(folder: Path) -> str:
    """The section of the document."""
    parts = [
        f"{HEADING}\n",
        "Written by `tools/declared_power.py` (its first lines say how). A press, a cache and a quantised cache, each "
        f"declared with {', '.join(f'{key} {value}' for key, value in OPTIONS.items())}, and recorded as a user "
        "records: `knorm golden record` measured their noise on one CPU, and made their gates of it. Then they ran "
        "where nothing that matters differed: instructions of the CPU (MKL, oneDNN and ATen limited as `tools/cpus.py` "
        "says), 1, 2 or 4 threads, 1 to 4 windows at a time, SDPA or eager attention, drawn anew for each run; every "
        "fourth as it was declared. The scale of the fp8 cache is one for the whole batch, so another batch changes "
        "its numbers (`record` says so) and was not drawn. Numbers in nats a token are the largest of all metrics and "
        "runs.\n",
    ]
    quiet, faults = [], []
    for name, subject in SUBJECTS.items():
        rows = [*rows_of(folder, name)]
        nothing = [row for row in rows if row.change is None]
        for group in sorted({(row.transformers, row.near == "same") for row in nothing}):
            mine = [row for row in nothing if (row.transformers, row.near == "same") == group]
            numbers = (f"{max(row.moved[of] for row in mine):.1e}" for of in ("mean", "typical", "worst"))
            place = "the golden's" if group[1] else "another"
            fired = (sum(bool(getattr(row, by)) for row in mine) for by in ("plain", "fired"))
            quiet.append([name, f"`{subject.target}`", group[0], place, len(mine), *numbers, *fired])
        for change in subject.changes:
            mine = [row for row in rows if row.change == change]
            least = min((row.moved["typical"] for row in mine), default=0.0)
            caught = f"{sum(bool(row.fired) for row in mine)} of {len(mine)}"
            by = sorted({finding.metric.partition("/")[0] for row in mine for finding in row.fired})
            faults.append([name, change, caught, f"{least:.1e}", ", ".join(by)])
    head = ["case", "target", "transformers", "environment", "runs", "mean", "typical window", "worst window"]
    head += ["fired: gates of other methods", "**fired: its own gates**"]
    total = ["", "", "", "all", sum(line[4] for line in quiet), "", "", ""]
    parts.append(table(head, [*quiet, [*total, sum(line[8] for line in quiet), sum(line[9] for line in quiet)]]))
    parts.append("Injected changes, each in every setting of the CPU:\n")
    parts.append(table(["case", "change", "**caught**", "typical window, at least", "by"], faults))
    return "\n".join(parts)


def write(folder: Path) -> None:
    """Put the section at the end of the document, in place of an older one."""
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(text.partition(HEADING)[0].rstrip("\n") + "\n\n" + section(folder), encoding="utf-8")


def main() -> int:
    verb, *rest = sys.argv[1:] or [""]
    hush()
    if verb == "reference" and len(rest) == 1:
        reference(Path(rest[0]))
    elif verb in ("runs", "changes") and len(rest) == 2:
        return in_each_setting(verb, Path(rest[0]), rest[1])
    elif verb in ("runs-here", "changes-here"):
        measure(Path(rest[0]), int(rest[1]), verb == "changes-here", rest[2])
    elif verb == "table" and len(rest) == 1:
        write(Path(rest[0]))
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
