"""Golden results as files: what is stored, sealed and read back.

A golden is golden/<case>/<device class>.json, readable and diffable; beside it lies a .safetensors file, named by its
content, with the NLL of each token.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, ValidationError
from safetensors.numpy import save

from knorm.strict import Strict, first_error, no_field_twice

SCHEMA = 1

Tensors = Mapping[str, np.ndarray[Any, Any]]


class Damaged(ValueError):
    """A golden that cannot be trusted: which file, which field, and how to get it back."""


class Noise(Strict):
    """What runs showed that differed in nothing that matters (docs/golden-power.md).

    runs      how many
    sigma     standard deviation of a metric's mean shift between environments, nats a token
    largest   of any token's NLL within one environment, nats
    typical   of a window's mean absolute difference between environments, nats: the median over windows is gated
    alpha     of the one-sided interval that has to exclude 0
    power     share of the injected changes that the gates caught; None where not measured
    """

    runs: int
    sigma: float
    largest: float
    typical: float
    alpha: float
    power: float | None


class Gate(Strict):
    """How a metric is judged.

    rule        "exact": equal everywhere. "same_environment": equal there, elsewhere shown. "same_versions": equal with
                the golden's torch and transformers, else shown. "tokens": see judge_tokens. "at_most": not above the
                golden value x (1 + threshold). "timing": in the same environment, see judge_timing; elsewhere shown
    threshold   relative for "at_most"; nats a token of mean shift for "tokens"; a slowdown for "timing"; else None
    noise       where it came from
    """

    rule: Literal["exact", "same_environment", "same_versions", "tokens", "at_most", "timing"]
    threshold: float | None = None
    noise: Noise | None = None


class Metric(Strict):
    """One number, or hash, of a case.

    direction   which way is better; "same": neither
    anchor      the first accepted value: small accepted drifts add up in sight
    """

    model_config = ConfigDict(allow_inf_nan=True)  # what was measured may be broken: `make` refuses it

    name: str
    unit: str
    direction: Literal["lower", "higher", "same"]
    kind: Literal["count", "selection", "schedule", "nll", "ratio", "memory"]
    value: int | float | str
    anchor: int | float | str
    gate: Gate


class Environment(Strict):
    """What numbers may depend on besides the code; numerics: batches and attention. No host is named."""

    device: str
    driver: str | None
    cuda: str | None
    capability: str
    threads: int
    numerics: str
    torch: str
    transformers: str
    numpy: str
    python: str


class Provenance(Strict):
    """Where a golden comes from: the commit and a hash of knorm's sources, when, how many agreeing runs, and why."""

    knorm: str
    commit: str = Field(pattern=r"^[0-9a-f]{40}$")
    clean: bool
    code: str = Field(pattern=r"^[0-9a-f]{64}$")
    date: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")
    runs: int = Field(ge=3)
    reason: str


class Golden(Strict):
    """An accepted result, or a candidate for one.

    tensors   sha256 of the .safetensors file: the NLL of each token by metric; None where there is none
    seal      of each other field a hash: an edit by hand is noticed, and where
    """

    schema_version: Literal[1]
    case: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    device_class: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    configuration: dict[str, Any]
    metrics: tuple[Metric, ...] = Field(min_length=1)
    tensors: str | None = Field(pattern=r"^[0-9a-f]{64}$")
    environment: Environment
    provenance: Provenance
    seal: dict[str, str]

    def metric(self, name: str) -> Metric | None:
        """The metric of that name, if there is one."""
        return next((metric for metric in self.metrics if metric.name == name), None)

    def text(self) -> str:
        """What its file holds."""
        return json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"


@dataclass(frozen=True)
class Measured:
    """What one run of a case gave: metrics with their gates, and tensors by metric."""

    metrics: tuple[Metric, ...]
    tensors: Tensors = field(default_factory=dict)


def digest(data: bytes) -> str:
    """Sha256 in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def _seals(fields: Mapping[str, Any]) -> dict[str, str]:
    names = [name for name in Golden.model_fields if name != "seal"]
    return {name: digest(json.dumps(fields[name], sort_keys=True).encode())[:16] for name in names}


def pack(tensors: Tensors, metadata: dict[str, str] | None = None) -> bytes:
    """The bytes of a .safetensors file, the same for the same tensors."""
    return save({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}, metadata=metadata)


def make(
    case: str,
    device_class: str,
    configuration: Mapping[str, Any],
    measured: Measured,
    environment: Environment,
    provenance: Provenance,
) -> Golden:
    """A sealed golden. Raises ValueError, naming the metric, for a value that is not finite."""
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
    """A golden from JSON. Raises Damaged, naming the field, for anything but what `make` and `accept` write."""
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
    if golden.tensors is None and (bare := [m.name for m in golden.metrics if m.gate.rule in ("tokens", "timing")]):
        raise Damaged(f"{name}: field 'tensors' is null, but {bare[0]} is judged by its tokens or blocks")
    if edited := [key for key, seal in _seals(fields).items() if golden.seal.get(key) != seal]:
        raise Damaged(f"{name}: field {edited[0]!r} was edited by hand")
    return golden


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names of the entries in which two mappings differ."""
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def environment_changes(golden: Golden, environment: Environment) -> list[str]:
    """In which fields an environment is not the golden's. Where there are none, numbers have to agree as in one run.

    What a golden does not know (None) does not count.
    """
    known = {name: value for name, value in golden.environment if value is not None}
    return differing(known, {name: value for name, value in environment if name in known})
