"""What a page shows, as the JSON beside it holds it: every verdict and number of the page, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from knorm.strict import Strict

Count = Annotated[int, Field(ge=0, le=2**53)]
CheckName = Annotated[str, Field(pattern=r"^\w+$")]
Verdict = Literal["holds", "refuted", "expected failure", "unexpectedly holds", "untested", "does not apply"]
Nats = Annotated[float, Field(ge=-1e6, le=1e6)]
Divergence = Annotated[float, Field(ge=0, le=1e6)]
Size = Annotated[float, Field(gt=0, le=1e18)]
Factor = Annotated[float, Field(ge=0, le=1e18)]


class Part(Strict):
    """Hold fields of a page; none may be missing, none may be added, and no number is infinite."""

    model_config = ConfigDict(strict=False)


class Source(Part):
    """Name what results were read from.

    Attributes:
        name: of the file or folder, without those above it.
        form: the schema of the results.
        digest: of their bytes.
        versions: of what they depend on, by package.
        cells: of a sweep's plan, and missing: those without a result; null for other results.
        failed_cells: of a sweep, in words.
    """

    name: str
    form: str
    digest: str
    versions: dict[str, str]
    cells: Count | None = None
    missing: Count | None = None
    failed_cells: list[str] = Field(default_factory=list)


class Law(Part):
    """Name a check, and the law that it tries to refute."""

    check: CheckName
    law: str
    family: str


class Judged(Part):
    """Hold what became of one check on one method, as `knorm check` says it."""

    check: CheckName
    verdict: Verdict
    examples: Count
    answered: Count
    evicted: Count
    fault: bool
    counterexample: str | None
    given: str | None
    snippet: str | None
    reason: str | None
    needs: list[str]


class MethodVerdicts(Part):
    """Hold what became of one method; source: index of the results that it is from."""

    name: str
    source: Count
    seed: int
    profile: str
    device: str
    not_run: str | None
    results: list[Judged]


class Matrix(Part):
    """Hold the verdicts that were found by one revision of the laws: those of another are not compared with them."""

    suite: str
    laws: list[Law]
    methods: list[MethodVerdicts]


class Point(Part):
    """Hold what a method costs, as difference from the full cache of its own environment.

    Attributes:
        source: index of the results that it is from.
        control: this is the full cache, run again.
        mean_seen: tokens that a query sees, on average over layers and heads.
        kl_at_least: KL is a lower bound, since a server told the likeliest tokens alone.

    All else is as in knorm-sweep.
    """

    source: Count
    control: bool
    method: str
    keep_ratio: float | None
    keep_tokens: Count | None
    device: str
    how: str
    checked: str
    changed: bool
    complete: bool
    windows: Count
    letters: str
    tokens: Count
    ppl: float | None
    delta_nll: Nats
    delta_nll_low: Nats | None
    delta_nll_high: Nats | None
    kl: Divergence
    kl_low: Nats | None
    kl_high: Nats | None
    kl_99: Divergence
    kl_largest: Divergence
    accuracy: float
    same_top: float
    delta_p_rms: float
    bytes_per_token: Size
    bytes_per_token_full: Size
    mean_seen: float
    kl_at_least: bool = False

    @property
    def label(self) -> str:
        """Name the method and its budget."""
        return label_of(self.method, self.keep_ratio, self.keep_tokens)


class Frontier(Part):
    """Hold methods that ran on the same windows of a text.

    Attributes:
        noise_kl: KL up to which nothing is told apart.
        beside: of an engine: each condition beside itself, which shows its noise, and its full cache beside
            transformers with the same weights.
    """

    model: str
    dtype: str
    text: str
    column: str
    window: Count
    windows: Count
    prompt_length: Count
    seed: int
    noise_kl: float
    points: list[Point]
    beside: list[Point] = Field(default_factory=list)


class Pace(Part):
    """Compare one time of a method with the full cache's, which took turns with it in the same run.

    Attributes:
        ms: milliseconds with the method; ms_full: with the full cache.
        ratio: of both, mean over blocks; below 1 the method is faster.
        low: and high: bounds of the ratio, each at the one-sided `alpha` of its table.
        mde: smallest slowdown, as a share, that the run could have detected.
        verdict: FAIL: slower; PASS: not slower by the table's `margin`; INCONCLUSIVE: neither is known.
    """

    ms: Size
    ms_full: Size
    ratio: Size
    low: Factor
    high: Factor
    mde: Factor
    verdict: Literal["PASS", "FAIL", "INCONCLUSIVE"]


class TimedRow(Part):
    """Hold how long a method takes.

    Attributes:
        source: index of the results that it is from.
        method: with its budget.
        first_token: time to it; output_token: time per token after it.
        blocks: in which both caches ran in turns.
        verdict: on both times together.
    """

    source: Count
    method: str
    first_token: Pace
    output_token: Pace
    blocks: Count
    verdict: Literal["PASS", "FAIL", "INCONCLUSIVE"]


class Timing(Part):
    """Hold methods that were timed with one prompt in one environment; those of another are in a table of their own.

    Attributes:
        text: that the prompt is the start of.
        new_tokens: generated after it.
        device_class: the exact kind of device, as cpu-x86_64 or nvidia-h200; threads: of the processor.
        versions: of the environment, by package.
        margin: slowdown, as a share, that a verdict allows; alpha: one-sided, of each bound.
    """

    model: str
    dtype: str
    text: str
    prompt_length: Count
    new_tokens: Count
    seed: int
    device_class: str
    threads: Count
    versions: dict[str, str]
    margin: Annotated[float, Field(gt=0, le=10)]
    alpha: Annotated[float, Field(gt=0, lt=0.5)]
    rows: list[TimedRow]


class CurvePoint(Part):
    """Hold one ratio of a curve of knorm's own policy."""

    keep_ratio: float
    nll: float
    ppl: float | None
    standard_error: float | None
    accuracy: float
    mean_cache: float
    recent: float | None


class CurveShown(Part):
    """Hold a curve of knorm's own policy, in which no full cache was run beside it."""

    source: Count
    model: str
    text: str
    window: Count
    windows: Count
    policy_told: str
    rows: list[CurvePoint]


class Change(Part):
    """Hold what one change to an explained run did."""

    name: str
    change: float
    low: float | None
    high: float | None
    recovered: float | None
    sentence: str


class Lost(Part):
    """Name an evicted token to which the full model attends, and its share of the attention."""

    position: Count
    attention: float


class TokenShown(Part):
    """Hold one token of a window; what was not scored has no losses.

    Attributes:
        token: as text.
        gone: for each layer and head the query that no longer saw it; the window's length: none.
        lost: what its prediction would have attended to and could not, most attended first.
    """

    token: str
    nll_full: float | None
    nll: float | None
    kl: float | None
    lost: list[Lost]


class WindowShown(Part):
    """Hold the tokens of one window, and when each head evicted them.

    Attributes:
        window: its index in the text.
        evicted_at: for each layer, key/value head and token the first query that no longer saw it; the window's length
            where none was. Null where every query saw every token.
    """

    window: Count
    shown_tokens: list[TokenShown]
    evicted_at: list[list[list[Count]]] | None

    @model_validator(mode="after")
    def _fits(self) -> WindowShown:
        length = len(self.shown_tokens)
        heads = [head for layer in self.evicted_at or () for head in layer]
        if any(len(head) != length or max(head, default=0) > length for head in heads):
            raise ValueError(f"evicted_at should have a time from 0 to {length} for each of {length} tokens")
        if any(lost.position >= length for token in self.shown_tokens for lost in token.lost):
            raise ValueError(f"lost should name one of {length} tokens")
        return self


class Explained(Part):
    """Hold why a method's predictions moved."""

    source: Count
    model: str
    text: str
    method: str
    keep_ratio: float | None
    keep_tokens: Count | None
    windows: Count
    prompt_length: Count
    nll: float
    nll_full: float
    tokens: Count
    conclusions: list[str]
    interventions: list[Change]
    per_token: WindowShown | None

    @property
    def label(self) -> str:
        """Name the method and its budget."""
        return label_of(self.method, self.keep_ratio, self.keep_tokens)


class Page(Part):
    """Hold a page."""

    title: str
    sources: list[Source]
    matrices: list[Matrix]
    frontiers: list[Frontier]
    timings: list[Timing]
    curves: list[CurveShown]
    explained: list[Explained]

    @model_validator(mode="after")
    def _fits(self) -> Page:
        tables: list[Sequence[Any]] = [self.curves, self.explained, *(matrix.methods for matrix in self.matrices)]
        tables += [rows for frontier in self.frontiers for rows in (frontier.points, frontier.beside)]
        tables += [timing.rows for timing in self.timings]
        if any(row.source >= len(self.sources) for rows in tables for row in rows):
            raise ValueError(f"source should name one of {len(self.sources)} sources")
        for matrix in self.matrices:
            laws = {law.check for law in matrix.laws}
            for checks in ([result.check for result in method.results] for method in matrix.methods):
                if not laws.issuperset(checks) or len({*checks}) < len(checks):
                    raise ValueError("results should be of checks that the laws of their matrix name, one of each")
        if len({source.digest for source in self.sources}) < len(self.sources):
            raise ValueError("sources should each have a digest of its own")
        if any(source.missing and source.cells is None for source in self.sources):
            raise ValueError("cells should be a number where some are missing")
        return self


def label_of(method: str, keep_ratio: float | None, keep_tokens: int | None) -> str:
    """Name a method and its budget, as tables do.

    Args:
        method: its name.
        keep_ratio: share of the cache, written with four significant digits; or None.
        keep_tokens: their number; or None, as both are for a method with a budget of its own.

    Returns:
        The name alone where there is no budget.

    Example:
        >>> label_of("knorm", 0.5, None), label_of("mine.py:f", None, 64), label_of("fp8", None, None)
        ('knorm 0.5', 'mine.py:f 64 tokens', 'fp8')
    """
    budget = f"{keep_ratio:.4g}" if keep_ratio is not None else f"{keep_tokens} tokens" if keep_tokens else ""
    return f"{method} {budget}".strip()
