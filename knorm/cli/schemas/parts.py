"""What all forms are made of."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _as_number(value: Any) -> Any:
    return float(Fraction(value)) if isinstance(value, str | Fraction) else value


Number = Annotated[float, BeforeValidator(_as_number)]
Share = Annotated[Number, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


def said(text: str, **rules: Any) -> Any:
    """Describe a field, in words."""
    return Field(description=text, **rules)


class Part(BaseModel):
    """Hold fields of a result; none may be missing, none may be added."""

    model_config = ConfigDict(extra="forbid")


class Environment(Part):
    """Name what results depend on."""

    knorm: str
    python: str
    machine: str = said("architecture of the processor")
    torch: str
    transformers: str
    numpy: str
    kvpress: str | None = said("null where it is not installed", default=None)


class Result(Part):
    """Hold what every result begins with."""

    schema_name: str = Field(alias="schema", description="knorm-COMMAND, also where several forms of it exist")
    schema_version: int
    environment: Environment


class ModelFields(Part):
    """Say which model ran, and how."""

    model: str = said("as --model names it")
    dtype: str
    device: str


class TextFields(ModelFields):
    """Say on which text a model ran."""

    text: str = said("as --text names it")
    column: str = said("of a table, where the text is one")
    window: Count = said("tokens of a window")
    windows: Count
    batch: Count = said("windows at a time")


class PolicyFields(Part):
    """Hold a policy of knorm's own; its documentation says what each field does."""

    keep_ratio: Share | None = None
    prune_after: Count
    skip_layers: list[int]
    protect_first: Count
    protect_recent: Count
    score: str
    protocol: str
    seed: int
    prompt_length: Count | None = None


class Doubt(Part):
    """Say what does not make sense, and its cause or the command that would show it."""

    what: str
    then: str
