"""What a compressed cache must compute, slowly: all the text at once, under a mask made from lists of living tokens."""

from __future__ import annotations

import torch

from knorm import retained_count
from knorm.model_attention import attention_through


def visible(keys, policy, layer, calls):
    """bool [batch, heads, T, T]: query t sees key s, where tokens come in `calls` and are thrown out after each."""
    batch, heads, length, _ = keys.shape
    seen = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    norms = keys.double().norm(dim=-1).tolist()
    for b in range(batch):
        for h in range(heads):
            alive, start = [], 0
            for size in calls:
                for t in range(start, start + size):
                    seen[b, h, t, [*alive, *range(start, t + 1)]] = True
                alive += range(start, start + size)
                start += size
                due = start == calls[0] or policy.protocol == "streaming"
                if due and layer not in policy.skip_layers and len(alive) >= policy.prune_after:
                    count = retained_count(len(alive), policy.keep_ratio)
                    edge = len(alive) - policy.protect_recent
                    safe = set(alive[: policy.protect_first]) | set(alive[edge:])
                    ranked = sorted(alive, key=lambda s: (s not in safe, norms[b][h][s], s))
                    alive = sorted(ranked[:count]) if count < len(alive) and len(safe) < len(alive) else alive
    return seen


def oracle_logits(model, ids, policy, calls):
    """Logits float64 [batch, T, vocabulary] of a model in float64, without a cache."""

    def attend(module, query, key, value, mask, scaling=None, **_):
        groups = query.shape[1] // key.shape[1]
        mask = visible(key, policy, module.layer_idx, calls).repeat_interleave(groups, 1)
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), None

    with attention_through(model, attend), torch.no_grad():
        return model(ids, use_cache=False).logits
