"""Does a perplexity curve make sense? Rows measured here get the cause, somebody else's table what to run.

A curve that falls while less is kept is suspicious, not wrong: it says that something other than the amount kept moved.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from knorm.evaluation.curve import NEWEST, Row, measure_row
from knorm.evaluation.interventions import newest_to_protect, sees_itself
from knorm.evaluation.runner import Runner
from knorm.files import read_text
from knorm.policy import Policy, exact_ratio
from knorm.strict import no_field_twice

TOLERANCE = 0.01  # relative: perplexities this close count as equal
_MOST_TABLE, _MOST_ROWS, _MOST_COLUMNS = 2**24, 1000, 100  # bytes of a file; every two are compared
JUMP = 2.0  # a first step that multiplies perplexity by more


@dataclass(frozen=True)
class Suspicion:
    """Say `what` does not make sense, and `then` its cause or the command that would show it."""

    what: str
    then: str

    def __str__(self) -> str:
        return f"{self.what}: {self.then}"


@dataclass(frozen=True)
class Series:
    """Hold the column `name` of a table.

    Attributes:
        ppl: keep_ratio as written -> perplexity.
        tokens: keep_ratio as written -> how many tokens were scored; empty where the table does not say.
    """

    name: str
    ppl: dict[str, float]
    tokens: dict[str, float]


def fall(ppl: dict[str, float]) -> tuple[str, str] | None:
    """Find where perplexity falls although less is kept, in `ppl`: keep_ratio as written -> perplexity.

    Returns the ratio below 1 and the smaller one between which it falls most, by more than 1%; None without a fall.

    >>> fall({"1.0": 15.0, "0.9": 20.0, "0.5": 12.0})
    ('0.9', '0.5')
    """
    ratios = sorted((r for r in ppl if exact_ratio(r) < 1), key=exact_ratio, reverse=True)
    pairs = [(a, b) for i, a in enumerate(ratios) for b in ratios[i + 1 :] if ppl[b] < ppl[a] * (1 - TOLERANCE)]
    return max(pairs, key=lambda pair: ppl[pair[0]] / ppl[pair[1]], default=None)


def judge_reported(table: Sequence[Series]) -> list[Suspicion]:
    """Say what to doubt in a table that was measured elsewhere, and which checks to run.

    Args:
        table: a curve for each column of perplexities.

    Returns:
        The doubts; none where nothing is suspicious by itself.

    Example:
        >>> judge_reported([Series("ppl", {"1.0": 15.0, "0.9": 20.0, "0.5": 12.0}, {})])[0].what
        'perplexity falls from 20 at 0.9 to 12 at 0.5, while less is kept'
    """
    doubts = []
    for series in table:
        of, ppl = (f"{series.name}: " if len(table) > 1 else ""), series.ppl
        if len(set(ppl.values())) == 1 and len(ppl) > 1:
            doubts.append(
                Suspicion(
                    f"{of}every ratio has the same perplexity, {next(iter(ppl.values())):g}",
                    "nothing was compressed; check that prune_after was ever reached (the column 'mean cache' of "
                    "`knorm ppl` says so)",
                )
            )
        if pair := fall(ppl):
            a, b = pair
            doubts.append(
                Suspicion(
                    f"{of}perplexity falls from {ppl[a]:g} at {a} to {ppl[b]:g} at {b}, while less is kept",
                    f"run `knorm explain --keep-ratio {a}` with the protocol of the table: are the newest tokens "
                    "starved, does protecting them make the curve rise? Order cannot do it: "
                    "`knorm check TARGET --select attention`",
                )
            )
        doubts += _baseline(of, series)
    return [*doubts, *_columns(table)]


def _baseline(of: str, series: Series) -> list[Suspicion]:
    ppl = series.ppl
    doubts: list[Suspicion] = []
    full = next((r for r in ppl if exact_ratio(r) == 1), None)
    if full is None:
        return [Suspicion(f"{of}there is no row at ratio 1", "measure the uncompressed model on the same tokens")]
    if below := [r for r in ppl if ppl[r] < ppl[full] * (1 - TOLERANCE)]:
        doubts.append(
            Suspicion(
                f"{of}perplexity at {', '.join(below)} lies below the full cache's {ppl[full]:g}",
                "that can be right, where what was evicted misled; check first that both scored the same tokens, as "
                "`knorm ppl` does",
            )
        )
    next_one = max((r for r in ppl if r != full), key=exact_ratio, default=None)
    if next_one and ppl[next_one] > JUMP * ppl[full]:
        doubts.append(
            Suspicion(
                f"{of}perplexity jumps from {ppl[full]:g} at {full} to {ppl[next_one]:g} at {next_one}, "
                f"{ppl[next_one] / ppl[full]:.1f}-fold",
                "check that the baseline scored the same tokens by the same protocol, as `knorm ppl` does at every "
                "ratio, and that positions continue from the tokens seen: `knorm check TARGET --select cache`",
            )
        )
    counts = set(series.tokens.values())
    if len(counts) > 1:
        listed = ", ".join(f"{n:g} at {r}" for r, n in series.tokens.items())
        doubts.append(
            Suspicion(f"{of}the ratios score different tokens ({listed})", "score the same: `knorm ppl` does")
        )
    return doubts


def _columns(table: Sequence[Series]) -> list[Suspicion]:
    doubts = []
    for i, first in enumerate(table):
        for second in table[i + 1 :]:
            both = [r for r in first.ppl if r in second.ppl and exact_ratio(r) < 1]
            same = [r for r in both if math.isclose(first.ppl[r], second.ppl[r], rel_tol=1e-4)]
            apart = [r for r in both if r not in same]
            if same and apart:
                doubts.append(
                    Suspicion(
                        f"{first.name} and {second.name} are equal at {', '.join(same)} but differ at "
                        f"{', '.join(apart)}",
                        "one change cannot do both unless it depends on the ratio; the order of the cache cannot "
                        "change any of them. Check that both columns come from the same texts: `knorm ppl` on each",
                    )
                )
    return doubts


def read_reported(file: Path) -> list[Series]:
    """Read somebody else's table: keep_ratio, columns whose name starts with ppl, and tokens, if told.

    Args:
        file: a .csv with a header, or .json (a list of objects, or what `knorm ppl --json` writes). Empty cells and "-"
            are left out.

    Returns:
        A curve for each column of perplexities.

    Raises:
        ValueError: anything else, with the row.
    """
    rows, series = _rows(file), []
    if not rows:
        raise ValueError(f"{file} has no rows, but should have keep_ratio and ppl in each")
    aside = ("err", "error", "se", "std", "stderr", "ci", "low", "high")
    columns = dict.fromkeys(name for row in rows for name in row)
    if len(rows) > _MOST_ROWS or len(columns) > _MOST_COLUMNS:
        raise ValueError(
            f"{file} has {len(rows)} rows and {len(columns)} columns, but should have at most {_MOST_ROWS} ratios "
            f"and {_MOST_COLUMNS} columns"
        )
    names = [name for name in columns if name.startswith("ppl") and not name.endswith(aside)]
    if "keep_ratio" not in rows[0] or not names:
        raise ValueError(
            f"{file} has the columns {_short(', '.join(columns))}, but should have keep_ratio and ppl "
            "(or several: ppl_before, ppl_after)"
        )
    ratios = [_ratio(file, number, row) for number, row in enumerate(rows, 1)]
    counted = Counter(map(exact_ratio, ratios))
    if twice := {ratio for ratio in ratios if counted[exact_ratio(ratio)] > 1}:
        raise ValueError(f"{file} has keep_ratio {_short(', '.join(sorted(twice)))} more than once")
    for name in names:
        ppl, tokens = {}, {}
        for number, (ratio, row) in enumerate(zip(ratios, rows, strict=True), 1):
            value = _number(file, number, name, row.get(name))
            if value is not None:
                if value < 1:
                    raise ValueError(f"{file}, row {number}: {name}={value:g}, but a perplexity is at least 1")
                ppl[ratio] = value
                if (count := _number(file, number, "tokens", row.get("tokens"))) is not None:
                    if count < 1 or count != int(count):
                        raise ValueError(f"{file}, row {number}: tokens={count:g}, but should be a count of tokens")
                    tokens[ratio] = count
        if not ppl:
            raise ValueError(f"{file}: the column {name} is empty")
        series.append(Series(str(name), ppl, tokens))
    return series


def _rows(file: Path) -> list[dict[str, Any]]:
    text = read_text(file, _MOST_TABLE)
    if file.suffix.lower() == ".json":
        try:
            rows = json.loads(text, object_pairs_hook=no_field_twice)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not JSON: {error}") from None
        rows = rows.get("rows") if isinstance(rows, dict) else rows
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{file} should be a list of objects with keep_ratio and ppl")
        return [dict(zip(_columns_of(file, row), row.values(), strict=True)) for row in rows]
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
        reader.fieldnames = _columns_of(file, reader.fieldnames or [])
        rows = list(reader)
    except csv.Error as error:
        raise ValueError(f"{file} is not CSV: {error}") from None
    if any(None in row or None in row.values() for row in rows):
        number = next(n for n, row in enumerate(rows, 1) if None in row or None in row.values())
        raise ValueError(
            f"{file}, row {number}: not as many cells as the header has, {_short(', '.join(reader.fieldnames or []))}"
        )
    return rows


def _columns_of(file: Path, names: Iterable[str]) -> list[str]:
    """Names of columns in lower case. Raises ValueError where two differ by case or spaces alone."""
    columns = [name.strip().lower() for name in names]
    if twice := {name for name in columns if columns.count(name) > 1}:
        raise ValueError(f"{file} has the column {_short(', '.join(sorted(twice)))} more than once")
    return columns


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:100]}..."


def _ratio(file: Path, number: int, row: dict[str, Any]) -> str:
    written = str(row.get("keep_ratio")).strip()
    if len(written) > 100:
        raise ValueError(f"{file}, row {number}: keep_ratio={_short(written)}, but should lie in (0, 1]")
    try:
        exact_ratio(written)
    except ValueError as error:
        raise ValueError(f"{file}, row {number}: {error}") from None
    return written


def _number(file: Path, number: int, name: object, value: Any) -> float | None:
    if value is None or str(value).strip() in ("", "-", "–", "—"):
        return None
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if isinstance(value, str) and ("_" in value or not value.isascii()):  # read by Python alone
        result = math.nan
    if not math.isfinite(result) or isinstance(value, bool):
        raise ValueError(f"{file}, row {number}: {name}={_short(repr(value))}, but should be a number")
    return result


def judge_measured(
    runner: Runner, rows: Sequence[Row], policies: Sequence[Policy], *, nll_empty: float | None = None
) -> list[Suspicion]:
    """Doubt rows measured here; the cause of a falling curve is found by intervention.

    Args:
        runner: what measured the rows, to measure one more policy on the same tokens.
        rows: a row for each policy.
        policies: of the rows, in the same order.
        nll_empty: mean NLL without a cache (nll_without_cache), to tell what lies outside [full cache, no cache].

    Returns:
        A suspicion for each thing that makes no sense; none where the curve is as it should be.
    """
    ppl, doubts = {row.keep_ratio: row.ppl for row in rows}, []
    by_ratio = {row.keep_ratio: (row, policy) for row, policy in zip(rows, policies, strict=True)}
    if pair := fall(ppl):
        a, b = pair
        protected = []
        for ratio in pair:
            policy = by_ratio[ratio][1]
            newest = newest_to_protect(policy, runner.prompt_length, NEWEST) or policy.protect_recent
            protected.append((newest, measure_row(runner, replace(policy, protect_recent=newest)).ppl))
        (n, at_a), (m, at_b) = protected
        cached = [by_ratio[ratio][0].recent for ratio in pair]
        said = f"with the newest {n} and {m} protected it is {at_a:.2f} and {at_b:.2f}"
        if at_b >= at_a * (1 - TOLERANCE):
            there = (
                ""
                if None in cached
                else f" ({cached[0]:.1f} of the newest {NEWEST} are cached at {a}, {cached[1]:.1f} at {b})"
            )
            said += f": the newest tokens had been starved{there}"
        else:
            said += f", so it falls still: run `knorm explain --keep-ratio {a}`"
        doubts.append(
            Suspicion(f"perplexity falls from {ppl[a]:.2f} at {a} to {ppl[b]:.2f} at {b}, while less is kept", said)
        )
    full = next((row for row in rows if Fraction(row.keep_ratio) == 1), None)
    if full and nll_empty is not None:
        low, high = sorted((full.ppl, math.exp(nll_empty)))
        outside = [row.keep_ratio for row in rows if not low * (1 - 1e-6) <= row.ppl <= high * (1 + 1e-6)]
        if outside:
            doubts.append(
                Suspicion(
                    f"perplexity at {', '.join(outside)} lies outside {low:.2f} (full cache) to {high:.2f} (no cache)",
                    "that can be right: what is left of the cache may mislead, or what was evicted may have",
                )
            )
    return doubts


def nll_without_cache(runner: Runner) -> float:
    """Measure a run in which each token sees itself only.

    Args:
        runner: the model, its windows and their prompt.

    Returns:
        The mean NLL of the scored tokens, in nats.
    """
    return float(runner.run(Policy(), schedule=sees_itself).nll.double().mean())
