"""Forms of `knorm ppl`, `knorm explain` and `knorm verify`."""

from __future__ import annotations

from typing import Literal

from knorm.cli.schemas.parts import Count, Doubt, Part, PolicyFields, Result, Share, TextFields, said
from knorm.page.form import WindowShown


class CurveRow(Part):
    """Hold one policy's costs on one text."""

    keep_ratio: Share
    windows: Count
    tokens: Count = said("scored in all windows")
    nll: float = said("mean, in nats per token")
    ppl: float = said("exp of it")
    standard_error: float | None = said("of ppl, clustered by window")
    bits_per_byte: float
    accuracy: Share = said("share of tokens that were predicted as the likeliest")
    mean_cache: float = said("tokens that a scored query sees in a compressed layer, itself included")
    final_cache: float = said("the same of the last query")
    recent: float | None = said("how many of the newest 16 tokens are among them")
    seconds: float
    scheduling: float = said("seconds of these that schedules took")
    stream_ppl: float | None = said("of the loop, with --stream; null without")
    stream_seconds: float | None
    stream_difference: float | None = said("largest difference of a token's NLL from the one pass, in nats")
    stream_evictions: int | None = said("evictions that differ")
    stream_gap: float | None = said("widest relative gap of norms where they first differ")


class Curve(TextFields, Result):
    """Hold what `knorm ppl` without a TARGET measures."""

    policy: PolicyFields
    holds: bool = said("false: the loop contradicts the one pass")
    suspicious: list[Doubt]
    rows: list[CurveRow]


class Reported(Result):
    """Hold what `knorm ppl --reported FILE` finds in somebody else's table."""

    table: str = said("the file")
    suspicious: list[Doubt]


class DamageFields(Part):
    """Hold a method's damage beside the full cache on the same tokens."""

    method: str
    keep_ratio: Share | None = said("share of the cache that one compression retains; null: the method's own budget")
    keep_tokens: Count | None = said("the same in tokens")
    how: str = said('"schedule", "two calls" or "loop"')
    checked: str = said("how that way was checked; empty where there was nothing to check")
    changed: bool = said("false: every prediction is the full cache's, up to rounding")
    windows: Count
    tokens: Count = said("scored in all windows")
    nll: float = said("mean, in nats per token")
    ppl: float = said("exp of it")
    delta_nll: float = said("mean difference from the full cache, paired by token")
    delta_nll_low: float | None = said("lower end of its 95% interval, clustered by window")
    delta_nll_high: float | None
    kl: float = said("mean KL(full cache || method), in nats per token")
    kl_low: float | None
    kl_high: float | None
    kl_median: float
    kl_99: float = said("99% quantile of the tokens' KL")
    kl_999: float
    kl_largest: float
    accuracy: Share
    same_top: Share = said("share of tokens for which both predict the same as the likeliest")
    delta_p: float = said("mean change of the true token's probability")
    delta_p_rms: float = said("root of its mean square")
    bytes_per_token: float = said("bytes that the cache stores, per token fed")
    bytes_per_token_full: float
    tokens_seen: list[list[float]] = said("tokens that a query sees on average, by layer and key/value head")
    tokens_before: float = said("the same of the full cache")


class MethodRow(DamageFields):
    """Hold a method's damage, and what it took."""

    bytes_per_token: float | None = said(  # type: ignore[assignment]
        "bytes that the cache stores, per token fed; null where a server does not say"
    )
    bytes_per_token_full: float | None  # type: ignore[assignment]
    seconds: float
    kl_at_least: bool = said("true: KL is a lower bound, since a server told the likeliest tokens alone", default=False)


class Recall(Part):
    """Hold what became of the names of facts that the text needs late."""

    nll: float
    ppl: float
    accuracy: Share
    tokens: Count
    others: float = said("perplexity of all other tokens of the same windows")


class EngineFields(Part):
    """Say which engine ran, what its full cache is, and what stands beside the rows."""

    name: str
    package: str = said("of Python, through which it runs")
    version: str = said("of the package")
    system: str = said("what the engine says of the processor")
    full: str = said("what the full cache is, in words")
    python: str | None = said("the interpreter, where it is another one than knorm's")
    beside: list[MethodRow] = said(
        "each method beside itself, read in other batches or with moved weights: the noise in its condition; last, "
        "transformers with the same weights beside the engine's full cache"
    )


class Methods(TextFields, Result):
    """Hold what `knorm ppl TARGET ...` measures."""

    prompt_length: Count
    rows: list[MethodRow] = said("the control first: the full cache run again in other batches")
    failed: dict[str, str] = said("methods that did not run, with the reason")
    facts: dict[str, Recall] = said("with --facts, by method")
    engine: EngineFields | None = said("null where transformers runs the methods", default=None)


class EffectRow(Part):
    """Hold what one change to a run did; the change is against the explained run, negative if it helps."""

    kind: str
    name: str
    nll: float
    change: float = said("mean difference, in nats per token")
    low: float | None = said("lower end of its 95% interval, clustered by window; null for one window")
    high: float | None
    recovered: float | None = said("share of the loss, or of the KL, that it takes back")
    largest: float = said("largest change of one token's NLL")
    sentence: str
    is_rounding: bool
    kl: float | None = said("mean KL from the full cache that is left, where a method keeps every token")


class WorstToken(Part):
    """Show a token whose prediction got worse, and what its query no longer saw."""

    window: Count
    position: Count
    token: str
    nll_full: float
    nll: float
    evicted_token: str = said("the evicted token that the full model attends to most there")
    evicted_position: Count
    attention: float


class ExplanationFields(Part):
    """Hold why predictions moved."""

    nll: float
    nll_full: float
    nll_empty: float | None = said("of a run that sees nothing but the token itself")
    tokens: Count
    recent: float | None
    effects: list[EffectRow] = said("the best first")
    worst: list[WorstToken]
    conclusions: list[str] = said("in words")
    per_token: WindowShown | None = said("the tokens of one window, with --tokens", default=None)


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
    checked: str
    acts: Literal["evicts", "changes"]
    seen: str = said("what its queries saw, in words")


class VerdictRow(Part):
    """Hold one claim of `knorm verify`, and what became of it."""

    claim: str
    holds: bool
    evidence: str
    seconds: float
    rows: list[CurveRow] = said("of the curve, where the claim is about it")
    doubts: list[Doubt]
    compared: bool = said("false: there was no golden to compare with")


class Verified(Result):
    """Hold what `knorm verify` finds."""

    verdicts: list[VerdictRow]
