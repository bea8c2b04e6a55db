"""Attacks knorm with command lines and calls that nobody would write: python tools/fuzz.py [--commands N] [--calls N]

Everything runs in this process, which can write under a temporary folder alone (tools/sandbox.py). Wanted of a command:
exit code 0, 1 or 2, no traceback, and an end within its limit. Wanted of a call: an answer, or a ValueError or a
TypeError that knorm raises itself. What is found is shrunk to the smallest case that shows it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import knorm
from knorm import cli
from knorm.cli.options import ModelOptions

sys.path.insert(0, str(Path(__file__).parent))
from sandbox import NoSandbox, confine

FOLDER = "KNORM_FUZZ_FOLDER"  # of the environment: all that this process may write to
LIMIT = 60.0  # seconds of the processor that one command may take: a loop with every intervention takes some
WAIT = 4 * LIMIT  # and of the clock, where it waits for what never comes: the machine may have other work
WINDOW = ("--window", "32", "--windows", "1", "--batch", "1")
NASTY = [
    "", " ", "0", "-1", "1", "nan", "inf", "1e309", "1_0", "\u0663", "0x10", "1/3", "1/0", str(2**63), "9" * 400,
    "a" * 4000, "--", "-", "..", "/", "~", ".", "/dev/zero", "/dev/null", "/dev/stdin", "pipe", "loop", "folder",
    "empty", "binary", "readonly", "deep.json", "twice.csv", "\u202eevil", "\x1b[2K", "é" * 200, "a,b", ",",
    ",,", "0.5,,0.9", "0.5;0.9", "hub:x", "organisation/name", "organisation/name@main", "kvpress:",
    "kvpress:*", "transformers:*", "os:system", "file.py", "file.py:", "file.py:missing", "file.py:broken",
    "file.py:(", "file.py:keep(1", "a.b.c:d",
    "{}", "[]", "$HOME", "%s", "null", "True",
]  # fmt: skip
TARGETS = [
    "knorm", "file.py:newest", "file.py:oldest", "file.py:nothing", "file.py:late", "file.py:wrong", "file.py:nan",
    "file.py:Cache", "transformers:DynamicCache", 'transformers:QuantizedCache(backend="fp8")',
    "transformers:StaticCache",
]  # fmt: skip
FILE = """
import torch
from transformers.cache_utils import DynamicCache

def newest(keys, values, keep_ratio):
    count = max(1, int(keys.shape[2] * keep_ratio))
    return keys[:, :, -count:], values[:, :, -count:]

def oldest(keys, values, keep_tokens):
    return keys[:, :, :keep_tokens], values[:, :, :keep_tokens]

def nothing(keys, values, keep_ratio):
    return None

def broken(keys, values, keep_ratio):
    raise KeyError("no such luck")

def wrong(keys, values, keep_ratio):
    return keys[..., :-1], values

def nan(keys, values, keep_ratio):
    return keys * float("nan"), values

def late(keys, values, keep_ratio, layer):
    return keys[:, :, ::2], values[:, :, ::2]

class Cache(DynamicCache):
    def update(self, keys, values, layer, *rest, **more):
        keys, values = super().update(keys, values, layer, *rest, **more)
        return keys[:, :, -8:], values[:, :, -8:]
"""


PLAN = """
models = ["model"]
methods = ["knorm", "file.py:newest"]
texts = ["text.txt"]
window = 32
windows = 2
device = "cpu"
"""
PLANS = [PLAN] + [
    f'{PLAN}\n{more}' for more in (
        "dtypes = []", "keep_ratio = [0.5, 0.5]", "keep_ratio = [2]", "keep_ratio = ['x']", "keep_tokens = [0]",
        "keep_tokens = [9223372036854775808]", "seeds = [-1]", "limit = nan", "limit = -1", "measure = []",
        'measure = ["laws", "counters", "latency"]', 'measure = ["x"]', "windows_per_cell = 0", "batch = 3",
        "prompt_lengths = [40]", "prompt_lengths = []", "threads = 0", "a = 1", 'how = "loop"', "window = 64",
        "[[methods]]", "\0",
    )
] + [
    PLAN.replace(old, new) for old, new in (
        ('"file.py:newest"', '"file.py:missing"'), ('"file.py:newest"', '"kvpress:*"'), ('"file.py:newest"', '"knorm"'),
        ('"model"', '"missing"'), ('"model"', '"hub:x@main"'), ('"model"', ""), ('"text.txt"', '"empty"'),
        ('"text.txt"', '"pipe"'), ('"text.txt"', '"/dev/zero"'), ("= 32", "= 1"), ("= 32", '= "32"'), ("= 2", "= 1e9"),
        ('"cpu"', '"tpu"'), ("models", "model"), ('["knorm", ', '[{target = "knorm", policy = {x = 1}}, '), ("[", ""),
        ('["knorm", ', '[{target = "knorm", keep_ratio = [0.1]}, '), ('"knorm", ', '{}, '),
    )
]  # fmt: skip


def prepare(folder: Path) -> None:
    """Lay out what commands are pointed at: a model of 2 layers, a target, texts, and files of all bad kinds."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from knorm.models import load_embedded

    _, tokenizer = load_embedded()
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = GPTNeoXConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **shape)
    GPTNeoXForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "file.py").write_text(FILE)
    (folder / "text.txt").write_text("The mayor had one story, and the captain had another. " * 60)
    (folder / "table.csv").write_text("keep_ratio,ppl\n1.0,30.5\n0.9,31\n0.5,29\n")
    (folder / "twice.csv").write_text("keep_ratio,ppl\n0.9,30.5\n0.90,31\n")
    (folder / "deep.json").write_text("[" * 5000 + "]" * 5000)
    for index, plan in enumerate(PLANS):
        (folder / f"plan{index}.toml").write_text(plan)
    (folder / "empty").touch()
    (folder / "binary").write_bytes(bytes(range(256)) * 40)
    (folder / "readonly").write_text("{}")
    (folder / "readonly").chmod(0o400)
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")


def mostly(good: st.SearchStrategy[Any], bad: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Draw what is right five times of six."""
    return st.integers(0, 5).flatmap(lambda drawn: bad if drawn == 5 else good)


shapes = st.lists(st.integers(0, 6), min_size=0, max_size=5)
dtypes = st.sampled_from([getattr(torch, n) for n in ("float64", "bfloat16", "float16", "int64", "bool", "complex64")])


@st.composite
def tensors(draw: Any) -> torch.Tensor:
    """Tensors of every kind: of numbers, empty, not finite, meta, sparse, nested in time."""
    shape = draw(st.just([1, 2, 6, 4]) | st.just([2, 2, 6, 4]) | shapes)
    dtype = draw(st.just(torch.float32) | dtypes)
    tensor = torch.arange(math.prod(shape)).view(shape).to(dtype)
    kind = draw(st.sampled_from(["plain"] * 6 + ["nan", "inf", "meta", "sparse", "transposed", "gradient", "expanded"]))
    if kind in ("nan", "inf") and dtype.is_floating_point:
        return torch.full(shape, float(kind), dtype=dtype)
    if kind == "meta":
        return tensor.to("meta")
    if kind == "sparse" and tensor.ndim:
        return tensor.to_sparse()
    if kind == "transposed" and tensor.ndim > 1:
        return tensor.transpose(-1, -2)
    if kind == "gradient" and dtype.is_floating_point:
        return tensor.requires_grad_()
    return tensor.expand(3, *shape) if kind == "expanded" else tensor


# Command lines

nasty = st.sampled_from(NASTY)
small = mostly(st.integers(1, 6), st.integers(-2, 70)).map(str)
ratios = mostly(
    st.sampled_from(["0.5", "0.9", "1/3", "0.1", "1e-3"]), st.sampled_from(["1", "0.9,0.5", "0", "2", "-0.5"])
)
figures = mostly(st.sampled_from(["out.png", "out.svg"]), nasty)
results = mostly(st.sampled_from(["out.json", "folder/out.json"]), nasty | st.just("missing/out.json"))


def option(flag: str, value: st.SearchStrategy[str]) -> st.SearchStrategy[tuple[str, ...]]:
    return st.tuples(st.just(flag), value)


def flag(name: str) -> st.SearchStrategy[tuple[str, ...]]:
    return st.just((name,))


POLICY = [
    option("--keep-ratio", ratios),
    option("--prune-after", small),
    option("--skip-layers", mostly(st.sampled_from(["0", "1"]), st.sampled_from(["0,1", "-1", "9"]))),
    option("--protect-first", small),
    option("--protect-recent", small),
    option("--seed", small),
    option("--score", st.sampled_from(["low_norm", "high_norm", "random"])),
    option("--protocol", st.sampled_from(["prefill", "streaming"])),
]
TEXT = [option("--windows", small), option("--batch", small), option("--window", st.integers(2, 40).map(str))]
COMMON = [
    option("--json", results),
    flag("--force"),
    flag("-q"),
    option("--dtype", st.sampled_from(["float64", "bfloat16", "float32"])),
]
PLOT = [option("--plot", figures)]
METHOD = [option("--keep-tokens", small), option("--how", st.sampled_from(["auto", "schedule", "two calls", "loop"]))]
ANY = [
    option(name, nasty) for name in ("--text", "--model", "--device", "--keep-ratio", "--as", "--reported", "--trait")
]


def line(command: str, *groups: list[Any], targets: int = 0, most: int = 3) -> st.SearchStrategy[tuple[str, ...]]:
    """Command lines that mostly work: a few options that the command takes, now and then one that it does not."""
    given = st.lists(st.one_of(*(one for group in groups for one in group)), max_size=most)
    strange = st.integers(0, 9).flatmap(lambda drawn: st.just(()) if drawn else st.tuples(st.one_of(*ANY)))
    known = st.sampled_from(TARGETS)
    named = st.lists(mostly(known, mostly(known, nasty)), max_size=targets, min_size=min(1, targets))
    base = ("--model", "model", "--text", "text.txt", "--prune-after", "4", *WINDOW)

    def joined(parts: Any) -> tuple[str, ...]:
        own, others, names = parts
        return (command, *names, *base, *(word for pair in (*own, *others) for word in pair))

    return st.tuples(given, strange, named).map(joined)


golden = st.tuples(
    st.just("golden"),
    st.sampled_from(["list", "diff", "log", "record", "accept", "verify"]),
    nasty | st.sampled_from(["prefill", "counters"]),
    st.just("--golden-dir"),
    st.sampled_from(["folder", "empty", "pipe", "loop", "missing"]),
).map(tuple)
sweep = st.tuples(
    st.just("sweep"),
    mostly(st.integers(0, len(PLANS) - 1).map("plan{}.toml".format), nasty),
    mostly(st.just("swept"), nasty),
    st.just("--dry-run"),  # what would run is fuzzed as ppl
    st.one_of(st.just(()), option("--json", results), option("--workers", nasty), option("--expire", nasty)),
).map(lambda parts: (*parts[:4], *parts[4]))
page = st.tuples(
    st.just("page"),
    st.lists(mostly(st.sampled_from(["out.json", "folder/out.json", "swept"]), nasty), max_size=3),
    mostly(st.just("site"), nasty),
).map(lambda parts: (parts[0], *parts[1], parts[2]))
words = nasty | st.sampled_from(["ppl", "check", "explain", "bench", "verify", "golden", "--json", "-v"])
junk = st.tuples(nasty, st.lists(words, max_size=4)).map(lambda parts: (parts[0], *parts[1]))
check = st.tuples(st.just("check"), nasty, *(option(name, nasty) for name in ("--trait", "--select"))).map(
    lambda parts: (*parts[:2], *parts[2], *parts[3])
)
measuring = st.one_of(
    line("ppl", POLICY, TEXT, COMMON, PLOT, [option("--prompt-length", small), flag("--stream")]),
    line("ppl", TEXT, COMMON, PLOT, METHOD, [option("--prompt-length", small), POLICY[0]], targets=2),
    line("explain", POLICY[1:], TEXT, COMMON, PLOT, [option("--newest", small), option("--worst", small)], most=2),
    line("explain", TEXT, COMMON, METHOD[:1], [option("--newest", small)], targets=1, most=1),
)
reported = st.tuples(st.just("ppl"), st.just("--reported"), nasty | st.just("table.csv")).map(tuple)
commands = mostly(measuring, st.one_of(reported, golden, check, sweep, page, junk))


class Late(BaseException):
    """A command that did not end."""


LOADED: list[str] = []  # the models that the command line under way has loaded


def count_models() -> None:
    """Have each model that a command loads counted."""
    whole = ModelOptions.load

    def load(options: ModelOptions) -> Any:
        loaded = whole(options)
        LOADED.append(options.model)
        return loaded

    ModelOptions.load = load  # type: ignore[method-assign]


def clocks(processor: float, wall: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, processor)
    signal.setitimer(signal.ITIMER_REAL, wall)


def run(words: tuple[str, ...]) -> tuple[int, str, str]:
    """Run a command line; returns exit code, stdout and stderr."""
    LOADED.clear()
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["knorm", *words]
    clocks(LIMIT, WAIT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    finally:
        clocks(0, 0)
        sys.argv = argv
    return code, out.getvalue(), err.getvalue()


def check_command(words: tuple[str, ...], counted: Counter[str]) -> None:
    """Run a command line, and refuse what it should not do."""
    try:
        code, out, err = run(words)
    except Late:
        raise AssertionError(f"knorm {' '.join(words)} did not end within {LIMIT:.0f} s") from None
    counted[f"exit {code}"] += 1
    counted["reached a model"] += bool(LOADED)
    counted["was answered on one"] += bool(LOADED) and code in (0, 1)
    assert code in (0, 1, 2), f"knorm {words} ended with {code}: {err[-2000:]}"
    assert "Traceback" not in out + err, f"knorm {words}: {err[-2000:]}"
    if code == 2:
        assert err.strip(), f"knorm {words} says nothing of what is wrong"


# Calls


plain = st.sampled_from([(1, 2, 6, 4), (2, 2, 6, 4), (1, 1, 3, 8)]).map(
    lambda shape: torch.randn(shape, generator=torch.Generator().manual_seed(0))
)
LITERALS = [
    None,
    True,
    -1,
    0,
    1,
    2,
    5,
    2**63,
    0.5,
    float("nan"),
    1e309,
    "",
    "1/3",
    "0.5",
    "x",
    [],
    [0, 1],
    [-9],
    b"\\0",
]
values = st.sampled_from(LITERALS)
ratio = mostly(st.sampled_from([0.5, 0.9, 1, "1/3", 0.01]), st.floats(0, 1) | values)
count = mostly(st.integers(0, 6), values)
policies = st.sampled_from(
    [knorm.Policy(ratio, after, protocol=protocol)
     for ratio in (0.5, 1.0, "1/3", 0.01) for after in (2, 5) for protocol in ("prefill", "streaming")]
    + [knorm.Policy(0.5, 8, (0,), 1, 2, "random", "streaming")]
)  # fmt: skip
policy = mostly(policies, values)
rows = st.lists(st.integers(0, 50), min_size=2, max_size=12).map(lambda row: torch.tensor([row]))


def cache_calls(policy: Any, first: Any, second: Any, layer: Any, crop: Any) -> None:
    cache = knorm.KnormCache(policy)
    cache.update(first, first, layer)
    cache.update(second, second, layer)
    cache.get_seq_length()
    cache.crop(crop)
    cache.reset()


Call = tuple[Callable[..., Any], tuple[st.SearchStrategy[Any], ...]]


def calls(model: Any) -> list[Call]:
    """Functions that people call, each with what they might be given."""
    odd = tensors() | values
    ids, keys, names = mostly(rows, odd), mostly(plain, odd), mostly(st.sampled_from(TARGETS), nasty | values)
    make = knorm.Policy

    def nll(ids: Any, policy: Any, **options: Any) -> Any:
        return knorm.exact_nll(model, ids, policy, **options)

    return [
        (make, (ratio, count, values)),
        (lambda ratio, first, recent: make(ratio, protect_first=first, protect_recent=recent), (ratio, count, count)),
        (knorm.compress, (keys, keys, policy)),
        (lambda keys, policy, places: knorm.compress(keys, keys, policy, positions=places), (keys, policies, odd)),
        (knorm.evicted_at, (keys, policy, count)),
        (knorm.retained_count, (count, ratio)),
        (cache_calls, (policy, keys, keys, mostly(st.just(0), values), count)),
        (lambda name, ratio: knorm.method(name, keep_ratio=ratio), (names, ratio)),
        (lambda name, count: knorm.method(name, keep_tokens=count), (names, count)),
        (lambda ids, policy, prompt: nll(ids, policy, prompt_length=prompt), (ids, policy, count)),
        (lambda ids, policy, mask: nll(ids, policy, attention_mask=mask), (ids, policies, odd)),
        (lambda ids, policy, places: nll(ids, policy, position_ids=places), (ids, policies, odd)),
        (lambda ids, policy, prompt: knorm.evaluate(model, ids, knorm.method(policy), prompt_length=prompt),
         (ids, policies, count)),
        (lambda ids, policy: knorm.exact_nll(ids, ids, policy), (odd, policy)),
    ]  # fmt: skip


def check_call(function: Callable[..., Any], arguments: tuple[Any, ...], counted: Counter[str]) -> None:
    """Call a function, and refuse an error that knorm did not raise itself."""
    clocks(LIMIT, WAIT)
    try:
        function(*arguments)
        counted["answered"] += 1
    except (ValueError, TypeError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        if Path(knorm.__file__).parent not in Path(last).parents:
            raise AssertionError(f"not knorm's own {type(error).__name__}: {error}") from error
        counted["refused"] += 1
    except Late:
        raise AssertionError(f"did not end within {LIMIT:.0f} s") from None
    finally:
        clocks(0, 0)


def shown(case: Any) -> str:
    """Write a case in few words: a tensor is its shape and dtype."""
    if isinstance(case, tuple):
        return f"({', '.join(map(shown, case))})"
    if isinstance(case, torch.Tensor):
        return f"{str(case.dtype)[6:]} {[*case.shape]} {case.layout} on {case.device}"
    if callable(case):
        code = getattr(case, "__code__", None)
        return f"{case.__name__} (line {code.co_firstlineno})" if code else case.__name__
    return repr(case)[:200]


class Found(Exception):
    """Say what the smallest case is, and what it does."""


def attack(
    count: int, start: int, name: str, strategy: st.SearchStrategy[Any], test: Callable[..., None]
) -> Counter[str]:
    """Try so many cases; raises what the smallest one that fails raises."""
    counted: Counter[str] = Counter()
    failed: list[tuple[Any, BaseException]] = []
    phases, checks = (Phase.generate, Phase.shrink), [*HealthCheck]

    @seed(start)
    @settings(max_examples=count, database=None, deadline=None, phases=phases, suppress_health_check=checks)
    @given(strategy)
    def trial(case: Any) -> None:
        try:
            test(case, counted)
        except Exception as error:
            failed[:] = [(case, error)]  # the last one is the smallest
            raise

    begin = time.perf_counter()
    try:
        trial()
    except Exception as error:
        if not failed:
            raise
        case, cause = failed[0]
        places = traceback.extract_tb((cause.__cause__ or cause).__traceback__)[-3:]
        told = "".join(traceback.format_list(places)) + f"{type(cause).__name__}: {str(cause)[:2000]}"
        raise Found(f"{name}: {shown(case)}\n{told}") from error
    done = {key: counted[key] for key in sorted(counted)}
    print(f"{name}: {count} in {time.perf_counter() - begin:.0f} s, {done}", flush=True)
    return counted


@contextlib.contextmanager
def sandboxed() -> Iterator[Path]:
    """A folder to attack in, prepared, which is all that this process can write to from now on."""
    folder = Path(os.environ[FOLDER])
    os.environ.update(
        HF_HUB_OFFLINE="1", HF_HOME=str(folder / "hub"), TMPDIR=str(folder), MPLCONFIGDIR=str(folder / "mpl")
    )
    tempfile.tempdir = str(folder)
    prepare(folder)
    (folder / "work").mkdir()
    for entry in [*folder.iterdir()]:
        if entry.name not in ("work", "hub", "mpl"):
            entry.rename(folder / "work" / entry.name)
    confine(folder)
    os.chdir(folder / "work")
    yield folder / "work"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", type=int, default=5000)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if FOLDER not in os.environ:  # begin again, all caches in the folder: some are chosen when a module is imported
        with tempfile.TemporaryDirectory(prefix="knorm-fuzz-", ignore_cleanup_errors=True) as name:
            own = {**os.environ, FOLDER: name, "XDG_CACHE_HOME": name}
            return subprocess.run([sys.executable, *sys.argv], env=own, check=False).returncode
    torch.set_num_threads(1)

    def late(*_: Any) -> None:
        raise Late

    signal.signal(signal.SIGALRM, late)
    signal.signal(signal.SIGPROF, late)
    try:
        with sandboxed() as folder:
            from knorm.models import load_model

            model, _ = load_model(str(folder / "model"))
            count_models()
            drawn = st.one_of(*(st.tuples(st.just(one), st.tuples(*parts)) for one, parts in calls(model)))
            attack(asked.calls, asked.seed, "calls", drawn, lambda case, counted: check_call(*case, counted))
            counted = attack(asked.commands, asked.seed, "command lines", commands, check_command)
    except NoSandbox as error:
        print(f"not run: {error}")
        return 2
    except Found as error:
        print(error)
        return 1
    share = counted["reached a model"] / max(1, asked.commands)
    print(f"{share:.0%} of the command lines got as far as a model")
    return 0


if __name__ == "__main__":
    sys.exit(main())
