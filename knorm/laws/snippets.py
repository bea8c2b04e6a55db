"""Python that shows a counterexample, to be pasted into an interpreter that has torch and the target."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from knorm.laws.reading import Reading
from knorm.laws.registry import Check, find
from knorm.laws.scripts import program
from knorm.laws.strategies import Cache, Text
from knorm.laws.subjects import Call, Subject, takes_layer
from knorm.laws.traits import METHOD, Traits
from knorm.tensors import alike

MOST_CALLS, MOST_NUMBERS = 3, 400
SHOWS = {  # where the numbers retained are not what is wrong
    "dtype": "print(kept[0].dtype, kept[0].device, kept[1].dtype, kept[1].device)",
    "inputs_unwritten": "print(keys.tolist(), values.tolist(), sep='\\n')  # as they are afterwards",
    "own_bytes": "print([(x.untyped_storage().nbytes(), x.numel() * x.element_size()) for x in kept[:2]])  # held, own",
}


def _literal(tensor: Tensor) -> str:
    numbers = tensor.detach().cpu()
    if not numbers.numel():
        return f"torch.zeros({list(numbers.shape)}, dtype={tensor.dtype})"
    data = "float('nan')".join(str(numbers.double().tolist()).split("nan")).replace("inf", "float('inf')")
    return f"torch.tensor({data}, dtype={tensor.dtype})"


def _layout(strides: tuple[int, ...], tensor: Tensor) -> str:
    """What gives a literal the strides that the tensor had: transposed or expanded, where it was."""
    if strides == tensor.contiguous().stride() or not tensor.numel():
        return ""
    if strides[0] == 0 and tensor.shape[0] > 1:
        return f"[:1].expand({tensor.shape[0]}, -1, -1, -1)"
    return ".transpose(1, 2).contiguous().transpose(1, 2)"


def _same(first: Call, second: Call) -> bool:
    return (
        (first.keep_ratio, first.layer, first.keys.dtype) == (second.keep_ratio, second.layer, second.keys.dtype)
        and alike(first.keys, second.keys)
        and torch.equal(first.values, second.values)
    )


def snippet(check: Check, subject: Subject, case: Cache | Text | Reading, calls: list[Call]) -> str:
    """Write what repeats a counterexample.

    Args:
        check: the law.
        subject: what breaks it.
        case: the smallest case that does.
        calls: of a compressor, that the check made on it.

    Returns:
        Lines of Python: the calls; for laws about models, a whole program.
    """
    if not isinstance(case, Cache) and (alone := program(subject, case)):
        return alone
    if isinstance(case, Reading):
        return "\n".join(
            [
                "from knorm.laws import reproduce",
                "from knorm.laws.reading import Reading",
                subject.code or f"target = ...  # {subject.name}",
                f'reproduce("{check.name}", target, {_arguments(case)}{_promises(subject)})',
            ]
        )
    if isinstance(case, Text):
        return "\n".join(
            [
                "import torch",
                "from knorm.laws import reproduce",
                "from knorm.laws.strategies import Text",
                subject.code or f"target = ...  # {subject.name}",
                f"text = Text(torch.tensor({case.input_ids.tolist()}), {case.prompt}, {case.chunk}, "
                f"{case.keep_ratio}, {case.pads})",
                f'reproduce("{check.name}", target, text{_promises(subject)})',
            ]
        )
    again = check.family == "independence"  # what is called twice, and in which order, is the point
    shown: list[Call] = []
    for call in calls:
        if again or not any(_same(call, earlier) for earlier in shown):
            shown.append(call)
    most = len(shown) if again else MOST_CALLS
    own = "\n".join(line for line in subject.code.splitlines() if line != "target = compress")
    lines = ["import torch", own or f"compress = ...  # {subject.name}"]
    for call in shown[-most:]:
        if call.keys.numel() > MOST_NUMBERS:
            lines.append(f"# a call with keys {list(call.keys.shape)} at ratio {call.keep_ratio} is too long to print")
            continue
        layer = f", layer={call.layer}" if call.layer is not None and takes_layer(subject.compress) else ""  # type: ignore[arg-type]
        lines += [
            f"keys = {_literal(call.keys)}{_layout(call.strides[0], call.keys)}",
            f"values = {_literal(call.values)}{_layout(call.strides[1], call.values)}  "
            "# each (row, head, position // 256, position % 256)",
            f"kept = compress(keys, values, {call.keep_ratio}{layer})",
            SHOWS.get(check.name, "print(kept[0].tolist(), kept[1].tolist(), sep='\\n')"),
        ]
    return "\n".join(lines)


def _arguments(reading: Reading) -> str:
    """A reading as it is written in Python; what is the default is left out."""
    changed = {f.name: getattr(reading, f.name) for f in fields(Reading) if getattr(reading, f.name) != f.default}
    return f"Reading({', '.join(f'{name}={value!r}' for name, value in changed.items())})"


def _promises(subject: Subject) -> str:
    """The traits that differ from what every compressor owes, as keywords."""
    owed = METHOD if subject.make_cache or subject.open_cache or subject.method else Traits()
    given = {f.name: getattr(subject.traits, f.name) for f in fields(Traits)}
    return "".join(f", {name}={value!r}" for name, value in given.items() if value != getattr(owed, name))


def reproduce(name: str, target: object, case: Cache | Text | Reading, **traits: Any) -> None:
    """Run one check on one case.

    Args:
        name: the check's.
        target: what adapters.adapt takes.
        case: the case, as a counterexample shows it.
        traits: what the target promises.

    Raises:
        Refuted: the target breaks the law; the message has the evidence.

    Example:
        >>> import knorm
        >>> from knorm.laws import reproduce
        >>> from knorm.laws.strategies import Text
        >>> reproduce("one_pass", knorm.exact_nll, Text(torch.arange(8)[None], 2, 1, 0.5))
    """
    from knorm.laws.adapters import adapt

    find(name).function(adapt(target, traits or None), case)
