"""The cases that goldens pin: what each measures, on which text or tensors, and what its numbers may depend on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knorm.core import compress
from knorm.evaluation.published.measure import seed_ids
from knorm.evaluation.published.schema import PYTHIA, bug_report
from knorm.evaluation.runner import Runner
from knorm.evaluation.windows import Windows, cut_windows
from knorm.golden.environment import How
from knorm.golden.format import Environment, Measured, Metric, Noise, digest
from knorm.golden.latency import COUNTED_SHAPE, POLICIES, TIMED_SHAPE, measure_counters, measure_latency
from knorm.golden.metrics import count, fingerprint, memory_ratio, ppl_ratio, tokens
from knorm.golden.pythia import judged_claims, load_texts, load_weights
from knorm.models import load_embedded, load_text, random_gpt_neox
from knorm.paths import ASSETS
from knorm.policy import Policy
from knorm.schedule import cache_lengths

RATIOS = ("1.0", "0.95", "0.7", "0.5", "0.1")

# What runs showed that differed in nothing that matters: docs/golden-power.md.
NOISE = {
    "cpu": Noise(runs=244, sigma=5e-7, largest=5e-5, typical=1e-4, alpha=0.01, power=1.0),
    "cuda": Noise(runs=200, sigma=2e-6, largest=5e-5, typical=1e-5, alpha=0.01, power=1.0),
}


@dataclass(frozen=True)
class Case:
    """Define the case `id`: what it pins in a sentence, its configuration, and the `devices` that measure it.

    optional     it needs what is not in the box: without that, or without a golden, it is not compared
    timed        it is measured by a clock: only where it is asked for by name, with the machine to itself
    how          the way to run it that is its own
    one_thread   it is measured by one thread on a CPU: its tensors are small, and more threads only wait
    packages     of others that the method comes from: name -> version; part of the environment
    sources      files and folders of the code under test, besides knorm's own
    environment  that it was measured in, where that is not this process'
    recorded     what `knorm golden record` is given for it, where that is not its name
    beside       measures on a device what `record` shows beside it, as text
    own_noise    its gates come from its own noise, which `record` measures; others' are known (NOISE)
    fixed        kinds of metrics whose thresholds are declared
    """

    id: str
    what: str
    configuration: Callable[[], dict[str, Any]]
    measure: Callable[[str, How], Measured]
    devices: tuple[str, ...] = ("cpu", "cuda")
    optional: bool = False
    timed: bool = False
    how: How = field(default_factory=How)
    one_thread: bool = False
    packages: Mapping[str, str] = field(default_factory=dict)
    sources: tuple[Path, ...] = ()
    environment: Environment | None = None
    recorded: str = ""
    beside: Callable[[str], str] | None = None
    own_noise: bool = False
    fixed: tuple[str, ...] = ()


CASES: dict[str, Case] = {}


def _as_json(policies: Iterable[Policy]) -> list[dict[str, Any]]:
    return [policy.as_json() for policy in policies]


def find_case(name: str, catalogue: Mapping[str, Case] | None = None) -> Case:
    """Look up the case `name` in `catalogue`, by default among knorm's own. Raises ValueError for an unknown one."""
    known = CASES if catalogue is None else catalogue
    check_name(name, known)
    return known[name]


def check_name(name: str, known: Iterable[str]) -> None:
    """Raise ValueError for a `name` that is not among the `known` ones; the nearest one is offered."""
    if name not in (names := sorted(known)):
        near = get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]}? There" if near else "there"
        raise ValueError(f"no case is named {name!r}; {hint} are {', '.join(names) or 'none'}")


# Tokens: the NLL of each under a policy


@lru_cache(maxsize=2)
def _embedded(device: str) -> tuple[Any, Any]:
    return load_embedded(device=device)


def _sums() -> dict[str, str]:
    """File of the box -> its sha256."""
    lines = (ASSETS / "SHA256SUMS").read_text("ascii").splitlines()
    return {name: digest for digest, name in (line.split() for line in lines)}


def _embedded_configuration() -> dict[str, Any]:
    sums = _sums()
    return {
        "model": "embedded",
        "model_sha256": sums["model.safetensors"],
        "tokenizer_sha256": sums["tokenizer.json"],
    }


def digest_of(model: Any) -> str:
    """Hash the bytes of the weights of `model`, in their order: sha256 in hexadecimal digits."""
    digest = hashlib.sha256()
    for weight in model.parameters():
        digest.update(weight.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


@lru_cache(maxsize=2)
def _random(device: str) -> Any:
    model: Any = random_gpt_neox()
    if (digest := digest_of(model)) != RANDOM_SHA256:
        raise ValueError(
            f"the random GPT-NeoX has sha256 {digest[:12]}, but should have {RANDOM_SHA256[:12]}: NumPy's "
            "PCG64 or transformers' order of its weights changed"
        )
    return model.to(device)


@dataclass(frozen=True)
class _Tokens:
    """A curve over ratios on windows of a text, by one pass each.

    policies   one per ratio, the first uncompressed
    random     a GPT-NeoX of Pythia-70M's shape with random weights, on random tokens, instead of the embedded model
    """

    policies: tuple[Policy, ...]
    windows: int
    window: int
    prompt_length: int = 1
    random: bool = False

    def configuration(self) -> dict[str, Any]:
        where = (
            {"model": "random GPT-NeoX of Pythia-70M's shape", "model_sha256": RANDOM_SHA256, "text": "random tokens"}
            if self.random
            else {**_embedded_configuration(), "text": "narrative", "text_sha256": _sums()["narrative.txt"]}
        )
        shape = {"windows": self.windows, "window": self.window, "prompt_length": self.prompt_length}
        return {**where, **shape, "dtype": "float32", "attention": "one pass", "policies": _as_json(self.policies)}

    def measure(self, device: str, how: How) -> Measured:
        if self.random:
            model, ids = _random(device), random_tokens(self.windows, self.window)
        else:
            model, tokenizer = _embedded(device)
            ids = cut_windows(tokenizer, load_text("narrative"), self.window, self.windows).input_ids
        return curve(how.model(model), ids, self.policies, self.prompt_length, how, memory=self.random)


def curve(
    model: Any, ids: Tensor, policies: tuple[Policy, ...], prompt_length: int, how: How, memory: bool = False
) -> Measured:
    """Measure several policies on the same windows.

    Args:
        model: a causal language model in eval mode.
        ids: int64 [windows, tokens].
        policies: one for each ratio, the first uncompressed.
        prompt_length: tokens of the first call, which are not scored.
        how: the way to run them.
        memory: measure peak memory too, which takes CUDA.

    Returns:
        For each ratio: the mean NLL, and each token's as a tensor; the PPL over the first's; tokens that queries saw;
        bytes of the final cache; a hash of each layer's evicted_at; on CUDA with `memory`, the peak over the first's.
    """
    noise = NOISE[model.device.type]
    metrics: list[Metric] = []
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    order = torch.tensor(how.order(len(ids)))
    back = order.argsort()
    runner = Runner(model, Windows(ids[order]), prompt_length, how.batch)
    plain_mean = plain_peak = 0.0
    for index, given in enumerate(policies):
        policy, ratio = how.policy(given), given.keep_ratio
        before = _start_memory(model.device) if memory else 0
        run = runner.run(policy, attend=how.attend)
        peak = torch.cuda.max_memory_allocated(model.device) - before if before else 0
        nll = run.nll.cpu()[back]
        evicted = [layer.cpu()[back] for layer in run.evicted_at]
        mean = float(nll.double().mean())
        tensors[f"nll/{ratio}"] = nll.numpy()
        metrics += [
            tokens(f"nll/{ratio}", mean, noise),
            *_counts(ratio, evicted, policy, model, prompt_length),
            fingerprint(
                f"evicted_at/{ratio}", _hashes(evicted), kind="schedule", of="per layer", rule="same_environment"
            ),
        ]
        if index == 0:
            plain_mean, plain_peak = mean, peak
            continue
        metrics.append(ppl_ratio(f"ppl_ratio/{ratio}", math.exp(mean - plain_mean)))
        if plain_peak:
            metrics.append(memory_ratio(f"peak_memory/{ratio}", peak / plain_peak, "at 1.0"))
    return Measured(tuple(metrics), tensors)


def _start_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _counts(ratio: Any, evicted: list[Tensor], policy: Policy, model: Any, prompt_length: int) -> Iterator[Metric]:
    lengths = [cache_lengths(layer)[..., prompt_length - 1 :] for layer in evicted]
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    final = sum(int(layer[..., -1].sum()) for layer in lengths)
    seen = sum(int(layer.sum()) for layer in lengths)
    yield count(f"seen/{ratio}", seen, "tokens over queries, heads, layers")
    yield count(f"cache_bytes/{ratio}", final * width * 2 * model.dtype.itemsize, "bytes", direction="lower")


def _hashes(evicted: list[Tensor]) -> str:
    return " ".join(digest(layer.contiguous().numpy().tobytes())[:12] for layer in evicted)


RANDOM_SHA256 = "4fbb090fc3a4fc5332a6a9fbe86e9b2c1904a203029c6fdcaaccff3b2a4a4280"  # of its weights


def random_tokens(windows: int, window: int, vocabulary: int = 50304) -> Tensor:
    """Draw token ids from NumPy's PCG64, with a fixed seed: the same on every machine.

    Args:
        windows: how many.
        window: tokens of each.
        vocabulary: ids are below it.

    Returns:
        The ids, int64 [windows, window].
    """
    return torch.from_numpy(np.random.Generator(np.random.PCG64(70)).integers(0, vocabulary, (windows, window)))


def _streaming(prune_after: int, **options: Any) -> tuple[Policy, ...]:
    return tuple(Policy(r, prune_after, protocol="streaming", skip_layers=(0,), **options) for r in RATIOS)


def _protected(prune_after: int) -> tuple[Policy, ...]:
    """The newest half of each budget is protected."""
    policies = (Policy(ratio, prune_after, protocol="streaming", skip_layers=(0,)) for ratio in RATIOS)
    return tuple(
        Policy(p.keep_ratio, prune_after, (0,), protect_recent=p.budget(prune_after) // 2, protocol="streaming")
        for p in policies
    )


def _enter(id: str, what: str, tokens: _Tokens, devices: tuple[str, ...] = ("cpu", "cuda")) -> None:
    CASES[id] = Case(id, what, tokens.configuration, tokens.measure, devices)


_enter("streaming-32", "compressed after every token, at 32", _Tokens(_streaming(32), 8, 256))
_enter("streaming-128", "compressed after every token, at 128", _Tokens(_streaming(128), 4, 512))
_enter(
    "prefill",
    "compressed once, after a prompt of 128",
    _Tokens(tuple(Policy(r, skip_layers=(0,)) for r in RATIOS), 8, 256, prompt_length=128),
)
_enter("protected-recency", "streaming at 32, the newest half of the budget protected", _Tokens(_protected(32), 8, 256))
_enter("high-norm", "streaming at 32, the highest norms kept", _Tokens(_streaming(32, score="high_norm"), 8, 256))
_enter("random", "streaming at 32, a seeded draw kept", _Tokens(_streaming(32, score="random", seed=1), 8, 256))
_enter(
    "pythia-shape",
    "Pythia-70M's shape with random weights, streaming at 512",
    _Tokens(tuple(Policy(r, 512, protocol="streaming") for r in ("1.0", "0.9", "0.5")), 4, 1024, random=True),
    devices=("cuda",),
)


# Pythia-70M itself, where its weights are at hand


def _pythia_policies() -> tuple[Policy, ...]:
    protocol = bug_report().protocol
    return tuple(protocol.policy(ratio) for ratio in ("1.0", *protocol.ratios))


def _pythia_configuration() -> dict[str, Any]:
    tokens = bug_report().protocol.streamed_tokens
    fixed = {"model": PYTHIA, "window": tokens, "dtype": "float32", "attention": "one pass"}
    return fixed | {"policies": _as_json(_pythia_policies())}


def _pythia(device: str, how: How) -> Measured:
    """The report's protocol on both texts; what weights and texts they were is a metric."""
    protocol, texts = bug_report().protocol, load_texts()
    model, tokenizer = load_weights(device)
    metrics: list[Metric] = [fingerprint("weights", digest_of(model))]
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for name, text in texts.items():
        ids = seed_ids(tokenizer, text, protocol.streamed_tokens)
        measured = curve(how.model(model), ids, _pythia_policies(), 1, how)
        metrics.append(fingerprint(f"{name}/text", digest(text.encode())))
        metrics += [m.model_copy(update={"name": f"{name}/{m.name}"}) for m in measured.metrics]
        tensors |= {f"{name}/{key}": tensor for key, tensor in measured.tensors.items()}
    return Measured(tuple(metrics), tensors)


CASES["pythia-70m"] = Case(
    "pythia-70m", "the report's protocol on Pythia-70M's own weights", _pythia_configuration, _pythia, optional=True,
    beside=judged_claims,
)  # fmt: skip


# Selections: positions retained of fixed tensors

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_SELECTIONS = {
    "0.5": Policy(0.5),
    "0.3, first 2 and newest 5 protected": Policy(0.3, protect_first=2, protect_recent=5),
    "0.55, highest norms": Policy(0.55, score="high_norm"),
    "0.7, random": Policy(0.7, score="random", seed=3),
}


def _fixed_keys() -> np.ndarray[Any, Any]:
    return np.random.Generator(np.random.PCG64(7)).integers(-8, 9, (2, 3, 100, 8))


def _selections(device: str, how: How) -> Measured:
    metrics: list[Metric] = []
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for dtype in _DTYPES:
        keys = torch.from_numpy(_fixed_keys()).to(device, getattr(torch, dtype))
        for name, policy in _SELECTIONS.items():
            positions = compress(keys, keys, how.policy(policy)).positions.cpu().numpy()
            label = f"positions/{dtype}, {name}"
            tensors[label] = positions.astype(np.int32)
            metrics.append(fingerprint(label, digest(tensors[label].tobytes())[:16]))
    return Measured(tuple(metrics), tensors)


def _selections_configuration() -> dict[str, Any]:
    keys = digest(_fixed_keys().astype(np.int32).tobytes())
    return {"keys_sha256": keys, "dtypes": [*_DTYPES], "policies": _as_json(_SELECTIONS.values())}


CASES["selections"] = Case(
    "selections", "positions retained of fixed tensors, for each dtype", _selections_configuration, _selections
)


# Latency


def _latency_configuration(shape: dict[str, Any]) -> dict[str, Any]:
    sums = {name: sha256 for name, sha256 in _sums().items() if name.endswith(".txt")}
    policies = {"policies": _as_json(POLICIES.values())}
    return {**_embedded_configuration(), "texts": sums, **shape, "dtype": "float32", **policies}


CASES["counters"] = Case(
    "counters",
    "tokens, bytes, operators and kernel launches of a prompt pass and of decoding",
    lambda: _latency_configuration(COUNTED_SHAPE),
    lambda device, _: measure_counters(*_embedded(device)),
)
CASES["latency"] = Case(
    "latency",
    "TTFT and TPOT over those of the uncompressed cache in the same run",
    lambda: _latency_configuration(TIMED_SHAPE),
    lambda device, how: measure_latency(*_embedded(device), on_step=how.on_step),
    optional=True,
    timed=True,
)
