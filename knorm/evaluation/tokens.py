"""What single tokens lost: which got worse, what had been evicted by then, and to what the full model attends there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from knorm.evaluation.runner import Runner
from knorm.masked_attention import attend_seen
from knorm.perplexity import Run, exact_run
from knorm.policy import Policy
from knorm.rounding import Rounding

MOST_NUMBERS = 2**18  # tokens x layers x heads that are told
_CONTEXT = 16  # tokens before one that its text may depend on
_PART = "\ufffd"  # what a part of a character is decoded to
_LOST, _LEAST = 3, 0.01  # evicted tokens told of each prediction, and the attention that one has at least


@dataclass(frozen=True)
class TokenView:
    """Show a token that got worse, and the evicted token that it would have attended to most.

    token       stands at position of window; nll_full, nll: in nats, with the full cache and in the run
    evicted     stood at evicted_position
    attention   that token's share of the full model's attention, mean over compressed layers and heads
    """

    window: int
    position: int
    token: str
    nll_full: float
    nll: float
    evicted: str
    evicted_position: int
    attention: float


@dataclass(frozen=True)
class LostToken:
    """Name an evicted token's `position`, and the full model's mean `attention` to it, by compressed head."""

    position: int
    attention: float


@dataclass(frozen=True)
class TokenLosses:
    """Hold one token and what became of it.

    token      as text
    nll_full   and nll, kl: in nats, with the full cache, in the run, and between both; None where it is not scored
    lost       what its prediction could no longer see
    """

    token: str
    nll_full: float | None
    nll: float | None
    kl: float | None
    lost: tuple[LostToken, ...]


@dataclass(frozen=True)
class WindowTokens:
    """Hold each token of one window.

    Attributes:
        window: its index.
        shown_tokens: in their order.
        evicted_at: by layer, key/value head and token (schedule.py); None where every query saw every token.
    """

    window: int
    shown_tokens: tuple[TokenLosses, ...]
    evicted_at: list[list[list[int]]] | None


def check_window(model: PreTrainedModel, input_ids: Tensor, window: int | None) -> None:
    """Refuse a window that cannot be told token by token, before the work.

    Args:
        model: a causal language model of transformers.
        input_ids: [windows, tokens].
        window: its index; None where none is asked for.

    Raises:
        ValueError: it is not there, or too large.
    """
    if window is None:
        return
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    (count, length), layers = input_ids.shape, config.num_hidden_layers
    if not 0 <= window < count:
        raise ValueError(f"there is no window {window}: there are {count}, the first is 0")
    if length * layers * heads > MOST_NUMBERS:
        most = MOST_NUMBERS // (layers * heads)
        raise ValueError(
            f"a window of {length} tokens in {layers} layers of {heads} heads is too large to be told token by token: "
            f"give a --window of at most {most}"
        )


def window_tokens(
    runner: Runner,
    tokenizer: PreTrainedTokenizerFast,
    window: int | None,
    nll: Tensor,
    full: Tensor,
    evicted_at: Sequence[Tensor],
    policy: Policy,
    kl: Tensor | None = None,
) -> WindowTokens | None:
    """Tell each token of one window: its losses, when each head evicted it, and what its prediction missed.

    Args:
        runner: the model, its windows and their prompt.
        tokenizer: of the model.
        window: its index; None: nothing is told.
        nll: of the run, float64 [windows, scored].
        full: of the full cache, the same.
        evicted_at: for each layer int64 [windows, kv_heads, T]; empty where every query saw every token.
        policy: of the run; layers that it skips do not count.
        kl: KL(full || run), float64 [windows, scored], where it is known.

    Returns:
        The window; None where none is asked for.
    """
    if window is None:
        return None
    ids = runner.windows.input_ids[window]
    unscored = len(ids) - nll.shape[1]
    gone = [layer[window].cpu() for layer in evicted_at]
    lost = _lost_attention(runner.model, ids[None], gone, policy) if gone else None
    told = []
    for position, text in enumerate(_pieces(tokenizer, ids.tolist())):
        at = position - unscored
        before, now, apart = (
            None if at < 0 or losses is None else float(losses[window, at]) for losses in (full, nll, kl)
        )
        missed = _most_lost(lost[position - 1]) if lost is not None and at >= 0 else ()
        told.append(TokenLosses(text, before, now, apart, missed))
    return WindowTokens(window, tuple(told), [layer.tolist() for layer in gone] or None)


def _most_lost(shares: Tensor) -> tuple[LostToken, ...]:
    top = shares.topk(min(_LOST, len(shares)))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return tuple(LostToken(position, share) for position, share in pairs if share >= _LEAST)


def _pieces(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> Iterator[str]:
    """Decode a text token by token, so that the pieces joined are the text; a part of a character comes with its last.

    Each is what a token adds to those before it: some tokenizers strip the space before a token that stands alone.
    """
    for stop in range(1, len(ids) + 1):
        some = ids[max(0, stop - _CONTEXT) : stop]
        before, text = (str(tokenizer.decode(part)).rstrip(_PART) for part in (some[:-1], some))
        yield text[len(before) :]


def _lost_attention(model: PreTrainedModel, ids: Tensor, gone: Sequence[Tensor], policy: Policy) -> Tensor:
    """Compute the full model's attention to evicted tokens: float32 [T, T], query by token, mean over layers and heads.

    Args:
        model: of the run.
        ids: [1, T].
        gone: for each layer int64 [kv_heads, T].
        policy: layers that it skips do not count.
    """
    length, layer = ids.shape[1], 0
    total = torch.zeros(length, length)
    places = torch.arange(length)
    unseen = places > places[:, None]

    def attend(query: Tensor, key: Tensor, value: Tensor, evicted: Tensor | None, scale: float | None) -> Tensor:
        nonlocal layer
        if layer not in policy.skip_layers:
            group = query.shape[1] // key.shape[1]
            for head, lost in enumerate(gone[layer]):
                keys = key[0, head].float()
                for one in query[0, head * group : (head + 1) * group].float():  # a head at a time: [T, T]
                    scores = (one @ keys.T * (scale or query.shape[-1] ** -0.5)).cpu()
                    weights = scores.masked_fill_(unseen, -torch.inf).softmax(-1)
                    total.add_(weights.masked_fill_(lost > places[:, None], 0), alpha=1 / query.shape[1])
        layer += 1
        return attend_seen(query, key, value, evicted, scale)

    exact_run(model, ids, Policy(), attend=attend)
    return total / max(1, layer - len(policy.skip_layers))


def worst_tokens(
    runner: Runner,
    tokenizer: PreTrainedTokenizerFast,
    run: Run,
    full: Tensor,
    most: int,
    policy: Policy,
    rounding: Rounding,
) -> Iterator[TokenView]:
    """Find the tokens whose NLL rose most, each with the evicted token that the full model attends to most there.

    Args:
        runner: the model, its windows and their prompt.
        tokenizer: of the model.
        run: the compressed run.
        full: NLLs of the full cache, float64 [windows, scored].
        most: how many tokens.
        policy: of the run.
        rounding: a rise within it is none.

    Yields:
        The tokens, the worst first.
    """
    own, all_ids = run.nll.double().cpu(), runner.windows.input_ids
    rise = own - full
    for flat in rise.flatten().topk(min(most, rise.numel())).indices.tolist():
        window, at = divmod(flat, rise.shape[1])
        if rise[window, at] <= rounding.largest:
            return
        query = at + runner.prompt_length - 1
        weights = _attention_of(runner.model, all_ids[window : window + 1], query)
        lost = torch.zeros(query + 1, dtype=torch.float64)
        for layer, weight in enumerate(weights):  # [heads, query + 1]
            if layer not in policy.skip_layers:
                gone = run.evicted_at[layer][window, :, : query + 1] <= query
                lost += (weight * gone.repeat_interleave(len(weight) // len(gone), 0)).mean(0).double().cpu()
        source = int(lost.argmax())
        if not lost[source]:  # nothing that it would have seen was evicted: it got worse by what others lost
            continue
        ids = all_ids[window]
        compressed = max(1, len(weights) - len(policy.skip_layers))
        yield TokenView(
            window, query + 1, str(tokenizer.decode(ids[query + 1 : query + 2])), float(full[window, at]),
            float(own[window, at]), str(tokenizer.decode(ids[source : source + 1])), source,
            float(lost[source]) / compressed,
        )  # fmt: skip


def _attention_of(model: PreTrainedModel, ids: Tensor, query_position: int) -> list[Tensor]:
    """The full model's attention weights at one query, per layer: [heads, query_position + 1]."""
    weights: list[Tensor] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, evicted: Tensor | None, scale: float | None) -> Tensor:
        keys = key[0, :, : query_position + 1].repeat_interleave(query.shape[1] // key.shape[1], 0)
        scores = query[0, :, query_position, None] @ keys.mT
        weights.append((scores[:, 0] * (scale or query.shape[-1] ** -0.5)).softmax(-1))
        return attend_seen(query, key, value, evicted, scale)

    exact_run(model, ids, Policy(), attend=attend)
    return weights
