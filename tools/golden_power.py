"""Do the gates of the goldens fire when they should, and only then? Writes docs/golden-power.md.

    python tools/golden_power.py reference DIR [cpu|cuda]            # what runs are compared with, as candidates in DIR
    python tools/golden_power.py runs DIR OUT.jsonl COUNT [cpu|cuda]   # runs in which nothing that matters differs
    python tools/golden_power.py changes DIR OUT.jsonl COUNT [cpu|cuda]  # COUNT runs for each injected change
    python tools/golden_power.py table OUT.jsonl...                 # the document, from the runs of all machines

A run measures every case of the device once, with threads, batches, order of the windows and attention implementation
drawn at random. Each is judged twice: as if in the reference's environment, and as if in another of its device class.
Run it with other versions of torch and transformers against one DIR, and give all outputs to `table`. Cases that a
project declares are measured by declared_power.py.
"""

from __future__ import annotations

import copy
import json
import os
import random
import statistics
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from math import floor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.nn import functional  # noqa: E402

from knorm import schedule  # noqa: E402
from knorm.golden.cases import CASES, NOISE  # noqa: E402
from knorm.golden.environment import How, device_class, environment  # noqa: E402
from knorm.golden.format import environment_changes  # noqa: E402
from knorm.golden.gates import Results, judge  # noqa: E402
from knorm.golden.shift import shift_of  # noqa: E402
from knorm.golden.store import Checkout, Store, hash_of_code, read_candidate  # noqa: E402
from knorm.golden.verify import record  # noqa: E402
from knorm.masked_attention import attend_seen  # noqa: E402
from knorm.models import hush  # noqa: E402
from knorm.policy import Policy, exact_ratio  # noqa: E402
from knorm.rounding import attend_shuffled  # noqa: E402

DOCUMENT = ROOT / "docs" / "golden-power.md"
HEADING = "## Declared cases"  # that section is of declared_power.py


def attend_eager(query, key, value, evicted, scale):
    """Attention written out: products, a mask, softmax, products."""
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    positions = torch.arange(length, device=query.device)
    seen = (positions <= positions[:, None])[None, None]
    if evicted is not None:
        seen = seen & (positions[:, None] < evicted.repeat_interleave(groups, 1)[..., None, :])
    weights = functional.softmax((query @ key.mT * scale).masked_fill(~seen, -torch.inf), dim=-1)
    return weights @ value


ATTENTION = {"blocks": attend_seen, "eager": attend_eager, "shuffled slots": attend_shuffled}


def scaled(attend):
    attend = attend or attend_seen
    return lambda query, key, value, evicted, scale: attend(query, key, value, evicted, scale * 1.01)


def perturbed(model, seed: int):
    """float32 weights, each changed by up to 1e-4 of itself."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.rand(weight.shape, generator=generator).to(weight.device) * 2 - 1
            weight.mul_(1 + 1e-4 * noise)
    return model


@contextmanager
def budgets(change: Callable[[Policy, int, int], int]):
    """Every compression retains another number."""
    whole = Policy.budget

    def budget(self: Policy, length: int) -> int:
        count = whole(self, length)
        return count if count == length else max(1, min(length, change(self, length, count)))

    Policy.budget = budget
    schedule._events.cache_clear()
    try:
        yield
    finally:
        Policy.budget = whole
        schedule._events.cache_clear()


def rounded_down(policy: Policy, length: int, count: int) -> int:
    return max(policy.protect_first + policy.protect_recent, floor(exact_ratio(policy.keep_ratio) * Fraction(length)))


@contextmanager
def nothing():
    yield


CHANGES: dict[str, tuple[Callable[[How, int], How], Callable[[], Any]]] = {
    "a count off by one": (lambda how, seed: how, lambda: budgets(lambda policy, length, count: count + 1)),
    "one recent token fewer protected": (
        lambda how, seed: replace(how, policy=lambda p: replace(p, protect_recent=max(0, p.protect_recent - 1))),
        nothing,
    ),
    "counts rounded down": (lambda how, seed: how, lambda: budgets(rounded_down)),
    "attention scale off by 1%": (lambda how, seed: replace(how, attend=scaled(how.attend)), nothing),
    "weights perturbed by 1e-4": (lambda how, seed: replace(how, model=lambda m: perturbed(m, seed)), nothing),
    "one layer's skip forgotten": (
        lambda how, seed: replace(how, policy=lambda p: replace(p, skip_layers=())),
        nothing,
    ),
}
GATES = {
    "count": "counts",
    "selection": "positions",
    "schedule": "evicted_at",
    "nll": "token NLL",
    "ratio": "PPL ratio",
    "memory": "memory",
}


def reference(folder: Path, device: str) -> None:
    for case in CASES.values():
        if device in case.devices and not case.optional:
            (folder / case.id).mkdir(parents=True, exist_ok=True)
            recorded = record(case, device, Checkout("0" * 40, True, hash_of_code()))
            assert recorded is not None
            print(Store(folder).write_candidate(recorded.golden, recorded.measured.tensors))


def one_run(job: tuple[Path, str, str | None, int]) -> dict[str, Any]:
    """A run judged as `knorm golden verify` would; every fourth is in the reference's own environment."""
    folder, device, change, seed = job
    draw = random.Random(f"{change} {seed}")
    kind = device_class(device)
    goldens = {
        case.id: read_candidate(folder / case.id / f"{kind}.candidate")
        for case in CASES.values()
        if device in case.devices and not case.optional
    }
    how, attention = How(), "blocks"
    threads = next(iter(goldens.values()))[0].environment.threads
    if seed % 4:
        threads, batch, attention = draw.choice((1, 2)), draw.choice((1, 2, 3, 4, 5, 8)), draw.choice([*ATTENTION])
        how = How(batch, lambda count: draw.sample(range(count), count), ATTENTION[attention], numerics="drawn")
    torch.set_num_threads(threads)
    adjust, around = CHANGES[change] if change else (lambda how, seed: how, nothing)
    here = environment(device, how)
    same = not environment_changes(next(iter(goldens.values()))[0].environment, here)
    row: dict[str, Any] = {"device": kind, "torch": here.torch.split("+")[0], "transformers": here.transformers}
    row |= {"change": change, "seed": seed, "same": same, "threads": threads, "numerics": [how.batch, attention]}
    row |= {"fired": [], "mean": 0.0, "typical": 0.0, "largest": 0.0, "schedules": 0}
    for name, (golden, tensors) in goldens.items():
        with around():
            measured = CASES[name].measure(device, adjust(how, seed))
        kinds = {metric.name: metric.kind for metric in golden.metrics}
        again = Results(measured.metrics, measured.tensors, here)
        for found in judge(Results.of(golden, tensors), again):
            row["schedules"] += kinds[found.metric] == "schedule" and found.golden != found.measured
            if found.verdict == "moved":
                row["fired"].append([GATES[kinds[found.metric]], name, found.metric, found.evidence])
        for metric in tensors:
            if kinds[metric] == "nll":
                shift = shift_of(measured.tensors[metric], tensors[metric])
                row["mean"] = max(row["mean"], abs(shift.mean))
                row["typical"] = max(row["typical"], shift.typical)
                row["largest"] = max(row["largest"], shift.largest)
    return row


def run(folder: Path, out: Path, count: int, device: str, changes: bool) -> None:
    jobs = [(folder, device, change, seed) for change in (CHANGES if changes else [None]) for seed in range(count)]
    processes = 2 if device == "cuda" else max(2, (os.cpu_count() or 2) - 4)
    with out.open("a", encoding="utf-8") as stream, get_context("spawn").Pool(processes, hush) as pool:
        for row in pool.imap_unordered(one_run, jobs):
            stream.write(json.dumps(row) + "\n")
            stream.flush()


def still_fires(row: dict[str, Any], evidence: str) -> bool:
    """Whether what fired then would fire by today's bound on the typical window."""
    kind = "cpu" if row["device"].startswith("cpu") else "cuda"
    return not (evidence.startswith("the typical window") and row["typical"] <= NOISE[kind].typical)


def rate(rows: list[dict[str, Any]], gate: str | None) -> str:
    return f"{sum(any(gate in (None, found[0]) for found in row['fired']) for row in rows)} of {len(rows)}"


def table(head: list[str], rows: list[list[Any]]) -> str:
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (head, ["---"] * len(head), *rows)) + "\n"


def document(files: list[Path]) -> str:
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["fired"] = [found for found in row["fired"] if still_fires(row, found[3])]
    parts = [
        "# Do the goldens' gates fire when they should, and only then?\n",
        "Written by `tools/golden_power.py` (its first lines say how). A run measures every case of the device and is "
        "judged as `knorm golden verify` judges it. Every fourth run is in the golden's own environment, where the "
        "hash of `evicted_at` and each token's NLL are gated; for the others, what must not matter is drawn anew: "
        "threads (1, 2), windows at a time (1 to 8), their order, attention (blocks of queries through SDPA; written "
        "out, eagerly; slots shuffled). Numbers in "
        "nats are the largest of all cases and ratios of a run.\n",
    ]
    for device in sorted({row["device"] for row in rows}):
        mine = [row for row in rows if row["device"] == device]
        gates = [gate for gate in GATES.values() if gate != "memory" or not device.startswith("cpu")]
        parts.append(f"## {device}\n\nNothing that matters was changed:\n")
        quiet = [row for row in mine if row["change"] is None]
        lines = []
        for group in sorted({(row["torch"], row["transformers"], row["same"]) for row in quiet}):
            each = [row for row in quiet if (row["torch"], row["transformers"], row["same"]) == group]
            means = [row["mean"] for row in each]
            lines.append(
                [*group[:2], "the golden's" if group[2] else "another", len(each), rate(each, None),
                 sum(row["schedules"] > 0 for row in each), f"{statistics.fmean(x * x for x in means) ** 0.5:.1e}",
                 *(f"{max(row[name] for row in each):.1e}" for name in ("mean", "typical", "largest"))]
            )  # fmt: skip
        head = ["torch", "transformers", "environment", "runs", "**a gate fired**", "near-ties fell differently"]
        head += ["mean shift, r.m.s.", "mean shift", "typical token", "any token"]
        parts.append(table(head, [*lines, ["", "", "all", len(quiet), rate(quiet, None), "", "", "", "", ""]]))
        for same in (True, False):
            lines = []
            for change in CHANGES:
                each = [row for row in mine if row["change"] == change and row["same"] == same]
                if each:
                    typical = statistics.median(row["typical"] for row in each)
                    lines.append([change, *(rate(each, gate) for gate in gates), rate(each, None), f"{typical:.1e}"])
            where = "the golden's environment" if same else "another environment"
            if lines:
                parts.append(f"Injected changes, in {where}: runs in which a gate fired.\n")
                parts.append(table(["change", *gates, "**any**", "typical token"], lines))
    noise = {name: value.model_dump() for name, value in NOISE.items()}
    parts.append(
        "One CPU run of 244, the first pass of a fresh process, moved the typical token by 4.6e-5, for no cause that "
        "could be found or repeated. It fired under the bound of 1e-5 that held then; the bound was widened to 1e-4 "
        "because of it, and all runs are judged by that here: this one run is no independent proof. The injected "
        "changes touch every window and lie at least ten times beyond a gate; what touches few windows is bounded by "
        "`ANY_WINDOW` in `knorm/golden/rules.py` and shown in `tests/golden/test_gates.py`. None of them changes "
        "peak memory: the power of its gate is not shown.\n"
    )
    parts.append(
        f"What the gates know of this (`knorm/golden/cases.py`, stored with each golden): `{json.dumps(noise)}`.\n"
    )
    return "\n".join(parts)


def main() -> int:
    verb, *rest = sys.argv[1:] or [""]
    hush()
    if verb == "reference" and rest:
        reference(Path(rest[0]), *(rest[1:] or ["cpu"]))
    elif verb in ("runs", "changes") and len(rest) >= 3:
        run(Path(rest[0]), Path(rest[1]), int(rest[2]), *(rest[3:] or ["cpu"]), changes=verb == "changes")
    elif verb == "table" and rest:
        _, heading, declared = DOCUMENT.read_text(encoding="utf-8").partition(HEADING)
        text = document([Path(file) for file in rest])
        DOCUMENT.write_text(text + (f"\n{heading}{declared}" if heading else ""), encoding="utf-8")
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
