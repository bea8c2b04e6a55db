"""Which tokens each query after the prompt saw, recovered from the keys and values that its attention was given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from knorm.methods.method import Session
from knorm.methods.watch import Seen
from knorm.model_attention import attention_beside


class Beside:
    """Stand beside a method's run: in the prompt's call, and in those after it. By default nothing happens there."""

    def reading(self, session: Session) -> AbstractContextManager[None]:
        """Open what holds while `session` reads the prompt; the prefill phase ends after it."""
        return nullcontext()

    def decoding(self, session: Session) -> AbstractContextManager[None]:
        """Open what holds in all calls of `session` after the prompt."""
        return nullcontext()


_NONE = -(2**63)  # a fingerprint that no vector is looked for by


class Unrecoverable(ValueError):
    """Say why what a method's queries see cannot be told token by token."""


def fingerprints(vectors: Tensor) -> Tensor:
    """Map `vectors` to integers that are equal where all bits are: [..., head_dim] -> int64 [...]."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[vectors.element_size()]
    bits = vectors.contiguous().view(whole).to(torch.int64)
    generator = torch.Generator().manual_seed(vectors.shape[-1])
    factors = torch.randint(-(2**62), 2**62, (vectors.shape[-1],), generator=generator) * 2 + 1
    return (bits * factors.to(vectors.device)).sum(-1)


class Recovery(Seen, Beside):
    """Recover a run's schedule: which of its tokens each query after the prompt saw, in each layer and key/value head.

    A slot that attention is given is the token whose key, as the model first computed it, it equals bit for bit; where
    a method renumbers what it retains, or changes keys otherwise, the token whose value it equals.

    Args:
        rows: of the batch.
        prompt_length: tokens of the prompt.
        length: tokens of each row.

    Attributes:
        changed: "keys", "values": what is not, in some slot that was seen, as the model computed it.
        shift: what the method adds to the positions of tokens after the prompt.
    """

    def __init__(self, rows: int, prompt_length: int, length: int) -> None:
        Seen.__init__(self)
        self.rows, self.prompt_length, self.length = rows, prompt_length, length
        self.changed: set[str] = set()
        self.shift = 0
        self.unknown = 0  # slots that are no token's, of those seen
        self._keys: dict[int, Tensor] = {}  # by layer: fingerprints [rows, kv_heads, tokens so far]
        self._values: dict[int, Tensor] = {}
        self._gone: dict[int, Tensor] = {}
        self._again = False

    @contextmanager
    def reading(self, session: Session) -> Iterator[None]:
        """Note the prompt's keys and values; count what later queries see here instead of in the session."""
        with attention_beside(session.model, self._read):
            yield
        session.seen = self

    @contextmanager
    def decoding(self, session: Session) -> Iterator[None]:
        """Note where the tokens after the prompt stand; renumbered, the prompt's are told by their values alone."""
        self.shift = session.next_position() - session.tokens
        if self.shift:
            self._keys = {layer: torch.full_like(keys, _NONE) for layer, keys in self._keys.items()}
        yield

    def _read(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        layer, tokens = int(module.layer_idx), query.shape[2]  # type: ignore[arg-type]
        if tokens != self.prompt_length:
            raise Unrecoverable(f"its prompt has {tokens} tokens, but the text's has {self.prompt_length}")
        if key.shape[2] < tokens:
            raise Unrecoverable(f"the prompt's own {tokens} tokens attend to {key.shape[2]} keys")
        self._keys[layer], self._values[layer] = fingerprints(key[:, :, :tokens]), fingerprints(value[:, :, :tokens])
        return key, value

    def add(self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        """Find the tokens that one call's queries see."""
        start = self.prompt_length + self.queries.get(layer, 0) // self.rows
        super().add(layer, query, key, value, mask)
        if layer not in self._keys:
            raise Unrecoverable("it reads the prompt by an attention of its own")
        shown = self._shown(query, key, mask)
        there = shown.any(2)
        keys, values = fingerprints(key), fingerprints(value)
        places = _places(keys, self._keys[layer])
        fresh = _last(there, query.shape[2])
        if bool((fresh.sum(-1) != query.shape[2]).any()):
            raise Unrecoverable(f"in a call of {query.shape[2]} tokens fewer are seen")
        for known, new in ((self._keys, keys), (self._values, values)):
            added = new[fresh].view(*new.shape[:2], query.shape[2])
            known[layer] = torch.cat([known[layer], added], -1)
        now = torch.arange(start, start + query.shape[2], device=key.device)
        places[fresh] = now.repeat(places.shape[0] * places.shape[1])
        self._compare(layer, there, places, values)
        self._note(layer, shown, places, start)

    def _shown(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        """Which slots each query sees, in any query head of a group: bool [rows, kv_heads, queries, slots]."""
        shape = (len(key), key.shape[1], query.shape[2], key.shape[2])
        if mask is None:
            seen = torch.ones(shape, dtype=torch.bool, device=key.device)
            return seen if shape[2] == 1 else seen.tril()
        seen = mask if mask.dtype == torch.bool else mask == 0
        return seen.expand(len(key), query.shape[1], *shape[2:]).unflatten(1, (key.shape[1], -1)).any(2)

    def _compare(self, layer: int, there: Tensor, places: Tensor, values: Tensor) -> None:
        """Note which slots hold what the model did not compute; find the tokens of changed keys by their values."""
        unmatched = there & (places < 0)
        if bool(unmatched.any()):
            self.changed.add("keys")
            for row, head in unmatched.any(-1).nonzero().tolist():
                _fill(places[row, head], unmatched[row, head], values[row, head], self._values[layer][row, head])
        own = self._values[layer].gather(-1, places.clamp(min=0))
        if bool((there & (places >= 0) & (own != values)).any()):
            self.changed.add("values")
        unknown = int((there & (places < 0)).sum())
        if unknown:
            self.changed.add("values")
        self.unknown += unknown

    def _note(self, layer: int, shown: Tensor, places: Tensor, start: int) -> None:
        """Note for each token the first query that did not see it."""
        rows, heads, queries, _ = shown.shape
        seen = torch.zeros(rows, heads, queries, self.length + 1, dtype=torch.uint8, device=shown.device)
        index = places.where(places >= 0, self.length)[:, :, None].expand(shown.shape)
        seen = seen.scatter_reduce_(3, index, shown.to(torch.uint8), "amax")[..., : self.length].bool()
        token, at = torch.arange(self.length, device=shown.device), torch.arange(start, start + queries)
        at = at.to(shown.device)[:, None]
        late = torch.where(~seen & (token <= at), at, self.length).amin(2)
        before = self._gone.get(layer, torch.full_like(late, self.length))
        gone = torch.minimum(before, late)
        self._again |= bool((seen & (at > gone[:, :, None])).any())
        self._gone[layer] = gone

    def schedule(self) -> list[Tensor]:
        """Return for each layer the first query that no longer sees a token: int64 [rows, kv_heads, length].

        Raises:
            Unrecoverable: with the reason.
        """
        gone = [self._gone[layer] for layer in sorted(self._gone)]
        if self.unknown:
            raise Unrecoverable("attention is given keys and values that are no token's of the text")
        if self._again:
            raise Unrecoverable("a token that a query does not see is seen again by a later one")
        if any(bool((lost <= torch.arange(self.length, device=lost.device)).any()) for lost in gone):
            raise Unrecoverable("a token does not see itself")
        return gone

    @property
    def evicts(self) -> bool:
        """Tell whether some query sees fewer tokens than had been fed."""
        fed = self.prompt_length + 1 + (next(iter(self.queries.values())) // self.rows - 1) / 2
        return bool((self.mean() < fed - 1e-9).any())


class Exact(Beside):
    """Lets queries after the prompt attend to keys and values as the model computed them, in some layers.

    Args:
        layers: those in which they do; None: all.
        keys: the keys are exact.
        values: the values are.

    For caches that store each token, in time order, and change only its numbers.
    """

    def __init__(self, layers: frozenset[int] | None = None, *, keys: bool = True, values: bool = True) -> None:
        self.layers, self.keys, self.values = layers, keys, values
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def reading(self, session: Session) -> Iterator[None]:
        """Keep what the cache is given for the prompt."""
        with self._told(session.cache):
            yield

    @contextmanager
    def decoding(self, session: Session) -> Iterator[None]:
        """Keep what the cache is given from now on too, and let queries attend to that."""
        with self._told(session.cache), attention_beside(session.model, self._attended):
            yield

    @contextmanager
    def _told(self, cache: Any) -> Iterator[None]:
        own = cache.update

        def update(key: Tensor, value: Tensor, layer: int, *rest: Any, **keywords: Any) -> Any:
            known = self._known.get(layer)
            new = (
                (key, value)
                if known is None
                else [torch.cat(both, 2) for both in zip(known, (key, value), strict=True)]
            )
            self._known[layer] = new[0], new[1]
            return own(key, value, layer, *rest, **keywords)

        cache.update = update
        try:
            yield
        finally:
            del cache.update

    def _attended(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        if self.layers is not None and layer not in self.layers:
            return key, value
        both = zip(self._known[layer], (key, value), strict=True)
        exact = [torch.cat([known, slots[:, :, known.shape[2] :]], 2) for known, slots in both]  # what is spare stays
        return exact[0] if self.keys else key, exact[1] if self.values else value


def _places(slots: Tensor, tokens: Tensor) -> Tensor:
    """Find each slot among tokens by fingerprint: int64 [rows, kv_heads, slots], -1 for those that are none."""
    ordered, index = tokens.sort(dim=-1)
    at = torch.searchsorted(ordered, slots).clamp(max=tokens.shape[-1] - 1)
    return torch.where(ordered.gather(-1, at) == slots, index.gather(-1, at), -1)


def _last(where: Tensor, count: int) -> Tensor:
    """Return the last `count` true entries of each row."""
    after = where.flip(-1).cumsum(-1).flip(-1)
    return where & (after <= count)


def _fill(places: Tensor, unmatched: Tensor, values: Tensor, tokens: Tensor) -> None:
    """Find unmatched slots of one head by their values, each after the slot before it: repeated tokens look alike."""
    by_value: dict[int, list[int]] = {}
    for token, value in enumerate(tokens.tolist()):
        by_value.setdefault(value, []).append(token)
    taken, before = set(places[~unmatched].tolist()), -1
    for slot in unmatched.nonzero()[:, 0].tolist():
        candidates = [token for token in by_value.get(int(values[slot]), ()) if token not in taken]
        later = [token for token in candidates if token > before]
        before = later[0] if later else before
        token = (later or candidates or [-1])[0]
        places[slot] = token
        taken.add(token)
