"""Programs that show what was refuted of an engine, with the engine's own package alone."""

from __future__ import annotations

from knorm.engines.conditions import EngineTarget, LlamaCpp

_LLAMA_CPP = '''\
# {target}: {law}
# Needs llama-cpp-python and numpy. Arguments: a .gguf file{which}.
import ctypes
import os
import sys

os.environ["LLAMA_ATTN_ROT_DISABLE"] = "{rotation}"
import llama_cpp as L
import numpy as np

IDS = {ids}
PROMPT, BLOCK = 32, 16


@L.llama_log_callback
def quiet(level, text, user):
    if level >= 3:
        print(text.decode(errors="replace"), end="", file=sys.stderr)


L.llama_log_set(quiet, ctypes.c_void_p(0))
parameters = L.llama_model_default_params()
parameters.n_gpu_layers = 0
model = L.llama_model_load_from_file(sys.argv[1].encode(), parameters)
size = L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))


def predictions(type_k, type_v):
    """Log-probabilities of all tokens at each place after the prompt, by forced decode, one token a call."""
    given = L.llama_context_default_params()
    given.n_ctx, given.n_batch, given.n_ubatch = len(IDS), {ubatch}, {ubatch}
    given.n_threads = given.n_threads_batch = {threads}
    given.flash_attn_type, given.type_k, given.type_v = {flash}, type_k, type_v
    context = L.llama_init_from_model(model, given)
    assert context, "refused"
    batch = L.llama_batch_init(len(IDS), 0, 1)

    def feed(start, stop):
        batch.n_tokens = stop - start
        for slot, place in enumerate(range(start, stop)):
            batch.token[slot], batch.pos[slot], batch.n_seq_id[slot] = IDS[place], place, 1
            batch.seq_id[slot][0], batch.logits[slot] = 0, place == stop - 1
        assert L.llama_decode(context, batch) == 0
        logits = np.ctypeslib.as_array(L.llama_get_logits_ith(context, stop - start - 1), shape=(size,)).astype(float)
        return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())

    return np.stack([feed(0, PROMPT), *(feed(place, place + 1) for place in range(PROMPT, len(IDS) - 1))])


full, run = predictions(1, 1), predictions({type_k}, {type_v})  # f16; {names}
kl = (np.exp(full) * (full - run)).sum(1)
for start in range(0, len(kl), BLOCK):
    print(f"tokens {{PROMPT + start}} on: KL from the f16 cache {{kl[start : start + BLOCK].mean():.4f}} nats a token")
'''


_VLLM = '''\
# {target}: {law}
# Needs vllm alone, on a CPU. Argument: a folder with a model{which}.
import os
import sys

os.environ |= {environment}
import torch
from vllm import LLM, SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

IDS = {ids}
PROMPT, BLOCK = 32, 16
SEEN = {{}}


class Forced(LogitsProcessor):
    """Keep the log-probabilities of all tokens at each step, and leave the next token of IDS as the only choice."""

    def __init__(self, vllm_config, device, is_pin_memory):
        self.rows = {{}}

    def is_argmax_invariant(self):
        return False

    def update_state(self, batch_update):
        process_dict_updates(self.rows, batch_update, lambda params, prompt, out: out)

    def apply(self, logits):
        for row, out in self.rows.items():
            SEEN[len(out)] = torch.log_softmax(logits[row].double(), -1)
            logits[row] = float("-inf")
            logits[row, IDS[PROMPT + len(out)]] = 0.0
        return logits


def predictions(kv_cache_dtype):
    SEEN.clear()
    llm = LLM(
        model=sys.argv[1], kv_cache_dtype=kv_cache_dtype, dtype={dtype!r}, block_size={block}, max_model_len=len(IDS),
        max_num_seqs=1, max_num_batched_tokens={batch}, num_gpu_blocks_override=8 * (len(IDS) // {block} + 2),
        enable_prefix_caching=False, async_scheduling=False, enforce_eager=True, skip_tokenizer_init=True,
        logits_processors=[Forced],
    )
    asked = SamplingParams(temperature=0.0, max_tokens=len(IDS) - PROMPT, ignore_eos=True, detokenize=False)
    llm.generate({{"prompt_token_ids": IDS[:PROMPT]}}, asked, use_tqdm=False)
    return torch.stack([SEEN[place] for place in range(len(IDS) - PROMPT)])


full, run = predictions("auto"), predictions({kind!r})
kl = (full.exp() * (full - run)).sum(1)
for start in range(0, len(kl), BLOCK):
    mean = kl[start : start + BLOCK].mean()
    print(f"tokens {{PROMPT + start}} on: KL from the default cache {{mean:.4f}} nats a token")
'''


def program(target: EngineTarget, tokens: list[int], law: str) -> str:
    """Write a program that compares a condition with the full cache, block by block.

    Args:
        target: the condition.
        tokens: of a window.
        law: the name of the check.

    Returns:
        Python that needs the engine's package alone; the model's file or folder is its argument.

    Example:
        >>> from knorm.engines.conditions import engine_target
        >>> "import knorm" in program(engine_target("llama.cpp:embedded"), [1, 2, 3], "survives")
        False
    """
    settings, boxed = target.settings, target.model.startswith("embedded")
    if not isinstance(settings, LlamaCpp):
        return _VLLM.format(
            target=target.spec,
            law=law,
            which=f", as knorm.engines.boxed.write_folder makes of {target.model}" if boxed else f", {target.model}",
            environment=settings.environment(),
            ids=tokens,
            dtype=settings.dtype,
            block=settings.block_size,
            batch=settings.max_num_batched_tokens,
            kind=settings.kv_cache_dtype,
        )
    given = settings.request()
    return _LLAMA_CPP.format(
        target=target.spec,
        law=law,
        which=f", as knorm.engines.boxed.write_gguf makes of {target.model}" if boxed else f", {target.model}",
        rotation="0" if settings.rotate else "1",
        ids=tokens,
        ubatch=settings.n_ubatch,
        threads=settings.n_threads,
        flash=given["flash_attn"],
        type_k=given["type_k"],
        type_v=given["type_v"],
        names=f"{settings.type_k} and {settings.type_v}",
    )
