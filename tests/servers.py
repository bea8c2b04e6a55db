"""Servers on the loopback that tests start: one that scores as it should, and whatever else listens on a port."""

from __future__ import annotations

import contextlib
import heapq
import http.server
import json
import math
import threading

FULL = 10**9


def table(tokens, vocabulary=12):
    """Predict the next token of a text by a rule that every token of it matters to."""
    state = 1
    for token in tokens:
        state = (state * 31 + token + 7) % 1009
    weights = [1 + (state * (place + 3)) % 17 for place in range(vocabulary)]
    return [math.log(weight / sum(weights)) for weight in weights]


class Handler(http.server.BaseHTTPRequestHandler):
    """Answer as an OpenAI-compatible server does; `self.server.s` says in what it differs."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, body, status=200, kind="application/json", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        s = self.server.s
        s.seen.append((self.path, dict(self.headers)))
        if self.path == "/v1/models":
            entries = [{"id": name, "owned_by": s.owner, "max_model_len": s.context} for name in s.models]
            self.reply({"object": "list", "data": entries})
        elif self.path == "/metrics" and s.metrics:
            self.reply(s.metrics.encode(), kind="text/plain")
        else:
            self.reply({"detail": "Not Found"}, 404)

    def do_POST(self):
        s = self.server.s
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        s.seen.append((self.path, request))
        if self.path == "/tokenize" and s.tokens is not None:
            self.reply({"tokens": s.tokens(request.get("prompt") or request["content"])})
            return
        if self.path != "/v1/completions":
            self.reply({"detail": "Not Found"}, 404)
            return
        try:
            with s.running():
                self.complete(request)
        except Refusal as refusal:
            self.reply({"error": {"message": str(refusal), "code": 400}}, 400)

    def complete(self, request):
        s, prompt, known = self.server.s, request["prompt"], request["logprobs"]
        if max(request.get("stop_token_ids", [0])) >= s.vocabulary:
            raise Refusal(f"token_id(s) {request['stop_token_ids']} in stop_token_ids contain out-of-vocab token ids")
        if max(prompt) >= s.vocabulary:
            s.ended = s.unchecked
            raise Refusal(f"Token id {max(prompt)} is out of vocabulary")
        if known > s.most or (known == -1 and s.most < FULL):
            raise Refusal(f"Requested sample logprobs of {known}, which is greater than max allowed: {s.most}")
        if request.get("echo"):
            if not s.prompts:
                raise Refusal("echo is not supported")
            rows = [None, *s.told(prompt, 1, False)]
            self.reply({"choices": [self.choice(prompt, rows, known)]})
            return
        forced = request.get("vllm_xargs", {}).get("forced") if s.forced else None
        text = [*prompt, *forced] if forced else s.greedy(prompt, request["max_tokens"])
        rows = s.told(text, len(prompt), True)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        after = text[len(prompt) :]
        rows = [s.after_forcing(row, token) if forced else row for token, row in zip(after, rows, strict=True)]
        for start in range(0, len(after), s.at_once):
            part = slice(start, start + s.at_once)
            event = {"choices": [self.choice(after[part], rows[part], known)]}
            self.wfile.write(f"data: {json.dumps(s.changed(event))}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def choice(self, tokens, rows, known):
        name = self.server.s.name
        top = []
        for token, row in zip(tokens, rows, strict=True):
            if row is None:
                top.append(None)
                continue
            kept = heapq.nlargest(len(row) if known == -1 else known, range(len(row)), row.__getitem__)
            top.append({name(i): row[i] for i in [token, *kept]})
        logprobs = [None if row is None else row[token] for token, row in zip(tokens, rows, strict=True)]
        told = {"tokens": [*map(name, tokens)], "token_logprobs": logprobs, "top_logprobs": top}
        return {"index": 0, "text": "", "logprobs": told}


class LlamaHandler(Handler):
    """Answer as llama.cpp's server does: a token a request, in the cache of a slot."""

    def do_GET(self):
        s = self.server.s
        if self.path == "/v1/models":
            meta = {"n_vocab": s.vocabulary, "n_ctx": s.context}
            self.reply({"data": [{"id": name, "owned_by": "llamacpp", "meta": meta} for name in s.models]})
        elif self.path == "/props":
            self.reply({"total_slots": s.slots, "build_info": "b1"})
        else:
            self.reply({"error": {"code": 404, "message": "File Not Found"}}, 404)

    def complete(self, request):
        s, prompt, known = self.server.s, request["prompt"], request["logprobs"]
        if max(prompt) >= s.vocabulary:
            raise Refusal("Prompt contains invalid tokens")
        assert request["max_tokens"] == 1
        (row,) = s.told([*prompt, 0], len(prompt), True)
        bias = dict(request.get("logit_bias", []))
        token = max(range(len(row)), key=lambda token: row[token] + bias.get(token, 0))
        kept = heapq.nlargest(min(known, s.most), range(len(row)), row.__getitem__)
        top = [{"id": i, "token": "a", "logprob": row[i]} for i in kept]
        content = [{"id": token, "token": "a", "logprob": row[token], "top_logprobs": top}]
        told = None if token in s.incomplete else {"content": content}  # as of a token that ends within a character
        answer = {"choices": [{"text": "a", "logprobs": told}]}
        self.reply(s.changed(answer | {"timings": {"prompt_n": s.read_anew(request)}}))


class Refusal(Exception):
    """Refused, with the reason."""


class Scoring:
    """A server that scores; arguments say in what it is no perfect one."""

    def __init__(self, **different):
        self.models, self.context, self.metrics, self.tokens = ["small"], 64, "", None
        self.vocabulary, self.most, self.forced, self.prompts = 12, FULL, True, True
        self.seen, self.count, self.at_once = [], 0, 1
        self.slots, self.clears, self.caches, self.incomplete = 2, False, {}, ()
        self.predict, self.owner = table, "made up"
        self.unchecked = self.ended = False  # it has no tokenizer: a prompt's token beyond its vocabulary ends it
        vars(self).update(different)

    def name(self, token):
        return f"token_id:{token}"

    def told(self, text, first, decoded):
        """Log-probabilities that predict the tokens of a text from `first` on."""
        return [self.predict(text[:place]) for place in range(first, len(text))]

    def greedy(self, prompt, count):
        text = [*prompt]
        for _ in range(count):
            row = self.predict(text)
            text.append(max(range(len(row)), key=row.__getitem__))
        return text

    def after_forcing(self, row, token):
        return row

    def changed(self, event):
        return event

    def read_anew(self, request):
        """Read a prompt into the cache of a slot; returns how many of its tokens were not there."""
        prompt, slot = request["prompt"], request["id_slot"]
        if self.clears:
            self.caches = {name: cache for name, cache in self.caches.items() if name == slot}
        cache = self.caches.get(slot, []) if request["cache_prompt"] else []
        same = next((place for place, (a, b) in enumerate(zip(cache, prompt, strict=False)) if a != b), len(cache))
        self.caches[slot] = [*prompt]
        return len(prompt) - min(same, len(prompt) - 1)

    @contextlib.contextmanager
    def running(self):
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1


class _Threads(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        pass  # the other side has heard enough


@contextlib.contextmanager
def serving(scoring=None, handler=Handler, tls=None):
    """Serve on a free port while the context is open; yields the endpoint's address."""
    server = _Threads(("127.0.0.1", 0), handler)
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    server.s = scoring or Scoring()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
