"""A server asked over HTTP: one connection a request, limited in time and size; whatever it does instead is one line.

No proxy is asked and no redirect is followed: what is scored goes to the host that was named, and nowhere else.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from knorm.engines.process import EngineError, EngineLost, EngineRefused

KEY = "KNORM_API_KEY"  # an environment variable: sent as a bearer token, where a server asks for one
MOST_ANSWER, MOST_SMALL = 2**28, 2**22  # bytes of an answer with logits, and of any other
_MOST_LINE = MOST_ANSWER  # a server that is behind sends many tokens in a line
_MOST_REASON, _MOST_WORDS = 2**16, 300  # bytes of a refusal that are read, and characters of it that are shown
_PIECE = 2**20
_NOBODY_TRUSTS = (18, 19, 20, 21)  # OpenSSL's codes: who signed a certificate is not known
Fields = dict[str, Any]


@dataclass(frozen=True)
class Address:
    """Name a server's endpoint, and one of the models that it serves.

    Attributes:
        url: without the model, as http://127.0.0.1:8000/v1.
        secure: https.
        host: name or number.
        port: of it.
        path: before /completions.
        model: as the server calls it; empty for the one that it serves.
    """

    url: str
    secure: bool
    host: str
    port: int
    path: str
    model: str = ""

    @property
    def root(self) -> str:
        """Return the path before /v1, where servers tell of themselves."""
        return self.path.removesuffix("/v1")

    @property
    def spec(self) -> str:
        """Return the endpoint with its model, as it is written."""
        return f"{self.url}#{self.model}" if self.model else self.url


def read_address(text: str) -> Address:
    """Read an endpoint; nothing is asked.

    Args:
        text: as http://127.0.0.1:8000/v1#model; the model may be left out.

    Returns:
        Its parts.

    Raises:
        ValueError: another form, in one line.

    Example:
        >>> read_address("http://127.0.0.1:8000/v1#small").port
        8000
    """
    should = f"endpoint {text!r} should be http://HOST:PORT/v1 or http://HOST:PORT/v1#MODEL"
    if not text.isprintable() or " " in text:
        raise ValueError(should)
    if "(" in text.partition("#")[0]:
        raise ValueError(f"{should}: it has no settings, which are the server's own")
    try:
        parts = urlsplit(text)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
        host = (parts.hostname or "").encode("idna").decode()
    except ValueError as error:
        raise ValueError(f"{should}: {error}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError(should)
    if parts.username is not None or parts.query:
        raise ValueError(f"{should}; a key is given by the variable {KEY}")
    path = parts.path.rstrip("/")
    if not path.isascii():
        raise ValueError(should)
    url = f"{parts.scheme}://{parts.netloc}{path}"
    return Address(url, parts.scheme == "https", host, port, path, unquote(parts.fragment))


@dataclass(eq=False)
class _Watch:
    """End a connection when its time is over, whatever it is waiting for.

    A time limit of a socket begins anew with each byte; this one does not.
    """

    sock: socket.socket
    limit: float
    expired: bool = False
    _end: float = 0.0
    _done: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.again()
        threading.Thread(target=self._run, daemon=True).start()

    def again(self) -> None:
        """Begin the time anew."""
        self._end = time.monotonic() + self.limit

    def _run(self) -> None:
        while (left := self._end - time.monotonic()) > 0:
            if self._done.wait(left):
                return
        self.expired = True
        self.cut()

    def cut(self) -> None:
        """End what is waiting for the connection."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Stop watching."""
        self._done.set()


class Server:
    """Ask a server; each request has a connection of its own.

    Args:
        address: of the endpoint.
        limit: seconds for an answer; of a stream, for each token.
        pairs: makes of the pairs of an object of JSON what stands for it.
    """

    def __init__(self, address: Address, limit: float, pairs: Callable[[list[tuple[str, Any]]], Any] = dict) -> None:
        self.address, self.limit, self.pairs = address, limit, pairs
        self._open: set[_Watch] = set()

    def get(self, path: str, most: int = MOST_SMALL) -> Any:
        """Return what is at a `path` of the server, of `most` bytes, as JSON. Raises what ask raises."""
        return self._json(self.read("GET", path, most=most), f"GET {path}")

    def ask(self, path: str, fields: Fields, most: int = MOST_SMALL) -> Any:
        """Post a request, and return the answer as JSON.

        Args:
            path: of the server.
            fields: of the request.
            most: bytes of an answer.

        Returns:
            An object of JSON.

        Raises:
            EngineRefused: the server says no, with its reason.
            EngineLost: it is not there, dies, hangs, or sends something else.
        """
        return self._json(self.read("POST", path, fields, most), f"POST {path}")

    def read(self, method: str, path: str, fields: Fields | None = None, most: int = MOST_SMALL) -> bytes:
        """Send a request, and return the body of the answer.

        Args:
            method: GET or POST.
            path: of the server.
            fields: of the request; None for none.
            most: bytes of an answer.

        Returns:
            The body.

        Raises:
            EngineRefused: the server says no, with its reason.
            EngineLost: it is not there, dies, hangs, or sends too much.
        """
        with self._answer(method, path, fields) as (answer, watch):
            data, told = bytearray(), answer.length
            while piece := answer.read1(_PIECE):
                data += piece
                if len(data) > most:
                    raise EngineLost(f"{self._name} answers {method} {path} with more than {most:,} bytes")
            if told is not None and len(data) < told and not watch.expired:
                raise EngineLost(f"{self._name} ended in the midst of its answer to {method} {path}")
            return bytes(data)

    def stream(self, path: str, fields: Fields) -> Iterator[Any]:
        """Post a request, and generate the events of the answer as they come.

        Args:
            path: of the server.
            fields: of the request.

        Yields:
            An object of JSON for each event.

        Raises:
            EngineRefused: the server says no, with its reason.
            EngineLost: it is not there, dies, hangs, or sends something else.
        """
        what = f"POST {path}"
        with self._answer("POST", path, fields) as (answer, watch):
            kind = answer.headers.get_content_type()
            if kind != "text/event-stream":
                raise EngineLost(f"{self._name} answers {what} with {kind}, not with a stream of events")
            while line := answer.readline(_MOST_LINE + 1):
                if len(line) > _MOST_LINE:
                    raise EngineLost(f"{self._name} answers {what} with a line of more than {_MOST_LINE:,} bytes")
                if not line.startswith(b"data:"):
                    continue  # a comment, which no time is given for
                if line[5:].strip() == b"[DONE]":
                    return
                yield self._json(line[5:], what)
                watch.again()
            if watch.expired:
                raise OSError  # said below
            raise EngineLost(f"{self._name} ended in the midst of its answer to {what}")

    @property
    def _name(self) -> str:
        return self.address.url

    @contextlib.contextmanager
    def _answer(
        self, method: str, path: str, fields: Fields | None
    ) -> Iterator[tuple[http.client.HTTPResponse, _Watch]]:
        a = self.address
        make: Any = http.client.HTTPSConnection if a.secure else http.client.HTTPConnection
        connection, watch, begin = make(a.host, a.port, timeout=self.limit), None, time.monotonic()
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        try:
            connection.connect()
            watch = _Watch(connection.sock, self.limit)
            self._open.add(watch)
            body = None if fields is None else json.dumps(fields).encode()
            connection.request(method, path or "/", body, headers)
            answer = connection.getresponse()
            self._refuse(method, path, answer)
            yield answer, watch
            if watch.expired:
                raise OSError  # what came may be cut short
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, EngineError):
                raise
            late = (watch and watch.expired) or time.monotonic() - begin >= self.limit
            raise EngineLost(self._why(error, f"{method} {path}", bool(late), watch is not None)) from None
        finally:
            if watch:
                watch.close()
                self._open.discard(watch)
            connection.close()

    def _why(self, error: Exception, what: str, late: bool, connected: bool) -> str:
        said = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        if late:
            return f"{self._name} gave no answer to {what} within {self.limit:g} s"
        if isinstance(error, ssl.SSLError):
            return f"{self._name} {_why_no_tls(error, _short(said))}"
        if not connected:
            return f"nothing answers at {self._name}: {_short(said)}; is the server started, and is this its port?"
        if isinstance(error, http.client.RemoteDisconnected | http.client.IncompleteRead | ConnectionError):
            return f"{self._name} died while it was to answer {what}: it closed the connection"
        return (
            f"{self._name} answers {what} with what is not HTTP ({_short(said)}); is this the port of a model server?"
        )

    def _refuse(self, method: str, path: str, answer: http.client.HTTPResponse) -> None:
        status, what = answer.status, f"{method} {path}"
        if status == 200:
            return
        if 300 <= status < 400:
            to = _short(answer.headers.get("Location", "nowhere"))
            raise EngineRefused(
                f"{self._name} redirects {what} to {to}, which is not followed: give that endpoint itself"
            )
        said = reason_in(answer.read1(_MOST_REASON))
        if status in (401, 403):
            said += f"; a key is given by the variable {KEY}"
        if status >= 500:
            raise EngineLost(f"{self._name} failed with status {status} at {what}: {said}")
        raise EngineRefused(f"{self._name} refuses {what} with status {status}: {said}")

    def _json(self, data: bytes, what: str) -> Any:
        try:
            read = json.loads(data, object_pairs_hook=self.pairs)
        except (ValueError, RecursionError):
            begin = _short(data[:80].decode("utf-8", "replace")) or "nothing"
            raise EngineLost(
                f"{self._name} answers {what} with what is not JSON, {begin!r}: is this the port of a model server?"
            ) from None
        if not isinstance(read, dict):
            raise EngineLost(f"{self._name} answers {what} with JSON that is no object: is this a model server?")
        if "error" in read and "choices" not in read:
            self._refuse_event(read["error"], what, reason_in(data))
        return read

    def _refuse_event(self, error: Any, what: str, said: str) -> None:
        code = error.get("code") if isinstance(error, dict) else None
        if isinstance(code, int) and 400 <= code < 500:
            raise EngineRefused(f"{self._name} refuses {what} with status {code}: {said}")
        raise EngineLost(f"{self._name} fails at {what}: {said}")

    def close(self) -> None:
        """End what is still being answered."""
        for watch in [*self._open]:
            watch.cut()


def _why_no_tls(error: ssl.SSLError, said: str) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        hint = ": name the file of whoever signed it by the variable SSL_CERT_FILE"
        unknown = error.verify_code in _NOBODY_TRUSTS
        return f"has a certificate that is not trusted ({_short(error.verify_message)}){hint if unknown else ''}"
    if error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
        return f"does not speak TLS ({said}): is it http:// in place of https://?"
    return f"is not reached by TLS ({said})"


def _short(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= _MOST_WORDS else f"{words[:_MOST_WORDS]}..."


def reason_in(data: bytes) -> str:
    """Find the words in a refusal's body: a message as servers send it, else the beginning of what it holds.

    Args:
        data: the body.

    Returns:
        One line of a few hundred characters.

    Example:
        >>> reason_in(b'{"error": {"message": "no such model"}}')
        'no such model'
    """
    text = data.decode("utf-8", "replace")
    if text.lstrip().startswith("<"):
        return "a page of HTML"
    with contextlib.suppress(ValueError, RecursionError):
        said = json.loads(text)
        for name in ("error", "detail", "message"):
            if isinstance(said, dict) and name in said:
                said = said[name]
        text = said if isinstance(said, str) else json.dumps(said)
    return _short(text) or "no reason given"
