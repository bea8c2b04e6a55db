"""vLLM's caches on a CPU, scored in a process of their own."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace

import pytest
import torch
from commands import strict_json
from transformers import AutoTokenizer

from knorm.engines.boxed import model_file
from knorm.engines.conditions import Place, engine_target
from knorm.engines.process import EngineError, EngineProcess, EngineRefused
from knorm.engines.scorer import FRAME, Asked, EngineScorer, ModelScorer, closing, compared
from knorm.evaluation.damage import summed
from knorm.evaluation.windows import cut_windows
from knorm.golden import noise
from knorm.laws import engine, engine_run
from knorm.laws.engine_run import Named
from knorm.laws.registry import Refuted, Silent
from knorm.models import load_embedded, load_model, load_text

FP8 = '(kv_cache_dtype="fp8")'


@pytest.fixture(autouse=True)
def _python(vllm, monkeypatch):
    """Commands and scorers start the interpreter that has vLLM."""
    monkeypatch.setenv("KNORM_ENGINE_PYTHON", vllm)


@pytest.fixture(scope="module")
def llama():
    model, tokenizer = load_embedded("embedded-llama")
    with model_file("embedded-llama", model, "folder") as file:
        yield model, file, cut_windows(tokenizer, load_text("narrative"), 192, 2).input_ids


@pytest.fixture(scope="module")
def running(vllm, llama):
    """vLLM with its default cache, for what one process can be asked."""
    scorer = EngineScorer(target(), llama[1], Place(vllm), 192, Asked(companions=(llama[2][1],)))
    with closing([scorer]):
        scorer.asked = Asked()
        yield scorer


def target(name="embedded-llama", settings=""):
    return engine_target(f"vllm:{name}{settings}")


def without_knorm(*words):
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(words, capture_output=True, text=True, check=False, env=bare)


def asked_as(scorer, how):
    scorer.asked = Asked(how)
    return scorer


@pytest.mark.parametrize("how", ["loop", "two calls"])
def test_the_default_cache_is_transformers_within_rounding(running, llama, how):
    model, _, ids = llama
    near, own = map(summed, compared([asked_as(running, how), ModelScorer(model)], ids, 100, [(1, 0), (1, 1)]))
    assert near.kl < 1e-6
    assert (near.tokens, own.kl, own.same_top) == (2 * 92, 0, 1)
    expected = torch.nn.functional.cross_entropy(model(ids).logits[:, 99:-1].flatten(0, 1), ids[:, 100:].flatten())
    assert near.nll == pytest.approx(expected.item(), abs=1e-4)


def test_a_gpt_neox_in_small_batches_and_blocks_is_transformers_too():
    """A prompt that is read in three parts is sampled from after each: only the last time counts."""
    model, tokenizer = load_embedded("embedded")
    ids = cut_windows(tokenizer, load_text("narrative"), 128, 1).input_ids
    with model_file("embedded", model, "folder") as file:
        small = target("embedded", "(max_num_batched_tokens=32, block_size=64)")
        scorers = [EngineScorer(small, file, Place(), 128), ModelScorer(model)]
        with closing(scorers):
            for how in ("loop", "two calls"):
                asked_as(scorers[0], how)
                assert summed(compared(scorers, ids, 90, [(1, 0)])[0]).kl < 1e-6
            assert scorers[0].tokenize(" a little girl", begin=False) == tokenizer(" a little girl").input_ids


@pytest.mark.parametrize("how", ["loop", "two calls"])
def test_logits_come_a_few_at_a_time_and_again_to_the_bit(running, llama, how):
    ids = llama[2]
    once = [*asked_as(running, how).logits(ids[0], 181)]
    assert [len(chunk) for chunk in once] == [*[FRAME] * (11 // FRAME), 11 % FRAME]
    _ = [*running.logits(ids[1], 90)]  # another request before
    assert torch.equal(torch.cat(once), torch.cat([*running.logits(ids[0], 181)]))


def test_a_companion_changes_no_more_than_rounding(running, llama):
    ids = llama[2]
    alone = torch.cat([*asked_as(running, "loop").logits(ids[0], 100)])
    running.asked = Asked(companions=(ids[1],))
    together = torch.cat([*running.logits(ids[0], 100)])
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-3)


def test_what_vllm_says_of_itself(running):
    said = running.said
    assert (said["vocabulary"], said["layers"], said["kv_heads"], said["trained"]) == (4096, 7, 2, 1024)
    assert said["bytes_per_token"] == 7168  # keys and values of 7 layers, 2 heads, 64 numbers of 4 bytes
    assert said["version"].startswith("0.")


def test_tokens_of_another_vocabulary_are_refused(running):
    with pytest.raises(EngineError, match="token 4096 is not in the vocabulary of vllm:embedded-llama"):
        asked_as(running, "loop").logits(torch.full((8,), 4096), 4)


def test_what_cannot_be_opened_is_one_line(llama, tmp_path):
    wanted = target(settings='(kv_cache_dtype="q4_0")')
    with wanted.start(llama[1], Place(), context=64) as process:
        with pytest.raises(EngineRefused, match=r"^vllm refuses: cache_dtype: Input should be 'auto', .*'fp8'.*$"):
            wanted.opened(process)
        (tmp_path / "empty").mkdir()
        (tmp_path / "wrong").mkdir()
        (tmp_path / "wrong" / "config.json").write_text('{"model_type": "none"}')
        asked = {"context": 64, "sequences": 1, **target().settings.request()}
        with pytest.raises(EngineRefused, match=r"vllm refuses: empty has no config.json that can be read"):
            process.ask("open", file=str(tmp_path / "empty"), **asked)
        with pytest.raises(EngineRefused) as raised:
            process.ask("open", file=str(tmp_path / "wrong"), **asked)
    assert "\n" not in str(raised.value)


def test_an_eviction_is_not_asked_of_it():
    subject = Named(target(), Place(), "quick")
    subject.file = "never read"
    with pytest.raises(Silent, match="vLLM has no call that takes tokens out of its cache"):
        engine.check_eviction_equals_transformers(engine.Trial(subject))


class Replayed:
    """What a scorer gave for windows, given again."""

    def __init__(self, scorer, windows):
        with closing([scorer]):
            self.chunks = [(window, [*scorer.logits(window, engine.PROMPT)]) for window in windows]

    def logits(self, tokens, prompt):
        return iter(next(chunks for window, chunks in self.chunks if torch.equal(window, tokens)))

    def close(self):
        pass


SHORT = {"quick": (1, 128)}  # windows and tokens: enough for what is broken from the first token on


@pytest.fixture(scope="module")
def full(vllm, llama):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_run, "LONG", SHORT)
        subject = Named(target(), Place(vllm), "quick")
    subject.file = llama[1]
    return Replayed(subject.scorer("full", Asked(), fresh=True), subject.long)


def trial(kind, llama, full, request):
    subject = Named(target(settings=f'(kv_cache_dtype="{kind}")'), Place(), "quick")
    subject.file, start = llama[1], subject.scorer
    subject.scorer = lambda which, asked, **how: full if which == "full" else start(which, asked, **how)
    request.addfinalizer(subject.close)
    return engine.Trial(subject)


@pytest.mark.parametrize(
    "kind",
    [
        *("int8_per_token_head", "int4_per_token_head", "fp8_per_token_head", "fp8_inc", "turboquant_k8v4"),
        "float16",  # under a model in float32; nvfp4: see test_check_refutes_with_a_program_that_needs_vllm_alone
    ],
)
def test_what_is_accepted_and_does_not_work_is_refuted(llama, full, kind, request, monkeypatch):
    monkeypatch.setattr(engine_run, "LONG", SHORT)
    with pytest.raises(
        Refuted, match=r"accepted cache works: from token 32 on the KL .*seeing the last 4 tokens alone"
    ):
        engine.check_accepted_cache_works(trial(kind, llama, full, request))


def test_ppl_prints_the_table_and_writes_the_form(run_knorm):
    spec = f"vllm:embedded{FP8}"
    code, out, err = run_knorm("ppl", spec, "--windows", "2", "--window", "96", "--json", "out.json")
    assert (code, err) == (0, ""), out
    assert "embedded in vllm (vllm 0." in out
    assert "The full cache has keys and values in float32, as the model computes them" in out
    result = strict_json("out.json")
    assert [row["method"] for row in result["rows"]] == ["full cache, again", spec]
    assert [row["method"] for row in result["engine"]["beside"]] == [f"{spec}, again", "transformers, float32"]
    assert 1e-3 < result["rows"][1]["kl"] < 0.05
    assert result["engine"]["beside"][1]["kl"] < 1e-6
    assert result["rows"][1]["bytes_per_token"] == result["engine"]["beside"][1]["bytes_per_token"] / 4


def test_check_answers_all_laws_with_few_processes(run_knorm, monkeypatch):
    """fp8 with its full cache, each in small batches and with moved weights, and one that was asked nothing before."""
    started, start = [], EngineProcess.__init__

    def counted(self, *given, **named):
        started.append(self)
        start(self, *given, **named)

    monkeypatch.setattr(EngineProcess, "__init__", counted)
    code, out, err = run_knorm("check", f"vllm:embedded-llama{FP8}", "--json", "out.json")
    assert (code, err) == (0, ""), out
    (checked,) = strict_json("out.json")["targets"]
    results = {result["check"]: result for result in checked["results"]}
    assert results.pop("eviction_equals_transformers")["verdict"] == "does not apply"
    assert {result["verdict"] for result in results.values()} == {"holds"}
    assert len(results) == 7
    assert "(weights moved in the last digit: " in results["decode_equals_batch"]["reason"]
    assert len(started) <= 7
    assert not any(process.running for process in started)


def test_check_refutes_with_a_program_that_needs_vllm_alone(run_knorm, llama, tmp_path, vllm, monkeypatch):
    monkeypatch.setattr(engine_run, "LONG", SHORT)
    spec = 'vllm:embedded-llama(kv_cache_dtype="nvfp4")'
    selected = "accepted_cache_works,eviction_equals_transformers"
    code, out, err = run_knorm("check", spec, "--select", selected, "--snippets", "shown")
    assert (code, err) == (1, ""), out
    assert "REFUTED  accepted_cache_works" in out
    assert "1 refuted, 0 untested, 1 do" in " ".join(out.split())
    (file,) = (tmp_path / "shown").iterdir()
    ended = without_knorm(vllm, file, llama[1])
    assert ended.returncode == 0, ended.stderr[-2000:]
    lines = [line for line in ended.stdout.splitlines() if line.startswith("tokens ")]
    assert lines[0].startswith("tokens 32 on: KL from the default cache ")
    assert len(lines) == 6
    assert all(float(line.split()[8]) > 1 for line in lines)


def test_a_gguf_file_is_given_as_a_folder_and_a_folder_as_it_is(tmp_path, llama):
    pytest.importorskip("gguf", reason="needs the package gguf: pip install 'knorm[gguf]'")
    with model_file(str(llama[1]), llama[0], "folder") as same:
        assert same == llama[1]
    model, tokenizer = (
        load_model("smollm2") if os.environ.get("KNORM_REQUIRE_VLLM") else load_embedded("embedded-llama")
    )
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    text = load_text("narrative")[:500] + " 12 345, don't!"
    with model_file(str(tmp_path / "m.gguf"), model, "folder", tokenizer) as folder:
        assert {"config.json", "model.safetensors"} <= {file.name for file in folder.iterdir()}
        written = load_written(folder)
        assert AutoTokenizer.from_pretrained(folder).encode(text) == tokenizer.encode(text)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, written[name])


def load_written(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def test_settings_say_what_runs():
    wanted = target(settings='(kv_cache_dtype="fp8", dtype="bfloat16", n_threads=2)').settings
    assert wanted.full() == replace(wanted, kv_cache_dtype="auto")
    assert wanted.environment()["OMP_NUM_THREADS"] == "2"
    assert wanted.in_batches_of(32).request()["batch"] == 32


def test_a_sweep_of_two_caches(run_knorm, tmp_path):
    specs = [f"vllm:embedded{FP8}", 'vllm:embedded(kv_cache_dtype="q4_0")']
    listed = ", ".join(f"'{spec}'" for spec in specs)
    (tmp_path / "plan.toml").write_text(f"methods = [{listed}]\nwindow = 96\nwindows = 1\n")
    code, out, _ = run_knorm("sweep", "plan.toml", "out", "--workers", "1", "--json", "out.json")
    assert code == 1, out
    result = strict_json("out.json")
    assert [(row["model"], row["method"]) for row in result["rows"]] == [
        ("vllm:embedded", "full cache, again"),
        ("vllm:embedded", specs[0]),
    ]
    assert 1e-3 < result["rows"][1]["kl"] < 0.1
    (reason,) = {failure["reason"] for failure in result["failures"]}
    assert reason.startswith("vllm refuses: cache_dtype: Input should be 'auto', ")


def test_a_golden_of_a_cache(run_knorm, tmp_path, monkeypatch):
    monkeypatch.setenv("KNORM_COMMIT", "a" * 40)
    monkeypatch.setattr(noise, "ROUNDINGS", 1)
    monkeypatch.setattr(noise, "_variations", lambda how, device: [])
    (tmp_path / "knorm.toml").write_text(f"[case.fp8]\ntarget = 'vllm:embedded{FP8}'\nwindow = 64\nwindows = 1\n")
    code, out, err = run_knorm("golden", "record", "fp8")
    assert (code, err) == (0, ""), out
    assert run_knorm("golden", "accept", "fp8", "--reason", "first")[0] == 0
    code, out, err = run_knorm("golden", "verify")
    assert (code, err) == (0, ""), out
    assert "holds         fp8" in out
