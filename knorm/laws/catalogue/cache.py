"""A transformers cache in all that generate() does with it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from knorm.laws.model import feed, gap, small_model, steps
from knorm.laws.registry import Refuted, Vacuous, check
from knorm.laws.strategies import Text, distinct
from knorm.laws.subjects import Subject


def _chunk(subject: Subject, text: Text) -> int:
    """One token a call where layers are skipped: transformers makes one mask for all layers, of whatever length."""
    return 1 if subject.traits.skip_layers else text.chunk


def _run(subject: Subject, text: Text, ids: Tensor | None = None, **options: Any) -> tuple[Any, Tensor]:
    """A fresh cache fed the whole text as it says, and the logits after the prompt."""
    ids = text.input_ids if ids is None else ids
    cache = subject.cache(text.keep_ratio)
    model = small_model(str(ids.device))
    logits = feed(model, ids, cache, steps(text.prompt, ids.shape[1], _chunk(subject, text)), **options)
    return cache, logits[:, text.prompt :]


def _equal(got: Tensor, should: Tensor, what: str, most: float = 1e-8) -> None:
    if (difference := gap(got, should)) > most:
        raise Refuted(f"{what}: logits differ by {difference:.3g}, but should be equal")


@check("cache")
def check_positions(subject: Subject, text: Text) -> None:
    """Positions continue from the tokens seen, not from the tokens stored."""
    cache, logits = _run(subject, text)
    length = text.input_ids.shape[1]
    if cache.get_seq_length() != length:
        raise Refuted(
            f"positions: get_seq_length() is {cache.get_seq_length()} after {length} tokens, but should be {length}: "
            "the next token's position is taken from it"
        )
    places = torch.arange(length, device=text.input_ids.device).expand(text.input_ids.shape)
    _equal(logits, _run(subject, text, position_ids=places)[1], "positions: given and left to the model")


@check("cache")
def check_shift(subject: Subject, text: Text) -> None:
    """A suffix's logits do not change when prefix and suffix shift together."""
    ids = distinct(text.input_ids)
    places = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    logits, shifted = (_run(subject, text, ids, position_ids=places + by)[1] for by in (0, 9))
    # transformers rotates by angles in float32, whatever the model's dtype
    _equal(logits, shifted, "shift: positions from 0 and from 9", 1e-4)


@check("cache")
def check_chunks(subject: Subject, text: Text) -> None:
    """At ratio 1, tokens fed 1, 2, 7 or all at a time get the plain model's logits."""
    model, ids = small_model(str(text.input_ids.device)), text.input_ids
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
    cache = subject.cache(1.0)
    logits = feed(model, ids, cache, steps(text.prompt, ids.shape[1], text.chunk))
    _equal(logits, plain, f"chunks: a prompt of {text.prompt}, then {text.chunk} at a time, and the plain model")


@check("cache")
def check_left_padding(subject: Subject, text: Text) -> None:
    """Pads are never attended nor retained before real tokens: each padded row equals itself alone."""
    ids = text.input_ids
    mask = (torch.arange(ids.shape[1]) >= torch.tensor(text.pads)[:, None]).long().to(ids.device)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = _run(subject, text, attention_mask=mask, position_ids=places)[1]
    model = small_model(str(ids.device))
    for row, pads in enumerate(text.pads):
        cache, alone = subject.cache(text.keep_ratio), ids[row : row + 1, pads:]
        sizes = steps(text.prompt - pads, alone.shape[1], _chunk(subject, text))
        own = feed(model, alone, cache, sizes, position_ids=places[row : row + 1, pads:])[:, text.prompt - pads :]
        _equal(logits[row : row + 1], own, f"left padding: row {row} with {pads} pads in the batch, and alone")


def _prompted(subject: Subject, text: Text, ids: Tensor | None = None) -> tuple[Any, Any]:
    ids = text.input_ids if ids is None else ids
    cache, model = subject.cache(text.keep_ratio), small_model(str(ids.device))
    feed(model, ids[:, : text.prompt], cache, [text.prompt])
    later = ids[:, text.prompt :]
    places = torch.arange(text.prompt, ids.shape[1], device=ids.device).expand(later.shape)

    def resume(cache: Any, rows: Tensor | slice = slice(None)) -> Tensor:
        chunk = _chunk(subject, text)
        sizes = steps(chunk, later.shape[1], chunk)
        return feed(model, later[rows], cache, sizes, position_ids=places[rows])

    return cache, resume


@check("cache")
def check_rows_move(subject: Subject, text: Text) -> None:
    """Beam reorder, choice and repetition of rows keep positions and contents together."""
    order = torch.arange(text.input_ids.shape[0], device=text.input_ids.device).flip(0)
    should = _prompted(subject, text)
    expected = should[1](should[0])
    cache, resume = _prompted(subject, text)
    cache.reorder_cache(order)
    _equal(resume(cache, order), expected[order], f"rows move: after reorder_cache({order.tolist()})")
    cache, resume = _prompted(subject, text)
    cache.batch_select_indices(order[:1])
    _equal(
        resume(cache, order[:1]), expected[order[:1]], f"rows move: after batch_select_indices({order[:1].tolist()})"
    )
    cache, resume = _prompted(subject, text)
    cache.batch_repeat_interleave(2)
    twice = torch.arange(len(order), device=order.device).repeat_interleave(2)
    _equal(resume(cache, twice), expected[twice], "rows move: after batch_repeat_interleave(2)")


@check("cache")
def check_copy(subject: Subject, text: Text) -> None:
    """A deep copy goes on like its original, and apart from it."""
    cache, resume = _prompted(subject, text)
    twin = copy.deepcopy(cache)
    first = resume(cache)
    _equal(resume(twin), first, "copy: the copy, after the original went on,")


@check("cache")
def check_reset(subject: Subject, text: Text) -> None:
    """A sequence after another in the same object equals a fresh cache."""
    cache, _ = _run(subject, text, text.input_ids.flip(1))
    cache.reset()
    model = small_model(str(text.input_ids.device))
    sizes = steps(text.prompt, text.input_ids.shape[1], _chunk(subject, text))
    again = feed(model, text.input_ids, cache, sizes)[:, text.prompt :]
    _equal(again, _run(subject, text)[1], "reset: a second sequence after reset(), and a fresh cache")


@check("cache")
def check_crop(subject: Subject, text: Text) -> None:
    """crop is exact back to the last compression, and refused beyond it."""
    cache, resume = _prompted(subject, text)
    stored = [layer.keys.shape[2] for layer in cache.layers]
    if min(stored) == text.prompt:
        raise Vacuous  # nothing was evicted
    try:
        cache.crop(-1)  # newer releases of transformers take only how many tokens to remove
    except Exception:
        pass
    else:
        raise Refuted(
            f"crop: crop(-1) after a prompt of {text.prompt}, of which {min(stored)} are stored, was not refused, "
            "but the tokens that it would bring back are gone"
        )
    model, ids = small_model(str(text.input_ids.device)), text.input_ids
    cache, resume = _prompted(subject, text)
    expected = resume(cache)
    cache, resume = _prompted(subject, text)
    wrong = ids[:, :1]
    feed(model, wrong, cache, [1], position_ids=torch.full_like(wrong, text.prompt))
    if any(layer.keys.shape[2] != n + 1 for layer, n in zip(cache.layers, stored, strict=True)):
        return  # it compresses after every call: crop cannot go back
    try:
        cache.crop(-1)
    except Exception:
        return
    _equal(resume(cache), expected, "crop: one token fed and cropped again")
