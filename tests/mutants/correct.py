"""Subjects that no check may refute."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, floor
from typing import Any

import torch
from transformers import DynamicCache

from knorm import KnormCache, Policy, compress, exact_nll, retained_count, stream_nll
from knorm.laws import KNORM, Subject, Traits
from knorm.laws.adapters import adapt
from knorm.laws.subjects import CompressingCache
from mutants import PROMISES, real
from mutants.parts import TurnedCache, WindowCache, everywhere, keep, keep_lowest, lowest, squares


@dataclass(frozen=True)
class Correct:
    """A subject, and why a check may refute it all the same: check -> reason."""

    subject: Subject
    expected: dict[str, str] = field(default_factory=dict)
    seeds: int = 20

    @property
    def name(self) -> str:
        return self.subject.name


CORRECT: list[Correct] = []


def correct(surface: str = "compress", expected: dict[str, str] | None = None, **traits: Any):
    def enter(target):
        CORRECT.append(Correct(Subject(target.__name__, Traits(**traits), **{surface: target}), expected or {}))
        return target

    return enter


CORRECT.append(Correct(Subject("knorm.compress", KNORM, compress=compress), seeds=200))


def slow(keys, values, keep_ratio):
    """The lowest norms, in plain Python and float64."""
    rows, heads, length, _ = keys.shape
    if not length:
        raise ValueError("no tokens")
    count = ceil(Fraction(str(keep_ratio)) * length)
    if count == length:
        return keys, values
    index = torch.empty(rows, heads, count, dtype=torch.int64)
    for row in range(rows):
        for head in range(heads):
            norms = [sum(x * x for x in key) for key in keys[row, head].double().tolist()]
            if not all(norm <= torch.finfo(torch.float32).max for norm in norms):
                raise ValueError(f"row {row}, head {head} has a key without a norm")
            ranked = sorted(range(length), key=lambda token: (norms[token], token))
            index[row, head] = torch.tensor(sorted(ranked[:count]))
    return keep(keys, values, index.to(keys.device))


CORRECT.append(Correct(Subject("slow", KNORM, compress=slow), seeds=200))


@correct(rounding="ceil", scores="keys", nonfinite="raise")
def highest_norms(keys, values, keep_ratio):
    return compress(keys, values, Policy(keep_ratio, score="high_norm"))


@correct(rounding="ceil")
def seeded_random(keys, values, keep_ratio):
    """A hash of each position."""
    hashes = torch.arange(keys.shape[2], device=keys.device) * 2654435761 % 2**32
    return keep_lowest(keys, values, everywhere(hashes, keys), keep_ratio)


@correct(rounding="ceil", protect_first=2, protect_recent=3)
def sinks_and_window(keys, values, keep_ratio):
    length, places = keys.shape[2], torch.arange(keys.shape[2], device=keys.device)
    count = retained_count(length, keep_ratio)
    if length <= 5:
        return keys, values
    if count < 5:
        raise ValueError(f"{count} tokens do not cover 2 sinks and a window of 3")
    return keep(keys, values, everywhere(torch.cat([places[:2], places[length - count + 2 :]]), keys))


@correct(rounding="ceil")
def window(keys, values, keep_ratio):
    count = retained_count(keys.shape[2], keep_ratio)
    return keys[:, :, -count:].clone(), values[:, :, -count:].clone()


@correct(rounding="floor", scores="key_norm", ties="earlier")
def rounded_down(keys, values, keep_ratio):
    count = max(1, floor(Fraction(str(keep_ratio)) * keys.shape[2]))
    return keep(keys, values, lowest(squares(keys), count))


@correct(rounding="half_even", scores="key_norm", ties="earlier")
def rounded_to_even(keys, values, keep_ratio):
    count = max(1, round(Fraction(str(keep_ratio)) * keys.shape[2]))
    return keep(keys, values, lowest(squares(keys), count))


@correct(scores="key_norm", ties="earlier")
def pyramid(keys, values, keep_ratio, layer=0):
    """Budgets shrink from layer to layer."""
    share = Fraction(str(keep_ratio)) / (1 + layer if keep_ratio < 1 else 1)
    return keep(keys, values, lowest(squares(keys), ceil(share * keys.shape[2])))


@correct(scores="key_norm", ties="earlier", ragged=True)
def ragged_heads(keys, values, keep_ratio):
    """Every other head gets half the budget; a mask tells what is filled up with zeros."""
    budget = retained_count(keys.shape[2], keep_ratio)
    few = (budget + 1) // 2 if keep_ratio < 1 else budget
    kept, mask = keep(keys, values, lowest(squares(keys), budget)), torch.ones(1, 1, budget, dtype=torch.bool)
    mask = mask.repeat(*keys.shape[:2], 1).to(keys.device)
    mask[:, 1::2, few:] = False
    for wide, narrow in zip(kept, keep(keys, values, lowest(squares(keys), few)), strict=True):
        wide[:, 1::2, :few], wide[:, 1::2, few:] = narrow[:, 1::2], 0
    return *kept, mask


@correct(rounding="ceil", scores="keys")
def key_difference(keys, values, keep_ratio):
    """KeyDiff: the keys least similar to the mean key stay."""
    directions = torch.nn.functional.normalize(keys.double().contiguous(), dim=-1)
    similar = torch.nn.functional.cosine_similarity(directions, directions.mean(2, keepdim=True), dim=-1)
    return keep_lowest(keys, values, similar.round(decimals=9), keep_ratio)  # no rounding error breaks a tie


PADDING = {"left_padding": "key norms are compared among all tokens of a row, pads included: a later issue"}


@correct("make_cache", expected=PADDING, **PROMISES)
def dynamic_cache(keep_ratio):
    return CompressingCache(Subject("compress", KNORM, compress=compress), keep_ratio)


@correct("make_cache", **PROMISES)
def knorm_cache(keep_ratio):
    return KnormCache(Policy(keep_ratio))


CORRECT.append(Correct(Subject("window_cache", Traits(), make_cache=WindowCache)))
CORRECT.append(Correct(Subject("turned_cache", Traits(positions="renumbered"), make_cache=TurnedCache)))


PADS_STAY = {"left_padding": "what stays is chosen by position, whatever is padding"}
for _cache, _traits, _expected in (
    (real.StreamingWindow, {"acts": "streaming"}, {}),
    (real.RingWindow, {"acts": "streaming"}, {}),
    (real.PagedWindow, {"acts": "streaming", "granularity": 4}, PADS_STAY),
    (real.CroppableWindow, {"acts": "streaming"}, {}),
    (real.LazyWindow, {"frees_memory": False}, {}),
    (real.SinksAndWindow, {"acts": "streaming", "protect_first": 2, "protect_recent": 3}, PADS_STAY),
    (real.EveryOther, {}, PADS_STAY),
    (real.EveryFourthCall, {}, {}),
    (real.SpareRoom, {"frees_memory": False}, {}),
    (real.Offloaded, {"acts": "streaming"}, {}),
    (real.EightBits, {"lossy": 0.01}, {}),
    (real.ExactAtItsEnd, {"lossy": 0.01}, {}),
    (real.TurnedWindow, {"positions": "renumbered"}, {}),
    (real.OwnRowOperations, {"acts": "streaming"}, {}),
):
    CORRECT.append(Correct(Subject(_cache.__name__, Traits(**_traits), make_cache=_cache), _expected))
for _name, _policy, _traits in (
    ("protecting", {"protect_first": 1, "protect_recent": 2}, {"protect_first": 1, "protect_recent": 2}),
    ("from_eight", {"prune_after": 8}, {"prune_after": 8}),
    ("highest", {"score": "high_norm"}, {"scores": "keys", "ties": None}),
):

    def _made(keep_ratio, policy=_policy):
        return KnormCache(Policy(keep_ratio, **policy))

    CORRECT.append(Correct(Subject(f"knorm_cache {_name}", Traits(**PROMISES | _traits), make_cache=_made)))


def kept_by_reset():
    """Tell whether transformers' own reset() keeps tokens, as older versions do: zeros, which later queries see."""
    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), 0)
    cache.reset()
    return cache.get_seq_length() > 0


CORRECT.append(Correct(adapt(DynamicCache), {"reset": "reset() keeps tokens, as zeros"} if kept_by_reset() else {}))


@correct("evaluate", **PROMISES)
def one_pass(model, input_ids, prompt_length, keep_ratio):
    return exact_nll(model, input_ids, Policy(keep_ratio), prompt_length=prompt_length)


@correct("evaluate", **PROMISES)
def the_loop(model, input_ids, prompt_length, keep_ratio):
    return stream_nll(model, input_ids, Policy(keep_ratio), prompt_length=prompt_length)
