"""Stand-in weights for presses that read what others have trained: seeded random numbers of the right shape.

They show what a press does with weights, whatever these are; nothing is learnt of its quality. The functions are kept
as text, since they are both what runs here and what a program of laws.scripts shows. Each puts the weights where the
press looks for them first, before it is opened.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from knorm.methods.presses import nested_at

_DUO_ATTENTION = '''\
def stand_in(press, model):
    """Attention patterns: 4 sinks, 32 recent tokens, and how much each key/value head retrieves."""
    shape = model.config.num_hidden_layers, model.config.num_key_value_heads
    patterns = 4, 32, torch.rand(shape, generator=torch.Generator().manual_seed(0)).numpy()
    press.load_attention_pattern = lambda model: patterns
'''
_EXPECTED_ATTENTION = '''\
def stand_in(press, model):
    """Statistics of queries: their mean, and a covariance."""
    shape, drawn = (model.config.num_hidden_layers, model.config.num_attention_heads), torch.Generator().manual_seed(0)
    spread = torch.randn(*shape, 64, 64, generator=drawn) / 8
    press.mu = torch.randn(*shape, 64, generator=drawn).to(model.dtype)
    press.cov = (spread @ spread.mT).to(model.dtype)
'''
_FAST_KVZIP = '''\
def stand_in(press, model):
    """Gates of hidden states, with 16 sinks each."""
    config, heads = model.config, model.config.num_key_value_heads
    sizes = config.hidden_size, heads, config.num_attention_heads // heads, model.dtype
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        press.gates = [FastKVzipGate(layer, *sizes) for layer in range(config.num_hidden_layers)]
        for gate in press.gates:
            gate.k_base.normal_()
            gate.b.normal_()
'''
_KVZAP = '''\
def stand_in(press, model):
    """A surrogate of hidden states."""
    config, hidden = model.config, None if press.model_type == "linear" else 32
    with torch.random.fork_rng():
        torch.manual_seed(0)
        press.kvzap_model = KVzapModel(
            KVzapConfig(
                input_dim=config.hidden_size,
                output_dim=config.num_key_value_heads,
                n_modules=config.num_hidden_layers,
                hidden_dim=hidden,
            )
        )
    press.kvzap_model_name = f"nvidia/KVzap-{press.model_type}-{config.name_or_path.split('/')[-1]}"
'''
_LUKV = '''\
def stand_in(press, model):
    """A curve of budgets: for each percentage to be removed, the share of each head; their mean is the percentage."""
    shape = model.config.num_hidden_layers, model.config.num_key_value_heads
    spread = torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 0.5
    removed = torch.arange(1, 100)[:, None, None] / 100
    press._budget_curves = (removed + (spread - spread.mean()) * torch.minimum(removed, 1 - removed)).numpy()
'''
_QFILTER = '''\
def stand_in(press, model):
    """Filters: a direction for each key/value head."""
    shape = model.config.num_hidden_layers, model.config.num_key_value_heads, 64
    filters = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    press.load_q_filters = lambda name: filters
'''
_RESTORE_KV = '''\
def stand_in(press, model):
    """Eight restore tokens, and an adapter that is active while they are read."""
    drawn = torch.Generator().manual_seed(0)
    press.restore_embeddings = torch.randn(8, model.config.hidden_size, generator=drawn).to(model.device, model.dtype)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    if press.adapter_name not in getattr(model, "peft_config", {}):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model.add_adapter(adapter, press.adapter_name)
    model.disable_adapters()
    variant = "_plus" if press.kvzip_plus_normalization else ""
    press.restore_model_name = f"higokri/RestoreKV-{model.config.name_or_path.split('/')[-1]}{variant}"
'''


class StandIn(NamedTuple):
    """Describe the stand-in weights of one class of presses.

    Attributes:
        text: the function that gives them to a press.
        imports: what it needs besides torch.
        unless: attributes that are set where a press has weights of its own, or makes them itself.
    """

    text: str
    imports: str = ""
    unless: tuple[str, ...] = ()


STAND_INS: Mapping[str, StandIn] = {
    "DuoAttentionPress": StandIn(_DUO_ATTENTION, unless=("on_the_fly_scoring",)),
    "ExpectedAttentionStatsPress": StandIn(_EXPECTED_ATTENTION, unless=("mu", "stats_folder")),
    "FastKVzipPress": StandIn(
        _FAST_KVZIP, "from kvpress.presses.fastkvzip_press import FastKVzipGate", unless=("gates",)
    ),
    "KVzapPress": StandIn(_KVZAP, "from kvpress.presses.kvzap_press import KVzapConfig, KVzapModel"),
    "LUKVPress": StandIn(_LUKV, unless=("_budget_curves",)),
    "QFilterPress": StandIn(_QFILTER),
    "RestoreKVPress": StandIn(_RESTORE_KV, "from peft import LoraConfig"),
}
SAID = "with stand-in weights"


def _kind(press: Any) -> str | None:
    """Name the class whose stand-ins a press is given: its own, or one that it is derived from."""
    kind = next((base.__name__ for base in type(press).__mro__ if base.__name__ in STAND_INS), None)
    own = STAND_INS[kind].unless if kind else ()
    return None if any(_is_set(getattr(press, name, None)) for name in own) else kind


def _is_set(value: Any) -> bool:
    return value is not None and value is not False


def stood_in(press: Any) -> list[tuple[str, Any]]:
    """List what stand-in weights are given to: a press, and those that it wraps.

    Args:
        press: an instance.

    Returns:
        What a program calls each, and the press itself; none for a press that reads no weights of others.
    """
    return [(path, each) for path, each in nested_at(press) if _kind(each)]


@cache
def _function(kind: str) -> Any:
    scope: dict[str, Any] = {}
    exec(f"import torch\n{STAND_INS[kind].imports}\n{STAND_INS[kind].text}", scope)
    return scope["stand_in"]


def stand_in(press: Any, model: Any) -> None:
    """Give a press, and those that it wraps, stand-in weights for a model, on which an adapter may be put.

    Args:
        press: an instance, not yet opened on the model.
        model: a Llama, or what has attention modules like one, with heads 64 wide.
    """
    for _, each in stood_in(press):
        _function(str(_kind(each)))(each, model)


def written(press: Any, name: str) -> tuple[str, str]:
    """Write what does the same in a program.

    Args:
        press: an instance.
        name: what the program calls it.

    Returns:
        The functions, with what they import, and the lines that call them with `model`; twice nothing for a press that
        reads no weights.
    """
    functions, calls = {}, []
    for path, each in stood_in(press):
        kind = str(_kind(each))
        own = re.sub(r"(?<!^)(?=[A-Z])", "_", kind.removesuffix("Press")).lower()
        imports = STAND_INS[kind].imports + "\n\n\n" * bool(STAND_INS[kind].imports)
        functions[kind] = imports + STAND_INS[kind].text.replace("def stand_in(", f"def stand_in_{own}(")
        calls.append(f"stand_in_{own}({path.replace('press', name, 1)}, model)")
    return "\n\n".join(functions.values()), "\n".join(calls)
