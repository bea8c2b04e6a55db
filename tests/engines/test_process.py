"""An engine's process: whatever it does, one line says it."""

from __future__ import annotations

import ast
import re
import sys
import time
from pathlib import Path

import pytest
import torch

import knorm.engines
from knorm.engines.conditions import EngineTarget, LlamaCpp, Place, engine_target
from knorm.engines.frames import MOST_FIELDS, Junk, pack, read_frame
from knorm.engines.process import EngineError, EngineProcess
from knorm.engines.scorer import EngineScorer
from knorm.engines.ways import EngineWays
from knorm.evaluation.damage import PerToken
from knorm.evaluation.windows import Windows

BARE = f'exec {sys.executable} -I -S "$@"'  # a Python without packages


def start(python=None, limit=20.0, spec="llama.cpp:embedded"):
    return EngineScorer(engine_target(spec), Path("model.gguf"), Place(python, limit), 64)


def refusal(*arguments, **options):
    with pytest.raises(EngineError) as raised:
        start(*arguments, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_python_without_the_engine_is_told_what_to_type(python):
    path = python(BARE)
    said = refusal(path)
    assert said.startswith(
        f"llama.cpp is not installed: {path} has no module 'llama_cpp'; pip install 'knorm[llamacpp]'"
    )
    assert said.endswith("or name a Python that has it by --engine-python or KNORM_ENGINE_PYTHON")


def test_a_python_without_vllm_is_told_what_to_type(python):
    said = refusal(python(BARE), spec="vllm:embedded")
    assert "has no module 'vllm'; pip install --no-deps -r constraints-vllm.txt, in an environment of its own" in said


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["exit 3"], "llama.cpp died .*: ended the interpreter with exit code 3"),
        (["kill -SEGV $$"], r"llama.cpp died .*: the process ended with signal 11 \(SIGSEGV\)"),
        (["echo no memory >&2", "exit 1"], "exit code 1; its log ends: no memory"),
        (
            ["echo '/home/x/a.c:7: ASSERT(x) failed' >&2", "echo bye >&2", "exit 1"],
            r"log ends: a.c:7: ASSERT\(x\) failed",
        ),
        (["echo Hello, I am something else", "cat > /dev/null"], "llama.cpp answers with bytes that are no frame"),
        (["head -c 12 /dev/zero", "sleep 60"], "llama.cpp answers with bytes that are no frame"),
    ],
)
def test_what_is_no_engine_is_one_line(python, lines, said):
    assert re.search(said, refusal(python(*lines)))


def test_an_engine_that_hangs_is_ended(python, tmp_path):
    path = python(f"echo $$ > {tmp_path}/id", "sleep 60")
    begin = time.monotonic()
    assert "llama.cpp gave no answer within 0.5 s, and was ended" in refusal(path, limit=0.5)
    assert time.monotonic() - begin < 10
    assert not Path(f"/proc/{(tmp_path / 'id').read_text().strip()}").exists()


def test_an_interpreter_that_is_not_there_is_one_line(tmp_path):
    assert "can be started: No such file or directory" in refusal(str(tmp_path / "nowhere"))
    (tmp_path / "text").write_text("no program")
    assert "can be started: Permission denied" in refusal(str(tmp_path / "text"))
    assert "can be started" in refusal("a\0b")


def test_the_interpreter_may_be_named_once_for_all(python, monkeypatch):
    monkeypatch.setenv("KNORM_ENGINE_PYTHON", python("exit 7"))
    assert "exit code 7" in refusal()
    assert "exit code 3" in refusal(python("exit 3"))
    monkeypatch.setenv("KNORM_ENGINE_PYTHON", python("echo 9.9"))
    assert engine_target("llama.cpp:embedded").version() == "9.9"


def test_a_closed_process_is_gone():
    with EngineProcess("engine", "llamacpp", "install it", limit=5) as process:
        assert process.process.poll() is None
    assert process.process.poll() is not None


def test_frames_come_back_and_junk_does_not():
    import io

    for fields, numbers in (({"a": [1, None, "ü"]}, b""), ({}, bytes(range(256)))):
        assert read_frame(io.BytesIO(pack(fields, numbers)).read) == (fields, numbers)
    for junk in (
        b"",
        b"knE",
        b"knE1" + b"\xff" * 8,
        pack({})[:-1],
        b"knE1\0\0\0\2\0\0\0\0[]",
        b"knE1\0\0\0\1\0\0\0\0{",
    ):
        with pytest.raises(Junk):
            read_frame(io.BytesIO(junk).read)
    with pytest.raises(Junk):
        pack({"long": "x" * MOST_FIELDS})


SERVED = ("frames", "serving", "forks", "llamacpp", "vllm", "forced")
OF_ENGINES = {"llamacpp": {"numpy", "llama_cpp"}, "vllm": {"vllm", "torch", "transformers"}}


@pytest.mark.parametrize("name", SERVED)
def test_what_runs_in_the_engines_python_needs_little_of_knorm(name):
    top = ast.parse((Path(knorm.engines.__file__).parent / f"{name}.py").read_text())
    names = set()
    for node in ast.walk(top):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    own = {f"knorm.engines.{other}" for other in SERVED}
    other = {x for x in names if x.split(".")[0] not in sys.stdlib_module_names} - own
    assert {x.split(".")[0] for x in other} <= OF_ENGINES.get(name, set())


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("llama.cpp:", "should be ENGINE:MODEL"),
        ("llama.cpp:embedded(", "should be ENGINE:MODEL"),
        ("llama.cpp:embedded(type_k='q4')", "iq4_nl, bf16, mxfp4, nvfp4; did you mean q4_"),
        ("llama.cpp:embedded(type_k=q4_0)", 'type_k should be a value, a text in quotes: type_k="..."'),
        ("llama.cpp:embedded(type_q='q4_0')", "llama.cpp has no setting 'type_q'; did you mean type_v?; it has type_k"),
        ("llama.cpp:embedded('q4_0')", "settings are given by name, as type_k=..."),
        ("llama.cpp:embedded(n_ubatch=0)", "n_ubatch=0, but should be a whole number from 1"),
        ("llama.cpp:embedded(flash_attn=1)", "flash_attn=1, but should be None or False or True"),
        ("llama.cpp:nowhere.gguf", "nowhere.gguf cannot be read: it is not there"),
        ("llama.cpp:mine.safetensors", "should be embedded, embedded-llama, smollm2 or a .gguf file"),
        ("knorm", "is no engine: it should begin with llama.cpp: or vllm:"),
        ("vllm:embedded(kv_cache_dtype=8)", "kv_cache_dtype=8, but should be a text, as auto or fp8"),
        ("vllm:embedded(kv_cache='fp8')", "vllm has no setting 'kv_cache'; did you mean kv_cache_dtype?"),
        ("vllm:embedded(dtype='float64')", "dtype='float64', but should be one of float32, bfloat16, float16"),
        ("vllm:embedded(block_size=0)", "block_size=0, but should be a whole number from 1 to 65536"),
        ("vllm:nowhere", "should be embedded, embedded-llama, smollm2, a .gguf file or a folder"),
    ],
)
def test_a_target_that_cannot_be_is_refused_in_a_line(spec, said):
    with pytest.raises(ValueError) as raised:
        engine_target(spec)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_target_is_read_by_the_same_machinery_as_all_others():
    target = engine_target('llama.cpp:embedded(type_k="q8_0", type_v="q4_0", flash_attn=True, n_threads=2)')
    assert target == EngineTarget(target.spec, "llama.cpp", "embedded", LlamaCpp("q8_0", "q4_0", True, 512, 2))
    assert target.settings.full() == LlamaCpp("f16", "f16", True, 512, 2)


def test_predictions_that_are_no_numbers_are_one_line(embedded, monkeypatch):
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    broken = PerToken(zeros, zeros, zeros.fill_(float("nan")), zeros == 0, zeros == 0, zeros)
    ways = EngineWays(embedded[0], Windows(torch.arange(12).view(2, 6)), 3, file=Path("m.gguf"))
    monkeypatch.setattr(
        ways, "_scored", lambda *_: ([broken], [{"layers": 1, "kv_heads": 1, "bytes_per_token": 4}] * 2)
    )
    with pytest.raises(EngineError, match="embedded: the predictions of 6 tokens are no numbers"):
        ways.alone(engine_target("llama.cpp:embedded"))
