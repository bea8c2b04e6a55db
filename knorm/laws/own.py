"""What `knorm verify` asks of knorm's own parts beyond the catalogue, each beside an oracle that shares no code.

Each check_<claim> returns the evidence and raises Refuted with what is wrong. Its first line is the claim.
"""

from __future__ import annotations

import copy
from decimal import Decimal
from fractions import Fraction
from math import ceil
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from knorm.core import compress
from knorm.laws import oracle
from knorm.laws.catalogue.perplexity import EQUAL
from knorm.laws.catalogue.selection import NEAR_TIE
from knorm.laws.model import gap, small_model
from knorm.laws.oracle import Rules
from knorm.laws.registry import Refuted
from knorm.laws.strategies import tagged_values
from knorm.masked_attention import attend_seen, block_mask
from knorm.perplexity import Agreement, Run, exact_run, parting_gap, stream_run
from knorm.policy import Policy, exact_ratio, retained_count
from knorm.schedule import cache_lengths, evicted_at, recent_cached

CLOSE = 1e-9  # in float64
RATIOS = (0.55, 0.07, 0.28, 0.1, 0.5, 0.333, 0.999, 1.0, "1/7", Fraction(5, 9), Decimal("0.29"), "0.57", 1)
LENGTHS = (1, 2, 3, 7, 9, 10, 14, 25, 63, 100, 1000, 131_072)
PROTECTING = (
    Rules(0.5, 6, (), 2, 1),
    Rules(0.3, 0, (1, 2), 0, 2, "high_norm"),
    Rules(0.6, 4, (), 1, 0),
    Rules(0.4, 0, (0,), 0, 0, "random", seed=7),
    Rules(0.75, 8, (), 1, 3, "random", seed=-3),
    Rules("1/3"),
)


def _differs(what: str, got: Any, should: Any) -> None:
    """Raise Refuted where two are not equal; of rows in lists, with the first that is not, and where it stands."""
    place: list[int] = []
    while isinstance(got, list) and isinstance(should, list) and len(got) == len(should) and _nested(got):
        place.append(next((i for i, pair in enumerate(zip(got, should, strict=True)) if pair[0] != pair[1]), 0))
        got, should = got[place[-1]], should[place[-1]]
    if got != should:
        raise Refuted(f"{what} is {got}, but should be {should}{f' (at {place})' if place else ''}")


def _nested(rows: list[Any]) -> bool:
    return bool(rows) and isinstance(rows[0], list)


def must_raise(what: str, kind: type[Exception], call: Any) -> None:
    """Raise Refuted where a call that must be refused is answered, or breaks off with another error.

    Args:
        what: the call in words.
        kind: the error that it must raise.
        call: makes it; takes nothing.
    """
    try:
        call()
    except kind:
        return
    except Exception as error:
        raise Refuted(f"{what} raised {type(error).__name__}: {error}, but should raise {kind.__name__}") from error
    raise Refuted(f"{what} was answered, but should raise {kind.__name__}")


def check_counts() -> str:
    """Budgets are exact: the ratio times the length rounded up, all below prune_after, and the protected in them."""
    tried = 0
    for ratio in RATIOS:
        share = Fraction(str(ratio))
        for length in LENGTHS:
            should = ceil(share * length)
            _differs(f"retained_count({length}, {ratio!r})", retained_count(length, ratio), should)
            _differs(f"Policy({ratio!r}).budget({length})", Policy(ratio).budget(length), should)
            tried += 2
    for rules in PROTECTING:
        for length in range(1, 40):
            protected = rules.protect_first + rules.protect_recent
            if rules.count(length) >= min(length, protected):
                _differs(f"{rules}.budget({length})", rules.policy().budget(length), rules.count(length))
                tried += 1
    stored = Policy(0.5, skip_layers=(3, 0, 3), score="random", seed=9)
    _differs("skip_layers of Policy(skip_layers=(3, 0, 3))", stored.skip_layers, (0, 3))
    _differs("seed of Policy(score='random', seed=9)", stored.seed, 9)
    return f"{tried} budgets"


def check_refusals() -> str:
    """What cannot be right is refused: ratios, lengths, protections, keys and scores that are none."""
    import numpy as np

    refused: list[tuple[str, type[Exception], Any]] = [
        (f"Policy({ratio!r})", ValueError, lambda ratio=ratio: Policy(ratio))
        for ratio in (0, 0.0, -0.5, 1.5, "0", float("nan"), "1/0", "half", "0.5_0")
    ]
    refused += [
        ("exact_ratio(numpy.float32(0.55))", TypeError, lambda: exact_ratio(np.float32(0.55))),  # type: ignore[arg-type]
        ("retained_count(0, 0.5)", ValueError, lambda: retained_count(0, 0.5)),
        ("Policy(0.5).budget(-1)", ValueError, lambda: Policy(0.5).budget(-1)),
        ("Policy(0.5, protect_first=3, protect_recent=3).budget(8)", ValueError,
         lambda: Policy(0.5, protect_first=3, protect_recent=3).budget(8)),
        ("a streaming Policy that protects 9 of the 8 that it keeps", ValueError,
         lambda: Policy(0.5, 16, protect_first=5, protect_recent=4, protocol="streaming")),
        ("a streaming Policy with prune_after=1", ValueError, lambda: Policy(0.5, 1, protocol="streaming")),
        ("evicted_at of scores that are not a number", ValueError,
         lambda: evicted_at(torch.tensor([1.0, torch.nan]), Policy(0.5, 2, protocol="streaming"))),
        ("evicted_at with a prompt longer than the text", ValueError,
         lambda: evicted_at(torch.zeros(4), Policy(0.5), 5)),
        ("evicted_at with 5 pads for 4 tokens", ValueError,
         lambda: evicted_at(torch.zeros(1, 1, 4), Policy(0.5), 2, padding=torch.tensor([5]))),
    ]  # fmt: skip
    for what, kind, call in refused:
        must_raise(what, kind, call)
    Policy(0.5, 16, protect_first=4, protect_recent=4, protocol="streaming")  # just what it keeps
    return f"{len(refused)} refusals"


def _draw(shape: tuple[int, ...], seed: int, spread: int = 6) -> Tensor:
    """Draw small integers: exact in every dtype, with many ties."""
    return torch.randint(-spread, spread + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def check_selections() -> str:
    """What compress retains is what a plain list retains: each score, what is protected, and skipped layers."""
    tried = 0
    for seed, rules in enumerate(PROTECTING):
        policy = rules.policy()
        for layer in range(3):
            rows, heads, length = 2, 3, 24
            keys, values = _draw((rows, heads, length, 4), seed), tagged_values(rows, heads, length, torch.float32)
            scores = oracle.scores_of(keys, rules, layer)
            kept, positions = (keys, values), None
            alive = [[list(range(length))] * heads for _ in range(rows)]
            for again in range(2):  # a second time, on what the first has left
                if layer not in rules.skip_layers:
                    alive = [[rules.leave(alive[r][h], scores[r][h]) for h in range(heads)] for r in range(rows)]
                got = compress(kept[0], kept[1], policy, positions=positions, layer=layer)
                what = f"compression {again + 1} of {length} tokens by {rules} in layer {layer}"
                _differs(f"positions after {what}", got.positions.tolist(), alive)
                place = torch.tensor(alive)[..., None].expand(-1, -1, -1, 4)
                for name, tensor, given in (("keys", got.keys, keys), ("values", got.values, values)):
                    if not torch.equal(tensor, given.gather(2, place)):
                        raise Refuted(f"{name} after {what} are not those of the positions {alive}")
                kept, positions = got[:2], got.positions
                tried += 1
    _check_large()
    return f"{tried + 1} compressions"


def _check_large() -> None:
    """Compress a few megabytes: from there on, norms are taken part by part, and rows gathered another way."""
    rules, length = Rules(0.5), 8192
    keys, values = _draw((1, 2, length, 128), 1), _draw((1, 2, length, 128), 2)
    should = [[rules.leave([*range(length)], head) for head in oracle.scores_of(keys, rules, 0)[0]]]
    got = compress(keys, values, rules.policy())
    if got.positions.tolist() != should:
        raise Refuted(f"of {length} tokens, those of the lowest norms should stay in time order, but others do")
    place = torch.tensor(should)[..., None].expand(-1, -1, -1, 128)
    if not torch.equal(got.keys, keys.gather(2, place)) or not torch.equal(got.values, values.gather(2, place)):
        raise Refuted(f"of {length} tokens, the keys or values that stay are not those of their positions")


STREAMED = (
    Rules(0.5, 8, protocol="streaming"),
    Rules(0.9, 5, (), 1, 2, protocol="streaming"),
    Rules(0.3, 12, (), 0, 3, protocol="streaming"),
    Rules("2/3", 6, (), 2, 0, protocol="streaming"),
    Rules(0.5, 4, (), 1, 2),
    Rules(0.25),
)


def check_schedules() -> str:
    """A schedule is the history of a plain list: evicted_at, with padding too, cache_lengths and recent_cached."""
    tried = 0
    for seed, rules in enumerate(STREAMED):
        for length, prompt in ((2, 1), (17, 12), (30, 1), (40, 21)):
            needed = rules.protect_first + rules.protect_recent
            if rules.protocol == "prefill" and rules.count(prompt) < min(prompt, needed):
                continue
            calls = [prompt] + [1] * (length - prompt)
            scores = _draw((2, 2, length), seed * 100 + length)
            lives = [[oracle.live(rules, head, calls).lost for head in row] for row in scores.tolist()]
            lost = evicted_at(scores, rules.policy(), prompt)
            what = f"of {length} tokens, a prompt of {prompt}, by {rules}"
            _differs(f"evicted_at {what}", lost.tolist(), lives)
            seen = [
                [[[s for s in range(t + 1) if t < head[s]] for t in range(length)] for head in row] for row in lives
            ]
            counts = [[[len(query) for query in head] for head in row] for row in seen]
            _differs(f"cache_lengths {what}", cache_lengths(lost).tolist(), counts)
            newest = [[[sum(s > t - 4 for s in q) for t, q in enumerate(head)] for head in row] for row in seen]
            _differs(f"recent_cached {what}", recent_cached(lost, 4).tolist(), newest)
            if prompt < 12:
                continue
            pads = torch.tensor([0, 5])
            padded = evicted_at(scores, rules.policy(), prompt, padding=pads)[1]
            own = [prompt - 5] + [1] * (length - prompt)
            alone = [[s + 5 for s in oracle.live(rules, head, own).lost] for head in scores[1, :, 5:].tolist()]
            _differs(f"evicted_at with 5 pads {what}", padded.tolist(), [[1, 2, 3, 4, 5, *head] for head in alone])
            tried += 1
    return f"{tried} padded batches of them"


def check_masked_attention() -> str:
    """Attention under a schedule is attention with the evicted masked: blocks, groups, scale, and tiles of a mask."""
    generator = torch.Generator().manual_seed(5)
    widest = 0.0
    for length, kv_heads, window in ((40, 2, 9), (300, 1, 60), (300, 2, 500)):
        query, key, value = (
            torch.randn(2, heads, length, 8, generator=generator, dtype=torch.float64)
            for heads in (4, kv_heads, kv_heads)
        )
        place = torch.arange(length)
        lost = place + 1 + torch.randint(0, window, (2, kv_heads, length), generator=generator)
        lost[1, :, 1 : length // 3] = place[1 : length // 3] + 1  # a row that has lost many more, as one with padding
        lost[1, :, 0] = length  # but not the first, whose index spare slots have
        lost = lost.clamp(max=length)
        for scale, given in ((0.3, lost), (0.3, None)):
            truth = torch.full_like(lost, length) if given is None else lost
            should = oracle.attend(query, key, value, truth, scale)
            widest = max(widest, gap(attend_seen(query, key, value, given, scale), should))
            if widest > CLOSE:
                raise Refuted(f"attention over {length} tokens, {kv_heads} key heads, is off by {widest:.3g}")
    _check_tiles(generator)
    return f"largest difference {widest:.1e}"


def _check_tiles(generator: torch.Generator) -> None:
    place = torch.arange(512)
    lost = (place + 1 + torch.randint(0, 300, (2, 1, 512), generator=generator)).clamp(max=512)
    lost[0, :, :128] = 512
    mask = block_mask(lost, place.expand(lost.shape))
    for row in range(2):
        seen = torch.zeros(512, 512, dtype=torch.bool)
        for tiles, counts, whole in (
            (mask.kv_indices, mask.kv_num_blocks, False),
            (mask.full_kv_indices, mask.full_kv_num_blocks, True),
        ):
            for block in range(4):
                for column in tiles[row, 0, block, : counts[row, 0, block]].tolist():  # type: ignore[index]
                    q, k = place[block * 128 :][:128, None], place[column * 128 :][:128]
                    seen[q, k] = True if whole else (k <= q) & (q < lost[row, 0, k])
        should = (place <= place[:, None]) & (place[:, None] < lost[row])
        if not torch.equal(seen, should):
            at = (seen != should).nonzero()[0].tolist()
            raise Refuted(f"by the block mask query {at[0]} {'sees' if seen[tuple(at)] else 'misses'} key {at[1]}")


RUNS = (
    (Rules(0.7, 12, (0, 2), protocol="streaming"), 1),
    (Rules(0.5, 16, (1,), 2, 4, protocol="streaming"), 20),
    (Rules(0.6, 10, (), 0, 0, "high_norm", "streaming"), 20),
    (Rules(0.6, 0, (0, 3), 1, 3, "random", seed=11), 24),
)


def check_runs(model: PreTrainedModel, ids: Tensor) -> str:
    """One pass and loop both equal full attention with the evicted masked, rows with padding as if alone.

    `model` is in float64, `ids` int64 [2, T] of at least 30 tokens.
    """
    widest = 0.0
    for number, (rules, prompt) in enumerate(RUNS):
        for pads in (0, 6) if prompt > 8 else (0,):
            mask = torch.ones_like(ids)
            mask[1, :pads] = 0
            options: Any = {"prompt_length": prompt, "attention_mask": mask if pads else None}
            runs = {"one pass": exact_run(model, ids, rules.policy(), **options)}
            if number < 2 or pads:
                runs["the loop"] = stream_run(model, ids, rules.policy(), **options)
            for row, lead in enumerate((0, pads)):
                alone = ids[row : row + 1, lead:]
                truth = oracle.run(model, alone, rules, [prompt - lead] + [1] * (ids.shape[1] - prompt))
                for name, run in runs.items():
                    where = f"{name} by {rules}, a prompt of {prompt}, {lead} pads"
                    widest = max(widest, _compare_run(run, row, lead, truth, alone, where))
    _check_in_half()
    return f"largest difference of a token's NLL {widest:.1e}"


def _compare_run(run: Run, row: int, lead: int, truth: oracle.Truth, ids: Tensor, where: str) -> float:
    if not run.nll[row, :lead].isnan().all():
        raise Refuted(f"{where}: the NLLs of padding are numbers")
    difference = gap(run.nll[row, lead:].double(), oracle.nll_of(truth.logits, ids)[0])
    if difference > 1e-5:  # NLLs are float32
        raise Refuted(f"{where}: a token's NLL differs by {difference:.3g} from full attention with the evicted masked")
    _differs(
        f"{where}: likeliest tokens, as bools,",
        run.correct[row, lead:].tolist(),
        (truth.logits[0, :-1].argmax(-1) == ids[0, 1:]).tolist(),
    )
    for layer, (got, lost) in enumerate(zip(run.evicted_at, truth.lost, strict=True)):
        if not torch.equal(got[row, :, lead:] - lead, lost[0]):
            raise Refuted(f"{where}: evicted_at of layer {layer} is not that of a list of living tokens")
    return difference


def _check_in_half() -> None:
    model = copy.deepcopy(small_model("cpu")).bfloat16()
    nll = exact_run(model, torch.arange(1, 25)[None], Policy()).nll
    if torch.equal(nll, nll.bfloat16().float()):
        raise Refuted("the NLLs of a model in bfloat16 are themselves bfloat16, but should be computed in float32")


def recount(both: Agreement) -> None:
    """Raise Refuted where `both`, an agreement of one pass and loop, says other than its two runs do."""
    pairs = zip(both.exact.evicted_at, both.stream.evicted_at, strict=True)
    evictions = sum(int((first != second).sum()) for first, second in pairs)
    _differs("the number of evictions that differ", both.evictions, evictions)
    if not evictions:
        _differs("the largest difference of a token's NLL", both.difference, gap(both.exact.nll, both.stream.nll))
    _differs("whether one pass and loop agree", both.holds, both.difference <= EQUAL and both.gap <= NEAR_TIE)


def check_parting() -> str:
    """Two runs agree only where tokens and evictions do; the widest gap of norms where schedules part is told."""
    nothing = torch.zeros(1, 1)
    none = Run(nothing, nothing > 0, (), 0.0, 0.0)
    for difference, parted, holds in ((1e-5, 0.0, True), (2e-4, 0.0, False), (1e-5, 1e-3, False)):
        both = Agreement(none, none, 0, parted, difference)
        _differs(f"holds, of tokens within {difference} and norms within {parted},", both.holds, holds)
    ours = torch.full((2, 2, 1, 8), 8)  # [layer, row, head, token]
    theirs, norms = ours.clone(), torch.ones(2, 2, 1, 8)
    ours[0, 0, 0, 1] = theirs[0, 0, 0, 2] = 3  # row 0 parts at 3, over norms 4 and 3
    norms[0, 0, 0, 1], norms[0, 0, 0, 2] = 4.0, 3.0
    ours[1, 0, 0, 3] = theirs[1, 0, 0, 4] = 6  # what the layer above does later is a consequence
    norms[1, 0, 0, 3] = 100.0
    ours[0, 1, 0, 1] = theirs[0, 1, 0, 2] = 5  # row 1 over norms 10 and 9
    norms[0, 1, 0, 1], norms[0, 1, 0, 2] = 10.0, 9.0
    for order in ([0, 1], [1, 0]):
        parts = [[layer[order] for layer in x] for x in (ours, theirs, norms)]
        _differs("the gap of norms 4 and 3, beside 10 and 9,", parting_gap(*parts), 0.25)
    return "3 agreements, 2 partings"
