"""Probe models: small models of real architectures whose keys are drawn and whose values say which token they are.

A value is 64 channels of +1 and -1, one bit each: the token's position and its complement, its row, its key/value head
and its layer. Bits survive rounding, and a value that was mixed out of two no longer agrees with its complement.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

WIDTH = 64  # of a head
LAYERS = 2
HEADS = 4
VOCABULARY = 128
FOREIGN = 2**14  # positions from here on are those of calls that a method makes itself
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HEADS * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 2 * WIDTH,
    "max_position_embeddings": 4096,
}
# What each architecture has besides the sizes that all share: heads are grouped wherever it knows groups.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "head_dim": WIDTH},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": WIDTH},
    "mistral": {"num_key_value_heads": 2, "head_dim": WIDTH, "sliding_window": None},
    "gpt_neox": {},
}
_FIELDS = (("position", 16), ("inverse", 16), ("row", 8), ("head", 8), ("layer", 8), ("fill", 8))
_FILL = 0x55
_FIELD_OF = torch.tensor([field for field, (_, count) in enumerate(_FIELDS) for _ in range(count)])
_BIT_OF = torch.tensor([bit for _, count in _FIELDS for bit in range(count)])
_WEIGHTS = torch.nn.functional.one_hot(_FIELD_OF).float() * (2.0**_BIT_OF)[:, None]  # what a channel's bit is worth


@lru_cache(maxsize=8)
def probe(
    family: str = "llama", attention: str = "sdpa", *, rotary: bool = False, dtype: str = "float32"
) -> PreTrainedModel:
    """Make a probe model, with seeded weights; the same one comes back for the same arguments.

    Args:
        family: one of FAMILIES.
        attention: "sdpa" or "eager".
        rotary: positions turn keys and queries. By default all angles are zero, so that drawn keys stay as drawn.
        dtype: "float32" or "float16".

    Returns:
        A model of 2 layers and 4 heads of 64, in eval mode.

    Example:
        >>> probe("qwen2").config.num_key_value_heads
        2
    """
    config = AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            spread = torch.randn(weight.shape, generator=generator)
            weight.copy_(0.1 * spread if weight.ndim == 2 else weight)
        if not rotary:
            model.base_model.rotary_emb.inv_freq.zero_()
    result: PreTrainedModel = model.to(getattr(torch, dtype))
    return result


@lru_cache(maxsize=1)
def probe_tokenizer() -> Any:
    """Make a tokenizer of the probes' vocabulary, for methods that read the prompt again in words of their own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": VOCABULARY - 1, **{f"w{n}": n for n in range(1, VOCABULARY - 1)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="w1")
    fast.chat_template = None
    return fast


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """List the attention module of each layer of `model`."""
    layers: Any = model.base_model.layers
    return [getattr(layer, "self_attn", None) or layer.attention for layer in layers]


def kv_heads_of(model: PreTrainedModel) -> int:
    """Return how many key/value heads a layer of `model` has."""
    return int(getattr(model.config, "num_key_value_heads", model.config.num_attention_heads))


def tagged(rows: int, heads: int, layer: int, positions: Tensor) -> Tensor:
    """Write values that name their token.

    Args:
        rows: of the batch.
        heads: key/value heads.
        layer: index of the layer.
        positions: of the tokens, below 2^16: int64 [tokens].

    Returns:
        Float [rows, heads, tokens, 64] of +1 and -1.
    """
    place = positions.expand(rows, heads, -1)
    parts = {
        "position": place,
        "inverse": 0xFFFF - place,
        "row": torch.arange(rows)[:, None, None].expand_as(place),
        "head": torch.arange(heads)[None, :, None].expand_as(place),
        "layer": torch.full_like(place, layer),
        "fill": torch.full_like(place, _FILL),
    }
    numbers = torch.stack([parts[name] for name, _ in _FIELDS], -1)
    return ((numbers[..., _FIELD_OF] >> _BIT_OF) & 1).float() * 2 - 1


_SOME = 512  # tokens; a table of their tags is kept, since most readings are shorter


@lru_cache(maxsize=32)
def _table(rows: int, heads: int, layer: int) -> Tensor:
    return tagged(rows, heads, layer, torch.arange(_SOME))


def _tags_of(rows: int, heads: int, layer: int, positions: Tensor) -> Tensor:
    """Return what `tagged` writes, from a table where the positions follow each other."""
    places = _follow(positions, _SOME)
    return tagged(rows, heads, layer, positions) if places is None else _table(rows, heads, layer)[:, :, places].clone()


def _follow(positions: Tensor, most: int) -> slice | None:
    """Return the slice that positions are, where each follows the one before and all lie below `most`."""
    if not len(positions):
        return None
    first, stop = int(positions[0]), int(positions[-1]) + 1
    return slice(first, stop) if stop - first == len(positions) and stop <= most else None


def read_tags(values: Tensor, plain: bool | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """Read values that `tagged` wrote, possibly rounded since.

    Args:
        values: [..., 64].
        plain: what `exact` says of them, where that is known.

    Returns:
        The fields by name, int64 [...], and whether they name a token at all: False for zeros and for mixtures.
    """
    values = values.float()
    numbers = ((values > 0).float() @ _WEIGHTS).long()  # sums of powers of two below 2^16: exact
    fields = dict(zip((name for name, _ in _FIELDS), numbers.unbind(-1), strict=True))
    sound = (fields["position"] + fields["inverse"] == 0xFFFF) & (fields["fill"] == _FILL)
    if not (exact(values) if plain is None else plain):
        size = values.abs()
        sound &= size.amin(-1) > 0.5 * size.amax(-1)
    return fields, sound


def exact(values: Tensor) -> bool:
    """Tell whether all `values`, of any shape, are the tags that `tagged` wrote, bit for bit; mostly they are."""
    return bool((values.abs() == 1).all())


@dataclass
class Draws:
    """Draw keys for a probe, tag its values, and know which tokens the call under way feeds.

    Attributes:
        model: the probe.
        rows: of the batch.
        length: tokens for which keys are drawn; later ones have those of the first again.
        seed: the same seed draws the same keys.
        scale: standard deviation of a key's numbers.
        drawn: False where the model projects its own keys.
        keys: float32 [layers, rows, kv_heads, tokens, 64], before a norm of keys that the architecture has; None: the
            model projects its own.
        given: the same after that norm: what attention is given where nothing was compressed.
        row: the row that stays, while all others are drawn anew; None: none is.
        noisy: values differ in size by a fifth, so that no channel of them is constant.
        start: position of the first token of the call under way; None: a method calls the model by itself.
        tokens: how many the call feeds, known from its first projection on.
    """

    model: PreTrainedModel
    rows: int
    length: int
    seed: int
    scale: float = 1.0
    drawn: bool = True
    row: int | None = None
    noisy: bool = False
    start: int | None = None
    tokens: int | None = None
    keys: Tensor | None = field(init=False, default=None)
    given: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if not self.drawn:
            return
        shape = (LAYERS, self.rows, kv_heads_of(self.model), self.length, WIDTH)
        keys = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed)) * self.scale
        if self.row is not None:
            others = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed + 1)) * self.scale
            others[:, self.row] = keys[:, self.row]
            keys = others
        self.keys = self.given = keys
        norms = [getattr(module, "k_norm", None) for module in attention_modules(self.model)]
        if norms[0] is not None:
            with torch.no_grad():
                self.given = torch.stack([norm(keys) for norm, keys in zip(norms, self.keys, strict=True)])  # type: ignore

    def begin(self, start: int) -> None:
        """Note that a call of the run's own begins, whose first token has the position `start`."""
        self.start, self.tokens = start, None

    def end(self) -> None:
        """Note that the call is over: what the model is fed now, a method feeds it."""
        self.start = None

    def positions(self, count: int) -> Tensor:
        """Return the positions of `count` projected tokens: a method may project the last ones of its call again."""
        if self.start is None:
            return FOREIGN + torch.arange(count) % FOREIGN
        self.tokens = self.tokens or count
        return self.start + self.tokens - count + torch.arange(count)

    def tags(self, layer: int, rows: int, count: int) -> Tensor:
        """Return tagged values for the tokens that are projected.

        Args:
            layer: index of the layer.
            rows: of the batch.
            count: how many tokens are.

        Returns:
            Float32 [rows, kv_heads, count, 64].
        """
        values = _tags_of(rows, kv_heads_of(self.model), layer, self.positions(count))
        if self.noisy:
            drawn = torch.rand(values.shape, generator=torch.Generator().manual_seed(layer + count))
            values = values * (0.8 + 0.4 * drawn)
        return values

    def drawn_keys(self, layer: int, rows: int, count: int) -> Tensor:
        """Return drawn keys for the tokens that are projected.

        Args:
            layer: index of the layer.
            rows: of the batch.
            count: how many tokens are.

        Returns:
            Float32 [rows, kv_heads, count, 64].
        """
        assert self.keys is not None
        positions = self.positions(count)
        places = _follow(positions, self.length)
        if places is not None and rows == self.keys.shape[1]:
            return self.keys[layer][:, :, places].clone()  # which a cache may write into
        return self.keys[layer][torch.arange(rows) % self.keys.shape[1]][:, :, positions % self.length]


@contextmanager
def projected(draws: Draws) -> Iterator[None]:
    """Let the projections of a probe give the keys and values of `draws`, for a while."""
    handles = []
    for layer, module in enumerate(attention_modules(draws.model)):
        if hasattr(module, "query_key_value"):
            handles.append(module.query_key_value.register_forward_hook(_fused(draws, layer)))  # type: ignore
            continue
        handles.append(module.v_proj.register_forward_hook(_separate(draws.tags, layer)))  # type: ignore
        if draws.drawn:
            handles.append(module.k_proj.register_forward_hook(_separate(draws.drawn_keys, layer)))  # type: ignore
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _separate(states: Any, layer: int) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        rows, count = output.shape[:2]
        replaced: Tensor = states(layer, rows, count).transpose(1, 2).reshape(output.shape).to(output)
        return replaced

    return hook


def _fused(draws: Draws, layer: int) -> Any:
    """GPT-NeoX projects queries, keys and values at once: a head's three stand side by side."""

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        rows, count = output.shape[:2]
        parts = list(output.view(rows, count, kv_heads_of(draws.model), 3 * WIDTH).split(WIDTH, -1))
        if draws.drawn:
            parts[1] = draws.drawn_keys(layer, rows, count).transpose(1, 2)
        parts[2] = draws.tags(layer, rows, count).transpose(1, 2)
        return torch.cat(parts, -1).reshape(output.shape)

    return hook
