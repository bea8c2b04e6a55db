"""Forms of `knorm bench`."""

from __future__ import annotations

from knorm.cli.schemas.parts import Count, ModelFields, Part, PolicyFields, Result, said


class Comparison(Part):
    """Say how much slower an arm is than the baseline, from blocks in which both ran in turns."""

    ratio: float = said("geometric mean over blocks; 1.05 is 5% slower")
    low: float
    high: float
    t: tuple[float, float]
    bootstrap: tuple[float, float]
    mde: float = said("smallest slowdown, as a share, that the run could have detected")
    margin: float
    alpha: float
    blocks: Count
    effective: float = said("what the blocks are worth, being correlated with their neighbours")
    verdict: str
    more: Count = said("blocks that would make INCONCLUSIVE impossible at this noise")


class Timed(Part):
    """Hold a time, in seconds."""

    seconds: float = said("mean")
    median: float | None = None
    p99: float | None = None


class CounterFields(Part):
    """Count what a generation does, in whole numbers."""

    retained: list[int] = said("tokens per layer at the end")
    cache_bytes: Count
    steps: Count
    prompt_operators: Count
    step_operators: Count
    prompt_launches: int | None = said("CUDA kernels that were launched; null on a CPU")
    step_launches: int | None


class ArmRow(Part):
    """Hold one arm: the uncompressed cache first, then each method."""

    method: str
    policy: PolicyFields | None
    ttft: Timed = said("time to the first token")
    tpot: Timed = said("time per output token")
    tokens_per_second: float
    comparisons: dict[str, Comparison] = said("with the uncompressed cache: ttft, tpot and throughput")
    verdict: str | None
    peak_memory: int | None = said("bytes")
    counters: CounterFields
    log_ratios: dict[str, list[float]] = said("of each block, by metric")


class PromptFields(Part):
    """Describe a prompt."""

    text: str
    tokens: Count
    new_tokens: Count


class ReportedClaim(Part):
    """Judge a published time."""

    claim: str
    verdict: str
    published: float
    measured_here: float | None
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
    claims: list[ReportedClaim] = said("with --reported")


class AgainstRow(Part):
    """Compare one policy between two commits."""

    policy: PolicyFields
    comparisons: dict[str, Comparison] = said("with the other commit: ttft, tpot and throughput")
    verdict: str
    counters: CounterFields
    counters_before: CounterFields = said("of the other commit")
    risen: list[str] = said("what differs or rose, in words")
    log_ratios: dict[str, list[float]]


class Against(TimingFields, Result):
    """Hold what `knorm bench --against REF` measures."""

    against: str = said("the commit")
    changed_files: Count
    rounds: Count
    verdict: str
    rows: list[AgainstRow]
