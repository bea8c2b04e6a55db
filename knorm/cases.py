"""The cases that goldens pin: what each measures, on which text or tensors, and what its numbers may depend on."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from knorm import __version__
from knorm.core import compress
from knorm.evaluation import cut_windows
from knorm.golden import (
    Environment,
    Finding,
    Gate,
    Golden,
    Measured,
    Metric,
    Noise,
    Provenance,
    compare,
    differing,
    digest,
    environment_changes,
    make,
    shift_of,
    why_moved,
)
from knorm.latency_cases import COUNTED_SHAPE, POLICIES, TIMED_SHAPE, measure_counters, measure_latency
from knorm.masked_attention import Attend
from knorm.models import ASSETS, load_embedded, load_model, load_text, random_gpt_neox
from knorm.perplexity import exact_run
from knorm.policy import Policy
from knorm.reported import PYTHIA, Reported, load_seed_texts, read_claims, seed_ids
from knorm.schedule import cache_lengths
from knorm.store import REPORTED, Checkout, Store, default_folder

RATIOS = ("1.0", "0.95", "0.7", "0.5", "0.1")
RUNS = 3  # that agree, at least, before anything is recorded

# What runs showed that differed in nothing that matters: docs/golden-power.md.
NOISE = {
    "cpu": Noise(runs=244, sigma=5e-7, largest=5e-5, typical=1e-4, alpha=0.01, power=1.0),
    "cuda": Noise(runs=200, sigma=2e-6, largest=5e-5, typical=1e-5, alpha=0.01, power=1.0),
}
_MEAN_SHIFT = 2e-6  # nats a token: smaller shifts are nobody's concern
_RATIO = 1e-4  # relative, of PPL at a ratio to PPL at 1.0


@dataclass(frozen=True)
class How:
    """How a case is run. What differs from the default must not matter, or is an injected change: docs/golden-power.md.

    batch     windows at a time
    order     of the windows
    attend    replaces masked_attention.attend_seen
    numerics  of batch, order and attend in words: part of the environment
    policy    changes each policy
    model     changes the model
    """

    batch: int = 8
    order: Callable[[int], list[int]] = field(default=lambda count: list(range(count)))
    attend: Attend | None = None
    numerics: str = "8 windows at a time, in order; attention in blocks"
    policy: Callable[[Policy], Policy] = field(default=lambda policy: policy)
    model: Callable[[Any], Any] = field(default=lambda model: model)


@dataclass(frozen=True)
class Case:
    """One case: what it pins in a sentence, what it is configured by, and on which kinds of device it is measured.

    optional   it needs what is not in the box: without that, or without a golden, it is not compared
    timed      it is measured by a clock: only where it is asked for by name, with the machine to itself
    """

    id: str
    what: str
    configuration: Callable[[], dict[str, Any]]
    measure: Callable[[str, How], Measured]
    devices: tuple[str, ...] = ("cpu", "cuda")
    optional: bool = False
    timed: bool = False


CASES: dict[str, Case] = {}


def as_json(policies: Iterable[Policy]) -> list[dict[str, Any]]:
    """Policies as a golden stores them."""
    return [asdict(policy) | {"skip_layers": [*policy.skip_layers]} for policy in policies]


def find_case(name: str) -> Case:
    """The case of that name. Raises ValueError where there is none."""
    if name not in CASES:
        raise ValueError(f"no case is named {name!r}; there are {', '.join(sorted(CASES))}")
    return CASES[name]


# Tokens: the NLL of each under a policy


@lru_cache(maxsize=2)
def _embedded(device: str) -> tuple[Any, Any]:
    return load_embedded(device=device)


def _sums() -> dict[str, str]:
    """File of the box -> its sha256."""
    lines = (ASSETS / "SHA256SUMS").read_text("ascii").splitlines()
    return {name: found for found, name in (line.split() for line in lines)}


def _embedded_configuration() -> dict[str, Any]:
    sums = _sums()
    return {
        "model": "embedded",
        "model_sha256": sums["model.safetensors"],
        "tokenizer_sha256": sums["tokenizer.json"],
    }


def _digest_of(model: Any) -> str:
    found = hashlib.sha256()
    for weight in model.parameters():
        found.update(weight.detach().cpu().numpy().tobytes())
    return found.hexdigest()


@lru_cache(maxsize=2)
def _random(device: str) -> Any:
    model: Any = random_gpt_neox()
    if (found := _digest_of(model)) != RANDOM_SHA256:
        raise ValueError(
            f"the random GPT-NeoX has sha256 {found[:12]}, but should have {RANDOM_SHA256[:12]}: NumPy's "
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
        return {**where, **shape, "dtype": "float32", "attention": "one pass", "policies": as_json(self.policies)}

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
    """Metrics of several policies on the same windows [windows, tokens], the first one uncompressed.

    Per ratio: the mean NLL and each token's; the PPL over that at the first policy; how many tokens the queries saw;
    bytes of the final cache; a hash of each layer's evicted_at; on CUDA with `memory`, the peak over the first's.
    """
    noise = NOISE[model.device.type]
    metrics: list[Metric] = []
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    order = how.order(len(ids))
    back = torch.tensor(order).argsort()
    plain_mean = plain_peak = 0.0
    for index, given in enumerate(policies):
        policy, ratio = how.policy(given), given.keep_ratio
        before = _start_memory(model.device) if memory else 0
        parts = torch.tensor(order).split(how.batch)
        runs = [exact_run(model, ids[p], policy, prompt_length=prompt_length, attend=how.attend) for p in parts]
        peak = torch.cuda.max_memory_allocated(model.device) - before if before else 0
        nll = torch.cat([run.nll[:, prompt_length - 1 :] for run in runs])[back].cpu()
        evicted = [torch.cat(layers).cpu()[back] for layers in zip(*(run.evicted_at for run in runs), strict=True)]
        mean = float(nll.double().mean())
        tensors[f"nll/{ratio}"] = nll.numpy()
        metrics += [
            _metric(
                f"nll/{ratio}",
                mean,
                "nll",
                "nats/token",
                "lower",
                Gate(rule="tokens", threshold=_MEAN_SHIFT, noise=noise),
            ),
            *_counts(ratio, evicted, policy, model, prompt_length),
            _metric(
                f"evicted_at/{ratio}",
                _hashes(evicted),
                "schedule",
                "sha256 per layer",
                "same",
                Gate(rule="same_environment"),
            ),
        ]
        if index == 0:
            plain_mean, plain_peak = mean, peak
            continue
        limit = Gate(rule="at_most", threshold=_RATIO)
        metrics.append(
            _metric(f"ppl_ratio/{ratio}", math.exp(mean - plain_mean), "ratio", "PPL / PPL at 1.0", "lower", limit)
        )
        if plain_peak:
            limit = Gate(rule="at_most", threshold=0.02)
            metrics.append(
                _metric(f"peak_memory/{ratio}", peak / plain_peak, "memory", "bytes / bytes at 1.0", "lower", limit)
            )
    return Measured(tuple(metrics), tensors)


def _start_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _metric(name: str, value: Any, kind: Any, unit: str, direction: Any, gate: Gate) -> Metric:
    return Metric(name=name, unit=unit, direction=direction, kind=kind, value=value, anchor=value, gate=gate)


def _counts(ratio: Any, evicted: list[Tensor], policy: Policy, model: Any, prompt_length: int) -> Iterator[Metric]:
    lengths = [cache_lengths(layer)[..., prompt_length - 1 :] for layer in evicted]
    exact, config = Gate(rule="exact"), model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    final = sum(int(layer[..., -1].sum()) for layer in lengths)
    seen = sum(int(layer.sum()) for layer in lengths)
    yield _metric(f"seen/{ratio}", seen, "count", "tokens over queries, heads, layers", "same", exact)
    yield _metric(f"cache_bytes/{ratio}", final * width * 2 * model.dtype.itemsize, "count", "bytes", "lower", exact)


def _hashes(evicted: list[Tensor]) -> str:
    return " ".join(digest(layer.contiguous().numpy().tobytes())[:12] for layer in evicted)


RANDOM_SHA256 = "4fbb090fc3a4fc5332a6a9fbe86e9b2c1904a203029c6fdcaaccff3b2a4a4280"  # of its weights


def random_tokens(windows: int, window: int, vocabulary: int = 50304) -> Tensor:
    """Token ids int64 [windows, window] from NumPy's PCG64: the same on every machine."""
    return torch.from_numpy(np.random.Generator(np.random.PCG64(70)).integers(0, vocabulary, (windows, window)))


def _streaming(prune_after: int, **options: Any) -> tuple[Policy, ...]:
    return tuple(Policy(r, prune_after, protocol="streaming", skip_layers=(0,), **options) for r in RATIOS)


def _protected(prune_after: int) -> tuple[Policy, ...]:
    """The newest half of each budget is protected."""
    each = (Policy(ratio, prune_after, protocol="streaming", skip_layers=(0,)) for ratio in RATIOS)
    return tuple(
        Policy(p.keep_ratio, prune_after, (0,), protect_recent=p.budget(prune_after) // 2, protocol="streaming")
        for p in each
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


@lru_cache(maxsize=1)
def _report() -> Reported:
    return read_claims(default_folder() / REPORTED / "kv-cache-order.json")


def _pythia_policies() -> tuple[Policy, ...]:
    protocol = _report().protocol
    return tuple(protocol.policy(ratio) for ratio in ("1.0", *protocol.ratios))


def _pythia_configuration() -> dict[str, Any]:
    tokens = _report().protocol.streamed_tokens
    fixed = {"model": PYTHIA, "window": tokens, "dtype": "float32", "attention": "one pass"}
    return fixed | {"policies": as_json(_pythia_policies())}


def _pythia(device: str, how: How) -> Measured:
    """The report's protocol on both texts; what weights and texts they were is a metric.

    From KNORM_PYTHIA70M (a folder), KNORM_WIKITEXT and KNORM_PG19 (files), else from the Hub or its cache.
    """
    protocol = _report().protocol
    given = {"wikitext": ("KNORM_WIKITEXT", "wikitext2"), "pg19": ("KNORM_PG19", "pg19")}
    texts = load_seed_texts(protocol, {n: os.environ.get(variable) or hub for n, (variable, hub) in given.items()})
    model, tokenizer = load_model(os.environ.get("KNORM_PYTHIA70M") or PYTHIA, device=device)
    exact = Gate(rule="exact")
    weights = _metric("weights", _digest_of(model), "selection", "sha256", "same", exact)
    metrics: list[Metric] = [weights]
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for name, text in texts.items():
        ids = seed_ids(tokenizer, text, protocol.streamed_tokens)
        found = curve(how.model(model), ids, _pythia_policies(), 1, how)
        metrics.append(_metric(f"{name}/text", digest(text.encode()), "selection", "sha256", "same", exact))
        metrics += [m.model_copy(update={"name": f"{name}/{m.name}"}) for m in found.metrics]
        tensors |= {f"{name}/{key}": tensor for key, tensor in found.tensors.items()}
    return Measured(tuple(metrics), tensors)


CASES["pythia-70m"] = Case(
    "pythia-70m", "the report's protocol on Pythia-70M's own weights", _pythia_configuration, _pythia, ("cuda",), True
)


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
            metrics.append(
                _metric(label, digest(tensors[label].tobytes())[:16], "selection", "sha256", "same", Gate(rule="exact"))
            )
    return Measured(tuple(metrics), tensors)


def _selections_configuration() -> dict[str, Any]:
    keys = digest(_fixed_keys().astype(np.int32).tobytes())
    return {"keys_sha256": keys, "dtypes": [*_DTYPES], "policies": as_json(_SELECTIONS.values())}


CASES["selections"] = Case(
    "selections", "positions retained of fixed tensors, for each dtype", _selections_configuration, _selections
)


# Latency


def _latency_configuration(shape: dict[str, Any]) -> dict[str, Any]:
    sums = {name: sha256 for name, sha256 in _sums().items() if name.endswith(".txt")}
    policies = {"policies": as_json(POLICIES.values())}
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
    lambda device, _: measure_latency(*_embedded(device)),
    optional=True,
    timed=True,
)


# Measuring, comparing, recording


def device_class(device: str) -> str:
    """The exact class that a golden is for: cpu-x86_64, nvidia-h200 ...: goldens never cross it."""
    if torch.device(device).type == "cpu":
        return f"cpu-{platform.machine().lower()}"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def environment(device: str, how: How | None = None) -> Environment:
    """What this process' numbers may depend on besides the code."""
    cuda = torch.device(device).type == "cuda"
    return Environment(
        device=torch.cuda.get_device_name(device) if cuda else _processor(),
        driver=_driver() if cuda else None,
        cuda=torch.version.cuda if cuda else None,
        capability=".".join(map(str, torch.cuda.get_device_capability(device))) if cuda else _instructions(),
        threads=torch.get_num_threads(),
        numerics=(how or How()).numerics + _products(cuda),
        torch=torch.__version__,
        transformers=transformers.__version__,
        numpy=np.__version__,
        python=platform.python_version(),
    )


# Variables that keep a CPU's libraries from its newest instructions. PyTorch's own, ATEN_CPU_CAPABILITY, is in what
# it says of itself; float32 matrix products follow MKL's.
_LIMITS = ("MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


def _instructions() -> str:
    """Which instructions the CPU's kernels are chosen for, and what limits the choice."""
    limits = [f"{name}={os.environ[name]}" for name in _LIMITS if os.environ.get(name)]
    return " ".join([torch.backends.cpu.get_cpu_capability(), *limits])


def _products(cuda: bool) -> str:
    """In what products of float32 matrices are computed, where PyTorch was told to use less; else nothing."""
    precision = (torch.backends.cuda if cuda else torch.backends.mkldnn).matmul.fp32_precision
    return "" if precision in ("none", "ieee") else f"; products of float32 in {precision}"


def _processor() -> str:
    """The CPU's model, as Linux names it: kernels are chosen by it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _driver() -> str | None:
    """The driver's version, where nvidia-smi is there to tell it."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return said.splitlines()[0].strip() if said.strip() else None


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    verdict    "holds"; "moved", "missing", "damaged" or "orphan": a failure; "not compared": no golden of this device
               class at all; "inconclusive": too noisy to say
    evidence   in one line
    findings   per metric, where anything was compared
    """

    case: str
    device_class: str
    verdict: str
    evidence: str
    findings: tuple[Finding, ...] = ()
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether somebody has to act."""
        return self.compared and self.verdict != "holds"

    @property
    def compared(self) -> bool:
        """Whether there is a golden, or should be, and its gates could decide."""
        return self.verdict not in ("not compared", "inconclusive")


def verify_goldens(
    store: Store, cases: list[str] | None = None, device: str = "cpu", how: How | None = None
) -> Iterator[Outcome]:
    """Measure each case and compare it with its golden of exactly this device class; by default all of the device's.

    Orphans are looked for where all cases are. Nothing is written. Raises ValueError for a case that there is not.
    """
    chosen = [find_case(name) for name in cases] if cases is not None else list(CASES.values())
    kind, mine = torch.device(device).type, device_class(device)
    for case in chosen:
        if cases is None and (case.timed or (case.optional and (case.id, mine) not in store.files)):
            continue
        if kind in case.devices:
            yield verify_case(case, store, device, mine, how or How())
        elif cases is not None:
            yield Outcome(case.id, mine, "not compared", f"is measured on {' and '.join(case.devices)} only")
    if cases is None:
        for name in store.orphans([*CASES]):
            yield Outcome(
                name, "", "orphan", f"{store.folder.name}/{name} belongs to no case: remove it, or bring the case back"
            )


def verify_case(case: Case, store: Store, device: str, mine: str, how: How) -> Outcome:
    """Measure one case and compare it."""
    begin = time.perf_counter()
    try:
        golden, tensors = store.read(case.id, mine)
    except FileNotFoundError:
        if case.optional:
            said = (
                f"none accepted for {mine}; with its weights at hand: knorm golden record {case.id} --device {device}"
            )
            return Outcome(case.id, mine, "not compared", said)
        if mine not in store.device_classes:
            there = ", ".join(sorted(store.device_classes)) or "none"
            return Outcome(case.id, mine, "not compared", f"no golden of device class {mine} (there are: {there})")
        said = f"no golden, but {mine} has others: knorm golden record {case.id} --device {device}"
        return Outcome(case.id, mine, "missing", said)
    except ValueError as damaged:
        return Outcome(case.id, mine, "damaged", str(damaged))
    configuration = case.configuration()
    if changed := differing(golden.configuration, configuration):
        name = changed[0]
        evidence = (
            f"its configuration changed: {name} was {golden.configuration.get(name)}, is {configuration.get(name)}"
        )
        return Outcome(case.id, mine, "moved", f"{evidence}: record it again")
    here = environment(device, how)
    try:
        measured = case.measure(device, how)
    except ValueError as error:
        if case.optional:  # its weights are not at hand, or the machine is not its own
            return Outcome(case.id, mine, "not compared", str(error))
        return Outcome(case.id, mine, "moved", f"it cannot be measured any more: {error}")
    findings = tuple(compare(golden, tensors, measured, here))
    seconds = time.perf_counter() - begin
    moved = [finding for finding in findings if finding.verdict == "moved"]
    if moved:
        evidence = f"{moved[0].metric}: {moved[0].evidence}"
        more = f" ({len(moved)} of {len(findings)} metrics)"
        return Outcome(case.id, mine, "moved", evidence + more, findings, seconds)
    if unsure := [finding for finding in findings if finding.verdict == "inconclusive"]:
        evidence = f"{unsure[0].metric}: {unsure[0].evidence} ({len(unsure)} of {len(findings)} metrics)"
        return Outcome(case.id, mine, "inconclusive", evidence, findings, seconds)
    elsewhere = environment_changes(golden, here)
    where = f"in another environment ({', '.join(elsewhere)})" if elsewhere else "in the same environment"
    shown = [finding.metric for finding in findings if finding.verdict == "shown"]
    differ = f"; {len(shown)} differ, which is not gated there: {', '.join(shown)}" if shown else ""
    said = f"{len(findings) - len(shown)} metrics hold {where}{differ}"
    return Outcome(case.id, mine, "holds", said, findings, seconds)


def record(case: Case, device: str, now: Checkout, runs: int = RUNS, how: How | None = None) -> tuple[Golden, Measured]:
    """Measure a case `runs` times, which have to agree, and make a candidate of it. Writes nothing.

    Raises ValueError for fewer than three runs, and where runs disagree.
    """
    if runs < RUNS:
        raise ValueError(f"--runs {runs}, but should be at least {RUNS}: one run cannot show that runs agree")
    if torch.device(device).type not in case.devices:
        raise ValueError(f"{case.id} is measured on {' and '.join(case.devices)} only, not on {device}")
    here, mine, configuration = environment(device, how), device_class(device), case.configuration()
    date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    provenance = Provenance(
        knorm=__version__, commit=now.commit, clean=now.clean, code=now.code, date=date, runs=runs, reason=""
    )
    first = case.measure(device, how or How())
    golden = make(case.id, mine, configuration, first, here, provenance)
    for _ in range(runs - 1):
        found = compare(golden, first.tensors, case.measure(device, how or How()), here)
        if moved := [finding for finding in found if finding.verdict == "moved"]:
            raise ValueError(f"{case.id}: runs disagree, nothing was recorded: {moved[0].metric} {moved[0].evidence}")
        if unsure := [finding for finding in found if finding.verdict == "inconclusive"]:
            said = f"{unsure[0].metric} {unsure[0].evidence}"
            raise ValueError(f"{case.id}: too noisy to record, nothing was: {said}. Leave the machine to it")
    return golden, first


@dataclass(frozen=True)
class Change:
    """A metric before and after, and as first accepted.

    low, high     interval of the difference, clustered by window, where there are tokens
    significant   the golden's own gate would not let it pass
    """

    metric: str
    anchor: int | float | str | None
    before: int | float | str | None
    after: int | float | str | None
    difference: float | None
    low: float | None
    high: float | None
    significant: bool


def changes(old: tuple[Golden, Any] | None, new: tuple[Golden, Any]) -> list[Change]:
    """What a candidate would change, metric by metric."""
    found = []
    names = [m.name for m in new[0].metrics] + [m.name for m in (old[0].metrics if old else ())]
    for name in dict.fromkeys(names):
        before, after = (old[0].metric(name) if old else None), new[0].metric(name)
        a, b = (before.value if before else None), (after.value if after else None)
        difference = low = high = None
        significant = a != b
        if not isinstance(a, str | None) and not isinstance(b, str | None):
            difference = b - a
            if old and name in old[1] and name in new[1] and old[1][name].shape == new[1][name].shape:
                shift = shift_of(new[1][name], old[1][name])
                low, high = shift.low, shift.high
        if old and before and after:
            same = not environment_changes(old[0], new[0].environment)
            significant = why_moved(before, after, old[1], new[1], same) is not None
        found.append(Change(name, before.anchor if before else None, a, b, difference, low, high, significant))
    return found
