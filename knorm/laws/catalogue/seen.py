"""What attention sees of a cache, or of a press, while a model reads: asked through the witness."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite

import torch
from torch import Tensor

from knorm.laws import shown
from knorm.laws.reading import Reading
from knorm.laws.registry import Condition, Refuted, Silent, Vacuous, check
from knorm.laws.replay import replayed
from knorm.laws.subjects import Subject
from knorm.laws.witness import ASTRAY, IN_WORDS, MIXED, Look, Unanswered, Witnessed, witnessed
from knorm.methods.known import other_version

ROUNDING = 1e-4  # relative, of float32
CLOSE = 1e-3  # of logits of about 5


def _place(wrong: Tensor) -> list[int]:
    first: list[int] = wrong.nonzero()[0].tolist()
    return first


def _where(look: Look, row: int, head: int) -> str:
    call = "the prompt" if look.call == 0 else f"call {look.call} after the prompt"
    return f"in {call}, layer {look.layer}, row {row}, key/value head {head}"


def listed(tokens: list[int], most: int = 24) -> str:
    """Write the positions of `tokens`, runs as 4-9; of more than `most` such parts, the first ones.

    >>> listed([0, 1, 2, 7])
    '0-2, 7'
    """
    parts: list[list[int]] = []
    for token in tokens:
        if parts and token >= 0 and parts[-1][-1] == token - 1:
            parts[-1] = [parts[-1][0], token]
        else:
            parts.append([token])
    words = [str(part[0]) if part[0] == part[-1] else f"{part[0]}-{part[-1]}" for part in parts]
    return ", ".join(words if len(words) <= most else [*words[:most], "..."]) or "nothing"


def _query(look: Look, query: int) -> str:
    return f"the query at {int(look.positions[query])}"


def _sees(look: Look, row: int, head: int, query: int, group: int = 0, run: str = "run") -> str:
    """Write what prints the tokens that a query sees."""
    return shown.sees((look.call, look.layer, row, head, query, group), int(look.positions[query]), run)


@check("witness")
def check_runs(subject: Subject, reading: Reading) -> None:
    """A text is read without NaN, in calls of any size and any number of rows, or refused in words that say why."""
    subject.shows = shown.RUNS
    try:
        run = witnessed(subject, reading)
    except Unanswered as error:
        other = other_version() if subject.method else ""  # its interface may be another's
        said = "should answer, or refuse with a ValueError that says why" + (f"; {other}" if other else "")
        raise Refuted(f"runs: raised {error}, but {said}") from error
    if lost := [call for call, logits in enumerate(run.logits) if logits.isnan().any()]:
        subject.shows = shown.LOGITS
        where = f"call {lost[0]} after the prompt" if lost[0] else "the prompt"
        raise Refuted(f"runs: the logits after {where} are NaN, but keys and values that are given are finite")


@check("witness", needs={"merges_values": False}, evicts=True)
def check_sees_tokens(subject: Subject, reading: Reading) -> None:
    """All that a query sees are tokens of its own row, head and layer, with the key and the value that were given."""
    most = max(ROUNDING, 1.1 * subject.traits.lossy)
    for look in witnessed(subject, reading).looks:
        visible = look.seen.any(2).any(2)
        if (wrong := visible & (look.tokens < 0)).any():
            row, head, slot = _place(wrong)
            what = IN_WORDS[int(look.tokens[row, head, slot])]
            subject.shows = shown.slot(look.call, look.layer, row, head, slot)
            raise Refuted(f"sees tokens: slot {slot} {_where(look, row, head)}, which queries see, holds {what}")
        errors = [("key", look.key_error), ("value", look.value_error)]
        for name, error in errors[subject.traits.positions == "renumbered" :]:  # keys are turned: another law's
            if (wrong := visible & (error > most)).any():
                row, head, slot = _place(wrong)
                token = int(look.tokens[row, head, slot])
                subject.shows = shown.off(name, look.call, look.layer, row, head, slot, token)
                off = float(error[row, head, slot])
                said = f"off by {off:.3g} of its largest number" if isfinite(off) else "not finite"
                raise Refuted(
                    f"sees tokens: slot {slot} {_where(look, row, head)} holds token {token}, but its {name} is "
                    f"{said}, as in {int(wrong.sum())} of {int(visible.sum())} slots that queries see"
                )


@check("witness", evicts=True)
def check_sees_once(subject: Subject, reading: Reading) -> None:
    """No query sees a token twice."""
    for look in witnessed(subject, reading).looks:
        tokens = (
            look.tokens[:, :, None, None].masked_fill(~look.seen, -1).masked_fill(look.tokens[:, :, None, None] < 0, -1)
        )
        ordered = tokens.sort(-1).values
        twice = (ordered.diff(dim=-1) == 0) & (ordered[..., 1:] >= 0)
        if twice.any():
            row, head, group, query, slot = _place(twice)
            subject.shows = shown.READ + _sees(look, row, head, query, group)
            raise Refuted(
                f"sees once: {_query(look, query)} sees token {int(ordered[row, head, group, query, slot])} twice "
                f"{_where(look, row, head)}: {listed(look.seen_tokens(row, head, query, group))}"
            )


@check("witness", needs={"time_order": True, "merges_values": False}, evicts=True)
def check_sees_in_order(subject: Subject, reading: Reading) -> None:
    """What a query sees stands in time order."""
    for look in witnessed(subject, reading).looks:
        for row, head in _heads(look):
            tokens = [token for token in look.seen_tokens(row, head, -1) if token >= 0]
            if tokens != sorted(tokens):
                subject.shows = shown.READ + _sees(look, row, head, len(look.positions) - 1)
                raise Refuted(f"sees in order: the last query sees {listed(tokens)} {_where(look, row, head)}")


def _heads(look: Look) -> list[tuple[int, int]]:
    return [(row, head) for row in range(look.tokens.shape[0]) for head in range(look.tokens.shape[1])]


@check("witness")
def check_sees_no_future(subject: Subject, reading: Reading) -> None:
    """No query sees a token that comes after it, however many are fed in one call."""
    for look in witnessed(subject, reading).looks:
        later = look.seen & (look.tokens[:, :, None, None] > look.positions[:, None])
        if later.any():
            row, head, group, query, slot = _place(later)
            subject.shows = shown.READ + _sees(look, row, head, query, group)
            raise Refuted(
                f"sees no future: {_query(look, query)}, one of {len(look.positions)}, sees token "
                f"{int(look.tokens[row, head, slot])} {_where(look, row, head)}: "
                f"{listed(look.seen_tokens(row, head, query, group))}"
            )


@check("witness")
def check_sees_itself(subject: Subject, reading: Reading) -> None:
    """Each query sees its own token."""
    for look in witnessed(subject, reading).looks:
        own = (look.seen & (look.tokens[:, :, None, None] == look.positions[:, None])).any(-1)
        # a value that is no token's is another law's
        own |= (look.seen & ((look.tokens == MIXED) | (look.tokens == ASTRAY))[:, :, None, None]).any(-1)
        if not own.all():
            row, head, group, query = _place(~own)
            subject.shows = shown.READ + _sees(look, row, head, query, group)
            raise Refuted(
                f"sees itself: {_query(look, query)} does not see its own token {_where(look, row, head)}, but sees "
                f"{listed(look.seen_tokens(row, head, query, group))}"
            )


_PROTECTING = ("protect_first", "protect_recent")


@check("witness", applies=Condition(_PROTECTING, lambda t: t.protected > 0), evicts=True)
def check_sees_protected(subject: Subject, reading: Reading) -> None:
    """Every query sees the first protect_first tokens and the newest protect_recent, however long it decodes."""
    traits = subject.traits
    for look in witnessed(subject, reading).looks:
        if look.call == 0:
            continue
        now = int(look.positions[0])
        wanted = [
            *range(min(traits.protect_first, now)),
            *range(max(traits.protect_first, now - traits.protect_recent), now),
        ]
        missing = ~look.seen_by_token(now)[..., 0, :][..., wanted]
        if missing.any():
            row, head, group, index = _place(missing)
            subject.shows = shown.READ + _sees(look, row, head, 0, group)
            raise Refuted(
                f"sees protected: {_query(look, 0)} does not see token {wanted[index]} {_where(look, row, head)}, "
                f"but {listed(look.seen_tokens(row, head, 0, group))}; it should see {listed(wanted)}"
            )


def _earlier(look: Look) -> Tensor:
    """How many tokens of earlier calls the first query sees: [rows, kv_heads, groups]."""
    return look.seen_by_token(int(look.positions[0]))[..., 0, :].sum(-1)


@check("witness", needs={"rounding": ("ceil", "floor", "half_even"), "ragged": False}, evicts=True)
def check_sees_the_count(subject: Subject, reading: Reading) -> None:
    """After the prompt a query sees the promised rounding of ratio x length, and itself."""
    run = witnessed(subject, reading)
    should = torch.tensor(subject.traits.count(reading.prompt, reading.keep_ratio))
    for look in run.looks:
        if look.call != 1 or look.layer in subject.traits.skip_layers:
            continue
        counts = _earlier(look)
        if (counts != should).any():
            row, head, group = _place(counts != should)
            subject.shows = shown.READ + _sees(look, row, head, 0, group)
            raise Refuted(
                f"sees the count: {_query(look, 0)} sees {int(counts[row, head, group])} of the prompt's "
                f"{reading.prompt} tokens {_where(look, row, head)}, but should see {int(should)}"
            )


@check("press", needs={"lossy": 0.0, "merges_values": False}, evicts=True)
def check_reports_its_ratio(subject: Subject, reading: Reading) -> None:
    """The ratio that a press reports after a prompt is the share that no later query sees, to a token and 2%."""
    run = witnessed(subject, reading)
    shares = [_earlier(look).float().mean() / run.prompt for look in run.looks if look.call == 1]
    if run.reported is None or not shares:
        raise Silent
    removed, grain = 1 - float(torch.stack(shares).mean()), max(1, subject.traits.granularity)
    if abs(run.reported - removed) > (grain + 0.01) / run.prompt + 0.02:  # rounded in each head, chunk or layer
        subject.shows = shown.REPORTED
        raise Refuted(
            f"reports its ratio: compression_ratio is {run.reported:.4g} after a prompt of {run.prompt} tokens, but "
            f"the share of it that later queries do not see is {removed:.4g}"
        )


@check("press", reads="half", evicts=True)
def check_sees_by_numbers(subject: Subject, reading: Reading) -> None:
    """In half precision too, and by large keys, what is seen is chosen by comparing numbers."""
    try:
        ranked = witnessed(subject, reading).ranked
    except Unanswered as error:
        if "not implemented for 'Half'" in str(error):  # torch's, on this device
            raise Silent from error
        raise
    if ranked and ranked.nans:
        subject.shows = shown.RANKED
        raise Refuted(
            f"sees by numbers: {ranked.operation} was given {ranked.nans} of {ranked.numbers} scores that are no "
            "numbers"
        )


@check("witness", needs={"acts": "streaming"}, evicts=True)
def check_keeps_the_budget(subject: Subject, reading: Reading) -> None:
    """A budget that holds after the prompt holds after each later token."""
    traits = subject.traits
    bounds: dict[int, int] = {}
    for look in witnessed(subject, reading).looks:
        if look.call == 1:
            seen = int(_earlier(look).max())
            if seen < reading.prompt:  # the prompt shows what the budget is
                bounds[look.layer] = max(seen, traits.prune_after) + traits.granularity - 1
        if look.call > 1 and look.layer in bounds:
            counts = _earlier(look)
            if (counts > bounds[look.layer]).any():
                row, head, group = _place(counts > bounds[look.layer])
                subject.shows = shown.READ + _sees(look, row, head, 0, group)
                raise Refuted(
                    f"keeps the budget: {_query(look, 0)} sees {int(counts[row, head, group])} earlier tokens "
                    f"{_where(look, row, head)}, but after the prompt of {reading.prompt} no more than "
                    f"{bounds[look.layer]} were seen"
                )
    if not bounds:
        raise Vacuous


def _differ(subject: Subject, one: Witnessed, other: Witnessed, row: int | None = None) -> str | None:
    """Say where two runs differ in what is seen; row: the one to look at; None: all."""
    for first, second in zip(one.looks, other.looks, strict=True):
        rows = slice(None) if row is None else slice(row, row + 1)
        pairs = ((first.tokens, second.tokens), (first.seen, second.seen))
        if all(torch.equal(x[rows], y[rows]) for x, y in pairs):
            continue
        length = int(first.positions[-1]) + 1
        mine, theirs = first.seen_by_token(length)[rows], second.seen_by_token(length)[rows]
        if not torch.equal(mine, theirs):
            at, head, group, query, _ = _place(mine != theirs)
            at = at if row is None else row
            both = [sorted(look.seen_tokens(at, head, query, group)) for look in (first, second)]
            again = "" if row is None else f"row={row}"
            lines = [_sees(first, at, head, query, group, name) for name in ("one", "other")]
            subject.shows = "\n".join(["one, *_ = read()", f"other, *_ = read({again})", *lines])
            return f"{_query(first, query)} sees {listed(both[0])} {_where(first, at, head)}, but {listed(both[1])}"
    return None


@check("witness", needs={"deterministic": True}, evicts=True)
def check_sees_again(subject: Subject, reading: Reading) -> None:
    """Read again, with torch seeded alike, every query sees the same."""
    first = witnessed(subject, reading)
    if wrong := _differ(subject, first, witnessed(subject.again(), reading)):
        raise Refuted(f"sees again: {wrong} when the same is read again")


@check("witness", needs={"batch_independent": True, "deterministic": True}, reads="rows", evicts=True)
def check_sees_alone(subject: Subject, reading: Reading) -> None:
    """A row sees the same, whatever the other rows of its batch are."""
    first = witnessed(subject, reading)
    row = 0 if reading.seed % 2 else reading.rows - 1
    # in a batch of one shape: another shape may round otherwise
    if wrong := _differ(subject, first, witnessed(subject, replace(reading, row=row)), row):
        raise Refuted(f"sees alone: in a batch of {reading.rows} {wrong} where the other rows are drawn anew")


@check("witness", needs={"merges_values": False, "lossy": 0.0}, reads="real", evicts=True)
def check_attends_exactly(subject: Subject, reading: Reading) -> None:
    """The model answers as the plain model does under a mask that shows each query what it was seen to see."""
    run = witnessed(subject, reading)
    if any(not torch.equal(look.seen_by_token(run.length).sum(-1), look.seen.sum(-1)) for look in run.looks):
        raise Vacuous  # what is seen is no token, or one that is there twice: other laws'
    renumbered = subject.traits.positions == "renumbered"
    expected = replayed(run, renumbered=renumbered)
    logits = torch.cat(run.logits, 1)
    difference = (logits - expected[:, -logits.shape[1] :]).abs().nan_to_num(torch.inf)
    if difference.max() > CLOSE:
        subject.shows = shown.under_the_mask(renumbered=renumbered)
        row, at = (difference.amax(-1) > CLOSE).nonzero()[0].tolist()
        token = run.length - logits.shape[1] + at
        raise Refuted(
            f"attends exactly: the logits after token {token} of row {row} differ by {float(difference.max()):.3g} "
            "from those of the plain model under the same mask"
            + (", its keys turned to their places in the cache" if renumbered else "")
        )


@check("witness", needs={"frees_memory": True, "ragged": False}, evicts=True)
def check_sees_what_is_held(subject: Subject, reading: Reading) -> None:
    """What no query sees any more is not held: a cache keeps the bytes of what is seen."""
    run = witnessed(subject, reading)
    looks = [look for look in run.looks if look.call == 1]
    kept = [int(_earlier(look).amax()) for look in looks]
    if not looks or min(kept) == run.length - sum(reading.calls):
        raise Vacuous
    a_token = 2 * 4 * looks[0].tokens.shape[0] * looks[0].tokens.shape[1] * 64
    should = sum(kept) * a_token
    if run.bytes_held > 1.1 * should + a_token:
        subject.shows = shown.held(should)
        raise Refuted(
            f"sees what is held: {run.bytes_held:,} bytes are held after a prompt of {reading.prompt} tokens, "
            f"but what later queries see of it, {kept} tokens by layer, takes {should:,}"
        )
