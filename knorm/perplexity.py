"""Token negative log-likelihoods (NLL) of a compressed run: exactly, from one forward pass; and by the honest loop.

The loop decodes token by token through a cache that compresses itself. The one pass computes the same numbers: a
layer's schedule follows from its keys, its keys from the layer below, so each layer makes its own mask (schedule.py)
when its turn comes. Equal up to rounding in float32 and float64, wherever no two norms at a cut lie within 2^-20.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from knorm.cache import KnormCache
from knorm.core import squared_norms, token_scores
from knorm.masked_attention import Attend, attend_seen, compiles
from knorm.model_attention import attention_through, cache_keyword
from knorm.policy import Policy, whole
from knorm.rounding import ROUNDING
from knorm.schedule import never, schedule_scores
from knorm.sources import MODELS
from knorm.tensors import refuse_unreadable

Schedule = Callable[[int, Tensor], Tensor]

_ROTATIONS = ("default", "linear", "llama3", "yarn")  # fixed for the run; others depend on the length of a call
_LOGITS = 2**26  # at most so many at a time
NEAR_TIE = 2.0**-20  # relative: norms this close may be ranked either way


class Run(NamedTuple):
    """Hold one run over a batch of texts of T tokens.

    Attributes:
        nll: float32 [batch, T-1], nats: of token t+1 given the tokens to t; nan where either is padding.
        correct: bool [batch, T-1]: token t+1 was the likeliest.
        evicted_at: for each layer, int64 [batch, kv_heads, T] (see schedule.py).
        seconds: wall time of the run.
        scheduling: seconds of it spent on the schedules (on CUDA this includes waiting for the layer below).
    """

    nll: Tensor
    correct: Tensor
    evicted_at: tuple[Tensor, ...]
    seconds: float
    scheduling: float


def _unready(model: PreTrainedModel) -> str | None:
    """Return why no run of a model, whatever its type, would be the one that is asked for; None if it would."""
    device = model.device.type
    if any(module.training for module in model.modules()):
        return "it is in training mode: call model.eval()"
    if model.device.type == "meta" and not hasattr(model, "hf_device_map"):
        return "its weights are on the device 'meta', without numbers: load them"
    if model.get_output_embeddings() is None:
        return "it has no language-model head"
    if torch.is_autocast_enabled(device):
        given, own = (str(x).removeprefix("torch.") for x in (torch.get_autocast_dtype(device), model.dtype))
        return (
            f"torch.autocast computes in {given} here, but a run is in its weights' dtype, {own}: leave autocast, or "
            f"load the model in {given}"
        )
    return None


def refuse_unready(model: PreTrainedModel) -> None:
    """Raise TypeError where `model` is none of transformers, ValueError for one that is not ready to be evaluated.

    That is one in training mode, without weights, without a head, or under autocast.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model {type(model).__name__}, but should be a model of transformers")
    if reason := _unready(model):
        raise ValueError(f"{type(model).__name__} cannot be evaluated: {reason}")


def refuse_model(model: PreTrainedModel) -> None:
    """Raise ValueError, with the reason, for a `model` whose compressed run knorm cannot evaluate exactly.

    Raises TypeError for one that is none of transformers.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model {type(model).__name__}, but should be a model of transformers")
    config, reason = model.config, None
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if config.model_type not in MODELS:
        reason = f"{config.model_type!r} is not one of {', '.join(MODELS)}, whose attention is known"
    elif "sliding_attention" in (getattr(config, "layer_types", None) or ()) or (
        config.model_type == "mistral" and config.sliding_window is not None
    ):
        reason = "it attends through a sliding window (load it with sliding_window=None if its texts are shorter)"
    elif rotation not in _ROTATIONS:
        reason = f"its rotary positions ({rotation!r}) change with the length of a call"
    else:
        reason = _unready(model)
    if reason:
        raise ValueError(f"{type(model).__name__} cannot be evaluated exactly: {reason}")


def _padding(attention_mask: Tensor | None, input_ids: Tensor, policy: Policy, prompt_length: int) -> Tensor | None:
    """Number of pads at the start of each row, int64 [batch]; None where there are none."""
    if attention_mask is None:
        return None
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask {list(attention_mask.shape)}, but should be {list(input_ids.shape)} as input_ids"
        )
    if not ((attention_mask == 0) | (attention_mask == 1)).all():
        raise ValueError("attention_mask has other numbers than 0, for padding, and 1, for tokens")
    mask = attention_mask.to(input_ids.device).bool()
    padding = (~mask).sum(-1)
    if not torch.equal(mask, torch.arange(mask.shape[1], device=mask.device) >= padding[:, None]):
        raise ValueError("attention_mask should be zeros, then ones, in each row: pad on the left")
    if (padding > mask.shape[1] - 2).any():
        raise ValueError("a row of attention_mask has fewer than two tokens: there is nothing to predict")
    if policy.protocol == "prefill" and policy.keep_ratio != 1 and (padding > max(0, prompt_length - 2)).any():
        raise ValueError(
            f"prompt_length={prompt_length} counts {int(padding.max())} pads in one row: fewer than two tokens of its "
            "prompt are left, so its prefill would never be compressed. Give a longer prompt_length"
        )
    return padding if padding.any() else None


def _positions(
    position_ids: Tensor | None, model: PreTrainedModel, input_ids: Tensor, padding: Tensor | None
) -> Tensor:
    """The given positions, checked; by default each row counts from its first token."""
    if position_ids is None:
        positions = torch.arange(input_ids.shape[1], device=model.device).expand(input_ids.shape)
        return positions if padding is None else (positions - padding[:, None]).clamp(min=0)
    refuse_unreadable(position_ids=position_ids)
    if position_ids.shape != input_ids.shape or position_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"position_ids {list(position_ids.shape)} {position_ids.dtype}, but should be int64 "
            f"{list(input_ids.shape)} as input_ids"
        )
    lowest, highest = (int(x) for x in position_ids.aminmax())
    if lowest < 0 or highest >= model.config.max_position_embeddings:
        raise ValueError(
            f"position_ids from {lowest} to {highest}, but {type(model).__name__} has positions 0 to "
            f"{model.config.max_position_embeddings - 1}"
        )
    return position_ids.to(model.device)


def check_ids(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
    """Refuse tokens that a model cannot be given: of another shape, length or vocabulary.

    Args:
        model: a causal language model of transformers.
        input_ids: int64 or int32 [batch, T], at least 2 tokens and at most the model's positions.
        attention_mask: [batch, T], 0 for padding, whose ids are not looked at.

    Raises:
        ValueError: what is wrong, and what should be.
    """
    config = model.config.get_text_config(decoder=True)
    refuse_unreadable(input_ids=input_ids, **({} if attention_mask is None else {"attention_mask": attention_mask}))
    if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids {list(input_ids.shape)} {input_ids.dtype}, but should be int64 [batch, tokens]")
    if attention_mask is not None and attention_mask.is_complex():
        raise ValueError(f"attention_mask {attention_mask.dtype}, but should be 0 for padding and 1 for tokens")
    length = input_ids.shape[1]
    if input_ids.shape[0] < 1 or length < 2:
        raise ValueError(f"input_ids {list(input_ids.shape)}: a text needs at least two tokens to predict one")
    if length > (getattr(config, "max_position_embeddings", None) or length):
        raise ValueError(
            f"{length} tokens, but {type(model).__name__} has {config.max_position_embeddings} positions: "
            "split the text into shorter windows"
        )
    real = (
        input_ids
        if attention_mask is None or attention_mask.shape != input_ids.shape
        else input_ids[attention_mask > 0]
    )
    lowest, highest = (int(x) for x in real.aminmax()) if real.numel() else (0, 0)
    if lowest < 0 or highest >= config.vocab_size:
        raise ValueError(
            f"token id {lowest if lowest < 0 else highest}, but the vocabulary has ids 0 to {config.vocab_size - 1}: "
            "was the text encoded with another model's tokenizer?"
        )


def check_run(
    model: PreTrainedModel,
    input_ids: Tensor,
    policy: Policy,
    prompt_length: int,
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Refuse what cannot be evaluated, and make what can ready to be run.

    Args:
        model: as for exact_nll.
        input_ids: as for exact_nll, [batch, T].
        policy: when and what to evict.
        prompt_length: tokens of the first call, 1 to T.
        attention_mask: [batch, T], 0 for padding on the left.

    Returns:
        The ids on the model's device, int64 [batch, T], pads replaced by 0; and the pads at the left of each row, int64
        [batch], or None where there are none.

    Raises:
        ValueError: as exact_nll.
        TypeError: as exact_nll.
    """
    refuse_model(model)
    config = model.config
    check_ids(model, input_ids, attention_mask)
    length = input_ids.shape[1]
    if not isinstance(policy, Policy):
        raise TypeError(f"policy={policy!r}, but should be a knorm.Policy, e.g. Policy(keep_ratio=0.5)")
    layers = config.num_hidden_layers
    if policy.skip_layers and policy.skip_layers[-1] >= layers:
        raise ValueError(f"skip_layers={policy.skip_layers}, but the model has layers 0 to {layers - 1}")
    if not 1 <= whole("prompt_length", prompt_length) <= length:
        raise ValueError(f"prompt_length={prompt_length}, but should be between 1 and the {length} tokens of the text")
    if policy.protocol == "prefill" and policy.keep_ratio != 1 and prompt_length == 1:
        raise ValueError(
            "protocol='prefill' compresses once, after the prompt, and prompt_length is 1: nothing would ever be "
            "evicted. Give prompt_length, or a Policy with protocol='streaming'"
        )
    if policy.protocol == "prefill":
        policy.budget(prompt_length)
    padding = _padding(attention_mask, input_ids, policy, prompt_length)
    ids = input_ids.to(model.device, torch.int64)
    if padding is None:
        return ids, None
    padding = padding.to(model.device)
    return ids.masked_fill(torch.arange(length, device=ids.device) < padding[:, None], 0), padding


def _score(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """NLL of each target and whether it was likeliest: hidden [batch, n, width], targets [batch, n] -> [batch, n].

    The head is applied to few tokens at a time: the logits of a long text would not fit.
    """
    head = model.get_output_embeddings()
    loss = _compiled_loss() if compiles(hidden, targets.numel()) else _loss
    size = max(1, _LOGITS // model.config.vocab_size)
    pieces = zip(hidden.flatten(0, 1).split(size), targets.flatten().split(size), strict=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\s*Online softmax is disabled")  # the compiler's: nothing a user could do
        nll, correct = zip(*(loss(head(states), wanted) for states, wanted in pieces), strict=True)
    return torch.cat(nll).view(targets.shape), torch.cat(correct).view(targets.shape)


def _loss(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """NLL in float32 of each wanted token, and whether it was likeliest: [n, vocabulary], int64 [n] -> both [n]."""
    likeliest = logits.argmax(-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(logits, wanted, reduction="none").float(), likeliest == wanted


@lru_cache(maxsize=1)
def _compiled_loss() -> Any:  # reads the logits once, in half precision
    return torch.compile(_loss, dynamic=True)


def _blank(run: Run, padding: Tensor | None) -> Run:
    if padding is None:
        return run
    unreal = torch.arange(run.nll.shape[1], device=run.nll.device) < padding[:, None]
    return run._replace(nll=run.nll.masked_fill(unreal, torch.nan), correct=run.correct & ~unreal)


def _spares(policy: Policy, layer: int) -> bool:
    return layer in policy.skip_layers or policy.keep_ratio == 1


def _schedule(policy: Policy, prompt_length: int, padding: Tensor | None) -> Schedule:
    """What a policy does to each layer."""

    def schedule(layer: int, keys: Tensor) -> Tensor:
        if _spares(policy, layer):
            return never(keys.shape[:3], keys.device, padding=padding)
        positions = torch.arange(keys.shape[2], device=keys.device).expand(keys.shape[:3])
        if padding is not None:
            positions = positions - padding[:, None, None]
        return schedule_scores(token_scores(keys, policy, positions, layer), policy, prompt_length, padding)

    return schedule


def _check_schedule(lost: Tensor, keys: Tensor) -> None:
    length, should = keys.shape[2], f"evicted_at, int64 {list(keys.shape[:3])} on {keys.device}"
    if not isinstance(lost, Tensor):
        raise ValueError(f"schedule returned {type(lost).__name__}, but should return {should}")
    refuse_unreadable(evicted_at=lost)
    if lost.shape != keys.shape[:3] or lost.dtype != torch.int64 or lost.device != keys.device:
        raise ValueError(
            f"schedule returned {list(lost.shape)} {lost.dtype} on {lost.device}, but should return {should}"
        )
    if (lost <= torch.arange(length, device=lost.device)).any():
        raise ValueError("schedule evicted a token before its own query: evicted_at[s] should be at least s + 1")
    if (lost > length).any():
        raise ValueError(
            f"schedule returned evicted_at up to {int(lost.max())}, but should be at most T={length}: never"
        )


class Hidden(NamedTuple):
    """Hold what one pass computes before the head, and the schedules that it followed.

    states       [batch, T, width], in the model's dtype
    input_ids    int64 [batch, T], on the model's device
    padding      pads at the left of each row, int64 [batch]; None: there are none
    evicted_at   per layer, int64 [batch, kv_heads, T]
    scheduling   seconds of making the schedules
    """

    states: Tensor
    input_ids: Tensor
    padding: Tensor | None
    evicted_at: tuple[Tensor, ...]
    scheduling: float


@torch.no_grad()
def exact_hidden(
    model: PreTrainedModel,
    input_ids: Tensor,
    policy: Policy,
    *,
    prompt_length: int = 1,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    schedule: Schedule | None = None,
    attend: Attend | None = None,
) -> Hidden:
    """Compute the compressed run's hidden states by one forward pass.

    Args:
        model: as for exact_nll.
        input_ids: as for exact_nll, [batch, T].
        policy: as for exact_nll.
        prompt_length: as for exact_nll.
        attention_mask: as for exact_nll, [batch, T].
        position_ids: as for exact_nll, [batch, T].
        schedule: as for exact_nll.
        attend: replaces attend_seen, with its arguments.

    Returns:
        The states before the head, and the schedules that attention followed.

    Raises:
        ValueError: as exact_nll.
        TypeError: as exact_nll.
    """
    scheduling = 0.0
    if schedule is not None and not callable(schedule):
        raise TypeError(f"schedule={schedule!r}, but should be a function (layer, keys) -> evicted_at")
    input_ids, padding = check_run(model, input_ids, policy, prompt_length, attention_mask)
    position_ids = _positions(position_ids, model, input_ids, padding)
    places = torch.arange(input_ids.shape[1], device=model.device)
    unreal = None if padding is None else (places < padding[:, None])[:, None, :]
    schedule_of = schedule or _schedule(policy, prompt_length, padding)
    schedules: list[Tensor] = []

    def attention(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, _: None, scaling: float, **__: Any
    ) -> tuple[Tensor, None]:
        nonlocal scheduling
        clock = time.perf_counter()
        if unreal is not None:  # whatever a pad's embedding is, it spoils no sum and needs no norm
            key, value = (x.masked_fill(unreal[..., None], 0) for x in (key, value))
        lost = schedule_of(len(schedules), key)
        if schedule:
            _check_schedule(lost, key)
            lost = lost if unreal is None else torch.where(unreal, places + 1, lost)
        spared = schedule is None and padding is None and _spares(policy, len(schedules))
        schedules.append(lost)
        scheduling += time.perf_counter() - clock
        return (attend or attend_seen)(query, key, value, None if spared else lost, scaling).transpose(1, 2), None

    with attention_through(model, attention):
        hidden = model.base_model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, return_dict=True
        ).last_hidden_state
    return Hidden(hidden, input_ids, padding, tuple(schedules), scheduling)


@torch.no_grad()
def exact_run(
    model: PreTrainedModel,
    input_ids: Tensor,
    policy: Policy,
    *,
    prompt_length: int = 1,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    schedule: Schedule | None = None,
    attend: Attend | None = None,
) -> Run:
    """Compute the compressed run in one forward pass.

    Args:
        model: as for exact_nll.
        input_ids: as for exact_nll, [batch, T].
        policy: as for exact_nll.
        prompt_length: as for exact_nll.
        attention_mask: as for exact_nll, [batch, T].
        position_ids: as for exact_nll, [batch, T].
        schedule: as for exact_nll.
        attend: replaces attend_seen, with its arguments.

    Returns:
        NLLs, and all else that is known of the run.

    Raises:
        ValueError: as exact_nll.
        TypeError: as exact_nll.

    Example:
        >>> model, tokenizer = load_embedded()
        >>> ids = tokenizer("The cat sat on the mat.", return_tensors="pt").input_ids
        >>> run = exact_run(model, ids, Policy(0.5), prompt_length=4)
        >>> run.evicted_at[0].shape == (1, model.config.num_attention_heads, ids.shape[1])
        True
    """
    begin = time.perf_counter()
    hidden = exact_hidden(
        model,
        input_ids,
        policy,
        prompt_length=prompt_length,
        attention_mask=attention_mask,
        position_ids=position_ids,
        schedule=schedule,
        attend=attend,
    )
    nll, correct = _score(model, hidden.states[:, :-1], hidden.input_ids[:, 1:])
    run = Run(nll, correct, hidden.evicted_at, time.perf_counter() - begin, hidden.scheduling)
    return _blank(run, hidden.padding)


def exact_nll(
    model: PreTrainedModel,
    input_ids: Tensor,
    policy: Policy,
    *,
    prompt_length: int = 1,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    schedule: Schedule | None = None,
) -> Tensor:
    """Compute each token's NLL, from one forward pass, in a run that compresses its cache as it goes.

    Args:
        model: a causal language model in eval mode, of the types in MODELS; its weights' dtype is the run's.
        input_ids: int64 [batch, T], at least 2 tokens and at most the model's positions.
        policy: when and what to evict: after the first call, and, if streaming, after each later token.
        prompt_length: tokens of the first call.
        attention_mask: [batch, T], 0 for padding on the left; a padded row is run as if it stood alone, with what the
            pads leave of its prompt, at least one token.
        position_ids: int64 [batch, T]; by default each row counts from its first token.
        schedule: overrides the policy's: schedule(layer, keys [batch, kv_heads, T, head_dim]) -> evicted_at.

    Returns:
        float32 [batch, T-1] in nats, entry t for token t+1; nan where the token or its context is padding.

    Raises:
        ValueError: a model, text, policy or mask that cannot be evaluated exactly, with the reason; or autocast, which
            leaves the dtype of the weights.
        TypeError: a model that is none of transformers', or ids that are no tensor.

    Example:
        >>> model, tokenizer = load_embedded()
        >>> ids = tokenizer("The cat sat on the mat.", return_tensors="pt").input_ids
        >>> exact_nll(model, ids, Policy(0.5), prompt_length=4).shape == (1, ids.shape[1] - 1)
        True
    """
    return exact_run(
        model,
        input_ids,
        policy,
        prompt_length=prompt_length,
        attention_mask=attention_mask,
        position_ids=position_ids,
        schedule=schedule,
    ).nll


@torch.no_grad()
def stream_run(
    model: PreTrainedModel,
    input_ids: Tensor,
    policy: Policy,
    *,
    prompt_length: int = 1,
    attention_mask: Tensor | None = None,
) -> Run:
    """Run the loop that a compressed run stands for.

    Args:
        model: as for stream_nll.
        input_ids: as for stream_nll, [batch, T].
        policy: as for stream_nll.
        prompt_length: as for stream_nll.
        attention_mask: as for stream_nll, [batch, T].

    Returns:
        NLLs, and all else that is known of the run.

    Raises:
        ValueError: as stream_nll.
        TypeError: as stream_nll.
    """
    begin = time.perf_counter()
    input_ids, padding = check_run(model, input_ids, policy, prompt_length, attention_mask)
    if padding is None:
        return _loop(model, input_ids, policy, prompt_length)._replace(seconds=time.perf_counter() - begin)

    # Rows of one length run together, without their padding: each as if it stood alone.
    batch, length = input_ids.shape
    nll = torch.full((batch, length - 1), torch.nan, device=model.device)
    correct = torch.zeros_like(nll, dtype=torch.bool)
    schedules: list[Tensor] = []
    for pads in padding.unique().tolist():
        rows = padding == pads
        run = _loop(model, input_ids[rows, pads:], policy, max(1, prompt_length - pads))
        nll[rows, pads:], correct[rows, pads:] = run.nll, run.correct
        for layer, lost in enumerate(run.evicted_at):
            if layer == len(schedules):
                own = torch.arange(1, length + 1, device=model.device)
                schedules.append(own.expand(batch, lost.shape[1], length).contiguous())
            schedules[layer][rows, :, pads:] = lost + pads
    return Run(nll, correct, tuple(schedules), time.perf_counter() - begin, 0.0)


def _loop(model: PreTrainedModel, input_ids: Tensor, policy: Policy, prompt_length: int) -> Run:
    batch, length = input_ids.shape
    cache = KnormCache(policy)
    positions = torch.arange(length, device=model.device).expand(batch, length)
    nll, correct = [], []
    schedules: list[Tensor] = []
    # Layers of unequal length work under SDPA, one token at a time; eager attention would want masks to match.
    with attention_through(model, None):
        for start, stop in [(0, prompt_length), *((t, t + 1) for t in range(prompt_length, length))]:
            hidden = model.base_model(
                input_ids=input_ids[:, start:stop],
                position_ids=positions[:, start:stop],
                use_cache=True,
                return_dict=True,
                **{cache_keyword(model): cache},
            ).last_hidden_state
            targets = input_ids[:, start + 1 : stop + 1]
            if targets.shape[1]:
                scores = _score(model, hidden[:, : targets.shape[1]], targets)
                nll.append(scores[0])
                correct.append(scores[1])
            schedules = _record(cache, schedules, length, stop)
    return Run(torch.cat(nll, 1), torch.cat(correct, 1), tuple(schedules), 0.0, 0.0)


def _record(cache: KnormCache, schedules: list[Tensor], length: int, seen: int) -> list[Tensor]:
    """Note which tokens, seen so far and not yet known as lost, each layer has ceased to store."""
    if not schedules:
        shapes = [(*cache.positions(layer).shape[:2], length) for layer in range(len(cache))]
        schedules = [never(shape, cache.positions(0).device) for shape in shapes]
    for layer, lost in enumerate(schedules):
        stored = cache.positions(layer)
        if stored.shape[-1] < seen:
            gone = torch.ones(lost.shape, dtype=torch.bool, device=lost.device).scatter_(-1, stored, False)
            gone[..., seen:] = False
            lost.masked_fill_(gone & (lost == length), seen)
    return schedules


def stream_nll(
    model: PreTrainedModel,
    input_ids: Tensor,
    policy: Policy,
    *,
    prompt_length: int = 1,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Compute each token's NLL by the loop: feed the prompt, then token by token, through a KnormCache.

    Positions count the tokens seen, not the tokens stored. Padded rows are run without their padding, those of one
    length together.

    Args:
        model: as for exact_nll.
        input_ids: as for exact_nll.
        policy: as for exact_nll.
        prompt_length: tokens of the first call.
        attention_mask: [batch, T], 0 for padding on the left.

    Returns:
        float32 [batch, T-1] in nats, as from exact_nll.

    Raises:
        ValueError: as exact_nll.
        TypeError: as exact_nll.

    Example:
        >>> model, tokenizer = load_embedded()
        >>> ids = tokenizer("The cat sat on the mat.", return_tensors="pt").input_ids
        >>> policy = Policy(0.5, protocol="streaming", prune_after=4)
        >>> torch.allclose(stream_nll(model, ids, policy), exact_nll(model, ids, policy), atol=1e-4)
        True
    """
    run = stream_run(model, input_ids, policy, prompt_length=prompt_length, attention_mask=attention_mask)
    return run.nll


def agrees(difference: float, gap: float) -> bool:
    """Tell whether two runs are equal as float32 and float64 can be.

    Args:
        difference: as in Agreement.
        gap: as in Agreement.

    Returns:
        True where both are within what rounding does.

    Example:
        >>> agrees(1e-6, 0.0)
        True
    """
    return difference <= ROUNDING and gap <= NEAR_TIE


class Agreement(NamedTuple):
    """Compare the one pass with the loop, on the same texts and policy.

    Attributes:
        exact: the one pass.
        stream: the loop.
        evictions: how many (layer, row, head, token) the two evict at different times.
        gap: the largest relative distance between the norms where a row's schedules first part; 0 if none does.
        difference: the largest absolute difference of any token's NLL in nats, given the loop's schedule.
    """

    exact: Run
    stream: Run
    evictions: int
    gap: float
    difference: float

    @property
    def holds(self) -> bool:
        """Tell whether they are equal up to ROUNDING, and up to evictions at near-ties."""
        return agrees(self.difference, self.gap)


def agreement(
    model: PreTrainedModel,
    input_ids: Tensor,
    policy: Policy,
    *,
    prompt_length: int = 1,
    attention_mask: Tensor | None = None,
) -> Agreement:
    """Run the one pass and the loop, and compare them.

    The two round differently, so of two keys with one norm (a word that occurs twice, in layer 0) either may go first.
    Such evictions are counted; the tokens are then compared under the schedule that the loop really had.

    Args:
        model: as for exact_nll.
        input_ids: as for exact_nll.
        policy: as for exact_nll.
        prompt_length: tokens of the first call.
        attention_mask: [batch, T], 0 for padding on the left.

    Returns:
        Both runs, and how they differ.

    Raises:
        ValueError: as exact_nll.
    """
    options: Any = {"prompt_length": prompt_length, "attention_mask": attention_mask}
    exact = exact_run(model, input_ids, policy, **options)
    stream = stream_run(model, input_ids, policy, **options)
    evictions = sum(int((a != b).sum()) for a, b in zip(exact.evicted_at, stream.evicted_at, strict=True))
    gap, same = 0.0, exact
    if evictions:
        norms: list[Tensor] = []

        def replay(layer: int, keys: Tensor) -> Tensor:
            norms.append(squared_norms(keys, layer).sqrt())
            return stream.evicted_at[layer]

        same = exact_run(model, input_ids, policy, schedule=replay, **options)
        gap = parting_gap(exact.evicted_at, stream.evicted_at, norms)
    # Not a number where both are padding is agreement; anywhere else it is none.
    padded = (torch.ones_like(input_ids) if attention_mask is None else attention_mask)[:, :-1].to(same.nll.device) == 0
    difference = float((same.nll - stream.nll).abs().masked_fill(padded, 0.0).nan_to_num(torch.inf).max())
    return Agreement(exact, stream, evictions, gap, difference)


def parting_gap(ours: Sequence[Tensor], theirs: Sequence[Tensor], norms: Sequence[Tensor]) -> float:
    """Measure how far apart the norms lie, relatively, over which rows' schedules first part; the widest over rows.

    Nothing but those norms can be the cause there; whatever parts later in the row may be a consequence.

    Args:
        ours: a schedule for each layer, int64 [batch, kv_heads, T].
        theirs: those of the other run, of the same shapes.
        norms: key norms for each layer, floating [batch, kv_heads, T].

    Returns:
        (highest - lowest) / highest of the norms; 0 where no row's schedules part.
    """
    layers = list(zip(ours, theirs, norms, strict=True))
    never = ours[0].shape[-1]
    times = [torch.minimum(a, b).masked_fill(a == b, never) for a, b, _ in layers]
    parting = torch.stack([when.flatten(1).amin(-1) for when in times]).amin(0)
    gap = 0.0
    for when, (_, _, norm) in zip(times, layers, strict=True):
        cause = (when == parting[:, None, None]) & (when < never)
        highest = norm.masked_fill(~cause, 0.0).amax(-1)
        lowest = norm.masked_fill(~cause, torch.inf).amin(-1)
        gap = max(gap, float(((highest - lowest) / highest).where(cause.any(-1), 0.0).max()))
    return gap
