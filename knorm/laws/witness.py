"""The witness: what attention is given while a method runs on a probe model, call by call and layer by layer.

It stands around the model's own attention, under whatever a method puts over it, and reads which tokens each query
sees, in the order of their slots, and whether their keys and values are those that were given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from knorm.laws.blame import is_ours, is_refusal
from knorm.laws.probe import (
    FOREIGN,
    Draws,
    attention_modules,
    exact,
    kv_heads_of,
    probe,
    probe_tokenizer,
    projected,
    read_tags,
)
from knorm.laws.ranked import Ranked
from knorm.laws.reading import Reading
from knorm.laws.registry import Malformed, Refusal
from knorm.laws.subjects import Subject, in_words
from knorm.methods.caches import tensors_of
from knorm.model_attention import cache_keyword, implementation_of, observed

EMPTY, MIXED, STRANGE, ASTRAY = -1, -2, -3, -4  # what a slot may hold in place of a token
IN_WORDS = {
    EMPTY: "an empty slot, all zeros",
    MIXED: "a value that is no token's",
    STRANGE: "a token of a call that the method made by itself",
    ASTRAY: "a token of another row, head or layer",
}


@dataclass
class Look:
    """Record what the attention of one layer was given in one call.

    Attributes:
        call: 0 for the prompt.
        layer: its index.
        positions: of the call's own tokens, int64 [queries].
        tokens: the position of the token in each slot, or EMPTY ... ASTRAY: int64 [rows, kv_heads, slots].
        seen: which slots a query sees, after the mask: bool [rows, kv_heads, groups, queries, slots].
        key_error: largest difference of a slot's key from the one given, relative to the largest number of that; 0
            where keys are the model's own: float [rows, kv_heads, slots].
        value_error: the same for values.
    """

    call: int
    layer: int
    positions: Tensor
    tokens: Tensor
    seen: Tensor
    key_error: Tensor
    value_error: Tensor

    def seen_tokens(self, row: int, head: int, query: int, group: int = 0) -> list[int]:
        """List the tokens that a query sees, in the order of their slots.

        Args:
            row: of the batch.
            head: key/value head.
            query: its place in the call, from 0.
            group: which of the query heads that share the key/value head.

        Returns:
            Their positions; EMPTY ... ASTRAY for what is no token.
        """
        shown: list[int] = self.tokens[row, head][self.seen[row, head, group, query]].tolist()
        return shown

    def seen_by_token(self, length: int) -> Tensor:
        """Tell which of `length` tokens each query sees: bool [rows, kv_heads, groups, queries, length]."""
        rows, heads, groups, queries, _ = self.seen.shape
        index = self.tokens.where((self.tokens >= 0) & (self.tokens < length), length)
        index = index[:, :, None, None].expand_as(self.seen)
        counts = torch.zeros(rows, heads, groups, queries, length + 1, dtype=torch.int32)
        return counts.scatter_add_(-1, index, self.seen.int())[..., :length] > 0


@dataclass
class Witnessed:
    """Record a reading, as attention saw it.

    Attributes:
        reading: what was read.
        looks: a Look for each call and layer.
        logits: float [rows, length, vocabulary]; of the prompt, the last token's.
        prompt: tokens of the prompt as it was read: a method may have added to it.
        reported: the compression_ratio that a press has after the prompt; None for what has none.
        length: tokens that were fed in all.
        ranked: what was ranked in a reading in half precision; None in another.
        bytes_held: memory that the cache keeps alive after the prompt.
    """

    reading: Reading
    looks: list[Look] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    length: int = 0
    prompt: int = 0
    reported: float | None = None
    ranked: Ranked | None = None
    bytes_held: int = 0

    @property
    def evicted(self) -> bool:
        """Tell whether a query after the prompt did not see a token that came before it."""
        for look in self.looks:
            before = int(look.positions[-1]) + 1
            if look.call and not look.seen_by_token(before)[..., -1, :].all():
                return True
        return False


class Opened(Protocol):
    """Describe a method that is open on a model: a methods.method.Session, or what stands for a bare cache."""

    cache: Any

    def prompt(self, input_ids: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
        """Return the keywords of the prompt's call, for `input_ids` and `position_ids` int64 [rows, tokens]."""

    def end_prompt(self) -> int:
        """End the prefill phase; return the position of the next token."""


class BareCache:
    """Hold a `cache` that a model is given without anything around it: transformers' own masks, whatever they are.

    Attributes:
        renumbered: True where positions are left to the model, which takes them from the cache.
    """

    def __init__(self, cache: Any, *, renumbered: bool = False) -> None:
        self.cache, self.renumbered, self.tokens = cache, renumbered, 0

    def prompt(self, input_ids: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
        """Return the keywords of the prompt's call: `input_ids` and `position_ids`, int64 [rows, tokens]."""
        self.tokens = input_ids.shape[1]
        return {"input_ids": input_ids, "position_ids": position_ids}

    def end_prompt(self) -> int:
        """Return the position of the next token."""
        return int(self.cache.get_seq_length()) if self.renumbered else self.tokens


class _Given(NamedTuple):
    """Hold what one call of an attention was given, as it was then."""

    call: int
    layer: int
    start: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Return rows, key/value heads and width."""
        return (*self.value.shape[:2], *self.value.shape[3:])


class _Recorder:
    """Writes down what the model's own attention is given in each call of the run's own; what that was is read at once
    when the run is over, since a run has many small calls.
    """

    def __init__(self, model: PreTrainedModel, draws: Draws) -> None:
        self.draws, self.call = draws, 0
        self.eager = implementation_of(model.config) == "eager"
        self.layer_of = {id(module): layer for layer, module in enumerate(attention_modules(model))}
        self.heads = kv_heads_of(model)
        self._given: list[_Given] = []

    def __call__(
        self, attention: Any, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **keywords: Any
    ) -> Any:
        result = attention(module, query, key, value, mask, **keywords)  # first: what does not fit is the method's
        layer, start = self.layer_of.get(id(module)), self.draws.start
        if start is not None and layer is not None:
            copies = query, key.clone(), value.clone(), None if mask is None else mask.clone()  # caches write in place
            self._given.append(_Given(self.call, layer, start, *copies))
        return result

    def looks(self) -> list[Look]:
        """Read what was written down: a Look for each call and layer."""
        shapes = dict.fromkeys(given.shape for given in self._given)
        read = {
            id(given): look
            for shape in shapes
            for given, look in self._read([given for given in self._given if given.shape == shape])
        }
        return [read[id(given)] for given in self._given]

    def _read(self, every: list[_Given]) -> Iterator[tuple[_Given, Look]]:
        """Read calls of one shape, with what they were given side by side along the slots."""
        value, sizes = torch.cat([given.value for given in every], 2), [given.value.shape[2] for given in every]
        layer = torch.tensor([given.layer for given in every]).repeat_interleave(torch.tensor(sizes))
        plain = exact(value)
        fields, sound = read_tags(value, plain)
        tokens = fields["position"].clone()
        places = torch.arange(value.shape[0])[:, None, None], torch.arange(self.heads)[None, :, None]
        at_home = (fields["row"] == places[0]) & (fields["head"] == places[1]) & (fields["layer"] == layer)
        tokens[tokens >= FOREIGN] = STRANGE
        tokens[sound & ~at_home] = ASTRAY
        tokens[~sound] = MIXED
        value_error = torch.zeros(tokens.shape)
        if not plain:
            tokens[(value == 0).all(-1)] = EMPTY
            off = (value.float().abs() - 1).abs().amax(-1)
            value_error = torch.where(tokens >= 0, off, 0.0).nan_to_num(torch.inf, torch.inf)
        key_error = error = torch.zeros(tokens.shape)
        keys: tuple[Tensor, ...] = ()
        if self.draws.given is not None:
            at = (layer, *places, tokens.clamp(min=0) % self.draws.length)
            own, key = self.draws.given[at], torch.cat([given.key for given in every], 2).float()
            if not torch.equal(key, own):  # else all are the keys that were given, as mostly
                error = ((key - own).abs().amax(-1) / own.abs().amax(-1)).nan_to_num(torch.inf, torch.inf)
                key_error = torch.where(tokens >= 0, error, 0.0)
                keys = own.split(sizes, 2) if (error > 1e-3).any() else ()
        parts = zip(every, *(x.split(sizes, 2) for x in (tokens, key_error, value_error, error)), strict=True)
        for index, (given, *read, off) in enumerate(parts):
            rows, heads, queries, _ = given.query.shape
            slots, shape = given.key.shape[2], (rows, self.heads, heads // self.heads, queries, given.key.shape[2])
            seen = _allowed(given.mask, queries, slots, self.eager).expand(rows, heads, queries, slots).reshape(shape)
            if keys and (off > 1e-3).any():
                seen = seen & ~_let_through(given.query, given.key, keys[index], seen)
            positions = given.start + torch.arange(queries)
            yield given, Look(given.call, given.layer, positions, read[0], seen, read[1], read[2])


def _allowed(mask: Tensor | None, queries: int, slots: int, eager: bool) -> Tensor:
    """Tell what a mask lets through: bool, broadcast to [rows, heads, queries, slots]."""
    if mask is None:  # PyTorch's own causal rule counts from the first slot, and is not applied to one query
        everything = torch.ones(1, 1, queries, slots, dtype=torch.bool)
        return everything if eager or queries == 1 else everything.tril()
    shown = mask[..., :slots]
    return shown if shown.dtype == torch.bool else shown > -1e4


def _let_through(query: Tensor, key: Tensor, given: Tensor, allowed: Tensor) -> Tensor:
    """Tell which slots have a key of another's making that no query can see, however the mask is."""
    replaced = nn.functional.cosine_similarity(key.float(), given, dim=-1) < 0.5
    if not replaced.any():
        return torch.zeros_like(allowed)
    rows, heads, groups, queries, _ = allowed.shape
    scores = query.float().view(rows, heads, groups, queries, -1) @ key.float()[:, :, None].mT * key.shape[-1] ** -0.5
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num()
    return replaced[:, :, None, None] & (weights < torch.finfo(torch.float32).tiny)


@contextmanager
def _opened(subject: Subject, model: PreTrainedModel, reading: Reading) -> Iterator[Opened]:
    """Open a subject's method on a model, or make its cache."""
    length = reading.length + 1  # a method may add a token to the prompt
    if subject.method is None:
        renumbered = subject.traits.positions == "renumbered"
        yield BareCache(subject.cache(reading.keep_ratio, model, length, reading.rows), renumbered=renumbered)
        return
    method = subject.method(reading.keep_ratio)
    # not method.session: what is raised comes out as it is, to be told from refusals and from knorm's own
    with method._opened(model, length, reading.rows, probe_tokenizer()) as session:
        for module in attention_modules(model):
            module.masked_key_indices = None  # type: ignore[assignment]  # as kvpress' attention has it from the prompt on
        yield session


def witness(subject: Subject, reading: Reading) -> Witnessed:
    """Run a subject on a probe and write down what attention saw.

    Args:
        subject: a laws.subjects.Subject with a method or a cache.
        reading: what is read.

    Returns:
        What was seen.

    Whatever the subject raises is raised as it is.
    """
    attention = "eager" if subject.eager else "sdpa"
    model = probe(reading.family, attention, rotary=reading.real, dtype=reading.dtype)
    draws = Draws(
        model,
        reading.rows,
        reading.length + 8,
        reading.seed + 1,
        reading.scale,
        drawn=not reading.real,
        row=reading.row,
        noisy=reading.dtype != "float32",  # where what is ranked matters, no value may be constant
    )
    run = Witnessed(reading)
    recorder = _Recorder(model, draws)
    torch.manual_seed(reading.seed)
    half = reading.dtype != "float32"  # what is ranked matters there, and watching takes time
    with (
        Ranked() if half else nullcontext() as ranked,
        torch.no_grad(),
        projected(draws),
        observed(model, recorder),
        _opened(subject, model, reading) as method,
    ):
        _read(model, method, run, draws, recorder)
    run.ranked, run.looks = ranked, recorder.looks()
    return run


def _read(model: PreTrainedModel, method: Opened, run: Witnessed, draws: Draws, recorder: _Recorder) -> None:
    reading = run.reading
    ids, keyword = reading.input_ids, cache_keyword(model)
    places = torch.arange(reading.length).expand(ids.shape)
    given = method.prompt(ids[:, : reading.prompt], places[:, : reading.prompt])
    draws.begin(0)
    run.logits.append(model(**given, use_cache=True, **{keyword: method.cache}).logits[:, -1:])
    run.length = run.prompt = draws.tokens or reading.prompt
    draws.end()
    shift, start = method.end_prompt() - run.length, reading.prompt
    run.reported = _reported(method)
    run.bytes_held = held_bytes(method.cache)
    for call, size in enumerate(reading.calls, start=1):
        stop = start + size
        recorder.call = call
        own_positions = isinstance(method, BareCache) and method.renumbered
        options = {} if own_positions else {"position_ids": places[:, :size] + run.length + shift}
        draws.begin(run.length)
        out = model(input_ids=ids[:, start:stop], use_cache=True, **options, **{keyword: method.cache})
        draws.end()
        run.logits.append(out.logits)
        start, run.length = stop, run.length + size


def _reported(method: Opened) -> float | None:
    """Return the share that a press says it removed; None for a press that says nothing, or not yet."""
    try:
        press, layers = method.press, len(method.cache.layers)  # type: ignore[attr-defined]
        if len(getattr(press, "compression_ratios", ())) > layers:
            return None  # it counts layers that this model does not have
        ratio = press.compression_ratio
    except Exception:  # whatever a property raises
        return None
    return float(ratio) if isinstance(ratio, int | float) else None


def held_bytes(cache: Any) -> int:
    """Add up the bytes that `cache` keeps alive: of each storage, the whole, and once."""
    storages = {}
    for tensor in tensors_of(cache):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Unanswered(Malformed):
    """Say that the method broke off in a reading that it should have answered."""


MOST_RUNS = 400  # remembered


def witnessed(subject: Subject, reading: Reading) -> Witnessed:
    """Return what attention saw of a `reading` by `subject`; each is run once, and read by all laws.

    Raises:
        Refusal: the method declined the reading in a sentence of its own.
        Unanswered: it broke off otherwise.
    """
    if reading not in subject.runs:
        while len(subject.runs) >= MOST_RUNS:
            del subject.runs[next(iter(subject.runs))]
        subject.announce(repr(reading))
        try:
            subject.runs[reading] = witness(subject, reading)
        except (Exception, SystemExit) as error:
            if is_ours(error):
                raise
            kind = Refusal if is_refusal(error) else Unanswered
            subject.runs[reading] = kind(in_words(error))
            raise subject.runs[reading] from error
    run = subject.runs[reading]
    if isinstance(run, Exception):
        raise run
    return run
