"""A published report as data: its tables, the protocol behind them, and claims with a tolerance each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from knorm.paths import REPORTED, goldens
from knorm.policy import Policy, exact_ratio
from knorm.strict import Strict, first_error, no_field_twice

PYTHIA = "EleutherAI/pythia-70m-deduped@e93a9faa9c77e5d09219f6c868bfc7a1bd65593c"
FULL = "1.0"

Verdict = Literal["holds", "does not hold", "cannot be tested"]
Unit = Literal["PPL", "nats", "share", "ratio", "s", "tokens/s"]


def _written_ratio(ratio: str) -> str:
    exact_ratio(ratio)
    return ratio


Ratios = tuple[Annotated[str, AfterValidator(_written_ratio)], ...]


class Source(Strict):
    """Name the model of a report: a Hub id, and the commit that stands for it."""

    name: str
    revision: str = Field(pattern=r"^[0-9a-f]{40}$")
    note: str


class Excerpt(Strict):
    """Say how one text is cut: the first row of a data set that has `least` characters, its first `characters`.

    prompt_characters, new_tokens   of the timed generation
    """

    name: Literal["wikitext", "pg19"]
    what: str
    least: int = Field(ge=1)
    characters: int = Field(ge=1)
    prompt_characters: int = Field(ge=1)
    new_tokens: int = Field(ge=2)


class Protocol(Strict):
    """Hold how the numbers were made; what is measured follows it.

    plain_tokens   at most so many in the plain pass at ratio 1; streamed_tokens: in compressed runs
    ratios         at which perplexity is measured, 0.9 among them
    before         of these, at which it is by the loop as it was before the fix too; timed: at which TTFT and TPOT are
    """

    what: str
    prune_after: int
    skip_layers: tuple[int, ...]
    streamed_tokens: int = Field(ge=2)
    plain_tokens: int = Field(ge=2)
    ratios: Ratios
    before: Ratios
    timed: Ratios
    texts: tuple[Excerpt, ...]
    timing: str

    @model_validator(mode="after")
    def _complete(self) -> Protocol:
        if "0.9" not in self.ratios or {*self.before, *self.timed} - {*self.ratios}:
            raise ValueError("ratios should hold 0.9, and all of before and timed")
        if sorted(text.name for text in self.texts) != ["pg19", "wikitext"]:
            raise ValueError("texts should be wikitext and pg19, once each")
        return self

    def policy(self, ratio: str) -> Policy:
        """Make the protocol's streaming policy that keeps `ratio`, a decimal as text."""
        return Policy(ratio, self.prune_after, self.skip_layers, protocol="streaming")


class Figures(Strict):
    """Hold one table as it was published; null where a cell is empty."""

    id: str
    what: str
    columns: tuple[str, ...]
    rows: tuple[tuple[float | str | None, ...], ...]

    @model_validator(mode="after")
    def _rectangular(self) -> Figures:
        for number, row in enumerate(self.rows, 1):
            if len(row) != len(self.columns):
                raise ValueError(f"row {number} has {len(row)} cells, but there are {len(self.columns)} columns")
        return self


class Claim(Strict):
    """Hold one number that was reported, and how near a measured one has to come.

    kind         "baseline", "compressed": within `tolerance`, relative. "change": within it, absolute. "difference": at
                 most it. "gain": at least what was reported, less it. "trend": on the same side of 1, by more than it.
                 "time": seconds, or per second
    quantity     what measure_claims calls it
    expected     the verdict that is right, where theory or the report's other numbers say so; null: only shown
    untestable   why no measurement here can decide
    """

    id: str
    statement: str
    kind: Literal["baseline", "compressed", "difference", "change", "gain", "trend", "time"]
    quantity: str
    reported: float
    tolerance: float = Field(ge=0)
    unit: Unit
    expected: Verdict | None
    untestable: str | None = None

    @model_validator(mode="after")
    def _time_stays(self) -> Claim:
        if self.kind == "time" and self.untestable is None:
            raise ValueError("untestable is missing: a time of another machine cannot be tested, say why")
        return self


class Reported(Strict):
    """Hold a report: where it comes from, how it was made, what it says, and its known inconsistencies."""

    schema_version: Literal[1]
    source: str
    model: Source
    protocol: Protocol
    tables: tuple[Figures, ...]
    claims: tuple[Claim, ...]
    inconsistencies: tuple[str, ...]

    @model_validator(mode="after")
    def _once(self) -> Reported:
        names = [claim.id for claim in self.claims]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"claim {', '.join(sorted(twice))} stands there twice")
        return self


def bug_report() -> Reported:
    """Return the report that knorm comes from: a cache out of order, and what was concluded from mending it."""
    return read_claims(goldens() / REPORTED / "kv-cache-order.json")


def read_claims(file: Path) -> Reported:
    """Read a report from the .json `file`. Raises ValueError, in one line that names the field, for any other file."""
    try:
        text = file.read_text(encoding="utf-8")
        json.loads(text, object_pairs_hook=no_field_twice)
        return Reported.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(f"{file.name}: {first_error(error)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} cannot be read: {error}") from None
