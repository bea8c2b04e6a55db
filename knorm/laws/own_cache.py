"""What `knorm verify` asks of KnormCache beyond the catalogue: generate() and any order of calls, beside the oracle.

Each check_<claim> returns the evidence and raises Refuted with what is wrong. Its first line is the claim.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from knorm.cache import KnormCache
from knorm.laws import oracle
from knorm.laws.model import CONFIG, gap, small_model
from knorm.laws.oracle import Rules
from knorm.laws.own import must_raise
from knorm.laws.registry import Refuted
from knorm.laws.results import Result
from knorm.laws.runner import iter_results
from knorm.laws.strategies import VOCABULARY
from knorm.laws.subjects import Subject
from knorm.laws.traits import KNORM
from knorm.model_attention import attention, cache_keyword
from knorm.policy import Policy

CLOSE = {"sdpa": 1e-8, "eager": 1e-4}  # eager attention takes its softmax in float32
GENERATED: tuple[tuple[str, Rules, tuple[int, ...], dict[str, Any]], ...] = (
    ("a streaming policy with a skipped layer", Rules(0.5, 20, (0,), 1, 2, protocol="streaming"), (0,), {}),
    ("rows with padding, skipped layers", Rules(0.6, 18, (0, 3), protocol="streaming"), (0, 7, 3), {}),
    ("a random prefill, rows with padding", Rules(0.5, 0, (2,), 2, 2, "random", seed=5), (4, 0), {}),
    ("a beam search", Rules(0.7, 16, protocol="streaming"), (0, 0), {"num_beams": 3, "num_return_sequences": 3}),
)


@contextmanager
def _attending_by(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    own = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def check_generation(model: PreTrainedModel, ids: Tensor, new: int = 10) -> str:
    """generate() with KnormCache has the logits of full attention with the evicted masked, rows with padding too.

    Args:
        model: a causal language model in float64.
        ids: int64 [3, T], of at least 20 tokens.
        new: tokens to generate; their logits come in float32.

    Returns:
        The evidence: how far they lie apart.
    """
    widest, prompt, whole = 0.0, ids.shape[1], KnormCache(Policy())
    with torch.no_grad():
        model(ids, use_cache=True, **{cache_keyword(model): whole})
    _check_bytes(whole, "a prompt of which nothing is evicted")
    for what, rules, leads, options in GENERATED:
        cache, mask = KnormCache(rules.policy()), torch.ones_like(ids[: len(leads)])
        for row, lead in enumerate(leads):
            mask[row, :lead] = 0
        keyword = "cache" if cache_keyword(model) == "cache" else "past_key_values"
        generate: Any = model.generate
        with attention(model) if any(leads) else nullcontext():
            out = generate(
                ids[: len(leads)] * mask, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=0,
                min_new_tokens=new, output_logits=True, output_scores=True, return_dict_in_generate=True,
                length_penalty=0.0, **{keyword: cache}, **options,
            )  # fmt: skip
        for row, tokens in enumerate(out.sequences):
            lead = leads[row] if len(out.sequences) == len(leads) else 0
            text = tokens[None, lead:-1]
            truth = oracle.run(model, text, rules, [prompt - lead] + [1] * (new - 1))
            should = truth.logits[0, prompt - lead - 1 :]
            if "num_beams" in options:
                chosen = should.log_softmax(-1).gather(1, tokens[prompt:, None]).sum()
                difference = gap(out.sequences_scores[row].double(), chosen)
            else:
                difference = gap(torch.stack(out.logits, 1)[row].double(), should)
                _compare_positions(cache, row, truth, f"generate(), {what}")
            widest = max(widest, difference)
            if difference > 1e-4:
                raise Refuted(
                    f"generate(), {what}, {rules}: row {row} differs in its logits by {difference:.3g} from full "
                    "attention with the evicted masked, but should be equal"
                )
        _check_bytes(cache, what)
    return f"{len(GENERATED)} runs of {new} tokens, largest difference {widest:.1e}"


def _compare_positions(cache: KnormCache, row: int, truth: oracle.Truth, what: str) -> None:
    for layer, lives in enumerate(truth.lives):
        for head, life in enumerate(lives[0]):
            positions = cache.positions(layer)[row, head].tolist()
            got = [position for position in positions if position >= 0]
            if positions != [-1] * (len(positions) - len(got)) + life.alive:
                raise Refuted(
                    f"{what}: layer {layer}, row {row}, head {head} says that it retains positions {positions}, but "
                    f"should retain {life.alive}, padding in front"
                )


def _check_bytes(cache: KnormCache, what: str) -> None:
    full = 0
    for index, layer in enumerate(cache.layers):
        for name, tensor in (("keys", layer.keys), ("values", layer.values)):
            held, own = tensor.untyped_storage().nbytes(), tensor.numel() * tensor.element_size()
            full += own // tensor.shape[2] * cache.get_seq_length()
            if held != own:
                raise Refuted(f"{what}: the {name} of layer {index} hold {held} bytes for {own}: a view, not a copy")
    if cache.memory().full != full:
        raise Refuted(f"{what}: memory().full is {cache.memory().full} bytes, but should be {full}")


@dataclass
class _Row:
    """What has been fed to one row: its tokens, in calls."""

    tokens: list[int] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    lead: int = 0

    def truth(self, model: PreTrainedModel, rules: Rules) -> oracle.Truth:
        return oracle.run(model, torch.tensor([self.tokens]), rules, self.calls)

    def cut(self, count: int) -> None:
        del self.tokens[len(self.tokens) - count :]
        while count:
            taken = min(count, self.calls[-1])
            count, self.calls[-1] = count - taken, self.calls[-1] - taken
            if not self.calls[-1]:
                self.calls.pop()


@dataclass(frozen=True)
class _Setting:
    """How a walk attends: by which implementation, inside attention() or not, and the padding of the first rows."""

    rules: Rules
    implementation: str
    inside: bool
    leads: tuple[int, ...]


SETTINGS = (
    _Setting(Rules(0.5, 8, (1,), 1, 2, protocol="streaming"), "sdpa", True, (0, 4, 2)),
    _Setting(Rules(0.6, 0, (), 0, 2), "sdpa", False, (0, 0)),
    _Setting(Rules(0.7, 9, protocol="streaming"), "eager", False, (0, 0)),
    _Setting(Rules(0.5, 7, (0,), 0, 0, "random", "streaming", 3), "eager", True, (3, 0)),
)


class _Walk:
    """A KnormCache and, row by row, what it should be; one step after another."""

    def __init__(self, model: PreTrainedModel, setting: _Setting, seed: int) -> None:
        self.model, self.setting, self.draw = model, setting, random.Random(seed)
        self.cache = KnormCache(setting.rules.policy())
        self.rows: list[_Row] = []
        self.said: list[str] = []
        self.truths: list[oracle.Truth] = []

    def start(self, prompt: int) -> None:
        self.rows = [_Row(lead=lead) for lead in self.setting.leads]
        self.feed(prompt)

    def feed(self, count: int) -> None:
        self.said.append(f"{count} tokens")
        first = not self.rows[0].calls
        ids = torch.tensor([[self.draw.randrange(1, VOCABULARY) for _ in range(count)] for _ in self.rows])
        if first:
            for row, given in zip(self.rows, ids.tolist(), strict=True):
                row.tokens, row.calls = given[row.lead :], [count - row.lead]
        else:
            for row, given in zip(self.rows, ids.tolist(), strict=True):
                row.tokens += given
                row.calls.append(count)
        options: dict[str, Any] = {cache_keyword(self.model): self.cache, "use_cache": True}
        if any(row.lead for row in self.rows):
            total = max(len(row.tokens) + row.lead for row in self.rows)
            mask = torch.tensor([[int(place >= row.lead) for place in range(total)] for row in self.rows])
            options |= {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -count:]}
        with torch.no_grad():
            logits = self.model(ids, **options).logits
        self.truths = [row.truth(self.model, self.setting.rules) for row in self.rows]
        self.compare(logits)

    def compare(self, logits: Tensor) -> None:
        rules, calls = self.setting.rules, ", ".join(self.said)
        for number, (row, truth) in enumerate(zip(self.rows, self.truths, strict=True)):
            new = min(logits.shape[1], row.calls[-1])
            difference = gap(logits[number, -new:], truth.logits[0, -new:])
            if difference > CLOSE[self.setting.implementation]:
                raise Refuted(
                    f"{rules}, {self.setting.implementation} attention, padding {[r.lead for r in self.rows]}: after "
                    f"{calls}, row {number} differs in its logits by {difference:.3g} from full attention with the "
                    "evicted masked, but should be equal"
                )
            _compare_positions(self.cache, number, truth, f"{rules}: after {calls}")
        seen = len(self.rows[0].tokens) + self.rows[0].lead
        if self.cache.get_seq_length() != seen:
            raise Refuted(f"get_seq_length() is {self.cache.get_seq_length()} after {seen} tokens, {rules}")

    def choose(self, indices: list[int], how: str) -> None:
        self.said.append(f"{how} of rows {indices}")
        index = torch.tensor(indices)
        if how == "batch_repeat_interleave":
            self.cache.batch_repeat_interleave(len(indices) // len(self.rows))
        else:
            getattr(self.cache, how)(index)
        self.rows = [replace(row, tokens=[*row.tokens], calls=[*row.calls]) for row in (self.rows[i] for i in indices)]

    def crop(self) -> None:
        """Take back what has come since the last eviction, by either way of saying so; one more is refused."""
        lives = [life for truth in self.truths for layer in truth.lives for head in layer for life in head]
        fresh = min(len(life.lost) - max([0, *life.evictions]) for life in lives)
        seen = self.cache.get_seq_length()
        if fresh < min(len(row.tokens) for row in self.rows):
            must_raise(f"crop(-{fresh + 1}) beyond an eviction", ValueError, lambda: self.cache.crop(-fresh - 1))
        self.cache.crop(0)
        if fresh and fresh < min(len(row.tokens) for row in self.rows):
            self.said.append(f"crop of {fresh}")
            self.cache.crop(-(fresh // 2))
            self.cache.crop(seen - fresh)
            for row in self.rows:
                row.cut(fresh)

    def go(self) -> None:
        """Take every kind of step; what is chosen, repeated and copied goes on."""
        self.start(11)
        self.feed(1)
        self.crop()
        self.feed(4)
        last = len(self.rows) - 1
        self.choose([last, 0, *range(1, last)], "reorder_cache")
        self.feed(1)
        self.feed(2)
        self.crop()
        self.feed(3)
        self.choose([1, 0], "batch_select_indices")
        self.feed(1)
        self.choose([0, 0, 1, 1], "batch_repeat_interleave")
        self.feed(5)
        twin = copy.copy(self)
        twin.cache, twin.rows, twin.said = copy.deepcopy(self.cache), copy.deepcopy(self.rows), [*self.said, "a copy"]
        self.feed(2)
        twin.feed(3)
        self.cache.reset()
        self.said.append("reset")
        self.start(13)
        self.feed(2)


def check_any_order() -> str:
    """KnormCache equals full attention with the evicted masked whatever is called, and says which positions it holds.

    Several tokens a call, rows chosen, reordered and repeated, crop, copies and reset; padded, by sdpa and eager.
    """
    model, steps = small_model("cpu"), 0
    for seed, setting in enumerate(SETTINGS):
        with (
            _attending_by(model, setting.implementation),
            attention(model) if setting.inside else nullcontext(),
        ):
            walk = _Walk(model, setting, seed)
            walk.go()
            steps += len(walk.said)
    return f"{steps} steps in {len(SETTINGS)} settings"


def check_cache_refusals() -> str:
    """What KnormCache cannot do right it refuses, before anything is written."""
    model, ids = small_model("cpu"), torch.arange(1, 25).view(2, 12)
    padded = torch.ones_like(ids)
    padded[1, :3] = 0
    skipping = Rules(0.5, 4, (0,), protocol="streaming").policy()

    def feed(cache: KnormCache, ids: Tensor, model: PreTrainedModel = model, **options: Any) -> None:
        with torch.no_grad():
            model(ids, use_cache=True, **{cache_keyword(model): cache}, **options)

    outside, lacking = KnormCache(Policy(0.5)), KnormCache(Policy(0.5, skip_layers=(2,)))
    unequal, inside, whole, window = (KnormCache(p) for p in (skipping, skipping, Policy(0.5), Policy(0.5)))
    feed(unequal, ids[:, :8])
    with attention(model):
        feed(inside, ids[:, :8], attention_mask=padded[:, :8])
    feed(whole, ids)
    sliding = MistralForCausalLM(MistralConfig(**CONFIG, sliding_window=9)).eval()
    feed(window, ids[:, :8], sliding)
    wrong = torch.cat([torch.ones_like(padded[:, :8]), padded[:, 8:9]], 1)
    deeper = LlamaForCausalLM(LlamaConfig(**{**CONFIG, "num_hidden_layers": 3})).double().eval()
    refused: list[tuple[str, KnormCache, Callable[[], None]]] = [
        ("a padded batch outside attention()", outside,
         lambda: feed(outside, ids, attention_mask=padded)),
        ("several tokens a call for layers of unequal length", unequal, lambda: feed(unequal, ids[:, 8:])),
        ("a sliding window outgrown", window, lambda: feed(window, ids[:, 8:], sliding)),
        ("another batch size", whole, lambda: feed(whole, ids[:1])),
        ("a model of more layers", whole, lambda: feed(whole, ids[:, :1], deeper)),
        ("a layer to skip that the model lacks", lacking,
         lambda: feed(lacking, ids)),
    ]  # fmt: skip
    for what, cache, call in refused:
        before = [layer.stored for layer in cache.layers]
        must_raise(what, ValueError, call)
        if [layer.stored for layer in cache.layers] != before:
            raise Refuted(f"{what} was refused, but only after something had been written to the cache")
    with attention(model):
        must_raise(
            "another padding than the cache's", ValueError, lambda: feed(inside, ids[:, 8:9], attention_mask=wrong)
        )
    broken = model.model.layers[0].register_forward_hook(lambda *_: 1 / 0)
    try:
        must_raise("a model that breaks off", ZeroDivisionError, lambda: feed(whole, ids[:, :1]))
    finally:
        broken.remove()
    must_raise("a call after one that broke off", RuntimeError, lambda: feed(whole, ids[:, :1]))
    return f"{len(refused) + 3} refusals"


def cache_results() -> Iterator[Result]:
    """Run the catalogue's laws of models and caches on KnormCache; left padding inside attention(), as it asks."""
    subject = Subject("knorm.KnormCache", KNORM, make_cache=lambda ratio: KnormCache(Policy(ratio)))
    for result in iter_results(subject):
        if result.verdict == "does not apply":
            continue
        if result.check == "left_padding":
            with attention(small_model("cpu")):
                (result,) = iter_results(subject, select=["left_padding"])  # noqa: PLW2901
        yield result
