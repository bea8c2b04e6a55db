"""Values of a test's own: compared with an accepted golden, and handed to `knorm golden record --from-tests`.

A test never writes among goldens. Where KNORM_RECORD_VALUES names a folder, which `record` makes and reads, values are
put there instead of being compared.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from knorm.golden.cases import Case
from knorm.golden.environment import How, environment
from knorm.golden.files import pack
from knorm.golden.format import OF_TESTS, Environment, Gate, Measured, Metric, digest
from knorm.golden.project import NAME
from knorm.golden.rules import RULES
from knorm.golden.store import Store
from knorm.golden.verify import Outcome, verify_goldens
from knorm.paths import REPORTED

FOLDER = "KNORM_RECORD_VALUES"  # in the environment of a test run that `record` starts
TOLERANCE = 1e-5  # relative, of a number that is not whole
_RULES = tuple(name for name, rule in RULES.items() if not rule.tensors)

Value = int | float | str
Bound = float | str


def measured_values(
    metrics: Mapping[str, Any],
    tensors: Mapping[str, Any] | None = None,
    gate: Bound | Mapping[str, Bound] | None = None,
) -> Measured:
    """Turn values into metrics with gates.

    Args:
        metrics: a number or a text by name; whole numbers and texts must be equal, others within TOLERANCE.
        tensors: by name, whatever NumPy makes an array of; whole numbers must be equal, others within TOLERANCE of the
            largest.
        gate: a relative tolerance, or the name of a rule (rules.RULES), for all, or by name.

    Returns:
        What a golden holds.

    Raises:
        ValueError: no value, a name twice, a value that is no number, or a gate that is unknown or for nothing.
    """
    arrays = {name: _array(name, tensor) for name, tensor in (tensors or {}).items()}
    if twice := sorted({*metrics} & {*arrays}):
        raise ValueError(f"{twice[0]!r} is among both metrics and tensors: give each its own name")
    if not metrics and not arrays:
        raise ValueError("golden.check was given no values")
    gates = gate if isinstance(gate, Mapping) else dict.fromkeys([*metrics, *arrays], gate)
    if unknown := sorted({*gates} - {*metrics, *arrays}):
        raise ValueError(f"gate names {unknown[0]!r}, but there are {', '.join([*metrics, *arrays])}")
    made = [_metric(name, _value(name, value), gates.get(name)) for name, value in metrics.items()]
    made += [_tensor_metric(name, array, gates.get(name)) for name, array in arrays.items()]
    return Measured(tuple(made), arrays)


def _value(name: str, value: Any) -> Value:
    if hasattr(value, "item"):  # of NumPy or torch
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"metric {name!r} is {value!r}, but should be a number or a text")
    return value


def _array(name: str, tensor: Any) -> np.ndarray[Any, Any]:
    if hasattr(tensor, "detach"):  # of torch
        tensor = tensor.detach().cpu()
        tensor = (
            tensor.numpy() if tensor.dtype.itemsize != 2 or not tensor.is_floating_point() else tensor.float().numpy()
        )
    array = np.asarray(tensor)
    if array.dtype.kind not in "biuf" or not array.size:
        raise ValueError(f"tensor {name!r} has dtype {array.dtype} and {array.size} elements, but should have numbers")
    return np.atleast_1d(array)


def _metric(name: str, value: Value, bound: Bound | None) -> Metric:
    gate = _gate(name, bound, Gate(rule="exact") if not isinstance(value, float) else _tolerance("near", TOLERANCE))
    if RULES[gate.rule].numbers and isinstance(value, str):
        raise ValueError(f"{name!r} is a text, which {gate.rule!r} cannot judge: use 'exact'")
    return Metric(name=name, unit="1", direction="same", kind="value", value=value, anchor=value, gate=gate)


def _tensor_metric(name: str, array: np.ndarray[Any, Any], bound: Bound | None) -> Metric:
    whole = array.dtype.kind != "f"
    if isinstance(bound, int | float):
        gate, whole = _tolerance("close", bound), False
    else:
        gate = _gate(name, bound, Gate(rule="exact") if whole else _tolerance("close", TOLERANCE))
    value: Value = float(array.astype(np.float64).mean())
    if gate.rule != "close":
        value = digest(np.ascontiguousarray(array).tobytes())[:16]
    unit = "mean" if gate.rule == "close" else "sha256"
    return Metric(name=name, unit=unit, direction="same", kind="value", value=value, anchor=value, gate=gate)


def _gate(name: str, bound: Bound | None, default: Gate) -> Gate:
    if bound is None:
        return default
    if isinstance(bound, str):
        if bound not in _RULES:
            raise ValueError(f"gate of {name!r} is {bound!r}, but should be a number or one of {', '.join(_RULES)}")
        return Gate(rule=bound)
    return _tolerance("near", bound)


def _tolerance(rule: str, bound: float) -> Gate:
    if not 0 <= bound < math.inf:
        raise ValueError(f"gate is {bound}, but should be a tolerance from 0 up")
    return Gate(rule=rule, threshold=float(bound))


def check_values(name: str, measured: Measured, store: Store, device: str) -> Outcome | None:
    """Compare a test's values with their golden, or hand them to `record`.

    Args:
        name: of the golden; a-z, 0-9, - and _.
        measured: the values, with gates.
        store: where the golden is.
        device: whose class the golden is of.

    Returns:
        The outcome; None where the values were handed over.

    Raises:
        ValueError: a name that is no golden's, or is used twice in one recording.
    """
    if not NAME.fullmatch(name) or name == REPORTED:
        raise ValueError(f"golden.check({name!r}): the name should be at most 64 of a-z, 0-9, - and _")
    if folder := os.environ.get(FOLDER):
        _hand_over(Path(folder), name, measured, environment(device, HOW))
        return None
    case = _case(name, lambda *_: measured, None)
    (outcome,) = verify_goldens(store, [name], device, catalogue={name: case})
    return outcome


HOW = How(numerics="values of a test")


def _case(name: str, measure: Callable[[str, How], Measured], there: Environment | None) -> Case:
    return Case(
        name, "values of a test", lambda: {**OF_TESTS}, measure, how=HOW, environment=there, recorded="--from-tests"
    )


def _hand_over(folder: Path, name: str, measured: Measured, here: Environment) -> None:
    """Write values for `record`, which made the folder. Raises ValueError for a name that is there already."""
    content = {"metrics": [metric.model_dump() for metric in measured.metrics], "environment": here.model_dump()}
    data = pack(dict(measured.tensors) or {"none": np.zeros(1)}, {"values": json.dumps(content)})
    try:
        with (folder / f"{name}.values").open("xb") as stream:
            stream.write(data)
    except FileExistsError:
        raise ValueError(f"golden.check({name!r}) is called twice in a run: give each call its own name") from None


def _taken(file: Path) -> tuple[Measured, Environment]:
    from safetensors.numpy import load

    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    content = json.loads(header["__metadata__"]["values"])
    metrics = tuple(Metric.model_validate(metric) for metric in content["metrics"])
    tensors = load(data)
    kept = {metric.name: tensors[metric.name] for metric in metrics if metric.name in tensors}
    return Measured(metrics, kept), Environment.model_validate(content["environment"])


def cases_of_tests(arguments: Sequence[str], runs: int) -> dict[str, Case]:
    """Run the tests several times, and make a case of each name that they check.

    Args:
        arguments: pytest's.
        runs: how often.

    Returns:
        Cases by name, each to be measured `runs` times: a measurement is what one run gave.

    Raises:
        ValueError: the tests fail, check nothing, or not the same in each run.
    """
    taken: list[dict[str, tuple[Measured, Environment]]] = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory(prefix="knorm-") as folder:
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
            done = subprocess.run(
                command, env={**os.environ, FOLDER: folder}, capture_output=True, text=True, check=False
            )
            if done.returncode:
                said = [line for line in done.stdout.splitlines() if line.strip()][-3:] or [done.stderr.strip()]
                raise ValueError(f"the tests failed, nothing was recorded: {'; '.join(said)}")
            taken.append({file.stem: _taken(file) for file in sorted(Path(folder).glob("*.values"))})
    names = [*taken[0]]
    if not names:
        raise ValueError("the tests call golden.check nowhere, nothing was recorded")
    if others := next((name for each in taken for name in {*names} ^ {*each}), None):
        raise ValueError(f"golden.check({others!r}) is not called in every run, nothing was recorded")
    return {name: _case(name, _in_turn([each[name][0] for each in taken]), taken[0][name][1]) for name in names}


def _in_turn(measured: list[Measured]) -> Callable[[str, How], Measured]:
    turns: Iterator[Measured] = iter(measured)
    return lambda *_: next(turns)


def case_of_values(name: str) -> Case:
    """Make the case that the candidate `name`, of a test's values, is of; measuring it raises ValueError."""

    def unmeasured(*_: Any) -> Measured:
        raise ValueError(f"{name} is of a test: knorm golden record --from-tests")

    return _case(name, unmeasured, None)
