"""vLLM's server with a forced decode: started with `--logits-processors knorm.engines.forced:Forced`.

A request whose `vllm_xargs` have a list `forced` and a word `key` gets these tokens, one a step, whatever is predicted.
Other requests are left alone. Needs vLLM, and of knorm what the engine's process needs.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from knorm.engines.vllm import forced_decode


@cache
def _served() -> type:
    """Make the class: what forces is the same as in the process that knorm starts, and nothing is kept."""
    base: Any = forced_decode({})

    class Forced(base):
        def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
            super().__init__(vllm_config, device, is_pin_memory)
            self.vocabulary = vllm_config.model_config.get_vocab_size()

        @classmethod
        def validate_params(cls, params: Any) -> None:
            given = params.extra_args or {}
            if "forced" not in given:
                return
            forced = given["forced"]
            if not (isinstance(forced, list) and all(type(token) is int and token >= 0 for token in forced)):
                raise ValueError("vllm_xargs: forced should be a list of tokens")
            if str(given.get("key", "")) in ("", "0"):
                raise ValueError("vllm_xargs: beside forced there should be a word as key, other than 0")
            if (params.max_tokens or 0) > len(forced):
                raise ValueError(f"vllm_xargs: {len(forced)} tokens are forced, but max_tokens is {params.max_tokens}")

        def update_state(self, batch_update: Any) -> None:
            super().update_state(batch_update)
            for row in [row for row, (forced, *_) in self.rows.items() if max(forced, default=0) >= self.vocabulary]:
                del self.rows[row]  # a token that is not there would end the engine

    return Forced


def __getattr__(name: str) -> type:
    """Make what vLLM is given by name, once vLLM is there."""
    if name != "Forced":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _served()
