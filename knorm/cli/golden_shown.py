"""What `knorm golden record` and `diff` show of a candidate: what it would change, and its noise."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any


def show_seen(console: Any, recorded: Any) -> dict[str, Any]:
    """Print the noise of what was recorded, and what its gates let pass; the same as JSON has it."""
    from knorm.cli.tables import show_noise
    from knorm.golden.noise import passes

    bounds = passes(recorded.measured, recorded.seen)
    show_noise(console, recorded.seen, bounds)
    return {**recorded.seen.as_fields(), "bounds": [asdict(bound) for bound in bounds]}


def accepted(console: Any, store: Any, case: str, device_class: str) -> Any:
    """Read a golden with its tensors; None where there is none, or none that can be trusted, which is said."""
    from knorm.golden.files import Damaged

    try:
        return store.read(case, device_class)
    except FileNotFoundError:
        return None
    except Damaged as damaged:
        console.print(f"DAMAGED: {damaged}", soft_wrap=True, markup=False)
        return None


def show_changes(console: Any, old: Any, made: Any, tensors: Any) -> list[Any]:
    """Print what a candidate would change in a golden, if there is one; the changes."""
    from knorm.cli.tables import changes_table
    from knorm.golden.format import differences
    from knorm.golden.gates import gate_changes
    from knorm.golden.verify import changes

    findings = changes(old, (made, tensors))
    title = f"{made.case} ({made.device_class})"
    if old and any(change.verdict != "holds" or change.golden != change.measured for change in findings):
        console.print(changes_table(findings, title))
    else:
        said = (
            f"{title}: nothing differs in {len(findings)} metrics" if old else f"{title}, new: {len(findings)} metrics"
        )
        console.print(said, markup=False)
    if old:
        for change in differences(old[0].configuration, made.configuration):
            console.print(f"configuration: {change}", soft_wrap=True, markup=False)
        for metric, change in gate_changes(old[0], made).items():
            console.print(f"GATE  {metric} is {change}", soft_wrap=True, markup=False)
    return findings
