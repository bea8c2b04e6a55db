"""What each command's --json holds: the fields, their units, and the JSON Schemas under docs/schemas.

A name means the same in all of them: losses are in nats per token, times in seconds, sizes in bytes, shares of 1.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

VERSION = 1  # raised where a field changes its name or meaning


def _as_number(value: Any) -> Any:
    return float(Fraction(value)) if isinstance(value, str | Fraction) else value


Number = Annotated[float, BeforeValidator(_as_number)]
Share = Annotated[Number, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


def _said(text: str, **rules: Any) -> Any:
    return Field(description=text, **rules)


class Part(BaseModel):
    """Hold fields of a result; none may be missing, none may be added."""

    model_config = ConfigDict(extra="forbid", from_attributes=True)


class Environment(Part):
    """Name what results depend on."""

    knorm: str
    python: str
    machine: str = _said("architecture of the processor")
    torch: str
    transformers: str
    numpy: str


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


class Result(Part):
    """Hold what every result begins with."""

    schema_name: str = Field(alias="schema", description="knorm-COMMAND, also where several forms of it exist")
    schema_version: int
    environment: Environment


class ModelFields(Part):
    """Say which model ran, and how."""

    model: str = _said("as --model names it")
    dtype: str
    device: str


class TextFields(ModelFields):
    """Say on which text a model ran."""

    text: str = _said("as --text names it")
    column: str = _said("of a table, where the text is one")
    window: Count = _said("tokens of a window")
    windows: Count
    batch: Count = _said("windows at a time")


class Doubt(Part):
    """Say what does not make sense, and its cause or the command that would show it."""

    what: str
    then: str


class CurveRow(Part):
    """Hold one policy's costs on one text."""

    keep_ratio: Share
    windows: Count
    tokens: Count = _said("scored in all windows")
    nll: float = _said("mean, in nats per token")
    ppl: float = _said("exp of it")
    standard_error: float | None = _said("of ppl, clustered by window")
    bits_per_byte: float
    accuracy: Share = _said("share of tokens that were predicted as the likeliest")
    mean_cache: float = _said("tokens that a scored query sees in a compressed layer, itself included")
    final_cache: float = _said("the same of the last query")
    recent: float | None = _said("how many of the newest 16 tokens are among them")
    seconds: float
    scheduling: float = _said("seconds of these that schedules took")
    stream_ppl: float | None = _said("of the loop, with --stream; null without")
    stream_seconds: float | None
    stream_difference: float | None = _said("largest difference of a token's NLL from the one pass, in nats")
    stream_evictions: int | None = _said("evictions that differ")
    stream_gap: float | None = _said("widest relative gap of norms where they first differ")


class Curve(TextFields, Result):
    """Hold what `knorm ppl` without a TARGET measures."""

    policy: PolicyFields
    holds: bool = _said("false: the loop contradicts the one pass")
    suspicious: list[Doubt]
    rows: list[CurveRow]


class Reported(Result):
    """Hold what `knorm ppl --reported FILE` finds in somebody else's table."""

    table: str = _said("the file")
    suspicious: list[Doubt]


class MethodRow(Part):
    """Hold a method's damage beside the full cache on the same tokens."""

    method: str
    keep_ratio: Share | None = _said("share of the cache that one compression retains; null: the method's own budget")
    keep_tokens: Count | None = _said("the same in tokens")
    how: str = _said('"schedule", "two calls" or "loop"')
    check: str = _said("how that way was checked; empty where there was nothing to check")
    changed: bool = _said("false: every prediction is the full cache's, up to rounding")
    windows: Count
    tokens: Count = _said("scored in all windows")
    nll: float = _said("mean, in nats per token")
    ppl: float = _said("exp of it")
    delta_nll: float = _said("mean difference from the full cache, paired by token")
    delta_nll_low: float | None = _said("lower end of its 95% interval, clustered by window")
    delta_nll_high: float | None
    kl: float = _said("mean KL(full cache || method), in nats per token")
    kl_low: float | None
    kl_high: float | None
    kl_median: float
    kl_99: float = _said("99% quantile of the tokens' KL")
    kl_999: float
    kl_largest: float
    accuracy: Share
    same_top: Share = _said("share of tokens for which both predict the same as the likeliest")
    delta_p: float = _said("mean change of the true token's probability")
    delta_p_rms: float = _said("root of its mean square")
    bytes_per_token: float = _said("bytes that the cache stores, per token fed")
    bytes_per_token_full: float
    tokens_seen: list[list[float]] = _said("tokens that a query sees on average, by layer and key/value head")
    tokens_before: float = _said("the same of the full cache")
    seconds: float


class Recall(Part):
    """Hold what became of the names of facts that the text needs late."""

    nll: float
    ppl: float
    accuracy: Share
    tokens: Count
    others: float = _said("perplexity of all other tokens of the same windows")


class Methods(TextFields, Result):
    """Hold what `knorm ppl TARGET ...` measures."""

    prompt_length: Count
    rows: list[MethodRow] = _said("the control first: the full cache run again in other batches")
    failed: dict[str, str] = _said("methods that did not run, with the reason")
    facts: dict[str, Recall] = _said("with --facts, by method")


class EffectRow(Part):
    """Hold what one change to a run did; the change is against the explained run, negative if it helps."""

    kind: str
    name: str
    nll: float
    change: float = _said("mean difference, in nats per token")
    low: float | None = _said("lower end of its 95% interval, clustered by window; null for one window")
    high: float | None
    recovered: float | None = _said("share of the loss, or of the KL, that it takes back")
    largest: float = _said("largest change of one token's NLL")
    sentence: str
    is_rounding: bool
    kl: float | None = _said("mean KL from the full cache that is left, where a method keeps every token")


class WorstToken(Part):
    """Show a token whose prediction got worse, and what its query no longer saw."""

    window: Count
    position: Count
    token: str
    nll_full: float
    nll: float
    evicted: str = _said("the evicted token that the full model attends to most there")
    evicted_position: Count
    attention: float


class ExplanationFields(Part):
    """Hold why predictions moved."""

    nll: float
    nll_full: float
    nll_empty: float | None = _said("of a run that sees nothing but the token itself")
    tokens: Count
    recent: float | None
    effects: list[EffectRow] = _said("the best first")
    worst: list[WorstToken]
    findings: list[str] = _said("in words")


class Explanation(ExplanationFields, TextFields, Result):
    """Hold what `knorm explain` without a TARGET finds."""

    policy: PolicyFields
    keep_ratio: Share


class MethodExplanation(ExplanationFields, TextFields, Result):
    """Hold what `knorm explain TARGET` finds."""

    prompt_length: Count
    method: str
    keep_ratio: Share | None
    keep_tokens: Count | None
    how: str
    check: str
    acts: Literal["evicts", "changes"]
    seen: str = _said("what its queries saw, in words")


class Comparison(Part):
    """Say how much slower an arm is than the baseline, from blocks in which both ran in turns."""

    ratio: float = _said("geometric mean over blocks; 1.05 is 5% slower")
    low: float
    high: float
    t: tuple[float, float]
    bootstrap: tuple[float, float]
    mde: float = _said("smallest slowdown, as a share, that the run could have detected")
    margin: float
    alpha: float
    blocks: Count
    effective: float = _said("what the blocks are worth, being correlated with their neighbours")
    verdict: str
    more: Count = _said("blocks that would make INCONCLUSIVE impossible at this noise")


class Timed(Part):
    """Hold a time, in seconds."""

    seconds: float = _said("mean")
    median: float | None = None
    p99: float | None = None


class CounterFields(Part):
    """Count what a generation does, in whole numbers."""

    retained: list[int] = _said("tokens per layer at the end")
    cache_bytes: Count
    steps: Count
    prompt_operators: Count
    step_operators: Count
    prompt_launches: int | None = _said("CUDA kernels that were launched; null on a CPU")
    step_launches: int | None


class ArmRow(Part):
    """Hold one arm: the uncompressed cache first, then each method."""

    method: str
    policy: PolicyFields | None
    ttft: Timed = _said("time to the first token")
    tpot: Timed = _said("time per output token")
    tokens_per_second: float
    comparisons: dict[str, Comparison] = _said("with the uncompressed cache: ttft, tpot and throughput")
    verdict: str | None
    peak_memory: int | None = _said("bytes")
    counters: CounterFields
    log_ratios: dict[str, list[float]] = _said("of each block, by metric")


class PromptFields(Part):
    """Describe a prompt."""

    text: str
    tokens: Count
    new_tokens: Count


class ReportedClaim(Part):
    """Judge a published time."""

    claim: str
    verdict: str
    reported: float
    measured: float | None
    why: str


class TimingFields(ModelFields):
    """Say how an arm was timed."""

    batch: Count
    protocol: str
    threads: Count
    prompts: list[PromptFields]
    margin: float
    alpha: float
    power: float
    blocks: Count


class Bench(TimingFields, Result):
    """Hold what `knorm bench [TARGET ...]` measures."""

    warm_up: Count
    seconds: float
    interrupted: Count
    verdict: str
    advice: list[str]
    rows: list[ArmRow]
    claims: list[ReportedClaim] = _said("with --reported")


class AgainstRow(Part):
    """Compare one policy between two commits."""

    policy: PolicyFields
    comparisons: dict[str, Comparison] = _said("with the other commit: ttft, tpot and throughput")
    verdict: str
    counters: CounterFields
    counters_before: CounterFields = _said("of the other commit")
    risen: list[str] = _said("what differs or rose, in words")
    log_ratios: dict[str, list[float]]


class Against(TimingFields, Result):
    """Hold what `knorm bench --against REF` measures."""

    against: str = _said("the commit")
    changed_files: Count
    rounds: Count
    verdict: str
    rows: list[AgainstRow]


class VerdictRow(Part):
    """Hold one claim of `knorm verify`, and what became of it."""

    claim: str
    holds: bool
    evidence: str
    seconds: float
    rows: list[CurveRow] = _said("of the curve, where the claim is about it")
    doubts: list[Doubt]
    compared: bool = _said("false: there was no golden to compare with")


class Verified(Result):
    """Hold what `knorm verify` finds."""

    verdicts: list[VerdictRow]


FORMS: dict[str, type[Result]] = {  # the name of a schema -> its form
    "knorm-ppl": Curve,
    "knorm-ppl-reported": Reported,
    "knorm-ppl-methods": Methods,
    "knorm-explain": Explanation,
    "knorm-explain-method": MethodExplanation,
    "knorm-bench": Bench,
    "knorm-bench-against": Against,
    "knorm-verify": Verified,
}
