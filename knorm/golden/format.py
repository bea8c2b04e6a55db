"""What a golden result holds: metrics with their gates, the environment, and where it comes from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict, Field

from knorm.strict import Strict

Tensors = Mapping[str, np.ndarray[Any, Any]]
OF_TESTS = {"values": "of a test"}  # the configuration of goldens that no case declares


class Noise(Strict):
    """Hold what runs showed that differed in nothing that matters (docs/golden-power.md).

    runs      how many
    sigma     standard deviation of a metric's mean shift between environments, nats a token
    largest   of any token's NLL within one environment, nats
    typical   of a window's mean absolute difference between environments, nats: the median over windows is gated
    alpha     of the one-sided interval that has to exclude 0
    power     share of the injected changes that the gates caught; None where not measured
    worst     of any window's mean absolute difference between environments; None where rules.ANY_WINDOW covers it
    """

    runs: int
    sigma: float
    largest: float
    typical: float
    alpha: float
    power: float | None
    worst: float | None = None


class Gate(Strict):
    """Say how a metric is judged.

    rule        one of `rules.RULES`: its class says where it speaks and what it lets pass
    threshold   what the rule takes for its bound, in the rule's own unit; None where it needs none
    noise       where the bounds come from
    """

    rule: str
    threshold: float | None = None
    noise: Noise | None = None


class Metric(Strict):
    """Hold one number, or hash, of a case.

    direction   which way is better; "same": neither
    anchor      the first accepted value: small accepted drifts add up in sight
    """

    model_config = ConfigDict(allow_inf_nan=True)  # what was measured may be broken: `make` refuses it

    name: str
    unit: str
    direction: Literal["lower", "higher", "same"]
    kind: Literal["count", "selection", "schedule", "nll", "kl", "share", "ratio", "memory", "value"]
    value: int | float | str
    anchor: int | float | str
    gate: Gate


class Environment(Strict):
    """Hold what numbers may depend on besides the code. No host is named.

    numerics   batches and attention, in words
    packages   of others that the method under test comes from, and knorm where it is not under test: name -> version
    """

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
    packages: dict[str, str] = Field(default_factory=dict)


class Provenance(Strict):
    """Say where a golden comes from: commit, hash of knorm's sources, date, how many runs agree, and why."""

    knorm: str
    commit: str = Field(pattern=r"^[0-9a-f]{40}$")
    clean: bool
    code: str = Field(pattern=r"^[0-9a-f]{64}$")
    date: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")
    runs: int = Field(ge=3)
    reason: str


class Golden(Strict):
    """Hold an accepted result, or a candidate for one.

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
        """Look up the metric `name`; None where there is none."""
        return next((metric for metric in self.metrics if metric.name == name), None)

    def text(self) -> str:
        """Return the contents of its file."""
        return json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"


@dataclass(frozen=True)
class Measured:
    """Hold what one run of a case gave: metrics with their gates, and tensors by metric."""

    metrics: tuple[Metric, ...]
    tensors: Tensors = field(default_factory=dict)


def digest(data: bytes) -> str:
    """Return the sha256 of `data` in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the names of the entries in which `old` and `new` differ; one that is missing counts as None."""
    return [name for name in {**old, **new} if old.get(name) != new.get(name)]


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Say where two configurations differ, and only there.

    Args:
        old: a mapping, list or value, as JSON has it.
        new: the other.
        place: what is put before each name: where both lie in something larger.

    Returns:
        A line for each difference.

    Example:
        >>> differences({"a": 1, "policies": [{"keep_ratio": "0.5"}]}, {"a": 1, "policies": [{"keep_ratio": "0.4"}]})
        ["policies.0.keep_ratio was '0.5', is '0.4'"]
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = [
            differences(old[name], new[name], f"{place}.{name}")
            if name in old and name in new
            else [f"{f'{place}.{name}'.lstrip('.')} {_there(old, new, name)}"]
            for name in {**old, **new}
        ]
        return [line for each in lines for line in each]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            line for at, pair in enumerate(zip(old, new, strict=True)) for line in differences(*pair, f"{place}.{at}")
        ]
    return [] if old == new else [f"{place.lstrip('.')} was {old!r}, is {new!r}"]


def _there(old: Mapping[str, Any], new: Mapping[str, Any], name: str) -> str:
    return f"is new: {new[name]!r}" if name in new else f"is gone, was {old[name]!r}"


def environment_changes(then: Environment, now: Environment) -> list[str]:
    """List the fields in which environments `then` and `now` differ. Without any, numbers agree as in one run.

    What `then` does not know (None) does not count.
    """
    known = {name: value for name, value in then if value is not None}
    return differing(known, {name: value for name, value in now if name in known})
