"""A report's protocol run on a model: every number that a claim speaks of, measured."""

from __future__ import annotations

import io
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicLayer

from knorm.bench.latency import METRICS, Arm, Prompt, Sample, attending, measure
from knorm.cache import KnormCache, KnormLayer
from knorm.evaluation.published.schema import FULL, Protocol
from knorm.files import read_text
from knorm.model_attention import attention_through, cache_keyword
from knorm.models import MOST_TEXT, hub_files, read_rows
from knorm.perplexity import Run, Schedule, exact_run
from knorm.policy import Policy, retained_count
from knorm.rounding import attend_shuffled
from knorm.sources import HUB_TEXTS

ROUNDS = 7  # blocks of timing, after one for warm-up


# Texts


def load_seed_texts(protocol: Protocol, sources: Mapping[str, str]) -> dict[str, str]:
    """Load the texts as the protocol cuts them.

    WikiText stays in its tokenised form, unlike in models.load_text: the report read it so.

    Args:
        protocol: which texts, and how long.
        sources: name -> "wikitext2" or "pg19" from the Hub, a .parquet with a column text, or a .txt: its lines for
            WikiText, one book for PG-19.

    Returns:
        name -> text.

    Raises:
        ValueError: a source that is missing or cannot be read, and where no row is long enough.
    """
    texts: dict[str, str] = {}
    for text in protocol.texts:
        if text.name not in sources:
            raise ValueError(f"no source of {text.name}: give {text.what}")
        rows = _text_rows(str(sources[text.name]), whole=text.name != "wikitext")
        row = next((row for row in rows if len(row.strip()) >= text.least), None)
        if row is None:
            raise ValueError(f"{sources[text.name]} has no row of {text.least} characters, but should be {text.what}")
        texts[text.name] = row[: text.characters]
    return texts


def _text_rows(source: str, whole: bool) -> Iterable[str]:
    source = HUB_TEXTS.get(source, source)
    if source.startswith("hub:"):
        return read_rows(hub_files(source), "parquet", "text")
    file = Path(source)
    if not os.path.lexists(file) or file.is_dir():
        raise ValueError(f"text {source!r} is no file here: give a .txt, a .parquet, or {' or '.join(HUB_TEXTS)}")
    if file.suffix == ".parquet":
        return read_rows([source], "parquet", "text")
    text = read_text(file, MOST_TEXT)
    return [text] if whole else io.StringIO(text).readlines()


def seed_ids(tokenizer: PreTrainedTokenizerFast, text: str, most: int) -> Tensor:
    """Take the first tokens of a text.

    Args:
        tokenizer: of the model that will read them.
        text: at least two tokens long.
        most: tokens at most.

    Returns:
        int64 [1, tokens].

    Raises:
        ValueError: fewer than two tokens.
    """
    ids: Tensor = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :most]
    if ids.shape[1] < 2:
        raise ValueError(f"the text has {ids.shape[1]} tokens, but needs at least two: {text[:40]!r}")
    return ids


class _NormOrderedLayer(KnormLayer):
    """One layer as the report's project kept it before its fix: sorted by norm, cut off, never sorted back."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = DynamicLayer.update(self, key_states, value_states)
        self.seen += key_states.shape[2]
        length = keys.shape[2]
        if self.index not in self.policy.skip_layers and length >= self.policy.prune_after:
            index = keys.norm(dim=-1).argsort(dim=-1)[..., : retained_count(length, self.policy.keep_ratio), None]
            self.keys, self.values = (x.gather(2, index.expand(*index.shape[:3], x.shape[3])) for x in (keys, values))
        return keys, values

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        queries = query_length if isinstance(query_length, int) else query_length.shape[0]
        stored = self.keys.shape[2] if self.seen and self.keys is not None else 0
        return stored + queries, self.seen - stored


class _NormOrderedCache(KnormCache):
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        while len(self.layers) <= layer_idx:
            self.layers.append(_NormOrderedLayer(self.policy, len(self.layers)))
        return self.layers[layer_idx].update(key_states, value_states)


@torch.no_grad()
def norm_ordered_nll(model: PreTrainedModel, input_ids: Tensor, policy: Policy) -> Tensor:
    """Compute token NLLs by the report's loop before its fix, whose slots stand in the order of norms.

    Args:
        model: a causal language model in eval mode.
        input_ids: int64 [batch, T].
        policy: only prune_after, skip_layers and the ratio count.

    Returns:
        Nats of each token after the first, float32 [batch, T-1].
    """
    ids = input_ids.to(model.device)
    cache, keyword = _NormOrderedCache(policy), cache_keyword(model)
    with attention_through(model, None):
        logits = [model(step, use_cache=True, **{keyword: cache}).logits for step in ids[:, :-1].split(1, dim=1)]
    return functional.cross_entropy(torch.cat(logits, 1).transpose(1, 2).float(), ids[:, 1:], reduction="none")


def _ppl(nll: Tensor) -> float:
    return float(nll.double().mean().exp())  # infinite, not an error, where a model is damaged


def _largest(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Largest difference of any token; nan, not the rest, where one is nan."""
    return float(torch.stack([(first - second).abs().max() for first, second in pairs]).max())


def _as_in(run: Run) -> Schedule:
    """The same evictions as in a run, so that near-ties cannot fall differently in another."""
    return lambda layer, _: run.evicted_at[layer]


def _perplexities(model: PreTrainedModel, ids: Mapping[str, Tensor], protocol: Protocol) -> dict[str, float]:
    values: dict[str, float] = {}
    shuffled: list[tuple[Tensor, Tensor]] = []
    loops: list[tuple[Tensor, Tensor]] = []
    for name, tokens in ids.items():
        values[f"ppl/{name}/{FULL}"] = _ppl(exact_run(model, tokens, Policy()).nll)
        streamed = tokens[:, : protocol.streamed_tokens]
        for ratio in protocol.ratios:
            policy = protocol.policy(ratio)
            run = exact_run(model, streamed, policy)
            values[f"ppl/{name}/{ratio}"] = _ppl(run.nll)
            turned = exact_run(model, streamed, policy, schedule=_as_in(run), attend=attend_shuffled)
            shuffled.append((run.nll, turned.nll))
            if ratio in protocol.before:
                before = norm_ordered_nll(model, streamed, policy)
                values[f"ppl_before/{name}/{ratio}"] = _ppl(before)
                loops.append((run.nll, before))
    values["order"] = _largest(shuffled)
    if loops:
        values["order_loop"] = _largest(loops)
    for kind, ratios in (("ppl", (FULL, *protocol.ratios)), ("ppl_before", protocol.before)):
        for ratio in ratios:
            values[f"{kind}/mean/{ratio}"] = statistics.fmean(values[f"{kind}/{name}/{ratio}"] for name in ids)
    return values


def _conclusions(values: Mapping[str, float], protocol: Protocol) -> dict[str, float]:
    """What the report concludes from its perplexities."""
    more = {
        f"fix/{ratio}": values[f"ppl/mean/{ratio}"] / values[f"ppl_before/mean/{ratio}"] - 1
        for ratio in protocol.before
    }
    means = {ratio: values[f"ppl/mean/{ratio}"] for ratio in sorted(protocol.ratios, key=Fraction, reverse=True)}
    down = [ppl for ratio, ppl in means.items() if Fraction(ratio) >= Fraction("0.5")]
    more["monotone"] = max(b / a for a, b in pairwise(down))
    more["paradox"] = means[min(means, key=Fraction)] / means["0.9"]
    rise = [values[f"ppl/{name}/0.9"] / values[f"ppl/{name}/{FULL}"] for name in ("pg19", "wikitext")]
    more["long_text"] = rise[0] / rise[1]
    return more


def _untouched(model: PreTrainedModel, ids: Mapping[str, Tensor], protocol: Protocol) -> float:
    """Largest change of a token where prune_after is as long as the longest plain pass."""
    policy = Policy("0.5", protocol.plain_tokens, protocol.skip_layers, protocol="streaming")
    return _largest(
        [(exact_run(model, tokens, policy).nll, exact_run(model, tokens, Policy()).nll) for tokens in ids.values()]
    )


def time_quantities(
    samples: Sequence[Sequence[Sample]], ratios: Sequence[str], new_tokens: Sequence[int]
) -> dict[str, float]:
    """Compute what measure_claims says of time.

    Args:
        samples: latency.measure's blocks [block][arm], the uncompressed arm first.
        ratios: of the arms.
        new_tokens: of each prompt.

    Returns:
        Quantities by the names that measure_claims lists, in seconds, tokens a second, or shares.
    """
    values, prompts = {}, range(len(new_tokens))
    ways = {metric: [[s.seconds(metric) for s in block] for block in samples] for metric in METRICS}

    def mean_of_medians(metric: str, arm: int, of: Callable[[float, int], float] = lambda x, _: x) -> float:
        """Over blocks the median, over prompts the mean."""
        columns = ([of(block[arm][p], new_tokens[p]) for block in ways[metric]] for p in prompts)
        return statistics.fmean(map(statistics.median, columns))

    for arm, ratio in enumerate(ratios):
        values[f"ttft_s/{ratio}"] = mean_of_medians("ttft", arm)
        values[f"tpot_s/{ratio}"] = mean_of_medians("tpot", arm)
        values[f"tokens_per_s/{ratio}"] = mean_of_medians("throughput", arm, lambda seconds, new: new / seconds)
    tenth = mean_of_medians("throughput", 0, lambda seconds, _: 0.1 * seconds)
    for arm, ratio in list(enumerate(ratios))[1:]:
        pairs = [block[arm][p] / block[0][p] for block in ways["ttft"] for p in prompts]
        values[f"ttft_gain/{ratio}"] = 1 - statistics.median(pairs)
        values[f"ttft_by_a_tenth/{ratio}"] = 1 - values[f"ttft_s/{ratio}"] / tenth
    return values


def _times(model: PreTrainedModel, prompts: Mapping[str, Tensor], protocol: Protocol, rounds: int) -> dict[str, float]:
    new: dict[str, int] = {text.name: text.new_tokens for text in protocol.texts}
    asked = [Prompt(ids, new[name]) for name, ids in prompts.items()]
    arms = [Arm(model, asked, None), *(Arm(model, asked, protocol.policy(ratio)) for ratio in protocol.timed)]
    with attending(model):
        samples = measure(arms, [prompt.new_tokens for prompt in asked], blocks=rounds)
    return time_quantities(samples, (FULL, *protocol.timed), [prompt.new_tokens for prompt in asked])


def measure_claims(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Mapping[str, str],
    protocol: Protocol,
    *,
    rounds: int = ROUNDS,
) -> dict[str, float]:
    """Run the protocol on a model, on its device.

    ppl/TEXT/RATIO, ppl_before/TEXT/RATIO   perplexity after and before the fix; TEXT is a name or "mean"
    order, order_loop    largest change of a token's NLL, nats: slots shuffled, same evictions; the loop before the fix
    fix/RATIO            perplexity after the fix over before, less 1
    monotone, paradox    largest ratio of perplexities from one ratio to the next, 0.9 to 0.5; of the least ratio to 0.9
    long_text            PG-19's rise at 0.9 over WikiText's
    untouched            largest change of a token where prune_after is as long as the text, nats
    ttft_s, tpot_s, tokens_per_s/RATIO      median over blocks, mean over texts; `knorm bench` has intervals
    ttft_gain/RATIO                         1 - the median over pairs of TTFT at RATIO / at 1.0
    ttft_by_a_tenth/RATIO                   the same as the report has it, against a tenth of the baseline's total time

    Args:
        model: a causal language model that exact_nll takes.
        tokenizer: of the model.
        texts: name -> text, as load_seed_texts cuts them.
        protocol: ratios, texts and lengths.
        rounds: of timing, at least 5; one more is run first and discarded.

    Returns:
        Quantities by the names above.

    Raises:
        ValueError: fewer than 5 rounds, and what perplexity.exact_nll raises.
    """
    if rounds < 5:
        raise ValueError(f"rounds={rounds}, but should be at least 5: a median of fewer is noise")
    ids = {name: seed_ids(tokenizer, text, protocol.plain_tokens) for name, text in texts.items()}
    prompts = {
        text.name: seed_ids(tokenizer, texts[text.name][: text.prompt_characters], protocol.plain_tokens)
        for text in protocol.texts
    }
    values = _perplexities(model, ids, protocol)
    values |= _conclusions(values, protocol)
    values["untouched"] = _untouched(model, ids, protocol)
    return values | _times(model, {name: prompt.to(model.device) for name, prompt in prompts.items()}, protocol, rounds)
