"""knorm's own method: a Policy, run by KnormCache."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel

from knorm.cache import KnormCache
from knorm.methods.budget import Budget, TakesNoBudget
from knorm.methods.method import Method, Session, Tokenizer
from knorm.methods.watch import watching
from knorm.policy import Policy


class PolicyMethod(Method):
    """Run a Policy; its runs also follow from a schedule (perplexity.exact_run).

    Args:
        name: the target as it was written.
        policy: when and what to evict.
        budget: its keep_ratio takes the place of the policy's.

    Raises:
        TakesNoBudget: the budget is a number of tokens.
    """

    kind = "policy"
    policy: Policy

    def __init__(self, name: str, policy: Policy, budget: Budget | None = None) -> None:
        if budget is not None:
            if budget.keep_ratio is None:
                raise TakesNoBudget(f"{name} keeps a share of the cache: give keep_ratio, not keep_tokens")
            policy = replace(policy, keep_ratio=budget.keep_ratio)
        super().__init__(name, Budget(policy.keep_ratio))
        self.policy = policy

    def start(self, model: PreTrainedModel, length: int, batch: int, tokenizer: Tokenizer | None) -> Session:
        return _PolicySession(model, KnormCache(self.policy))


class _PolicySession(Session):
    def __init__(self, model: PreTrainedModel, cache: KnormCache) -> None:
        super().__init__(model, cache)
        # The cache refuses what transformers' one mask for all layers would spoil, unless each layer gets its own.
        self._prefill.enter_context(watching(model, type(self.seen)(), masked=False))

    def begin_decoding(self) -> None:
        self._decode.enter_context(watching(self.model, self.seen, masked=False))
