"""llama.cpp's caches, scored in a process of their own."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from commands import in_a_new_process, strict_json

from knorm.engines.boxed import model_file, write_gguf
from knorm.engines.conditions import LlamaCpp, Place, engine_target
from knorm.engines.process import EngineError, EngineLost, EngineRefused
from knorm.engines.scorer import FRAME, Asked, EngineScorer, ModelScorer, closing, compared
from knorm.engines.ways import EngineWays, full_of
from knorm.evaluation.damage import summed
from knorm.evaluation.windows import Windows, cut_windows
from knorm.golden import noise
from knorm.laws import engine
from knorm.laws.engine_run import Named
from knorm.laws.engine_shown import program
from knorm.models import load_embedded, load_text

Q4 = '(type_k="q4_0", type_v="q4_0")'
pytestmark = pytest.mark.usefixtures("llamacpp")


@pytest.fixture(scope="module", params=["embedded", "embedded-llama"])
def box(request):
    """A model of the box: its name, the model, its file, and two windows of text."""
    model, tokenizer = load_embedded(request.param)
    windows = cut_windows(tokenizer, load_text("narrative"), 192, 2)
    with model_file(request.param, model) as file:
        yield request.param, model, file, windows


@pytest.fixture(scope="module")
def llama():
    model, tokenizer = load_embedded("embedded-llama")
    with model_file("embedded-llama", model) as file:
        yield model, file, cut_windows(tokenizer, load_text("narrative"), 192, 2)


def target(name="embedded-llama", settings=""):
    return engine_target(f"llama.cpp:{name}{settings}")


def scored(scorers, windows, prompt, pairs):
    with closing(scorers):
        return [summed(tokens) for tokens in compared(scorers, windows.input_ids, prompt, pairs)]


@pytest.mark.parametrize("how", ["loop", "two calls"])
def test_the_default_cache_is_as_near_to_transformers_as_rounding_and_q4_0_is_not(box, how):
    name, model, file, windows = box
    asked = Asked(how)
    engines = [EngineScorer(target(name, x), file, Place(), 192, asked) for x in ("", Q4)]
    near, far, plain = scored([*engines, ModelScorer(model)], windows, 100, [(2, 0), (2, 1), (2, 2)])
    assert near.kl < 5e-6
    assert 1e-3 < far.kl < 0.1
    assert (near.tokens, plain.kl, plain.same_top) == (2 * 92, 0, 1)
    assert near.nll == pytest.approx(plain.nll, abs=1e-3)


def test_what_is_scored_is_the_text(llama):
    model, file, windows = llama
    ids = windows.input_ids
    expected = torch.nn.functional.cross_entropy(model(ids).logits[:, 99:-1].flatten(0, 1), ids[:, 100:].flatten())
    (damage,) = scored([EngineScorer(target(), file, Place(), 192)], windows, 100, [(0, 0)])
    assert damage.nll == pytest.approx(expected.item(), abs=1e-4)


ALONE = """
import ctypes, hashlib, json, sys
import llama_cpp as L
import numpy as np
file, kind, ids = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
quiet = L.llama_log_callback(lambda level, text, user: None)
L.llama_log_set(quiet, ctypes.c_void_p(0))
p = L.llama_model_default_params(); p.n_gpu_layers = 0
model = L.llama_model_load_from_file(file.encode(), p)
c = L.llama_context_default_params()
c.n_ctx = c.n_batch = c.n_ubatch = len(ids); c.n_threads = c.n_threads_batch = 1; c.type_k = c.type_v = kind
context = L.llama_init_from_model(model, c)
batch = L.llama_batch_init(len(ids), 0, 1); batch.n_tokens = len(ids)
for i, token in enumerate(ids):
    batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
    batch.seq_id[i][0] = 0
assert L.llama_decode(context, batch) == 0
size = L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))
rows = [np.ctypeslib.as_array(L.llama_get_logits_ith(context, i), shape=(size,)).copy() for i in range(len(ids))]
print(hashlib.sha256(np.stack(rows[int(sys.argv[4]) - 1 : -1]).tobytes()).hexdigest())
"""


@pytest.mark.parametrize("kind", ["f16", "q4_0"])
def test_batches_of_64_give_the_logits_of_one_large_batch_to_the_bit(llama, kind):
    _, file, windows = llama
    ids = windows.input_ids[0]
    with_kind = target(settings=f'(type_k="{kind}", type_v="{kind}")')
    scorer = EngineScorer(with_kind, file, Place(), 192, Asked("two calls"))
    with closing([scorer]):
        logits = torch.cat([*scorer.logits(ids, 71)])
    number = str(with_kind.settings.request()["type_k"])
    alone = in_a_new_process(ALONE, str(file), number, json.dumps(ids.tolist()), "71", check=True)
    assert hashlib.sha256(logits.numpy().tobytes()).hexdigest() == alone.stdout.strip()


def test_logits_come_a_few_at_a_time(llama):
    _, file, windows = llama
    scorer = EngineScorer(target(), file, Place(), 192)
    with closing([scorer]):
        sizes = [len(chunk) for chunk in scorer.logits(windows.input_ids[0], 181)]
    assert sizes == [*[FRAME] * (11 // FRAME), 11 % FRAME]


def test_bytes_are_those_of_the_engines_own_log(llama):
    _, file, _ = llama
    for kind, size in (("f16", 3584), ("q4_0", 1008), ("q8_0", 1904)):
        scorer = EngineScorer(target(settings=f'(type_k="{kind}", type_v="{kind}")'), file, Place(), 1024)
        with closing([scorer]):
            assert scorer.said["bytes_per_token"] == size
            (line,) = (line for line in scorer.said["said"] if "KV" in line.upper() and "size" in line)
            assert f"size = {1024 * size / 2**20:.2f} MiB" in line


def test_scoring_again_gives_the_same_bits(llama):
    _, file, windows = llama
    q4 = target(settings=Q4)
    runs = [EngineScorer(q4, file, Place(), 192) for _ in range(2)]
    first, second = windows.input_ids
    with closing(runs):
        once = torch.cat([*runs[0].logits(first, 100)])
        _ = [*runs[1].logits(second, 90)]  # another request before
        assert torch.equal(once, torch.cat([*runs[1].logits(first, 100)]))


def test_what_follows_an_eviction_may_move_up(llama):
    """Rotations tell distances alone: without the first tokens all is the same, wherever counting begins."""
    _, file, windows = llama
    asked = [Asked(cut=((0, 30),), renumber=renumber) for renumber in (False, True)]
    scorers = [EngineScorer(target(), file, Place(), 192, each) for each in (*asked, Asked())]
    moved, whole = scored(scorers, windows, 60, [(0, 1), (0, 2)])
    assert moved.kl < 1e-5
    assert whole.kl > 1e-3


def test_a_refused_type_is_told_with_the_reason_in_the_log(llama):
    _, file, _ = llama
    with pytest.raises(EngineRefused, match="K cache type q4_K with block size 256 does not divide n_embd_head_k=64"):
        EngineScorer(target(settings='(type_k="q4_K")'), file, Place(), 64)
    with pytest.raises(EngineRefused, match="quantized V cache requires flash_attn to be enabled"):
        EngineScorer(target(settings='(type_v="q4_0", flash_attn=False)'), file, Place(), 64)


def test_an_engine_that_dies_on_a_type_is_told_of(llama):
    _, file, windows = llama
    scorer = EngineScorer(target(settings='(type_k="q8_1")'), file, Place(), 192)
    with closing([scorer]), pytest.raises(EngineLost, match=r"llama\.cpp died while it was to answer: .* signal"):
        [*scorer.logits(windows.input_ids[0], 100)]


def test_tokens_of_another_vocabulary_and_a_context_that_does_not_fit_are_refused(llama):
    _, file, _windows = llama
    scorer = EngineScorer(target(), file, Place(), 192)
    with (
        closing([scorer]),
        pytest.raises(EngineError, match="token 4096 is not in the vocabulary of llama"),
    ):
        scorer.logits(torch.full((8,), 4096), 4)
    with pytest.raises(EngineError, match="windows of 1,025 tokens, but embedded-llama holds a context of 1,024"):
        EngineScorer(target(), file, Place(), 1025)


def test_models_of_two_vocabularies_cannot_be_compared(llama):
    model, file, windows = llama
    other = ModelScorer(model, lambda tokens, prompt: torch.zeros(len(tokens) - prompt, 256))
    other._heads = lambda states: iter([torch.zeros(FRAME, 17)] * (96 // FRAME))
    scorer = EngineScorer(target(), file, Place(), 192)
    with closing([scorer]), pytest.raises(EngineError, match="vocabularies of 17 and 4,096 tokens differ"):
        compared([scorer, other], windows.input_ids, 96, [(0, 1)])


def test_a_file_that_llama_cpp_does_not_take_is_refused(llama, tmp_path):
    _, file, _ = llama
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:1000])
    with pytest.raises(EngineRefused, match="refuses: "):
        EngineScorer(target(), tmp_path / "cut.gguf", Place(), 64)


def test_only_known_architectures_are_written(llama, tmp_path):
    model = llama[0]
    config = model.config
    model.config = type("Config", (), {"model_type": "mamba"})()
    try:
        with pytest.raises(ValueError, match="a mamba cannot be written as GGUF here"):
            write_gguf(model, tmp_path / "m.gguf")
    finally:
        model.config = config


def test_rows_of_a_table(llama):
    model, file, windows = llama
    ways = EngineWays(model, windows, 96, file=file)
    q4 = target(settings=Q4)
    pair, control, beside = ways.evaluate(q4), ways.control(q4), ways.beside(q4)
    assert 1e-3 < pair.row.damage.kl < pair.row.damage.kl_high
    assert (pair.row.changed, control.changed, beside.changed) == (True, False, False)
    assert control.check.startswith("batches of 512 against 32; ")
    assert pair.again.check == "weights as they are against each moved to the number next to it, both in this condition"
    assert 1e-8 < pair.again.damage.kl < 1e-4  # batches of any size are the same with q4_0
    assert (pair.row.bytes_per_token, pair.row.bytes_full / pair.row.tokens_before) == (1008, 3584)
    assert beside.bytes_per_token == 7168
    assert pair.row.tokens_seen.shape == (7, 2)
    assert pair.row.tokens_before == float(pair.row.tokens_seen.mean()) == 144
    assert control.per_token.nll_full.numpy() == pytest.approx(pair.row.per_token.nll_full.numpy(), abs=0)
    turned = replace(q4, settings=replace(q4.settings, rotate=False))
    assert ways.evaluate(turned).row.damage.kl != pair.row.damage.kl
    assert full_of(turned).settings.rotate


def test_ppl_prints_the_table_and_writes_the_form(run_knorm):
    spec = f"llama.cpp:embedded{Q4}"
    short = ("--windows", "2", "--window", "96")
    code, out, err = run_knorm("ppl", spec, 'llama.cpp:embedded(type_k="q4_K")', *short, "--json", "out.json")
    assert (code, err) == (1, "")
    assert "embedded in llama.cpp (llama_cpp 0." in out
    assert "The full cache has keys and values in f16, llama.cpp's default" in out
    assert "FAILED" in out
    assert "does not divide n_embd_head_k=64" in " ".join(out.split())
    result = strict_json("out.json")
    assert result["schema"] == "knorm-ppl-methods"
    assert [row["method"] for row in result["rows"]] == ["full cache, again", spec]
    assert [row["how"] for row in result["rows"]] == ["loop", "loop"]
    assert [row["method"] for row in result["engine"]["beside"]] == [f"{spec}, again", "transformers, float32"]
    assert result["rows"][1]["checked"] == "forced decode, one token a call; batches of 512"
    code, out, err = run_knorm("ppl", spec, *short, "--how", "two calls", "--json", "batch.json")
    assert (code, err) == (0, "")
    assert "prompt scoring: all tokens in batches, none is decoded" in " ".join(out.split())
    other = strict_json("batch.json")["rows"][1]
    assert other["kl"] == pytest.approx(result["rows"][1]["kl"], rel=0.05)


def test_windows_without_a_prompt_are_refused(llama):
    model, file, windows = llama
    for prompt in (0, 192):
        with pytest.raises(ValueError, match="prompt"):
            EngineWays(model, Windows(windows.input_ids), prompt, file=file)


def test_logits_are_numbers_of_their_own(llama):
    """They are copied: the buffer that they came in is used again."""
    _, file, windows = llama
    scorer = EngineScorer(target(), file, Place(), 192)
    with closing([scorer]):
        chunks = [*scorer.logits(windows.input_ids[0], 100)]
    assert len({float(chunk[0, 0]) for chunk in chunks}) == len(chunks)
    assert not np.shares_memory(chunks[0].numpy(), chunks[1].numpy())


def test_check_asks_the_laws_of_engines(run_knorm):
    spec = 'llama.cpp:embedded(type_k="q8_0", type_v="q8_0")'
    code, out, err = run_knorm("check", spec, "--json", "out.json")
    assert (code, err) == (0, ""), out
    (checked,) = strict_json("out.json")["targets"]
    verdicts = {result["check"]: result["verdict"] for result in checked["results"]}
    assert verdicts.pop("same_tokens") == "does not apply"
    assert verdicts == dict.fromkeys(
        (
            "survives", "default_equals_transformers", "accepted_cache_works", "decode_equals_batch",
            "batch_changes_nothing", "order_changes_nothing", "eviction_equals_transformers",
        ), "holds",
    )  # fmt: skip


def test_check_names_what_dies_and_refuses_what_is_refused(run_knorm, llama, tmp_path):
    spec = 'llama.cpp:embedded-llama(type_k="q8_1")'
    code, out, err = run_knorm("check", spec, "--select", "engine", "--snippets", "shown")
    assert (code, err) == (1, "")
    assert "REFUTED  survives: The engine survives a cache that it accepts." in out
    assert "llama.cpp died while it was to answer: the process ended with signal" in " ".join(out.split())
    assert "1 refuted" in out
    (file,) = (tmp_path / "shown").iterdir()
    ended = subprocess.run([sys.executable, file, llama[1]], capture_output=True, text=True, check=False)
    assert ended.returncode < 0, ended.stderr
    spec = 'llama.cpp:embedded-llama(type_k="q4_K", flash_attn=False)'  # it dies before it is asked anything
    code, out, err = run_knorm("check", spec, "--select", "survives")
    assert (code, err) == (1, "")
    assert "REFUTED  survives" in out
    assert "GGML_ASSERT" in " ".join(out.split())
    code, out, err = run_knorm("check", 'llama.cpp:embedded-llama(type_k="q4_K")')
    assert (code, out) == (2, "")
    assert "does not divide n_embd_head_k=64" in err


def test_the_program_that_shows_a_refutation_runs_alone(llama, tmp_path):
    _, file, windows = llama
    (tmp_path / "shown.py").write_text(program(target(settings=Q4), windows.input_ids[0, :64].tolist(), "survives"))
    ended = subprocess.run([sys.executable, tmp_path / "shown.py", file], capture_output=True, text=True, check=True)
    lines = ended.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["tokens 32 on", "tokens 48 on"]
    assert 1e-3 < float(lines[0].split()[8]) < 0.1


def test_the_tokens_of_a_text_are_the_engines_own():
    named = Named(target("smollm2"), Place(), "quick")
    with model_file("smollm2", named.model) as named.file, closing([named]):
        assert engine.check_same_tokens(engine.Trial(named)) > 500


def test_a_sweep_of_an_engine(run_knorm, tmp_path):
    (tmp_path / "plan.toml").write_text(
        f"methods = ['llama.cpp:embedded-llama{Q4}', 'llama.cpp:embedded-llama(type_k=\"q4_K\")']\n"
        "window = 96\nwindows = 2\nwindows_per_cell = 1\n"
    )
    code, out, _ = run_knorm("sweep", "plan.toml", "out", "--workers", "1", "--json", "out.json")
    assert code == 1, out
    result = strict_json("out.json")
    assert [(row["model"], row["method"]) for row in result["rows"]] == [
        ("llama.cpp:embedded-llama", "full cache, again"),
        ("llama.cpp:embedded-llama", f"llama.cpp:embedded-llama{Q4}"),
    ]
    assert 1e-3 < result["rows"][1]["kl"] < 0.1
    (reason,) = {failure["reason"] for failure in result["failures"]}
    assert reason.startswith("llama.cpp refuses: llama_init_from_model: K cache type q4_K with block size 256")
    alone = run_knorm("ppl", f"llama.cpp:embedded-llama{Q4}", "--window", "96", "--windows", "2", "--json", "ppl.json")
    assert alone[0] == 0
    assert strict_json("ppl.json")["rows"][1]["kl"] == result["rows"][1]["kl"]
    code, out, err = run_knorm("page", "out", "ppl.json", "page")
    assert (code, err) == (0, ""), out


def test_a_golden_of_an_engine(run_knorm, tmp_path, monkeypatch):
    monkeypatch.setenv("KNORM_COMMIT", "a" * 40)
    monkeypatch.setattr(noise, "ROUNDINGS", 1)
    declared = f"[case.q4]\ntarget = 'llama.cpp:embedded-llama{Q4}'\nwindow = 64\nwindows = 2\n"
    (tmp_path / "knorm.toml").write_text(declared)
    code, out, err = run_knorm("golden", "record", "q4")
    assert (code, err) == (0, ""), out
    assert "batch 2" in out
    assert run_knorm("golden", "accept", "q4", "--reason", "first")[0] == 0
    code, out, err = run_knorm("golden", "verify")
    assert (code, err) == (0, ""), out
    assert "holds         q4" in out
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "0")  # the target says it: the user's own does not matter
    assert run_knorm("golden", "verify")[0] == 0
    worse = {**LlamaCpp(rotate=False).environment()}
    monkeypatch.setattr(LlamaCpp, "environment", lambda self: worse)
    code, out, err = run_knorm("golden", "verify")
    assert code == 1
    assert "MOVED         q4" in out
