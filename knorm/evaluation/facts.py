"""Recall: what a story names early and needs late, and whether a compressed cache still has it.

The mean over all tokens hardly moves when one name is lost; the tokens of the name itself do.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from knorm.evaluation.runner import Runner
from knorm.evaluation.ways import Ways
from knorm.evaluation.windows import Windows
from knorm.methods.method import Method, Tokenizer
from knorm.models import load_text
from knorm.paths import ASSETS
from knorm.policy import Policy

PASSAGE = 80  # tokens of the passage that names the fact
AFTER = 16  # of which after the name


@dataclass(frozen=True)
class Facts:
    """Hold a window for each fact of the embedded narrative: the passage that names it, then the text that needs it.

    names       what is named
    input_ids   int64 [facts, tokens]: the passage, then the latest text up to the last token of the name
    asked       bool [facts, tokens - 1]: which predicted tokens are the name's
    """

    names: tuple[str, ...]
    input_ids: Tensor
    asked: Tensor


@dataclass(frozen=True)
class Recall:
    """Hold what became of the names' tokens alone.

    Attributes:
        nll: their mean, in nats.
        ppl: exp of that.
        accuracy: share that were the likeliest.
        tokens: how many there are.
        others: perplexity of all other tokens of the same windows, after the passage.
    """

    nll: float
    ppl: float
    accuracy: float
    tokens: int
    others: float


def fact_windows(tokenizer: PreTrainedTokenizerFast, length: int = 512, *, named: bool = True) -> Facts:
    """Cut out the facts of the embedded narrative, named early and needed 14,000 to 45,000 characters later.

    Args:
        tokenizer: of the model that will read them.
        length: tokens of a window, at least 160: two passages.
        named: False for another passage of the story in place of the one that names it, to tell memory from guessing.

    Returns:
        A window for each fact, int64 [facts, length].

    Raises:
        ValueError: windows shorter than two passages.

    Example:
        >>> fact_windows(load_embedded()[1], 256).input_ids.shape
        torch.Size([33, 256])
    """
    if length < 2 * PASSAGE:
        raise ValueError(
            f"windows of {length} tokens, but should be at least {2 * PASSAGE}: a passage, and what needs it"
        )
    facts = json.loads((ASSETS / "facts.json").read_text(encoding="utf-8"))
    encoding = tokenizer(load_text("narrative"), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, ends = torch.tensor(encoding["input_ids"]), [end for _, end in encoding["offset_mapping"]]

    def token_at(character: int) -> int:
        return next(i for i, end in enumerate(ends) if end > character)

    windows, asked = [], []
    for fact in facts:
        early = token_at(fact["named"][1] - 1) + 1 + AFTER
        passage = ids[early - PASSAGE : early] if named else ids[early : early + PASSAGE]
        first, last = token_at(fact["needed"][0]), token_at(fact["needed"][1] - 1)
        windows.append(torch.cat([passage, ids[last + 1 - (length - PASSAGE) : last + 1]]))
        asked.append(torch.arange(length - 1) >= length - 1 - (last + 1 - first))
    return Facts(tuple(fact["fact"] for fact in facts), torch.stack(windows), torch.stack(asked))


def recall(model: PreTrainedModel, facts: Facts, policy: Policy, *, prompt_length: int = 1, batch: int = 8) -> Recall:
    """Measure how well the names are predicted where they are needed, by a policy.

    Args:
        model: a causal language model in eval mode.
        facts: made by fact_windows with the model's tokenizer.
        policy: when and what to evict.
        prompt_length: tokens of the first call, 1 or more.
        batch: windows at a time.

    Returns:
        A Recall; `others` is of all tokens after the first passage that are not asked.

    Raises:
        ValueError: as perplexity.exact_nll.
    """
    runner = Runner(model, Windows(facts.input_ids), batch=batch)  # all tokens are scored: those of the prompt too
    run = runner.run(policy, prompt_length=prompt_length)
    nll, correct = run.nll.double().cpu(), run.correct.cpu()
    mean = float(nll[facts.asked].mean())
    others = nll[:, PASSAGE:][~facts.asked[:, PASSAGE:]]
    return Recall(
        mean,
        math.exp(mean),
        float(correct[facts.asked].double().mean()),
        int(facts.asked.sum()),
        math.exp(float(others.mean())),
    )


def recall_of(
    model: PreTrainedModel, facts: Facts, method: Method, *, tokenizer: Tokenizer | None = None, batch: int = 1
) -> Recall:
    """Say how well the names are predicted where they are needed, by any method.

    Args:
        model: a causal language model in eval mode.
        facts: made by fact_windows with the model's tokenizer; the prompt ends 16 tokens before a name is asked.
        method: made by `knorm.method`.
        tokenizer: of the model, for methods that read text.
        batch: windows at a time.

    Returns:
        A Recall; `others` is of the tokens after the prompt that are not asked.

    Raises:
        MethodError: what the method's own code raised.
    """
    prompt = max(PASSAGE, int(facts.asked.any(0).nonzero()[0]) - AFTER)
    ways = Ways(model, Windows(facts.input_ids), prompt, batch=batch, tokenizer=tokenizer)
    tokens = ways.evaluate(method).per_token
    asked = facts.asked[:, prompt - 1 :]
    mean, others = float(tokens.nll[asked].mean()), float(tokens.nll[~asked].mean())
    accuracy = float(tokens.correct[asked].double().mean())
    return Recall(mean, math.exp(mean), accuracy, int(asked.sum()), math.exp(others))
