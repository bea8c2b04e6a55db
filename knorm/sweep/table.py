"""What a study found: results joined into rows, and what is still to come, estimated from those that are there."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from knorm.sweep.cells import CONTROL, Cell, cell_of
from knorm.sweep.folder import Folder

if TYPE_CHECKING:
    from knorm.evaluation.sums import Damage


MOST_LETTERED = 100  # rows: letters of more would be words that nobody reads


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SumsFields(_Form):
    """Hold damage.Sums as JSON has them, a number for each window."""

    nll: list[float]
    nll_full: list[float]
    delta_nll: list[float]
    kl: list[float]
    same_top: list[float]
    correct: list[float]
    delta_p: list[float]
    delta_p_squared: list[float]


class DamageFields(_Form):
    """Hold what a method did to the windows of one cell; kl: base64 of float64 [windows, scored], in little endian."""

    how: str
    checked: str
    changed: bool
    sums: SumsFields
    scored: int
    kl: str
    tokens_seen: list[list[float]]
    tokens_before: float
    bytes_stored: float
    bytes_full: float


class Result(_Form):
    """Hold the result of one cell, as its file does."""

    form: Literal["knorm-sweep-cell"]
    version: Literal[1]
    cell: dict[str, Any]
    failed: str | None
    fault: str | None
    seconds: float
    memory: int
    environment: dict[str, str]
    damage: DamageFields | None = None
    laws: dict[str, Any] | None = None
    counters: dict[str, Any] | None = None
    latency: dict[str, Any] | None = None


@dataclass(frozen=True)
class DamageRow:
    """Hold what a method costs on the windows of all its cells that are done.

    Attributes:
        cell: the first of them, for what they share.
        damage: as `knorm ppl` computes it for all these windows at once.
        windows: their number; planned: that of the plan.
        how: and checked: how they were run.
        changed: False where no prediction of any of them changed, up to rounding.
        tokens_seen: by layer and head; tokens_before: of the full cache.
        bytes_stored: of one window; bytes_full: of the full cache.
        kl: mean of each window; changes: of its tokens' NLL; nll_full: mean of the full cache.
    """

    cell: Cell
    damage: Damage
    windows: list[int]
    planned: int
    how: str
    checked: str
    changed: bool
    tokens_seen: list[list[float]]
    tokens_before: float
    bytes_stored: float
    bytes_full: float
    kl: list[float]
    changes: list[float]
    nll_full: float

    @property
    def label(self) -> str:
        """Name the method and its budget, as tables do."""
        return self.cell.method.label

    @property
    def bytes_per_token(self) -> float:
        """Divide the bytes stored by the tokens that had been fed."""
        return self.bytes_stored / self.tokens_before

    @property
    def seen(self) -> float:
        """Return the tokens that a query sees, on average over layers and heads."""
        return float(np.mean(self.tokens_seen))

    @property
    def whole(self) -> bool:
        """Tell whether all windows of the plan are in it."""
        return len(self.windows) == self.planned


@dataclass
class Table:
    """Hold what a study has found so far.

    Attributes:
        cells: of the plan; done: with a result that is none of the following.
        failures: (cell, reason), in the plan's order; faults: (cell, traceback).
        seconds: (cell, seconds) of those done; memory: the most bytes that one of their workers had.
        damage: rows, in the plan's order; laws, counters and latency: (cell, result), the last with the device's class.
    """

    cells: int = 0
    done: int = 0
    failures: list[tuple[Cell, str]] = field(default_factory=list)
    faults: list[tuple[Cell, str]] = field(default_factory=list)
    seconds: list[tuple[Cell, float]] = field(default_factory=list)
    memory: int = 0
    damage: list[DamageRow] = field(default_factory=list)
    laws: list[tuple[Cell, dict[str, Any]]] = field(default_factory=list)
    counters: list[tuple[Cell, dict[str, Any]]] = field(default_factory=list)
    latency: list[tuple[Cell, dict[str, Any]]] = field(default_factory=list)

    @property
    def refuted(self) -> bool:
        """Tell whether a law was refuted."""
        return any(result["verdict"] == "refuted" for _, values in self.laws for result in values["results"])


def read_result(folder: Folder, name: str) -> Result | None:
    """Return the result that `folder` holds of the cell `name`; None where there is none.

    Raises:
        ValueError: a file that is damaged.
    """
    if (text := folder.read(name)) is None:
        return None
    try:
        return Result.model_validate_json(text)
    except ValidationError:
        where = folder.results / f"{name}.json"
        raise ValueError(f"{where} is damaged: remove it, and its cell is done again") from None


def stored(folder: Folder) -> tuple[dict[str, Any], Table, dict[str, str]]:
    """Join what a folder holds of the plan that was run last, without the plan's file and without its methods.

    Args:
        folder: of a sweep.

    Returns:
        The study, as Ready.stored wrote it; its results; the environment of the first of them.

    Raises:
        ValueError: no folder of a sweep, none that says what was planned, or a result that is damaged.
    """
    known = folder.known()
    if not known:
        raise ValueError(f"{folder.place} holds no sweep: knorm sweep PLAN {folder.place} makes one")
    try:
        study, names = dict(known["study"]), [*map(str, known["study"]["cells"])]
        windows = int(study["plan"]["windows"])
    except (KeyError, TypeError, ValueError):
        said = "does not say which cells were planned: run the same knorm sweep on it again"
        raise ValueError(f"{folder.place / 'plan.json'} {said}") from None
    there = folder.states()
    cells: dict[str, Cell] = {}
    environment: dict[str, str] = {}
    for name in names:
        if name in there and (result := read_result(folder, name)) is not None:
            try:
                cells[name] = cell_of(result.cell)
            except (KeyError, TypeError):
                raise ValueError(f"{folder.results / name}.json is no result of this version of knorm") from None
            environment = environment or result.environment
    table = join(folder, cells, windows=windows)
    table.cells = len(names)
    return study, table, environment


def join(folder: Folder, cells: Mapping[str, Cell], *, rows: bool = True, windows: int | None = None) -> Table:
    """Join results into a table; it is the same, to the bit, however often the study was interrupted.

    Args:
        folder: that the results are in.
        cells: of the plan, by name.
        rows: False where only failures and laws are asked for: damage that is done is counted, and not read.
        windows: that a row has when it is whole; by default, all those of its cells.

    Returns:
        The table.

    Raises:
        ValueError: a result that is damaged.
    """
    table, there = Table(cells=len(cells)), folder.states()
    grouped: dict[tuple[Any, ...], list[str]] = {}
    for name, cell in cells.items():
        if not rows and cell.measure == "damage" and there.get(name) == "done":
            table.done += 1
        else:
            grouped.setdefault(cell.row, []).append(name)
    for names in grouped.values():  # one row's results at a time: all of them may be more than memory holds
        parts = []
        for name in names:
            result = read_result(folder, name) if name in there else None
            if result is not None and _counted(table, cells[name], result) and result.damage is not None:
                parts.append((cells[name], result.damage))
        if parts and rows:
            planned = sum(cells[name].last - cells[name].first for name in names)
            table.damage.append(_row(parts, windows or planned))
    return table


def _counted(table: Table, cell: Cell, result: Result) -> bool:
    """Enter what is no damage into the table; False for a cell that failed."""
    if result.fault is not None or result.failed is not None:
        if result.fault is not None:
            table.faults.append((cell, result.fault))
        else:
            table.failures.append((cell, result.failed or ""))
        return False
    table.done += 1
    table.seconds.append((cell, result.seconds))
    table.memory = max(table.memory, result.memory)
    for measure in ("laws", "counters"):
        if (values := getattr(result, measure)) is not None:
            getattr(table, measure).append((cell, values))
    if result.latency is not None:  # a sweep may be timed on several machines, and times are one's own
        table.latency.append((cell, {**result.latency, "device_class": result.environment.get("device_class", "")}))
    return True


def _row(parts: list[tuple[Cell, DamageFields]], planned: int) -> DamageRow:
    from knorm.evaluation.sums import Sums, damage_of

    parts.sort(key=lambda part: part[0].first)
    fields = [values for _, values in parts]
    counts = [cell.last - cell.first for cell, _ in parts]
    names = [*SumsFields.model_fields]
    values = np.array([[x for f in fields for x in getattr(f.sums, n)] for n in names])
    raw = b"".join(base64.b64decode(f.kl) for f in fields)
    tokens = np.frombuffer(raw, dtype="<f8").reshape(sum(counts), -1)
    sums = Sums(**dict(zip(names, values, strict=True)), tokens=tokens)
    weights = np.array(counts) / sum(counts)
    seen = sum(np.array(f.tokens_seen) * weight for f, weight in zip(fields, weights, strict=True))
    return DamageRow(
        cell=parts[0][0],
        damage=damage_of(sums),
        windows=[window for cell, _ in parts for window in range(cell.first, cell.last)],
        planned=planned,
        how=", ".join(dict.fromkeys(f.how for f in fields)),
        checked=fields[0].checked,
        changed=any(f.changed for f in fields),
        tokens_seen=np.asarray(seen).tolist(),
        tokens_before=fields[0].tokens_before,
        bytes_stored=float(sum(f.bytes_stored * weight for f, weight in zip(fields, weights, strict=True))),
        bytes_full=fields[0].bytes_full,
        kl=(sums.kl / tokens.shape[1]).tolist(),
        changes=(sums.delta_nll / tokens.shape[1]).tolist(),
        nll_full=float(sums.nll_full.sum()) / tokens.size,
    )


def groups(rows: Sequence[DamageRow]) -> dict[tuple[Any, ...], list[DamageRow]]:
    """Return those of `rows` together that can be compared, by what they share.

    That is (model, dtype, text, prompt length, window, seed); groups and their rows stand in the order of `rows`.
    """
    found: dict[tuple[Any, ...], list[DamageRow]] = {}
    for row in rows:
        cell = row.cell
        key = cell.model, cell.dtype, cell.text, cell.prompt_length, cell.window, cell.seed
        found.setdefault(key, []).append(row)
    return found


def apart(rows: Sequence[DamageRow]) -> list[str]:
    """Return letters for the `rows` of one group, as `knorm ppl` does: rows that share one cannot be told apart by KL.

    A row that lacks windows has "". So has every row where only one has all windows, or more than MOST_LETTERED, and
    where that is a single window. A difference up to twice the KL of the full cache, run again, is noise.
    """
    from knorm.evaluation.distinct import NOISE, letters

    whole = [row for row in rows if row.whole]
    if len(whole) > MOST_LETTERED:
        return [""] * len(rows)
    noise = max([NOISE, *(2 * row.damage.kl for row in whole if row.cell.method.target == CONTROL)])
    given = iter(letters([np.array(row.kl)[:, None] for row in whole], noise))
    return [next(given) if row.whole else "" for row in rows]


def row_fields(row: DamageRow, letter: str) -> dict[str, Any]:
    """Return `row` with its `letter`, of `apart`, as JSON has it: without times, so that a second run gives the same.

    Losses are in nats per token, bytes are for each token that had been fed, tokens_seen is by layer and head.
    """
    cell = row.cell
    method = cell.method
    return {
        "model": cell.model, "dtype": cell.dtype, "device": cell.device, "text": cell.text, "window": cell.window,
        "prompt_length": cell.prompt_length, "seed": cell.seed, "method": method.name,
        "keep_ratio": method.keep_ratio, "keep_tokens": method.keep_tokens, "how": row.how, "checked": row.checked,
        "changed": row.changed, "complete": row.whole, "letters": letter, **asdict(row.damage),
        "bytes_per_token": row.bytes_per_token, "bytes_per_token_full": row.bytes_full / row.tokens_before,
        "tokens_seen": row.tokens_seen, "tokens_before": row.tokens_before,
    }  # fmt: skip
