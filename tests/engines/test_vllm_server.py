"""vLLM's own server, started on the loopback: forced to decode, it predicts what vLLM in knorm's process does."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import strict_json

import knorm
from knorm.engines.asking import EndpointScorer, own_windows
from knorm.engines.boxed import model_file
from knorm.engines.conditions import Place, Vllm, engine_target
from knorm.engines.endpoint import Endpoint
from knorm.engines.http import read_address
from knorm.engines.process import EngineError, EngineLost, EngineRefused
from knorm.engines.scorer import Asked, EngineScorer, ModelScorer, closing, compared
from knorm.engines.told import Able
from knorm.evaluation.damage import summed
from knorm.evaluation.windows import cut_windows
from knorm.laws import engine_run
from knorm.models import load_embedded, load_text

STARTS, FORCING = 300, ("--max-logprobs", "-1", "--logprobs-mode", "raw_logprobs")
FORCING += ("--logits-processors", "knorm.engines.forced:Forced", "--no-async-scheduling")


@contextlib.contextmanager
def vllm_server(python, folder, *options, log):
    """Start vLLM's server as docs/engines.md does; yields its endpoint, and ends it with all that it started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "boxed",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--block-size", "32",
        "--max-num-seqs", "4", *options,
    ]  # fmt: skip
    where = str(Path(knorm.__file__).parents[1])
    environment = {**os.environ, **Vllm().environment(), "PYTHONPATH": where, "HF_HUB_OFFLINE": "1"}
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]  # a server has an engine in a process of its own
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, cwd=log.parent, start_new_session=True
        )
        try:
            yield _started(process, f"http://127.0.0.1:{port}/v1", log), process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


def _started(process, url, log):
    end = time.monotonic() + STARTS
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(EngineError):
            return Endpoint(read_address(url), 60)
        time.sleep(0.5)
    pytest.fail(f"vLLM's server did not start: {log.read_text(errors='replace')[-2000:]}")


@pytest.fixture(scope="module")
def llama():
    model, tokenizer = load_embedded("embedded-llama")
    with model_file("embedded-llama", model, "folder") as folder:
        yield model, folder, cut_windows(tokenizer, load_text("narrative"), 112, 2).input_ids


@pytest.fixture(scope="module")
def in_process(vllm, llama):
    """What vLLM predicts in the process that knorm starts, before a server runs: by type of cache, how and window."""
    kept = {}
    for kind in ("auto", "fp8"):
        target = engine_target(f'vllm:embedded-llama(kv_cache_dtype="{kind}")')
        scorer = EngineScorer(target, llama[1], Place(vllm), 112)
        with closing([scorer]):
            for how in ("loop", "two calls"):
                scorer.asked = Asked(how)
                kept[kind, how] = Kept(llama[2], [torch.cat([*scorer.logits(window, 64)]) for window in llama[2]])
    return kept


class Kept:
    """Logits that were scored before."""

    def __init__(self, windows, logits):
        self.windows, self.kept = windows, logits

    def logits(self, tokens, prompt):
        (place,) = (i for i, window in enumerate(self.windows) if torch.equal(window, tokens))
        return iter(self.kept[place].split(4))


@pytest.fixture(scope="module", params=["auto", "fp8"])
def served(request, vllm, llama, in_process, tmp_path_factory):
    log = tmp_path_factory.mktemp("vllm") / "log"
    options = [*FORCING, "--kv-cache-dtype", request.param]
    options += ["--skip-tokenizer-init"] if request.param == "auto" else []
    with vllm_server(vllm, llama[1], *options, log=log) as (endpoint, process):
        yield request.param, endpoint, in_process[request.param, "loop"]
        assert process.poll() is None, "it died"


def test_forced_decode_over_http_is_the_one_in_process(served, llama):
    kind, endpoint, same = served
    model, _, ids = llama
    assert (endpoint.kind, endpoint.software, endpoint.context) == (kind, "vllm 0.32.0", 1024)
    assert endpoint.bytes_per_token == {"auto": 7168, "fp8": 1792}[kind]
    able = endpoint.able()
    assert (able.forced, able.prompts, able.known, able.vocabulary) == (True, kind == "fp8", None, 4096)
    own, plain = compared([same, EndpointScorer(endpoint, able), ModelScorer(model)], ids, 64, [(0, 1), (2, 1)])
    assert summed(own).kl <= 1e-6
    far = summed(plain)
    assert far.kl <= 1e-6 if kind == "auto" else 3e-3 < far.kl < 0.05
    assert far.tokens == 2 * 48


def test_what_is_restricted_is_a_lower_bound(served, llama):
    kind, endpoint, _ = served
    model, _, ids = llama
    whole, top = endpoint.able(), Able(True, True, 20, None)
    scorers = [ModelScorer(model), EndpointScorer(endpoint, whole), EndpointScorer(endpoint, top)]
    full, bound = map(summed, compared(scorers, ids[:1], 64, [(0, 1), (0, 2)]))
    assert bound.kl <= full.kl + 1e-6
    assert (bound.same_top, bound.nll) == (full.same_top, pytest.approx(full.nll, abs=1e-5))
    assert bound.kl > 0.3 * full.kl or kind == "auto"


def test_a_companion_changes_no_more_than_noise(served, llama):
    _, endpoint, _ = served
    ids, able = llama[2][:1, :80], endpoint.able()
    scorers = [EndpointScorer(endpoint, able, asked) for asked in (Asked(), Asked(companions=(ids[0],)))]
    assert summed(compared(scorers, ids, 64, [(0, 1)])[0]).kl < 1e-3


def check_prompts(endpoint, able, kind, llama, in_process):
    """vLLM's own scores of a prompt are those of the process, and of a text of its own those of decoding it."""
    same = compared(
        [in_process[kind, "two calls"], EndpointScorer(endpoint, able, Asked("two calls"))], llama[2][:1], 64, [(0, 1)]
    )
    assert summed(same[0]).kl <= 1e-6
    own = own_windows(endpoint, llama[2][:1], 64)
    decoded, scored = (
        EndpointScorer(endpoint, replace(able, forced=False, known=20, vocabulary=None), Asked(how), [*own])
        for how in ("loop", "two calls")
    )
    assert summed(compared([decoded, scored], own, 64, [(0, 1)])[0]).kl < (1e-6 if kind == "auto" else 1e-3)


def test_without_a_tokenizer_it_reads_and_cuts_no_texts(served, llama, in_process):
    kind, endpoint, _ = served
    able = endpoint.able()
    if kind == "fp8":
        check_prompts(endpoint, able, kind, llama, in_process)
        assert endpoint.tokenize(" a little girl", begin=False) == load_embedded()[1](" a little girl").input_ids
        return
    with pytest.raises(EngineRefused, match="scores no prompts"):
        EndpointScorer(endpoint, able, Asked("two calls")).logits(llama[2][0], 64)
    with pytest.raises(EngineRefused, match="cuts no text into tokens"):
        endpoint.tokenize(" a little girl", begin=False)


def test_what_cannot_be_asked_is_one_line_and_the_server_lives(served):
    endpoint = served[1]
    server, path = endpoint.server, "/v1/completions"
    for forced, count, said in (
        ([1, 2], 3, "2 tokens are forced, but max_tokens is 3"),
        ("text", 1, "forced should be a list of tokens"),
        ([-1], 1, "forced should be a list of tokens"),
    ):
        request = {
            "model": "boxed",
            "prompt": [5, 6],
            "max_tokens": count,
            "vllm_xargs": {"forced": forced, "key": "k"},
        }
        with pytest.raises(EngineRefused, match=said):
            server.ask(path, request)
    with pytest.raises(EngineRefused, match="there should be a word as key"):
        server.ask(path, {"model": "boxed", "prompt": [5], "max_tokens": 1, "vllm_xargs": {"forced": [1], "key": "0"}})
    beyond = Able(True, True, None, 10_000)  # believed to have it
    with pytest.raises(EngineLost, match=r"generated token .* where it was left one choice, 5000"):
        [*EndpointScorer(endpoint, beyond).logits(torch.tensor([5, 6, 5000]), 2)]
    with pytest.raises(EngineRefused, match=r"the text has token 5000, the tokens are another model's: .*5000"):
        endpoint.check_vocabulary(None, torch.tensor([5, 5000]))
    with pytest.raises(EngineError, match=r"does not serve 'box'; it serves boxed; did you mean boxed\?"):
        Endpoint(read_address(f"{endpoint.address.url}#box"), 5)
    assert len([*endpoint.generated([5, 6], 2, 1, [7, 8])]) == 2


def test_commands_ask_it(served, run_knorm, monkeypatch):
    monkeypatch.setitem(engine_run.LONG, "quick", (1, 80))  # the server takes long to write a vocabulary's numbers
    kind, endpoint, _ = served
    url = endpoint.address.url
    short = ("--windows", "2", "--window", "48")
    code, out, err = run_knorm("ppl", url, "--model", "embedded-llama", *short, "--json", "out.json")
    assert (code, err) == (0, ""), err
    assert f"{url}#boxed (vllm 0.32.0, cache type {kind}) on narrative" in out
    assert "Compared with: transformers with the weights of embedded-llama in float32" in out
    row = strict_json("out.json")["rows"][1]
    assert row["kl"] <= 1e-6 if kind == "auto" else 1e-3 < row["kl"] < 0.05
    assert (row["bytes_per_token_full"], row["how"], row["kl_at_least"]) == (7168, "loop", False)
    names = "survives,same_tokens,default_equals_transformers,eviction_equals_transformers"
    names += ",accepted_cache_works" if kind == "fp8" else ""  # the default one would be compared with itself
    code, out, err = run_knorm("check", url, "--model", "embedded-llama", "--select", names, "--json", "laws.json")
    assert (code, err) == (0, ""), out
    verdicts = {x["check"]: x["verdict"] for x in strict_json("laws.json")["targets"][0]["results"]}
    default = verdicts.pop("default_equals_transformers")
    assert default == ("holds" if kind == "auto" else "does not apply")
    assert verdicts.pop("eviction_equals_transformers") == "does not apply"
    if kind == "auto":
        assert verdicts.pop("same_tokens") == "does not apply"  # it cuts no texts
    assert {*verdicts.values()} == {"holds"}


def test_a_server_as_it_comes_is_asked_by_prompts(vllm, llama, in_process, tmp_path):
    model, folder, ids = llama
    with vllm_server(vllm, folder, log=tmp_path / "log") as (endpoint, process):
        able = endpoint.able()
        assert (able.forced, able.prompts, able.known) == (False, True, 20)
        near = summed(compared([ModelScorer(model), EndpointScorer(endpoint, able)], ids, 64, [(0, 1)])[0])
        assert near.kl <= 1e-6
        check_prompts(endpoint, able, "auto", llama, in_process)
        os.killpg(process.pid, signal.SIGKILL)
        with pytest.raises(EngineLost, match=r"died while it was to answer|nothing answers at"):
            [*EndpointScorer(endpoint, able).logits(ids[0], 64)]
