"""vLLM in a process of its own, on a CPU. Needs vllm and what vllm itself needs.

A logits processor, which vLLM calls for each token that it is to generate, keeps the untouched logits and leaves the
next token of the text as the only choice: a forced decode. A prompt is scored from what the model makes of its tokens
as vLLM reads them in batches: the hidden states are kept, and logits are made of a few at a time, as vLLM makes them of
all where it is asked for a prompt's log-probabilities.
"""

from __future__ import annotations

import contextlib
import gc
import json
import platform
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from knorm.engines.frames import Fields
from knorm.engines.serving import Answer, Part, Refusal, serve

_SPACE = 8  # the cache has so many times the blocks that requests need, so that it is far from its end, as in serving
_ROWS = 16  # of logits that are made at a time: 3 MiB with 49,152 tokens
_MOST_REASON = 400  # characters
_SCORED = "0"  # the request whose logits are kept
_LATER = (
    "vllm.v1.worker.cpu_worker", "vllm.v1.attention.backends.cpu_attn", "vllm.model_executor.models.llama",
    "vllm.v1.core.kv_cache_manager", "vllm.v1.core.sched.scheduler",
)  # fmt: skip
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len")  # of a context, in a config.json

Kept = dict[int, Any]  # logits by the place of the token that they predict, after the prompt


def forced_decode(kept: Kept) -> type:
    """Make the class of the logits processor.

    Args:
        kept: where it puts the logits of the request _SCORED. A prompt that is read in several parts is sampled from
            after each: the last time counts.

    Returns:
        The class, of which vLLM makes one for itself.
    """
    from vllm.v1.sample.logits_processor import LogitsProcessor
    from vllm.v1.sample.logits_processor.builtin import process_dict_updates

    class Forced(LogitsProcessor):
        def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
            self.rows: dict[int, tuple[list[int], str, list[int]]] = {}

        def is_argmax_invariant(self) -> bool:
            return False  # it must run for greedy requests too

        def update_state(self, batch_update: Any) -> None:
            def state(params: Any, _prompt: Any, out: list[int]) -> Any:
                given = params.extra_args or {}
                return (given["forced"], given["key"], out) if "forced" in given else None

            process_dict_updates(self.rows, batch_update, state)

        def apply(self, logits: Any) -> Any:
            for row, (forced, key, out) in self.rows.items():
                place = len(out)
                if place >= len(forced):
                    continue
                if key == _SCORED:
                    kept[place] = logits[row].float().cpu().numpy().copy()
                logits[row].fill_(float("-inf"))
                logits[row, forced[place]] = 0.0
            return logits

    return Forced


def prepare() -> None:
    """Import vLLM, and what it imports itself where it loads a Llama on a CPU; without threads, as a fork needs."""
    gc.disable()  # what is imported stays: looking for garbage in it takes 2 of 7 s
    try:
        from vllm import LLM

        assert LLM
        for name in _LATER:
            with contextlib.suppress(Exception):  # of another version: it is imported where it is needed
                import_module(name)
    finally:
        gc.enable()
        gc.freeze()


class Vllm:
    """Hold a model in vLLM; answer what serving.serve hears."""

    def __init__(self) -> None:
        prepare()
        import vllm
        from vllm import LLM, SamplingParams

        self.library, self.start, self.parameters = vllm, LLM, SamplingParams
        self.kept: Kept = {}
        self.engine: Any = None
        self.asked = 0
        self.states: list[Any] | None = None  # hidden states of a prompt's tokens, while one is scored
        self.compute: Any = None  # makes logits of them

    def __call__(self, request: Fields) -> Iterator[Part]:
        """Answer a request: its field `ask` is open, score or tokenize."""
        answers = {"open": self._open, "score": self._score, "tokenize": self._tokenize}
        return answers[request["ask"]](request)

    def _open(self, request: Fields) -> Iterator[Part]:
        self.folder = Path(request["file"])
        trained = self._trained()
        self.context = min(request["context"], trained)
        block = request["block_size"]
        blocks = _SPACE * (request["sequences"] * -(-self.context // block) + 1)
        try:
            self.engine = self.start(
                model=str(self.folder), dtype=request["dtype"], kv_cache_dtype=request["kv_cache_dtype"],
                block_size=block, max_model_len=self.context, max_num_seqs=request["sequences"],
                max_num_batched_tokens=max(request["batch"], request["sequences"]), num_gpu_blocks_override=blocks,
                enable_prefix_caching=False, async_scheduling=False, enforce_eager=True, skip_tokenizer_init=True,
                disable_log_stats=True, seed=0, logits_processors=[forced_decode(self.kept)],
            )  # fmt: skip
        except Exception as error:  # whatever it raises in place of starting is its reason
            raise Refusal(reason_of(error)) from None
        self.engine.apply_model(self._listen)
        yield {**self._described(), "trained": trained}, b""

    def _trained(self) -> int:
        """Read how long a context the model was trained for: vLLM refuses a longer one in many lines."""
        try:
            settings = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise Refusal(f"{self.folder.name} has no config.json that can be read: {reason_of(error)}") from None
        inner = settings.get("text_config", settings)
        return next((int(inner[name]) for name in _LENGTHS if inner.get(name)), 2**30)

    def _listen(self, model: Any) -> None:
        """Keep the hidden states that the model makes of a prompt's tokens."""

        def heard(_module: Any, _given: Any, states: Any) -> None:
            if self.states is not None:
                self.states.append(states)

        self.compute = model.compute_logits
        model.register_forward_hook(heard)

    def _described(self) -> Fields:
        config = self.engine.llm_engine.vllm_config
        parallel, cache = config.parallel_config, config.cache_config
        (stored,) = self.engine.apply_model(_stored)
        self.vocabulary = config.model_config.get_vocab_size()
        return {
            "version": self.library.__version__,
            "system": f"{platform.machine()}, {_capability()}",
            "vocabulary": self.vocabulary,
            "context": self.context,
            "layers": config.model_config.get_num_layers(parallel),
            "kv_heads": config.model_config.get_num_kv_heads(parallel),
            "bytes_per_token": stored / (cache.num_gpu_blocks * cache.block_size),
            "said": [f"kv_cache_dtype {cache.cache_dtype}, blocks of {cache.block_size}"],
        }

    def _tokenize(self, request: Fields) -> Iterator[Part]:
        if not (self.folder / "tokenizer.json").exists():
            raise Refusal("its folder has no tokenizer.json")
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(self.folder))  # as vLLM does, which was started without
        yield {"tokens": tokenizer.encode(request["text"], add_special_tokens=request["begin"])}, b""

    def _score(self, request: Fields) -> Iterator[Part]:
        """Feed sequences, and give the logits that predict the tokens of the first one after its prompt."""
        if request["cut"]:
            raise Refusal("vLLM cannot take tokens out of its cache by their positions")
        rows, prompt = request["sequences"], request["prompt"]
        self.kept.clear()
        fed = self._in_batches(rows[0], prompt) if request["how"] == "batch" else self._decoded(rows, prompt)
        wanted, frame, done = len(rows[0]) - prompt, request["frame"], 0
        held: list[Any] = []
        for logits in fed:
            held.append(logits)
            if len(held) == frame or done + len(held) == wanted:
                yield {"first": prompt + done, "rows": len(held)}, b"".join(row.tobytes() for row in held)
                done, held = done + len(held), []

    def _add(self, key: str, prompt: Sequence[int], forced: Sequence[int], **more: Any) -> None:
        self.asked += 1
        parameters = self.parameters(
            temperature=0.0, max_tokens=len(forced), ignore_eos=True, detokenize=False,
            extra_args={"forced": list(forced), "key": key}, **more,
        )  # fmt: skip
        self.engine.llm_engine.add_request(f"{key}-{self.asked}", {"prompt_token_ids": list(prompt)}, parameters)

    def _decoded(self, rows: Sequence[Sequence[int]], prompt: int) -> Iterator[Any]:
        """Read the prompts in batches, then let vLLM generate the true tokens, each predicted before it is chosen."""
        for key, row in enumerate(rows):
            self._add(str(key), row[:prompt], row[prompt:])
        wanted, given = len(rows[0]) - prompt, 0
        while self.engine.llm_engine.has_unfinished_requests():
            for output in self.engine.llm_engine.step():
                if not output.request_id.startswith(f"{_SCORED}-"):
                    continue
                tokens = list(output.outputs[0].token_ids)
                if tokens != list(rows[0][prompt : prompt + len(tokens)]):
                    raise Refusal(f"vLLM chose token {tokens[-1]} where it was left one choice")
                while given < len(tokens):
                    yield self.kept.pop(given)
                    given += 1
        if given != wanted:
            raise Refusal(f"vLLM generated {given} tokens of {wanted}")

    def _in_batches(self, row: Sequence[int], prompt: int) -> Iterator[Any]:
        """Let vLLM read all tokens but the last as a prompt: none is decoded, and what it says next is not used."""
        import torch

        self._add(_SCORED, row[:-1], row[-1:])
        place = 1  # of the token that the next state predicts
        self.states = []
        try:
            while self.engine.llm_engine.has_unfinished_requests():
                self.engine.llm_engine.step()
                for states in self.states:
                    wanted = states[max(0, prompt - place) :]
                    place += len(states)
                    for part in wanted.split(_ROWS):
                        with torch.inference_mode():
                            logits = self.compute(part).float().cpu().numpy()
                        yield from logits
                self.states.clear()
        finally:
            self.states = None
        if place != len(row):
            raise Refusal(f"vLLM read {place - 1} tokens of a prompt of {len(row) - 1}")


def _stored(model: Any) -> int:
    """Add up the bytes of the cache of all layers."""
    caches = [layer.kv_cache for layer in model.modules() if getattr(layer, "kv_cache", None) is not None]
    parts = [part for cache in caches for part in (cache if isinstance(cache, list | tuple) else [cache])]
    return sum(int(part.nbytes) for part in parts)


def _capability() -> str:
    import torch

    return str(torch.backends.cpu.get_cpu_capability())


def reason_of(error: BaseException) -> str:
    """Say in a line why vLLM raises `error`: what is wrong with a value, where that is checked, else its message."""
    errors = getattr(error, "errors", None)
    if callable(errors):
        said = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in errors())
    else:
        said = str(error)
    return (" ".join(said.split()) or type(error).__name__)[:_MOST_REASON]


def main() -> None:
    """Serve vLLM until stdin ends."""

    def begin() -> Answer:
        return Vllm()

    serve(begin)
