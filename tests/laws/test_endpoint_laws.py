"""Laws of engines asked of a server: one that is right, and wrong ones that they refute."""

from __future__ import annotations

import copy
import re
import threading
import time
from typing import ClassVar

import pytest
import torch
from servers import Scoring, serving

from knorm.engines.endpoint import Endpoint
from knorm.engines.http import read_address
from knorm.laws import endpoint_run, engine
from knorm.laws.endpoint_run import EndpointChecks
from knorm.laws.process.protocol import Request

AUTO = 'vllm:cache_config_info{block_size="16",cache_dtype="auto"} 1.0'


@pytest.fixture(autouse=True)
def _one_shorter_window(monkeypatch):
    monkeypatch.setattr(endpoint_run, "LONG", {"quick": (1, 192)})


class Modelled(Scoring):
    """A server of a model, which reads a text once; `change` makes of its logits what a wrong one would predict."""

    known: ClassVar = {}

    def __init__(self, model, tokenizer, **different):
        self.model, self.lock, self.before = model, threading.Lock(), None
        super().__init__(vocabulary=4096, most=20, context=1024, metrics=AUTO)
        self.tokens = lambda text: tokenizer(text, add_special_tokens=False).input_ids
        vars(self).update(different)

    def told(self, text, first, decoded):
        with self.lock, torch.no_grad():
            if (key := (self.model, tuple(text))) not in self.known:
                self.known[key] = self.model(torch.tensor([text])).logits[0].float()
        logits = self.change(self.known[key][first - 1 : -1], text[:first], first, decoded)
        self.before = text[:first]
        return logits.log_softmax(-1).tolist()

    def predict(self, text):
        with self.lock, torch.no_grad():
            return self.model(torch.tensor([text])).logits[0, -1].tolist()

    def change(self, logits, prompt, first, decoded):
        return logits


def tried(url, *names, reference=None):
    checks = EndpointChecks(Request(url, select=names or None), 20.0, "embedded", reference)
    return {result.check: result for result in checks.results()}, checks


@pytest.mark.parametrize("forced", [True, False])
def test_a_right_server_obeys(embedded, forced):
    with serving(Modelled(*embedded, forced=forced)) as url:
        results, checks = tried(url)
    verdicts = {name: result.verdict for name, result in results.items()}
    assert verdicts.pop("eviction_equals_transformers") == "does not apply"
    assert {*verdicts.values()} == {"holds"}, verdicts
    assert len(verdicts) == len(engine.LAWS) - 1
    told = " ".join(checks.told)
    assert ("forced decode: the server generates" in told) == forced
    assert ("decode against rescoring" in told) == (not forced)
    assert "KL is a lower bound. The full cache is that of transformers" in told


def noisy(logits):
    return logits + 0.3 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))


def in_decode(self, logits, prompt, first, decoded):
    """Wrong in the first 128 tokens alone: what is wrong everywhere is a cache that costs as much (untested)."""
    places = torch.arange(first, first + len(logits))[:, None]
    return torch.where(places < 128, noisy(logits), logits) if decoded else logits


def in_company(self, logits, prompt, first, decoded):
    time.sleep(0.05 * decoded)  # others that were sent with it have come by then
    return noisy(logits) if decoded and self.count > 1 else logits


def after_another(self, logits, prompt, first, decoded):
    other = self.before and decoded and len(prompt) == engine.PROMPT and self.before != prompt
    return noisy(logits) if other and self.before[0] == self.second else logits


def from_150(self, logits, prompt, first, decoded):
    places = torch.arange(first, first + len(logits))[:, None]
    return torch.where(places >= 150, 0.0, logits)


@pytest.mark.parametrize(
    ("forced", "law", "change", "said"),
    [
        (True, "decode_equals_batch", in_decode, "decode equals batch: mean KL"),
        (False, "decode_equals_batch", in_decode, "decode equals batch: mean KL"),
        (True, "batch_changes_nothing", in_company, "batch changes nothing: mean KL"),
        (False, "accepted_cache_works", from_150, "accepted cache works: from token 1[45]. on"),
    ],
)
def test_a_wrong_server_is_refuted(embedded, monkeypatch, forced, law, change, said):
    monkeypatch.setattr(Modelled, "change", change)
    with serving(Modelled(*embedded, forced=forced)) as url:
        (result,) = tried(url, law)[0].values()
    assert result.verdict == "refuted"
    assert re.match(said, result.counterexample)


def test_a_server_that_remembers_is_refuted(embedded, monkeypatch):
    from knorm.evaluation.windows import cut_windows
    from knorm.models import load_text

    monkeypatch.setattr(Modelled, "change", after_another)
    second = (
        cut_windows(embedded[1], load_text("narrative"), engine.SHORT, 2).input_ids[1, -1].item()
    )  # scored before, back to front
    with serving(Modelled(*embedded, second=second)) as url:
        (result,) = tried(url, "order_changes_nothing")[0].values()
    assert result.verdict == "refuted"


def test_a_server_that_dies_is_refuted_and_all_else_untested(embedded, monkeypatch):
    def die(self, logits, prompt, first, decoded):
        if decoded and len(prompt) == engine.PROMPT:
            raise ConnectionError
        return logits

    monkeypatch.setattr(Modelled, "change", die)
    with serving(Modelled(*embedded)) as url:
        results, _ = tried(url, "survives", "same_tokens", "order_changes_nothing")
    assert [result.verdict for result in results.values()] == ["refuted", "untested", "untested"]
    assert "while it was to answer" in results["survives"].counterexample


@pytest.mark.parametrize(
    ("tokens", "verdict"), [(None, "does not apply"), (lambda text: [1, 2, 3], "refuted"), (lambda text: [], "refuted")]
)
def test_tokens_that_are_cut_otherwise_are_refuted(embedded, tokens, verdict):
    with serving(Modelled(*embedded, tokens=tokens)) as url:
        (result,) = tried(url, "same_tokens")[0].values()
    assert result.verdict == verdict


def rounded(model):
    return copy.deepcopy(model).bfloat16()


def broken(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.03)
    return other


@pytest.mark.parametrize(
    ("metrics", "made", "verdict", "said"),
    [
        (AUTO, copy.copy, "holds", ""),
        (AUTO, rounded, "untested", "that may be its precision, which it does not say: bfloat16 explains"),
        (AUTO, broken, "refuted", "default equals transformers: mean KL"),
        (AUTO.replace("auto", "fp8"), copy.copy, "does not apply", "the server says that its cache is fp8, and there"),
        ("", copy.copy, "does not apply", "the server does not say which cache it has, and there is no --reference"),
    ],
)
def test_the_default_cache_is_asked_of_a_server_that_says_it_has_it(embedded, metrics, made, verdict, said):
    model, tokenizer = embedded
    with serving(Modelled(made(model), tokenizer, metrics=metrics)) as url:
        (result,) = tried(url, "default_equals_transformers")[0].values()
    assert result.verdict == verdict
    assert said in (result.reason or result.counterexample or "")


def test_a_second_server_has_the_full_cache(embedded):
    model, tokenizer = embedded
    names = "default_equals_transformers", "accepted_cache_works"
    with (
        serving(Modelled(model, tokenizer, metrics=AUTO.replace("auto", "fp8"))) as url,
        serving(Modelled(broken(model), tokenizer)) as other,
    ):
        results, checks = tried(url, *names, reference=other)
    assert [results[name].verdict for name in names] == ["refuted", "holds"]
    assert checks.told[-1].endswith(f"The full cache is that of {other}#small.")


def test_check_prints_what_was_asked_and_how_to_ask_again(run_knorm, embedded, monkeypatch):
    monkeypatch.setattr(Modelled, "change", from_150)
    with serving(Modelled(*embedded)) as url:
        arguments = (
            "check",
            url,
            "--model",
            "embedded",
            "--select",
            "accepted_cache_works,eviction_equals_transformers",
        )
        code, out, err = run_knorm(*arguments)
    assert (code, err) == (1, "")
    assert "REFUTED  accepted_cache_works" in out
    assert f"{url}#small (made up, cache type auto): forced decode" in out
    assert f"    knorm check {url} --model embedded --select accepted_cache_works" in out
    assert "1 law does not apply" in out


def test_every_token_is_known_to_be_in_the_vocabulary_before_it_is_sent(embedded, monkeypatch):
    """A server that checks no prompts is ended by one that is not."""
    asked = []
    monkeypatch.setattr(
        Endpoint, "check_vocabulary", lambda self, ours, tokens: asked.extend(tokens.flatten().tolist())
    )
    with serving(Modelled(*embedded)) as url:
        served = endpoint_run.Served(Endpoint(read_address(url), 20), None, "embedded", "quick")
    assert {*served.short.flatten().tolist(), *served.long.flatten().tolist()} <= {*asked}


def test_a_short_context_is_refused(embedded):
    with serving(Modelled(*embedded, context=100)) as url, pytest.raises(ValueError, match="holds a context of 100"):
        tried(url)
