"""Golden results as files: sealed, written as text, and read back strictly.

A golden is golden/<case>/<device class>.json, readable and diffable; beside it lies a .safetensors file, named by its
content, with the NLL of each token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import ValidationError
from safetensors.numpy import save

from knorm.golden.format import Environment, Golden, Measured, Provenance, Tensors, digest
from knorm.golden.rules import RULES
from knorm.strict import first_error, no_field_twice

SCHEMA = 1


class Damaged(ValueError):
    """Say that a golden cannot be trusted: which file, and which field."""


def _seals(fields: Mapping[str, Any]) -> dict[str, str]:
    names = [name for name in Golden.model_fields if name != "seal"]
    return {name: digest(json.dumps(fields[name], sort_keys=True).encode())[:16] for name in names}


def pack(tensors: Tensors, metadata: dict[str, str] | None = None) -> bytes:
    """Return `tensors`, by name, and `metadata` as the bytes of a .safetensors file: the same for the same tensors."""
    return save({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}, metadata=metadata)


def make(
    case: str,
    device_class: str,
    configuration: Mapping[str, Any],
    measured: Measured,
    environment: Environment,
    provenance: Provenance,
) -> Golden:
    """Make a sealed golden of what was measured.

    Args:
        case: its name.
        device_class: as environment.device_class names it.
        configuration: of the case, as JSON has it.
        measured: its metrics and tensors.
        environment: that it was measured in.
        provenance: commit, date and runs; the reason comes with the acceptance.

    Returns:
        The golden; nothing is written.

    Raises:
        ValueError: a value that is not finite; the message names the metric.
    """
    for metric in measured.metrics:
        if isinstance(metric.value, float) and not math.isfinite(metric.value):
            raise ValueError(
                f"{case}: metric {metric.name} is {metric.value}, but should be finite: nothing was recorded"
            )
    for name, tensor in measured.tensors.items():
        if not np.isfinite(tensor).all():
            raise ValueError(f"{case}: a token of {name} is not finite: nothing was recorded")
    fields = {
        "schema_version": SCHEMA,
        "case": case,
        "device_class": device_class,
        "configuration": dict(configuration),
        "metrics": [metric.model_dump(mode="json") for metric in measured.metrics],
        "tensors": digest(pack(measured.tensors)) if measured.tensors else None,
        "environment": environment.model_dump(mode="json"),
        "provenance": provenance.model_dump(mode="json"),
    }
    return parse(json.dumps(fields | {"seal": _seals(fields)}), case)


def _no_constant(name: str) -> Any:
    raise ValueError(f"a value is {name}, but should be finite")


def parse(text: str, name: str) -> Golden:
    """Read a golden from JSON.

    Args:
        text: the JSON.
        name: what errors call it.

    Returns:
        The golden.

    Raises:
        Damaged: anything but what `make` and `accept` write; the message names the field.
    """
    try:
        fields = json.loads(text, object_pairs_hook=no_field_twice, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{name} is truncated, edited or no JSON: {error}") from None
    version = fields.get("schema_version") if isinstance(fields, dict) else None
    if version != SCHEMA:
        raise Damaged(f"{name}: field 'schema_version' is {version!r}, but this knorm reads {SCHEMA}: update knorm")
    try:
        golden = Golden.model_validate_json(text)
    except ValidationError as error:
        raise Damaged(f"{name}: {first_error(error)}") from None
    names = [metric.name for metric in golden.metrics]
    if len({*names}) < len(names):
        raise Damaged(f"{name}: field 'metrics' has {next(n for n in names if names.count(n) > 1)!r} twice")
    for place, metric in enumerate(golden.metrics):
        rule = RULES.get(metric.gate.rule)
        if rule is None:
            known = ", ".join(RULES)
            raise Damaged(
                f"{name}: field metrics.{place}.gate.rule is {metric.gate.rule!r}, but this knorm knows {known}"
            )
        if rule.numbers and isinstance(metric.value, str):
            raise Damaged(f"{name}: field metrics.{place}.value is {metric.value!r}, but should be a number")
        if rule.tensors and golden.tensors is None:
            raise Damaged(f"{name}: field 'tensors' is null, but {metric.name} is judged by its {rule.tensors}")
    if edited := [key for key, seal in _seals(fields).items() if golden.seal.get(key) != seal]:
        raise Damaged(f"{name}: field {edited[0]!r} was edited by hand")
    return golden
