"""Published numbers beside measured ones: which claims hold, which do not, and which cannot be tested."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from knorm.evaluation.published.measure import ROUNDS, load_seed_texts, measure_claims
from knorm.evaluation.published.schema import Claim, Reported, Unit, Verdict
from knorm.models import load_model

_FORMATS = {"PPL": ".2f", "nats": ".0e", "share": "+.1%", "ratio": ".3f", "s": ".4f", "tokens/s": ".2f"}
_SUFFIXES = {"nats": " nats", "ratio": "x", "s": " s", "tokens/s": " /s"}


@dataclass(frozen=True)
class Judged:
    """Hold the verdict on a claim.

    Attributes:
        claim: what is said.
        verdict: "holds", "does not hold" or "cannot be tested".
        reported: the number that is claimed.
        measured: the number found here; None without one.
        tolerance: by how much they may differ, as the claim's kind has it.
        why: in few words.
    """

    claim: Claim
    verdict: Verdict
    reported: float
    measured: float | None
    tolerance: float
    why: str

    @property
    def unexpected(self) -> bool:
        """Tell whether the verdict differs from the one that is right."""
        return self.claim.expected is not None and self.verdict != self.claim.expected


class UnexpectedVerdict(AssertionError):
    """Say that a claim's verdict is not the one that is right; the message is the table."""


def _judge(claim: Claim, measured: float) -> tuple[bool, str]:
    reported, tolerance = claim.reported, claim.tolerance
    if claim.kind in ("baseline", "compressed"):
        off = measured / reported - 1
        return abs(off) <= tolerance, f"{off:+.1%}"
    if claim.kind == "difference":
        return measured <= tolerance, ""
    if claim.kind == "gain":
        return measured >= reported - tolerance, ""
    if claim.kind == "trend":
        return measured < 1 - tolerance if reported < 1 else measured > 1 + tolerance, ""
    return abs(measured - reported) <= tolerance, ""


def judge_claims(claims: Iterable[Claim], measured: Mapping[str, float]) -> list[Judged]:
    """Judge each claim of a report.

    Args:
        claims: what the report says.
        measured: quantity -> what was measured here, in the claim's unit.

    Returns:
        A verdict for each claim. What was not measured, is not finite, or is said to be untestable cannot be tested.
    """
    judged = []
    for claim in claims:
        value = measured.get(claim.quantity)
        verdict: Verdict = "cannot be tested"
        if claim.untestable is not None:
            why = claim.untestable
        elif value is None or not math.isfinite(value):
            why = f"{claim.quantity} was not measured" if value is None else f"{claim.quantity} is not finite"
        else:
            holds, why = _judge(claim, value)
            verdict = "holds" if holds else "does not hold"
            tenth = measured.get(claim.quantity.replace("ttft_gain/", "ttft_by_a_tenth/"))
            if claim.kind == "gain" and tenth is not None:
                why = f"the report's way, against a tenth of the total: {tenth:+.0%}"
        judged.append(Judged(claim, verdict, claim.reported, value, claim.tolerance, why))
    return judged


def _show(value: float | None, unit: Unit) -> str:
    return "-" if value is None else f"{value:{_FORMATS[unit]}}{_SUFFIXES.get(unit, '')}"


def _tolerance(claim: Claim) -> str:
    if claim.untestable is not None:
        return "-"
    if claim.kind in ("baseline", "compressed", "trend"):
        return f"{claim.tolerance:.0%}"
    return f"{claim.tolerance * 100:.0f} points" if claim.unit == "share" else _show(claim.tolerance, claim.unit)


def claims_table(judged: Sequence[Judged], title: str | None = None) -> Table:
    """Make a table named `title` with a line for each of `judged`; unexpected verdicts are marked and come first."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("verdict", "claim", "what is claimed", "reported", "measured", "tolerance", "why"):
        number = name in ("reported", "measured", "tolerance")
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for judgement in sorted(judged, key=lambda judgement: not judgement.unexpected):
        claim = judgement.claim
        table.add_row(
            f"{judgement.verdict.upper()}, should be: {claim.expected}" if judgement.unexpected else judgement.verdict,
            claim.id,
            claim.statement,
            _show(judgement.reported, claim.unit),
            _show(judgement.measured, claim.unit),
            _tolerance(claim),
            judgement.why,
            style="bold red" if judgement.unexpected else "",
        )
    return table


def claims_text(judged: Sequence[Judged], width: int = 250) -> str:
    """Return claims_table of `judged` as plain text, cut at `width` characters a line, for logs and errors."""
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(claims_table(judged))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def require_expected(judged: Sequence[Judged]) -> None:
    """Raise UnexpectedVerdict, with the table of `judged`, where a verdict is not the expected one or none is named."""
    wrong = [judgement.claim.id for judgement in judged if judgement.unexpected]
    gated = sum(judgement.claim.expected is not None for judgement in judged)
    if not gated:
        raise UnexpectedVerdict("no claim says which verdict is expected: the gate would test nothing")
    if wrong:
        said = f"{len(wrong)} of {gated} claims came out otherwise than expected: {', '.join(wrong)}"
        raise UnexpectedVerdict(f"{said}\n\n{claims_text(judged)}")


def judge_model(
    reported: Reported,
    model: str,
    sources: Mapping[str, str],
    *,
    device: str | torch.device = "cpu",
    rounds: int = ROUNDS,
) -> list[Judged]:
    """Run a report's protocol on a model in float32, and judge each claim.

    Args:
        reported: what the report says, and its protocol.
        model: as models.load_model takes it: a folder, or PYTHIA.
        sources: as load_seed_texts takes them.
        device: of the model; times are this device's.
        rounds: of timings, as measure_claims takes them.

    Returns:
        A verdict for each claim.

    Raises:
        ValueError: a model or text is missing; in one line.
    """
    texts = load_seed_texts(reported.protocol, sources)
    loaded, tokenizer = load_model(model, device=device)
    return judge_claims(reported.claims, measure_claims(loaded, tokenizer, texts, reported.protocol, rounds=rounds))
