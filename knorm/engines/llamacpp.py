"""llama.cpp in a process of its own, through llama-cpp-python's C API. Needs numpy and llama_cpp, and no PyTorch."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from knorm.engines.frames import Fields
from knorm.engines.serving import Answer, Part, Refusal, serve

CHUNK = 64  # tokens with logits in a batch: as many as keep its kernels those of a large one
_MOST_LOGITS = 24 * 2**20  # bytes of a batch's logits
_WARNING, _ERROR, _CONTINUED = 3, 4, 5  # levels of the log
_MOST_REASON = 400  # characters


class Log:
    """Pass the log of the engine's `library` on to stderr, and remember warnings and errors since the request began."""

    def __init__(self, library: Any) -> None:
        self.lines: list[tuple[int, str]] = []
        self._callback = library.llama_log_callback(self._add)  # it must live as long as the library
        library.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _add(self, level: int, text: bytes, _user: Any) -> None:
        line = text.decode("utf-8", "replace")
        sys.stderr.write(line)
        sys.stderr.flush()
        if level == _CONTINUED and self.lines:
            self.lines[-1] = (self.lines[-1][0], self.lines[-1][1] + line)
        else:
            self.lines.append((level, line))

    def reason(self) -> str:
        """Return what the log says of a failure: its errors, else its warnings, else its last line."""
        for level in (_ERROR, _WARNING, 0):
            said = [" ".join(text.split()) for kind, text in self.lines if kind == level or not level]
            said = [*dict.fromkeys(line for line in said if line)][-4 if level else -1 :]
            if said:
                return "; ".join(said)[:_MOST_REASON]
        return "its log says nothing"


class LlamaCpp:
    """Hold a model and one context of llama.cpp; answer what serving.serve hears."""

    def __init__(self) -> None:
        import llama_cpp
        import numpy
        from llama_cpp import _ggml

        self.library, self.numpy = llama_cpp, numpy
        self.row_size = _ggml.libggml.ggml_row_size  # bytes of so many numbers of a type
        self.row_size.argtypes, self.row_size.restype = (ctypes.c_int, ctypes.c_int64), ctypes.c_size_t
        self.log = Log(llama_cpp)
        llama_cpp.llama_backend_init()
        self.model: Any = None
        self.context: Any = None
        self.batch: Any = None

    def __call__(self, request: Fields) -> Iterator[Part]:
        """Answer a request: its field `ask` is open, score or tokenize."""
        self.log.lines.clear()
        answers = {"open": self._open, "score": self._score, "tokenize": self._tokenize}
        return answers[request["ask"]](request)

    def _open(self, request: Fields) -> Iterator[Part]:
        lib = self.library
        parameters = lib.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.model = lib.llama_model_load_from_file(request["file"].encode(), parameters)
        if not self.model:
            raise Refusal(self.log.reason())
        self.log.lines.clear()
        given = lib.llama_context_default_params()
        given.n_ctx, given.n_seq_max = request["context"] * request["sequences"], request["sequences"]
        given.n_batch = given.n_ubatch = request["ubatch"]
        given.n_threads = given.n_threads_batch = request["threads"]
        given.flash_attn_type = request["flash_attn"]
        given.type_k, given.type_v = request["type_k"], request["type_v"]
        self.context = lib.llama_init_from_model(self.model, given)
        if not self.context:
            raise Refusal(self.log.reason())
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.memory = lib.llama_get_memory(self.context)
        self.ubatch = request["ubatch"]
        self.batch = lib.llama_batch_init(max(self.ubatch, request["sequences"]), 0, 1)
        yield self._described(request), b""

    def _described(self, request: Fields) -> Fields:
        lib = self.library
        architecture = self._setting("general.architecture")
        width = lib.llama_model_n_embd(self.model) // lib.llama_model_n_head(self.model)
        heads, layers = lib.llama_model_n_head_kv(self.model), lib.llama_model_n_layer(self.model)
        sizes = {
            "type_k": int(self._setting(f"{architecture}.attention.key_length") or width),
            "type_v": int(self._setting(f"{architecture}.attention.value_length") or width),
        }
        stored = [layers * self.row_size(request[name], heads * size) for name, size in sizes.items()]
        said = [" ".join(text.split()) for _, text in self.log.lines]
        return {
            "version": lib.__version__,
            "system": lib.llama_print_system_info().decode("utf-8", "replace"),
            "vocabulary": self.vocabulary,
            "trained": lib.llama_model_n_ctx_train(self.model),
            "context": lib.llama_n_ctx(self.context),
            "layers": layers,
            "kv_heads": heads,
            "bytes_per_token": sum(stored),
            "said": [line for line in said if "), K (" in line or "Flash Attention" in line or "output buffer" in line],
        }

    def _setting(self, key: str) -> str:
        buffer = ctypes.create_string_buffer(256)
        length = self.library.llama_model_meta_val_str(self.model, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if length >= 0 else ""

    def _tokenize(self, request: Fields) -> Iterator[Part]:
        lib, text = self.library, request["text"].encode()
        vocabulary = lib.llama_model_get_vocab(self.model)
        if lib.llama_vocab_type(vocabulary) == 0:
            raise Refusal("its file has no tokenizer")
        buffer = (lib.llama_token * (len(text) + 8))()
        count = lib.llama_tokenize(vocabulary, text, len(text), buffer, len(buffer), request["begin"], False)
        if count < 0:
            raise Refusal(self.log.reason())
        yield {"tokens": list(buffer[:count])}, b""

    def _score(self, request: Fields) -> Iterator[Part]:
        """Feed sequences, and give the logits that predict the tokens of the first one after its prompt."""
        rows, prompt = request["sequences"], request["prompt"]
        self.library.llama_memory_clear(self.memory, True)
        fed = self._in_batches(rows, prompt) if request["how"] == "batch" else self._decoded(rows, prompt, request)
        wanted, frame, done = len(rows[0]) - prompt, request["frame"], 0
        buffer = self.numpy.empty((frame, self.vocabulary), self.numpy.float32)
        held = 0
        for logits in fed:
            buffer[held] = logits
            held += 1
            if held == frame or done + held == wanted:
                yield {"first": prompt + done, "rows": held}, buffer[:held].tobytes()
                done, held = done + held, 0

    def _in_batches(self, rows: Sequence[Sequence[int]], prompt: int) -> Iterator[Any]:
        """Feed whole sequences in batches; logits begin with those after the prompt's last token.

        A batch in which logits are asked for is cut to CHUNK tokens, whose kernels are those of a large batch: the
        numbers are the same to the bit, and take a fraction of the memory.
        """
        length, first = len(rows[0]), prompt - 1
        size = min(self.ubatch, CHUNK)
        while size > 1 and size * self.vocabulary * 4 > _MOST_LOGITS:
            size //= 2
        at = first // size * size
        for start in range(0, at, self.ubatch):
            self._feed(rows, start, min(start + self.ubatch, at), shift=0, first=length)
        for start in range(at, length, size):
            stop = min(start + size, length)
            self._feed(rows, start, stop, shift=0, first=first)
            for place in range(max(start, first), min(stop, length - 1)):
                yield self._logits(place - start)

    def _decoded(self, rows: Sequence[Sequence[int]], prompt: int, request: Fields) -> Iterator[Any]:
        """Read the prompt in batches, then feed the true tokens one a call, each predicted before it is fed."""
        length = len(rows[0])
        for start in range(0, prompt, self.ubatch):
            stop = min(start + self.ubatch, prompt)
            self._feed(rows, start, stop, shift=0, first=prompt - 1)
        yield self._logits(stop - start - 1)
        shift = 0
        for first, last in request.get("cut", ()):  # from the last one on, so that positions stay what they say
            if not self.library.llama_memory_seq_rm(self.memory, 0, first, last):
                raise Refusal(f"llama_memory_seq_rm refuses positions {first} to {last - 1}")
            if request["renumber"]:
                self.library.llama_memory_seq_add(self.memory, 0, last, -1, first - last)
                shift += last - first
        for place in range(prompt, length - 1):
            self._step(rows, place, shift)
            yield self._logits(0)

    def _feed(self, rows: Sequence[Sequence[int]], start: int, stop: int, *, shift: int, first: int) -> None:
        """Decode tokens of each sequence in turn, the first one last; logits are asked of it alone, from `first` on."""
        for sequence in range(len(rows) - 1, -1, -1):
            for slot, place in enumerate(range(start, stop)):
                self._put(slot, rows[sequence][place], place - shift, sequence, not sequence and place >= first)
            self._decode(stop - start)

    def _step(self, rows: Sequence[Sequence[int]], place: int, shift: int) -> None:
        """Decode one token of each sequence in one call."""
        for sequence, row in enumerate(rows):
            self._put(sequence, row[place], place - shift, sequence, not sequence)
        self._decode(len(rows))

    def _put(self, slot: int, token: int, position: int, sequence: int, wanted: bool) -> None:
        batch = self.batch
        batch.token[slot], batch.pos[slot], batch.n_seq_id[slot] = token, position, 1
        batch.seq_id[slot][0], batch.logits[slot] = sequence, wanted

    def _decode(self, count: int) -> None:
        self.batch.n_tokens = count
        code = self.library.llama_decode(self.context, self.batch)
        if code:
            raise Refusal(f"llama_decode returned {code}: {self.log.reason()}")

    def _logits(self, slot: int) -> Any:
        pointer = self.library.llama_get_logits_ith(self.context, slot)
        return self.numpy.ctypeslib.as_array(pointer, shape=(self.vocabulary,))


def main() -> None:
    """Serve llama.cpp until stdin ends."""

    def begin() -> Answer:
        return LlamaCpp()

    serve(begin)
