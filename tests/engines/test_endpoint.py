"""Servers asked over HTTP: what they can is found out, and whatever they do instead of answering is one line."""

from __future__ import annotations

import http.server
import math
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time

import pytest
import torch
from commands import strict_json
from servers import FULL, Handler, Scoring, serving, table

from knorm.engines.asking import EndpointScorer, own_windows
from knorm.engines.endpoint import Endpoint
from knorm.engines.endpoint_ways import EndpointWays, windows_by
from knorm.engines.http import read_address
from knorm.engines.partial import Top
from knorm.engines.process import EngineError, EngineRefused
from knorm.engines.scorer import FRAME, Asked, compared
from knorm.engines.told import Able, fits
from knorm.evaluation.damage import summed
from knorm.evaluation.windows import Windows

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5]])


def endpoint(url, limit=5.0):
    return Endpoint(read_address(url), limit)


def refusal(url, ask=lambda server: server.able(), limit=5.0):
    """What is said of a server; in a line."""
    with pytest.raises(EngineError) as raised:
        ask(endpoint(url, limit))
    assert "\n" not in str(raised.value)
    return str(raised.value)


# What a server can


@pytest.mark.parametrize(
    ("different", "able"),
    [
        ({}, Able(True, True, None, 12)),
        ({"prompts": False}, Able(True, False, None, 12)),
        ({"most": 5}, Able(True, True, 5, None)),
        ({"most": 5, "forced": False}, Able(False, True, 5, None)),
        ({"forced": False}, Able(False, True, None, 12)),
    ],
)
def test_what_a_server_can_is_found_out_by_asking(different, able):
    with serving(Scoring(**different)) as url:
        found = endpoint(url).able()
    assert (found.forced, found.prompts, found.known, found.vocabulary) == (
        able.forced, able.prompts, able.known, able.vocabulary,
    )  # fmt: skip
    assert bool(found.why) == (not able.forced)
    assert ("KL is a lower bound" in found.told) == (able.known is not None)


def test_log_probabilities_of_after_forcing_are_no_predictions():
    class After(Scoring):
        def after_forcing(self, row, token):
            return [0.0 if place == token else -9999.0 for place in range(len(row))]

    with serving(After()) as url:
        able = endpoint(url).able()
    assert not able.forced
    assert "--logprobs-mode raw_logprobs" in able.why


@pytest.mark.parametrize("how", ["loop", "two calls"])
@pytest.mark.parametrize("most", [FULL, 5])
def test_what_is_scored_is_what_the_server_predicts(how, most):
    scoring = Scoring(most=most)
    with serving(scoring) as url:
        server = endpoint(url)
        chunks = [*EndpointScorer(server, server.able(), Asked(how)).logits(IDS[0], 5)]
    assert [len(chunk) for chunk in chunks] == [FRAME, 7 - FRAME]
    expected = [table(IDS[0, :place].tolist()) for place in range(5, 12)]
    if most == FULL:
        torch.testing.assert_close(torch.cat(chunks), torch.tensor(expected))
    else:
        assert all(isinstance(chunk, Top) for chunk in chunks)
        for row, tokens, true in zip(expected, [t for c in chunks for t in c.tokens], IDS[0, 5:], strict=True):
            likeliest = sorted(range(12), key=lambda i: -row[i])[:5]
            assert {*tokens.tolist()} == {*likeliest, int(true)}
    sent = [request for path, request in scoring.seen if path == "/v1/completions"][-1]
    assert sent["prompt"] == IDS[0, : 5 if how == "loop" else 12].tolist()  # numbers, not text
    assert (sent.get("vllm_xargs", {}).get("forced") == IDS[0, 5:].tolist()) == (how == "loop")


def test_a_server_that_is_behind_sends_many_tokens_at_once():
    with serving() as url, serving(Scoring(at_once=5)) as behind:
        one, many = ([*EndpointScorer(s, s.able()).logits(IDS[0], 5)] for s in map(endpoint, (url, behind)))
    assert [len(chunk) for chunk in many] == [FRAME, 7 - FRAME]
    assert torch.equal(torch.cat(one), torch.cat(many))


def test_what_has_no_room_in_an_answer_is_a_lower_bound(monkeypatch):
    monkeypatch.setattr("knorm.engines.told._MOST_NUMBERS", 7 * 6)
    with serving(Scoring(predict=worse)) as url, serving() as other:
        measured = EndpointWays(Windows(IDS), 5, reference=endpoint(other), how="loop").measure([endpoint(url)])
    row = measured.rows[1]
    assert row.kl_at_least
    assert row.check == "the 6 likeliest tokens are told, the others as one: KL is a lower bound"


def test_a_text_of_its_own_is_decoded_where_none_can_be_forced():
    with serving(Scoring(forced=False)) as url:
        server = endpoint(url)
        own = own_windows(server, IDS, 5)
        decoded = EndpointScorer(server, server.able(), Asked(), [*own])
        (same,) = compared([decoded, EndpointScorer(server, server.able(), Asked("two calls"))], own, 5, [(0, 1)])
        assert torch.equal(own[:, :5], IDS[:, :5])
        assert summed(same).kl == 0
        assert not own.equal(IDS)
        assert decoded._as_prompt(IDS[0])


def test_other_requests_run_beside_while_a_window_is_scored():
    most = []

    class Counting(Scoring):
        def told(self, text, first, decoded):
            time.sleep(0.02)
            most.append(self.count)
            return super().told(text, first, decoded)

    with serving(Counting()) as url:
        server = endpoint(url)
        able, most[:] = server.able(), []
        alone = torch.cat([*EndpointScorer(server, able).logits(IDS[0], 5)])
        assert max(most) == 1
        beside = EndpointScorer(server, able, Asked(companions=(IDS[1],)))
        torch.testing.assert_close(torch.cat([*beside.logits(IDS[0], 5)]), alone)
        assert max(most) == 2


def test_an_answer_that_scores_a_prompt_has_a_limit():
    whole = Able(True, True, None, 4096)
    assert (fits(whole, 1024), fits(whole, 2048)) == (None, 2048)
    assert fits(Able(True, True, 20, None), 512) == 20


CACHE = 'vllm:cache_config_info{block_size="16",cache_dtype="fp8",kv_cache_memory_bytes="%s",num_gpu_blocks="10"} 1.0'


def test_what_a_server_tells_of_its_cache():
    with serving(Scoring(metrics=CACHE % "16384")) as url:
        told = endpoint(url)
        assert (told.kind, told.bytes_per_token, told.software) == ("fp8", 102, "made up")
    with serving(Scoring(metrics=CACHE % "None")) as url:
        assert math.isnan(endpoint(url).bytes_per_token)
    with serving() as url:
        assert endpoint(url).kind == ""


def worse(tokens):
    """The table's rule, flattened: what a bad cache might do to it."""
    flat = [0.5 * value for value in table(tokens)]
    return [value - math.log(sum(map(math.exp, flat))) for value in flat]


@pytest.mark.parametrize("how", ["loop", "two calls"])
def test_a_second_server_is_the_full_cache(how):
    with serving(Scoring(predict=worse)) as url, serving() as other:
        ways = EndpointWays(Windows(IDS), 5, reference=endpoint(other), how=how)
        measured = ways.measure([endpoint(url)])
    control, row = measured.rows
    assert (control.damage.kl, control.changed) == (0, False)
    assert (row.changed, row.kl_at_least, row.how) == (True, False, how)
    p = torch.tensor([[table(w[:place].tolist()) for place in range(5, 12)] for w in IDS]).double()
    q = torch.tensor([[worse(w[:place].tolist()) for place in range(5, 12)] for w in IDS]).double()
    assert row.damage.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    assert [x.method for x in measured.beside] == [f"{url}#small, again"]
    with serving(Scoring(predict=worse, most=5)) as url, serving() as other:
        bound = EndpointWays(Windows(IDS), 5, reference=endpoint(other), how=how).measure([endpoint(url)]).rows[1]
    assert bound.kl_at_least
    assert 0.2 * row.damage.kl < bound.damage.kl < row.damage.kl
    assert bound.damage.nll == pytest.approx(row.damage.nll, rel=1e-5)


def test_a_server_cuts_the_text_where_nobody_else_can():
    scoring = Scoring(tokens=lambda text: [ord(character) % 12 for character in text])
    with serving(scoring) as url:
        windows = windows_by(endpoint(url), "What the server makes of it.", 8, 3)
        assert windows.input_ids[0].tolist() == [ord(character) % 12 for character in "What the"]
        assert windows.input_ids.shape == (3, 8)
    with serving() as url, pytest.raises(EngineRefused, match=r"cuts no text into tokens .*: give --model, the same"):
        windows_by(endpoint(url), "What", 8, 3)


# Bad input


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://127.0.0.1/v1", "should be http://HOST:PORT/v1 or http://HOST:PORT/v1#MODEL"),
        ("http://", "should be http://HOST:PORT/v1"),
        ("http://127.0.0.1:0x10/v1", "should be http://HOST:PORT/v1"),
        ("http://127.0.0.1:99999/v1", "should be http://HOST:PORT/v1"),
        ("http://[::1/v1", "should be http://HOST:PORT/v1"),
        ("http://me:secret@127.0.0.1/v1", "a key is given by the variable KNORM_API_KEY"),
        ("http://127.0.0.1/v1?key=1", "a key is given by the variable KNORM_API_KEY"),
        ("http://127.0.0.1/v1(model='a')", "it has no settings, which are the server's own"),
        ("http://127.0.0.1/v1 #a", "should be http://HOST:PORT/v1"),
        ("http://127.0.0.1/v1\r\nHost: other", "should be http://HOST:PORT/v1"),
        ("http://127.0.0.1/v\u00fc", "should be http://HOST:PORT/v1"),
        (f"http://{'a' * 70}.org/v1", "should be http://HOST:PORT/v1"),
    ],
)
def test_what_is_no_endpoint_is_refused_in_a_line(url, said):
    with pytest.raises(ValueError) as raised:
        read_address(url)
    assert said in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_an_endpoint_is_read():
    address = read_address("https://Example.org/x/v1/#org/model(1)")
    assert (address.secure, address.host, address.port, address.path) == (True, "example.org", 443, "/x/v1")
    assert (address.model, address.root) == ("org/model(1)", "/x")


def test_nothing_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    assert refusal(url) == f"nothing answers at {url}: Connection refused; is the server started, and is this its port?"
    assert "nothing answers at http://nowhere.invalid/v1: " in refusal("http://nowhere.invalid/v1")


def says(*replies, hold=0.0):
    """A handler of connections that sends bytes, whatever it is asked, and maybe does not end."""

    class Saying(http.server.BaseHTTPRequestHandler):
        def handle(self):
            self.connection.recv(65536)
            for reply in replies:
                self.connection.sendall(reply)
            time.sleep(hold)

    return Saying


OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("replies", "said"),
    [
        ([OK + b"\r\n<html>Hello</html>"], "answers GET /v1/models with what is not JSON, '<html>Hello</html>'"),
        ([OK + b"\r\n[1, 2]"], "answers GET /v1/models with JSON that is no object: is this a model server?"),
        ([OK + b'\r\n{"data": 3}'], "names no model under GET /v1/models: is this a model server?"),
        ([OK + b'\r\n{"data": [{"id": 3}, 7]}'], "names no model under GET /v1/models"),
        ([OK + b"\r\n" + b"[" * 100_000], "answers GET /v1/models with what is not JSON"),
        ([b"SSH-2.0-OpenSSH_9.2\r\n"], "with what is not HTTP (SSH-2.0-OpenSSH_9.2); is this the port of a model"),
        ([bytes(range(256))], "with what is not HTTP"),
        ([b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n"], "with what is not HTTP"),
        ([b""], "died while it was to answer GET /v1/models"),
        ([OK + b'Content-Length: 500\r\n\r\n{"data": ['], "ended in the midst of its answer to GET /v1/models"),
        ([OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{"], "died while it was to answer GET /v1/models"),
        ([OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{"], "while it was to answer GET /v1/models"),
        ([OK + b"\r\n" + b" " * 2**22 + b"  "], "answers GET /v1/models with more than 4,194,304 bytes"),
        (
            [b"HTTP/1.1 302 Found\r\nLocation: http://elsewhere.invalid/\r\nContent-Length: 0\r\n\r\n"],
            "redirects GET /v1/models to http://elsewhere.invalid/, which is not followed",
        ),
        ([b"HTTP/1.1 401 No\r\n\r\n{\"error\": \"who?\"}"], "status 401: who?; a key is given by the variable"),
        ([b"HTTP/1.1 503 No\r\n\r\n{\"error\": {\"message\": \"I am\\nloading\"}}"], "failed with status 503 at GET"),
        ([b"HTTP/1.1 500 No\r\n\r\n" + b"trace " * 900], f"{'trace ' * 50}..."),
        ([b"HTTP/1.1 404 No\r\n\r\n"], "refuses GET /v1/models with status 404: no reason given"),
        ([b"HTTP/1.1 404 No\r\n\r\n\n<!DOCTYPE HTML><html>No</html>"], "with status 404: a page of HTML"),
    ],
)  # fmt: skip
def test_what_is_no_model_server_is_one_line(replies, said):
    with serving(handler=says(*replies)) as url:
        assert said in refusal(url)


def test_a_path_without_v1_is_told_of():
    with serving() as url:
        assert refusal(url.removesuffix("/v1")).endswith(f"; is it {url}?")


@pytest.mark.parametrize("replies", [[], [OK], [OK + b"\r\n{"], [OK + b"Content-Length: 9\r\n\r\n{"]])
def test_a_server_that_hangs_is_given_up(replies):
    begin = time.monotonic()
    with serving(handler=says(*replies, hold=0.5)) as url:
        assert "gave no answer to GET /v1/models within 0.2 s" in refusal(url, limit=0.2)
    assert time.monotonic() - begin < 3


def test_a_server_that_sends_a_byte_now_and_then_is_given_up():
    class Dripping(http.server.BaseHTTPRequestHandler):
        def handle(self):
            self.connection.recv(65536)
            for byte in b"HTTP/1.1 200 OK and so on and on and on" * 3:
                self.connection.sendall(bytes([byte]))
                time.sleep(0.05)

    begin = time.monotonic()
    with serving(handler=Dripping) as url:
        assert "gave no answer to GET /v1/models within 0.3 s" in refusal(url, limit=0.3)
    assert time.monotonic() - begin < 3


@pytest.fixture
def secure(tmp_path, monkeypatch):
    """Make a certificate for the loopback; returns its file, and what serves with it."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the program openssl, which makes a certificate")
    key, own = tmp_path / "key.pem", tmp_path / "own.pem"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    words += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(own)]
    subprocess.run(words, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own, key)
    return own, context


def test_https_is_scored_as_http_is_where_the_certificate_is_trusted(secure, monkeypatch):
    own, context = secure
    monkeypatch.setenv("SSL_CERT_FILE", str(own))
    with serving(tls=context) as url:
        assert url.startswith("https://127.0.0.1:")
        server = endpoint(url)
        told = torch.cat([*EndpointScorer(server, server.able()).logits(IDS[0], 4)])
    assert torch.allclose(told, torch.tensor([table(IDS[0, :place].tolist()) for place in range(4, 12)]))


def test_a_certificate_that_nobody_trusts_and_a_server_without_tls_are_told(secure):
    with serving(tls=secure[1]) as url:
        said = refusal(url)
    assert "has a certificate that is not trusted (self" in said
    assert said.endswith("by the variable SSL_CERT_FILE")
    with serving() as url:
        assert "does not speak TLS" in refusal(url.replace("http://", "https://"))


def test_a_certificate_of_another_host_and_tls_that_fails_are_told_without_a_wrong_hint(secure, monkeypatch):
    own, context = secure
    monkeypatch.setenv("SSL_CERT_FILE", str(own))
    with serving(tls=context) as url:
        said = refusal(url.replace("127.0.0.1", "localhost"))
    assert "has a certificate that is not trusted (" in said
    assert "SSL_CERT_FILE" not in said
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("NULL-SHA256@SECLEVEL=0")  # which nobody offers
    with serving(tls=context) as url:
        said = refusal(url)
    assert "is not reached by TLS (" in said
    assert "http://" not in said


class Hanging(Handler):
    def do_GET(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{")
        time.sleep(3)


def test_a_server_that_hangs_behind_tls_is_given_up(secure, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(secure[0]))
    begin = time.monotonic()
    with serving(handler=Hanging, tls=secure[1]) as url:
        assert "gave no answer to GET /v1/models within 0.5 s" in refusal(url, limit=0.5)
    assert time.monotonic() - begin < 10


def test_no_proxy_is_asked_and_a_key_is_sent(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("KNORM_API_KEY", "open")
    scoring = Scoring()
    with serving(scoring) as url:
        assert endpoint(url).model == "small"
    assert scoring.seen[0][1]["Authorization"] == "Bearer open"


def test_the_model_is_one_that_is_served():
    with serving(Scoring(models=["small", "large-7b"])) as url:
        assert refusal(url) == f"{url} serves small, large-7b: name one of them, as {url}#small"
        said = refusal(f"{url}#large")
        assert said == f"{url} does not serve 'large'; it serves small, large-7b; did you mean large-7b?"
        assert endpoint(f"{url}#large-7b").model == "large-7b"
    with serving(Scoring(models=[f"m{number}" for number in range(99)])) as url:
        assert "m7 and 91 more: name one" in refusal(url)


def event(**told):
    return {"choices": [{"text": "a", "logprobs": told or None}]}


def likely(value):
    return event(tokens=["token_id:5"], token_logprobs=[value], top_logprobs=[{"token_id:5": value}])


@pytest.mark.parametrize(
    ("different", "said"),
    [
        ({"changed": lambda _: event()}, "tells no log-probabilities"),
        ({"changed": lambda _: likely(math.nan)}, "tells nan as log-probability of token 5"),
        ({"changed": lambda _: likely(math.inf)}, "tells inf as log-probability of token 5"),
        ({"changed": lambda _: likely(0.7)}, "tells 0.7 as log-probability of token 5"),
        ({"changed": lambda _: likely("much")}, "answers with what is no completion with log-probabilities"),
        ({"changed": lambda _: likely(-(10**400))}, "answers with what is no completion with log-probabilities"),
        ({"changed": lambda _: {"choices": 7}}, "answers with what is no completion with log-probabilities"),
        ({"changed": lambda _: {"choices": []}}, "generated 0 tokens of 1"),
        ({"changed": lambda _: {"error": {"message": "no\nmemory", "code": 500}}}, "at POST /v1/completions: no m"),
        ({"changed": lambda _: [1]}, "with JSON that is no object"),
        ({"name": lambda token: "tom"}, "tells tokens as texts ('tom'), not by their numbers"),
        ({"forced": False, "prompts": False}, "cannot be scored: it takes no tokens to be generated"),
        ({"vocabulary": 4}, "Token id 8 is out of vocabulary"),
    ],
)  # fmt: skip
def test_answers_without_log_probabilities_are_one_line(different, said):
    with serving(Scoring(**different)) as url:
        assert said in refusal(url)


def score(how="loop", tokens=IDS[0]):
    return lambda server: [*EndpointScorer(server, Able(True, True, None, 12), Asked(how)).logits(tokens, 5)]


def after(number, then):
    """Answer as usual until so many events were sent, then otherwise."""
    count = [0]

    def changed(usual):
        count[0] += 1
        return usual if count[0] <= number else then(usual)

    return changed


def told(usual, change):
    """An event with columns of its log-probabilities changed."""
    columns = usual["choices"][0]["logprobs"]
    return {"choices": [{"text": "", "logprobs": {name: change(name, values) for name, values in columns.items()}}]}


def die(_):
    raise ConnectionError


@pytest.mark.parametrize(
    ("then", "said"),
    [
        (die, "while it was to answer POST /v1/completions|ended in the midst of its answer to POST /v1/completions"),
        (lambda _: likely(-1.0), "generated token 5 where it was left one choice, 6"),
        (lambda usual: {"choices": []}, "generated 2 tokens of 7"),
        (lambda usual: told(usual, lambda name, values: [{"token_id:1": -2.0}] if name[:3] == "top" else values),
         "tells of 2 tokens, not of all 12"),
        (lambda usual: told(usual, lambda _, values: 9 * values), "where it was left one choice"),
    ],
)  # fmt: skip
def test_a_server_that_goes_wrong_midway_is_one_line(then, said):
    with serving(Scoring(changed=after(2, then))) as url:
        assert re.search(said, refusal(url, score()))


def test_a_stream_without_end_is_ended(monkeypatch):
    monkeypatch.setattr("knorm.engines.http._MOST_LINE", 1_000_000)

    class Endless(Handler):
        def complete(self, request):
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            while True:
                self.wfile.write(self.server.s.line)

    for line, said in (
        (b": still here\n", "gave no answer to POST /v1/completions within 0.3 s"),
        (b'data: {"choices": []}\n\n', "sends events without tokens"),
        (b"data: " + b"9" * 2**20, "with a line of more than 1,000,000 bytes"),
    ):
        with serving(Scoring(line=line), Endless) as url:
            assert said in refusal(url, score(), limit=0.3 if b":" in line[:1] else 5)


def test_a_stream_that_is_none_is_told_of():
    asked = {"prompt": [1, 2], "logprobs": 1, "echo": True, "max_tokens": 1}
    with serving() as url:
        said = refusal(url, lambda server: [*server.server.stream("/v1/completions", asked)])
    assert "with application/json, not with a stream of events" in said


def test_tokens_and_windows_that_do_not_fit_are_refused_before_anything_is_scored():
    scoring = Scoring(context=12)
    with serving(scoring) as url:
        asked = len(scoring.seen)
        assert "token 12 is not in the vocabulary of" in refusal(url, score(tokens=IDS[0] + 3))
        long = torch.ones(13, dtype=torch.int64)
        said = refusal(url, score(tokens=long))
        assert said.endswith("holds a context of 12: give --window 12 or less")
        assert "windows of 13 tokens" in refusal(url, score("two calls"))  # one more is generated
        assert not [path for path, _ in scoring.seen[asked:] if path == "/v1/completions"]


def test_a_vllm_that_checks_no_prompts_is_not_ended_by_a_token_that_it_does_not_have():
    scoring = Scoring(owner="vllm", unchecked=True, most=4)
    with serving(scoring) as url, pytest.raises(EngineRefused, match="the text has token 90, the tokens are another"):
        endpoint(url).check_vocabulary(None, IDS * 10)
    assert not scoring.ended


def test_ways_refuse_what_cannot_be_compared(embedded):
    with serving(Scoring(forced=False)) as url, serving(Scoring(vocabulary=5)) as small:
        server = endpoint(url)
        with pytest.raises(EngineError, match="vocabulary of 12 tokens, but that of --model has 4,096: they are two"):
            EndpointWays(Windows(IDS), 5, model=embedded[0]).prepare([server])
        with pytest.raises(EngineRefused, match="cannot be forced to decode a text: it takes no tokens"):
            EndpointWays(Windows(IDS), 5, reference=server, how="loop").prepare([server])
        assert EndpointWays(Windows(IDS), 5, reference=server).prepare([server]) == "two calls"
        with pytest.raises(EngineError, match="Token id"):
            EndpointWays(Windows(IDS), 5, reference=endpoint(small)).prepare([server])
        with pytest.raises(
            EngineRefused, match=r"the text has token 90, the tokens are another model's: .* out of voc"
        ):
            EndpointWays(Windows(IDS * 10), 5, reference=server).prepare([server])
        with pytest.raises(ValueError, match="prompt_length=0"):
            EndpointWays(Windows(IDS), 0, reference=server)
    with serving(Scoring(prompts=False)) as url:
        server = endpoint(url)
        with pytest.raises(EngineRefused, match="scores no prompts"):
            EndpointWays(Windows(IDS), 5, reference=server, how="two calls").prepare([server])


# On the command line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give --reference URL, a server of the same model with the full cache, or --model, the same weights"),
        (("--how", "schedule", "--model", "embedded"), "a server has no schedule"),
        (("--plot", "a.png", "--model", "embedded"), "--plot draws losses by bytes of cache"),
        (("--keep-ratio", "0.5"), "--keep-ratio is not for an engine such as http://127.0.0.1:9/v1: its settings are"),
        (("--engine-python", "x"), "--engine-python is not for an engine such as http://127.0.0.1:9/v1"),
        (("vllm:embedded",), "http://127.0.0.1:9/v1 is a server's endpoint, and vllm:embedded is none"),
        (("--model", "embedded"), "nothing answers at http://127.0.0.1:9/v1"),
        (("--reference", "127.0.0.1:8"), "endpoint '127.0.0.1:8' should be http://HOST:PORT/v1"),
    ],
)
def test_wrong_usage_is_one_line(run_knorm, arguments, said):
    code, out, err = run_knorm("ppl", "http://127.0.0.1:9/v1", *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("http://127.0.0.1:9/v1",), "the laws compare a server with the same weights in transformers"),
        (("http://127.0.0.1:9/v1", "--model", "embedded"), "nothing answers at http://127.0.0.1:9/v1"),
        (("http://127.0.0.1:9/v1", "--trait", "rounding=ceil"), "--trait is not for an engine such as http://127.0.0.1"),
        (("http://127.0.0.1:9/v1", "--select", "survive"), "no check is named 'survive'; there are acc"),
        (("mine.py:f", "--model", "embedded"), "there is no Python file"),
        (("knorm.core:compress", "--model", "embedded"), "--model is about a server's endpoint, as http://127.0.0.1:8000"),
        (("knorm.core:compress", "--reference", "x"), "--reference is about a server's endpoint"),
    ],
)  # fmt: skip
def test_wrong_usage_of_check_is_one_line(run_knorm, arguments, said):
    code, out, err = run_knorm("check", *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1


def test_what_takes_no_endpoint_says_so(run_knorm, tmp_path):
    said = "is a server's endpoint, which knorm ppl and knorm check alone take"
    assert said in run_knorm("explain", "http://127.0.0.1:9/v1")[2]
    (tmp_path / "study.toml").write_text(
        'models = ["embedded"]\ntexts = ["narrative"]\n[[methods]]\ntarget = "http://127.0.0.1:9/v1"\n'
    )
    assert said in run_knorm("sweep", "study.toml", "out", "--dry-run")[2]


def test_ppl_without_a_model_prints_a_table_and_writes_the_form(run_knorm):
    letters = {"tokens": lambda text: [ord(character) % 12 for character in text]}
    short = ("--windows", "2", "--window", "24")
    with serving(Scoring(predict=worse, **letters)) as url, serving(Scoring(most=5, **letters)) as other:
        code, out, err = run_knorm("ppl", url, "--reference", other, *short, "--json", "out.json")
    assert (code, err) == (0, ""), err
    assert f"Compared with: {other}#small (made up)" in out
    assert "≥0." in out
    assert "Forced decode: the server generates the text's own tokens" in out
    result = strict_json("out.json")
    assert [row["method"] for row in result["rows"]] == ["full cache, again", f"{url}#small"]
    assert [row["bytes_per_token"] for row in result["rows"]] == [None, None]
    assert [row["kl_at_least"] for row in result["rows"]] == [True, True]
    assert result["engine"]["full"] == f"{other}#small (made up)"
    assert threading.active_count() < 20
