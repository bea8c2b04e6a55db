"""A transformers cache in all that generate() does with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from knorm.laws import shown
from knorm.laws.blame import is_refusal
from knorm.laws.model import apart, feed, gap, keeps_all, small_model, steps
from knorm.laws.registry import Refusal, Refuted, Silent, Vacuous, check
from knorm.laws.strategies import Text, distinct
from knorm.laws.subjects import Subject, in_words


def _chunk(subject: Subject, text: Text) -> int:
    """One token a call where layers are skipped: transformers makes one mask for all layers, of whatever length."""
    return 1 if subject.traits.skip_layers else text.chunk


def _run(subject: Subject, text: Text, ids: Tensor | None = None, **options: Any) -> tuple[Any, Tensor]:
    """A fresh cache fed the whole text as it says, and the logits after the prompt."""
    ids = text.input_ids if ids is None else ids
    model = small_model(str(ids.device))
    cache = subject.cache(text.keep_ratio, model, rows=len(ids))
    logits = feed(model, ids, cache, steps(text.prompt, ids.shape[1], _chunk(subject, text)), **options)
    return cache, logits[:, text.prompt :]


def _equal(got: Tensor, should: Tensor, what: str, most: float = 1e-8) -> bool:
    """Raise Refuted where logits differ; tell whether all of them are numbers, so that something was compared."""
    if (difference := float(apart(got, should).max())) > most:
        said = f"differ by {difference:.3g}" if isfinite(difference) else "are NaN or infinite in one of the two"
        raise Refuted(f"{what}: logits {said}, but should be equal")
    return not got.isnan().any()


def _told(*compared: bool) -> None:
    """Raise Vacuous where nothing was compared."""
    if not any(compared):
        raise Vacuous("both runs predict NaN")


@check("cache", needs={"positions": "kept"})
def check_positions(subject: Subject, text: Text) -> None:
    """Positions continue from the tokens seen, not from the tokens stored."""
    subject.shows = shown.LENGTH
    cache, logits = _run(subject, text)
    length = text.input_ids.shape[1]
    if cache.get_seq_length() != length:
        raise Refuted(
            f"positions: get_seq_length() is {cache.get_seq_length()} after {length} tokens, but should be {length}: "
            "the next token's position is taken from it"
        )
    places = torch.arange(length, device=text.input_ids.device).expand(text.input_ids.shape)
    subject.shows = shown.POSITIONS
    _told(_equal(logits, _run(subject, text, position_ids=places)[1], "positions: given and left to the model"))


@check("cache", needs={"lossy": 0.0, "positions": "kept"})
def check_shift(subject: Subject, text: Text) -> None:
    """A suffix's logits do not change when prefix and suffix shift together."""
    ids = distinct(text.input_ids)
    subject.shows = shown.shifted(ids.tolist())
    places = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    logits, shifted = (_run(subject, text, ids, position_ids=places + by)[1] for by in (0, 9))
    # transformers rotates by angles in float32, whatever the model's dtype
    _told(_equal(logits, shifted, "shift: positions from 0 and from 9", 1e-4))


@check("cache", needs={"lossy": 0.0})
def check_chunks(subject: Subject, text: Text) -> None:
    """At ratio 1, tokens fed 1, 2, 7 or all at a time get the plain model's logits."""
    model, ids = small_model(str(text.input_ids.device)), text.input_ids
    subject.shows = shown.CHUNKS
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
    cache = subject.cache(1.0, model, rows=len(ids))
    logits = feed(model, ids, cache, steps(text.prompt, ids.shape[1], text.chunk))
    if not (subject.budgeted or keeps_all(cache, ids.shape[1])):
        raise Silent  # a budget of its own, which no ratio lifts
    _told(_equal(logits, plain, f"chunks: a prompt of {text.prompt}, then {text.chunk} at a time, and the plain model"))


@check("cache", needs={"lossy": 0.0, "positions": "kept"})
def check_left_padding(subject: Subject, text: Text) -> None:
    """Pads are never attended nor retained before real tokens: each padded row equals itself alone."""
    ids = text.input_ids
    mask = (torch.arange(ids.shape[1]) >= torch.tensor(text.pads)[:, None]).long().to(ids.device)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    subject.shows = shown.padded(text.pads)
    logits = _run(subject, text, attention_mask=mask, position_ids=places)[1]
    model = small_model(str(ids.device))
    told = []
    for row, pads in enumerate(text.pads):
        subject.shows = shown.padded(text.pads, row)
        cache, alone = subject.cache(text.keep_ratio, model), ids[row : row + 1, pads:]
        sizes = steps(text.prompt - pads, alone.shape[1], _chunk(subject, text))
        own = feed(model, alone, cache, sizes, position_ids=places[row : row + 1, pads:])[:, text.prompt - pads :]
        what = f"left padding: row {row} with {pads} pads in the batch, and alone"
        told.append(_equal(logits[row : row + 1], own, what))
    _told(*told)


def _prompted(subject: Subject, text: Text, ids: Tensor | None = None) -> tuple[Any, Any]:
    ids = text.input_ids if ids is None else ids
    model = small_model(str(ids.device))
    cache = subject.cache(text.keep_ratio, model, rows=len(ids))
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
    subject.shows, listed = shown.RESUMED, order.tolist()
    should = _prompted(subject, text)
    expected = should[1](should[0])
    cache, resume = _prompted(subject, text)
    subject.shows = shown.moved(listed, "reorder_cache(order)", "order")
    _does("reorder_cache", lambda: cache.reorder_cache(order))
    told = [_equal(resume(cache, order), expected[order], f"rows move: after reorder_cache({order.tolist()})")]
    cache, resume = _prompted(subject, text)
    subject.shows = shown.moved(listed, "batch_select_indices(order)", "order[:1]")
    _does("batch_select_indices", lambda: cache.batch_select_indices(order[:1]))
    what = f"rows move: after batch_select_indices({order[:1].tolist()})"
    told.append(_equal(resume(cache, order[:1]), expected[order[:1]], what))
    cache, resume = _prompted(subject, text)
    twice = torch.arange(len(order), device=order.device).repeat_interleave(2)
    subject.shows = shown.moved(listed, "batch_repeat_interleave(2)", f"torch.tensor({twice.tolist()})")
    _does("batch_repeat_interleave", lambda: cache.batch_repeat_interleave(2))
    _told(*told, _equal(resume(cache, twice), expected[twice], "rows move: after batch_repeat_interleave(2)"))


@check("cache")
def check_copy(subject: Subject, text: Text) -> None:
    """A deep copy goes on like its original, and apart from it."""
    subject.shows = shown.COPIED
    cache, resume = _prompted(subject, text)
    twin = copy.deepcopy(cache)
    first = resume(cache)
    _told(_equal(resume(twin), first, "copy: the copy, after the original went on,"))


@check("cache")
def check_reset(subject: Subject, text: Text) -> None:
    """A sequence after another in the same object equals a fresh cache, with another batch size and length too."""
    model, before = small_model(str(text.input_ids.device)), text.input_ids.flip(1)
    subject.shows = shown.RESET
    cache, _ = _run(subject, text, before)
    cache.reset()
    sizes = steps(text.prompt, text.input_ids.shape[1], _chunk(subject, text))
    again = feed(model, text.input_ids, cache, sizes)[:, text.prompt :]
    told = _equal(again, _run(subject, text)[1], "reset: a second sequence after reset(), and a fresh cache")
    other = replace(text, input_ids=torch.cat([before, before.flip(1)])[: len(before) + 1].repeat(1, 2)[:, 1:])
    subject.shows = shown.reset_for(other.input_ids.tolist())
    cache.reset()
    try:
        again = feed(model, other.input_ids, cache, steps(text.prompt, other.input_ids.shape[1], _chunk(subject, text)))
    except Refuted as error:
        rows = f"{len(before)} rows, then {len(other.input_ids)}"
        raise Refuted(f"reset: after reset() another batch is not read ({rows}): {error}") from error
    fresh = _run(subject, other)[1]
    what = "reset: another batch and length after reset(), and a fresh cache"
    _told(told, _equal(again[:, text.prompt :], fresh, what))


def _does(what: str, function: Callable[[], Any]) -> None:
    """Have a cache do something to its rows. Raises Refuted where it cannot, Refusal where it says why."""
    try:
        function()
    except Exception as error:
        if is_refusal(error):
            raise Refusal(f"{what}: {error}") from error
        raise Refuted(f"rows move: {what} raised {in_words(error)}") from error


def _cropped(cache: Any, tokens: int) -> bool:
    """Have a cache forget its newest tokens; False where it refuses to, however it says so."""
    if any(_warns(layer) for layer in cache.layers):
        return False
    try:
        cache.crop(-tokens)  # newer releases of transformers take only how many tokens to remove
    except Exception:
        return False
    return True


def _warns(layer: Any) -> bool:
    """Tell whether a layer leaves crop to transformers, and says beforehand that it would be wrong."""
    own = str(getattr(type(layer).crop, "__module__", "")) if hasattr(layer, "crop") else ""
    return own.startswith("transformers.") and getattr(layer, "is_croppable", True) is False


@check("cache")
def check_crop(subject: Subject, text: Text) -> None:
    """crop is exact back to the last compression, and refused beyond it; it never is something else in silence."""
    model, ids = small_model(str(text.input_ids.device)), text.input_ids
    subject.shows = shown.RESUMED
    cache, resume = _prompted(subject, text)
    expected = resume(cache)
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits[:, text.prompt :]
    cache, resume = _prompted(subject, text)
    told = []
    if gap(expected[:, :1], plain[:, :1]) > max(1e-8, subject.traits.lossy):  # something of the prompt is gone
        subject.shows = shown.CROP_REFUSED
        if _cropped(cache, 1):
            raise Refuted(
                f"crop: crop(-1) after a prompt of {text.prompt} was not refused, but the prompt was compressed: "
                "what it was like a token earlier is gone"
            )
    elif text.prompt > 1 and _cropped(cache, 1):
        subject.shows = shown.CROPPED_PROMPT
        again = ids[:, text.prompt - 1 : text.prompt]
        feed(model, again, cache, [1], position_ids=torch.full_like(again, text.prompt - 1))
        what = "crop: the prompt's last token cropped and fed again"
        told.append(_equal(resume(cache), expected, what, _near(subject)))
    for tokens in (1, 2):
        cache, resume = _prompted(subject, text)
        subject.shows = shown.cropped(tokens)
        wrong = ids[:, :1].expand(-1, tokens)
        places = torch.arange(text.prompt, text.prompt + tokens, device=ids.device).expand(wrong.shape)
        feed(model, wrong, cache, [1] * tokens, position_ids=places)
        if _cropped(cache, tokens):
            fed = "one token" if tokens == 1 else f"{tokens} tokens"
            told.append(_equal(resume(cache), expected, f"crop: {fed} fed and cropped again", _near(subject)))
    _told(*told or [True])  # what is refused throughout is answered


def _near(subject: Subject) -> float:
    """How far logits may lie apart: rounded keys and values are rounded again."""
    return 1e-8 if not subject.traits.lossy else 10.0 * subject.traits.lossy
