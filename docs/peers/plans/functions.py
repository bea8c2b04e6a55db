"""Public functions, as targets of the plans here, a few lines each.

They are called out of checkouts of their projects, in folders of the projects' names below $KNORM_CHECKOUTS:
l2compress, SnapKV, H2O, streaming-llm and KVCache-Factory. Where a method scores by queries, it is given the keys as
queries, normalised: laws can be asked of it then, but what it costs is not what the method costs, and is not measured.
What the projects promise otherwise than every compressor stands in knorm.toml.
"""

from __future__ import annotations

import importlib.util
import math
import os
from contextlib import redirect_stdout
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WINDOW = 2  # tokens at the end whose queries score, and which stay


@cache
def _module(project: str, file: str) -> Any:
    path = Path(os.environ["KNORM_CHECKOUTS"], project, file)
    spec: Any = importlib.util.spec_from_file_location(f"{project}_{path.stem}".replace("-", "_"), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _count(keys: Tensor, keep_ratio: float) -> int:
    return max(1, math.ceil(Fraction(str(keep_ratio)) * keys.shape[2]))


def l2compress(past_key_values: Any, keep_ratio: float, prune_after: int, skip_layers: list[int]) -> Any:
    compress = _module("l2compress", "cache.py").l2_compress
    return compress(past_key_values, keep_ratio=keep_ratio, prune_after=prune_after, skip_layers=skip_layers)


def streaming_llm(keys: Tensor, values: Tensor, keep_ratio: float) -> Any:
    """Two sinks, and the newest tokens up to the budget."""
    recent = _count(keys, keep_ratio) - 2
    if recent < 1 and keys.shape[2] > 3:
        raise ValueError("the budget leaves no room for a recent token beside 2 sinks")
    with redirect_stdout(None):
        made = _module("streaming-llm", "streaming_llm/kv_cache.py").StartRecentKVCache(2, max(1, recent))
    return made([(keys, values)])[0]


def h2o(keys: Tensor, values: Tensor, keep_ratio: float) -> Any:
    """Half of the budget by the attention received, half the newest."""
    count = _count(keys, keep_ratio)
    if count < 2:
        raise ValueError("a budget of 1 leaves no room for both a heavy hitter and a recent token")
    with redirect_stdout(None):
        layer = _module("H2O", "h2o_hf/utils_real_drop/modify_llama.py").H2OKVCache_LayerWise(
            count - count // 2, count // 2
        )
    scores = (_queries(keys) @ keys.mT / math.sqrt(keys.shape[3])).float()
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=keys.device).tril()
    return layer((keys, values), scores.masked_fill(~causal, -torch.inf).softmax(-1).to(keys.dtype))


def _queries(keys: Tensor) -> Tensor:
    """Queries of ordinary size, which follow from the keys."""
    return torch.nn.functional.normalize(keys.float(), dim=-1).nan_to_num().to(keys.dtype)


def _cluster(module: Any, name: str, keys: Tensor, values: Tensor, keep_ratio: float, **options: Any) -> Any:
    count = _count(keys, keep_ratio)
    if "window_size" in options:
        if count < WINDOW < keys.shape[2]:
            raise ValueError(f"a budget of {count} does not cover the window of {WINDOW}")
        count = max(count, WINDOW + 1)  # which the projects assert
    cluster = getattr(module, name)(max_capacity_prompt=count, **options)
    return cluster.update_kv(keys, _queries(keys), values, None, 1)


def snapkv(keys: Tensor, values: Tensor, keep_ratio: float) -> Any:
    module = _module("SnapKV", "snapkv/monkeypatch/snapkv_utils.py")
    return _cluster(module, "SnapKVCluster", keys, values, keep_ratio, window_size=WINDOW)


def _factory(name: str, *arguments: Any, **options: Any) -> Any:
    return _cluster(_module("KVCache-Factory", "pyramidkv/pyramidkv_utils.py"), name, *arguments, **options)


def factory_snapkv(keys: Tensor, values: Tensor, keep_ratio: float) -> Any:
    return _factory("SnapKVCluster", keys, values, keep_ratio, window_size=WINDOW)


def factory_pyramidkv(keys: Tensor, values: Tensor, keep_ratio: float, layer: int = 0) -> Any:
    return _factory(
        "PyramidKVCluster", keys, values, keep_ratio, window_size=WINDOW, num_hidden_layers=2, layer_idx=layer % 2
    )


def factory_h2o(keys: Tensor, values: Tensor, keep_ratio: float) -> Any:
    return _factory("H2OKVCluster", keys, values, keep_ratio, window_size=WINDOW)


def factory_cam(keys: Tensor, values: Tensor, keep_ratio: float) -> Any:
    return _factory("CAMKVCluster", keys, values, keep_ratio, window_size=WINDOW)


def factory_streaming(keys: Tensor, values: Tensor, keep_ratio: float) -> Any:
    return _factory("StreamingLLMKVCluster", keys, values, keep_ratio, window_size=WINDOW)


def factory_l2norm(keys: Tensor, values: Tensor, keep_ratio: float) -> Any:
    return _factory("L2NormCluster", keys, values, keep_ratio)
