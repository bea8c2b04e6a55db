"""Programs that show what a law found of a cache or a press, with torch, transformers and the target alone.

The parts are kept as text, since they are what a reader of the counterexample runs: a small model as laws.probe and
laws.model build it, what the witness writes down, and the calls of the run. The check that was refuted adds the lines
that print what is wrong, Subject.shows.
"""

from __future__ import annotations

from textwrap import indent
from typing import Any

from knorm.laws.model import CONFIG
from knorm.laws.probe import FAMILIES, HEADS, SIZES
from knorm.laws.reading import Reading
from knorm.laws.standins import written
from knorm.laws.strategies import Text
from knorm.laws.subjects import Subject
from knorm.methods.presses import acts_while_decoding, lends_tokenizer, reads_delimiter, renumbers, setting
from knorm.model_attention import cache_keyword

_MODEL = """\
config = AutoConfig.for_model(FAMILY, **SIZES)
model = AutoModelForCausalLM.from_config(config, dtype=DTYPE, attn_implementation=ATTENTION).eval()
drawn = torch.Generator().manual_seed(0)
torch.set_grad_enabled(False)
for weight in model.parameters():
    spread = torch.randn(weight.shape, generator=drawn, dtype=DTYPE)
    weight.copy_(SPREAD * spread if weight.ndim == 2 else weight + BIAS * spread)
"""
_FEED = """\
def feed(cache, ids, sizes, **given):
    \"\"\"Some tokens a call; positions are left to the model unless they are given.\"\"\"
    logits, start = [], 0
    for size in sizes:
        stop = min(start + size, ids.shape[1])
        now = {name: x[:, start:stop] if name == "position_ids" else x[:, :stop] for name, x in given.items()}
        logits.append(model(ids[:, start:stop], use_cache=True, CACHE=cache, **now).logits)
        start = stop
    return torch.cat(logits, 1)


def calls(prompt, length, chunk):
    return [prompt] + [chunk] * -(-(length - prompt) // chunk)


def made(ids, keep_ratio=KEEP_RATIO):
    return opened(keep_ratio, 64, len(ids))


def prompted():
    cache = made(ids)
    feed(cache, ids[:, :prompt], [prompt])
    return cache


def resume(cache, rows=slice(None)):
    rest = ids[rows, prompt:]
    return feed(cache, rest, calls(chunk, rest.shape[1], chunk), position_ids=places[rows, prompt:])


sizes = calls(prompt, ids.shape[1], chunk)
places = torch.arange(ids.shape[1]).expand(ids.shape)
"""
_NOTES = """\
# The model's own attention writes down what it is given, under all that a package puts over it.
looks, call, start, fed = {}, 0, None, None


def noting(attention):
    def noted(module, query, key, value, mask, *more, **named):
        result = attention(module, query, key, value, mask, *more, **named)
        if start is not None:
            looks[call, module.layer_idx] = look(module, query, key, value, mask)
        return result

    return noted


functions["sdpa"] = noting(functions["sdpa"])
modeling = importlib.import_module(f"transformers.models.{FAMILY}.modeling_{FAMILY}")
modeling.eager_attention_forward = noting(modeling.eager_attention_forward)
"""
_TAGS = """\
# A value is 64 channels of +1 and -1 that say whose it is: position, its complement, row, head, layer, and a constant.
WIDTHS = [16, 16, 8, 8, 8, 8]


def tags(rows, layer, places):
    row, head = torch.arange(rows)[:, None, None], torch.arange(HEADS)[:, None]
    parts = torch.broadcast_tensors(places, 65535 - places, row, head, torch.tensor(layer), torch.tensor(85))
    bits = [part[..., None] >> torch.arange(width) & 1 for part, width in zip(parts, WIDTHS)]
    return torch.cat(bits, -1).float() * 2 - 1


def named(value):
    parts = (value > 0).long().split(WIDTHS, -1)
    return [(part << torch.arange(width)).sum(-1) for part, width in zip(parts, WIDTHS)]


def look(module, query, key, value, mask):
    \"\"\"Return the token in each slot, and which slots each query sees: [rows, heads, groups, queries, slots].\"\"\"
    layer, rows, heads, queries, slots = module.layer_idx, *query.shape[:3], key.shape[2]
    seen = torch.ones(queries, slots, dtype=torch.bool)
    if mask is None:
        seen = seen if ATTENTION == "eager" or queries == 1 else seen.tril()
    else:
        seen = mask[..., :slots] if mask.dtype == torch.bool else mask[..., :slots] > -1e4
    seen = seen.expand(rows, heads, queries, slots).reshape(rows, HEADS, -1, queries, slots)
    place, inverse, row, head, own, fill = named(value)
    tokens = torch.where(place < 16384, place, -3)  # -3: of a call that the method made by itself
    home = (row == torch.arange(rows)[:, None, None]) & (head == torch.arange(HEADS)[:, None]) & (own == layer)
    sound = (place + inverse == 65535) & (fill == 85) & (value.abs().amin(-1) > 0.5 * value.abs().amax(-1))
    tokens[sound & ~home], tokens[~sound], tokens[(value == 0).all(-1)] = -4, -2, -1  # astray, no token's, empty
    if not REAL:  # a key that the method made itself is seen where its weight is a number
        key, query = key.float(), query.float()
        own = given[layer].gather(2, (tokens.clamp(min=0) % LENGTH)[..., None].expand_as(key))
        other = torch.nn.functional.cosine_similarity(key, own, dim=-1) < 0.5
        scores = query.reshape(rows, HEADS, -1, queries, 64) @ key[:, :, None].mT / 8
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
        seen = seen & ~(other[:, :, None, None] & (weights < torch.finfo(torch.float32).tiny))
    elif slots > queries and getattr(module, "masked_key_indices", None) is not None:  # where kvpress puts such a key
        row, head, slot = module.masked_key_indices
        seen = seen.clone()
        seen[row, head, :, :, slot] = False
    return tokens, seen, key, value


def sees(run, call, layer, row, head, query, group=0):
    tokens, seen, *_ = run[call, layer]
    return tokens[row, head][seen[row, head, group, query]].tolist()
"""
_HOOKS = """\
def positions(count):
    \"\"\"Of the tokens that are projected: those of the call, or of one that the method makes by itself.\"\"\"
    global fed
    if start is None:
        return 16384 + torch.arange(count) % 16384
    fed = fed or count
    return start + fed - count + torch.arange(count)


def values_for(layer, states):
    values = tags(len(states), layer, positions(states.shape[1]))
    if MADE_IN != torch.float32:  # no channel is constant
        values *= 0.8 + 0.4 * torch.rand(values.shape, generator=torch.Generator().manual_seed(layer + states.shape[1]))
    return values.transpose(1, 2)


def keys_for(layer, states):
    rows = torch.arange(len(states)) % ROWS
    return keys[layer][rows][:, :, positions(states.shape[1]) % LENGTH].transpose(1, 2)
"""
_SEPARATE = """\
def replaced_by(states, layer):
    return lambda module, inputs, out: states(layer, out).reshape(out.shape).to(out)


layers = [layer.self_attn for layer in model.model.layers]
for layer, module in enumerate(layers):
    module.v_proj.register_forward_hook(replaced_by(values_for, layer))
    if not REAL:
        module.k_proj.register_forward_hook(replaced_by(keys_for, layer))
"""
_FUSED = """\
def fused(layer, states):
    query, key, value = states.view(*states.shape[:2], HEADS, 3 * 64).split(64, -1)
    key = key if REAL else keys_for(layer, states)
    return torch.cat([query, key, values_for(layer, states)], -1).reshape(states.shape).to(states)


layers = [layer.attention for layer in model.gpt_neox.layers]
for layer, module in enumerate(layers):
    module.query_key_value.register_forward_hook(lambda _, __, out, layer=layer: fused(layer, out))
"""
_DRAW = """\
model = model.to(MADE_IN)
if not REAL:
    model.base_model.rotary_emb.inv_freq.zero_()  # drawn keys stay as they are drawn


def tokens(seed):
    return torch.randint(1, 127, (ROWS, PROMPT + sum(CALLS)), generator=torch.Generator().manual_seed(seed))


def draw(seed):
    return torch.randn(2, ROWS, HEADS, LENGTH, 64, generator=torch.Generator().manual_seed(seed)) * SCALE


def begin(row):
    \"\"\"Draw tokens and keys; all rows but one anew where that is given.\"\"\"
    global looks, ids, keys, given
    looks, ids, keys = {}, tokens(SEED), draw(SEED + 1)
    if row is not None:
        other, others = tokens(SEED + 1), draw(SEED + 2)
        other[row], others[:, row] = ids[row], keys[:, row]
        ids, keys = other, others
    norms = [getattr(module, "k_norm", None) or (lambda x: x) for module in layers]
    given = torch.stack([norm(x) for norm, x in zip(norms, keys)])
    torch.manual_seed(SEED)


def feed(cache, number, first, given, **more):
    global call, start, fed
    call, start, fed = number, first, None
    logits = model(input_ids=given, use_cache=True, CACHE=cache, **more).logits
    start = None
    return logits
"""
_READ_CACHE = """\
def read(row=None):
    begin(row)
    cache = opened(KEEP_RATIO, LENGTH - 7, ROWS)
    places, first = torch.arange(LENGTH).expand(ROWS, -1), PROMPT
    logits = [feed(cache, 0, 0, ids[:, :PROMPT], position_ids=places[:, :PROMPT])[:, -1:]]
    for number, size in enumerate(CALLS, 1):
        more = {} if RENUMBERS else {"position_ids": places[:, first : first + size]}
        logits.append(feed(cache, number, first, ids[:, first : first + size], **more))
        first += size
    return looks, torch.cat(logits, 1), cache
"""
_READ_PRESS = """\
def read(row=None):
    global own
    begin(row)
    own, cache, first = copy.deepcopy(press), DynamicCache(), PROMPT
PREPARED
    with own(model) if PREFILL else contextlib.nullcontext():
        logits = [feed(cache, 0, 0, QUESTION)[:, -1:]]
    shift = cache.get_seq_length() - PROMPT if RENUMBERS else 0
    with own(model) if WHILE_DECODING else contextlib.nullcontext():
        for number, size in enumerate(CALLS, 1):
            places = torch.arange(first, first + size).expand(ROWS, -1) + shift
            logits.append(feed(cache, number, first, ids[:, first : first + size], position_ids=places))
            first += size
    return looks, torch.cat(logits, 1), cache
"""
_TOKENIZER = """\
words = {"<s>": 0, "</s>": 127, **{f"w{n}": n for n in range(1, 127)}}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="w1")
"""
_LENT = """\
folder = tempfile.mkdtemp()  # where such a press looks for the model's tokenizer
fast.save_pretrained(folder)
model.config._name_or_path = folder
"""
_DELIMITED = """\
def delimited(prompt):
    \"\"\"The last quarter of a prompt is the question, up to 32 tokens: a delimiter stands before it.\"\"\"
    question, middle = max(1, min(32, PROMPT // 4)), torch.full((ROWS, 1), own.delimiter_token_id)
    return torch.cat([prompt[:, :-question], middle, prompt[:, -question:]], 1)
"""
_IMPORTS = {
    "contextlib": "import contextlib",
    "copy.": "import copy",
    "importlib.": "import importlib",
    "tempfile.": "import tempfile",
    "torch": "import torch",
    "models.WordLevel": "from tokenizers import Tokenizer, models, pre_tokenizers",
    "DynamicCache": "from transformers import DynamicCache",
    "PreTrainedTokenizerFast": "from transformers import PreTrainedTokenizerFast",
    "AutoConfig": "from transformers import AutoConfig, AutoModelForCausalLM",
    "functions[": "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions",
}


def program(subject: Subject, case: Text | Reading) -> str | None:
    """Write a program that shows what the check that just ran found of a case.

    Args:
        subject: with `opens`, and `shows` as the check left it.
        case: the smallest that refutes.

    Returns:
        The program; None where the target cannot be imported again, or the check shows nothing.
    """
    if not (subject.opens and subject.shows):
        return None
    parts = _of_text(subject, case) if isinstance(case, Text) else _of_reading(subject, case)
    if parts is None:
        return None
    body = "\n\n".join(part.rstrip() + "\n" for part in [*parts, subject.shows]).rstrip()
    imports = [line for word, line in _IMPORTS.items() if word in body]
    return "\n".join([*imports, "", body])


def _of_text(subject: Subject, text: Text) -> list[str] | None:
    if subject.method is not None:
        return None
    sizes = "\n".join(
        [
            "FAMILY, ATTENTION, DTYPE, SPREAD, BIAS = 'llama', 'sdpa', torch.float64, 0.3, 0.3",
            f"SIZES = {CONFIG}",
            f"ids, prompt, chunk, KEEP_RATIO = torch.tensor({text.input_ids.tolist()}), {text.prompt}, "
            f"{1 if subject.traits.skip_layers else text.chunk}, {text.keep_ratio}",
        ]
    )
    return [sizes, _MODEL, subject.opens, _keyword(_FEED)]


def _of_reading(subject: Subject, reading: Reading) -> list[str] | None:
    more: list[str] = []
    heads = FAMILIES[reading.family].get("num_key_value_heads", HEADS)
    attention = "eager" if subject.eager else "sdpa"
    head = [
        f"# {reading!r}",
        f"FAMILY, ATTENTION, DTYPE, SPREAD, BIAS = {reading.family!r}, {attention!r}, torch.float32, 0.1, 0",
        f"SIZES = {SIZES | FAMILIES[reading.family]}",
        f"PROMPT, CALLS, ROWS, HEADS, SEED = {reading.prompt}, {list(reading.calls)}, {reading.rows}, {heads}, "
        f"{reading.seed}",
        f"LENGTH, SCALE, REAL = {reading.length + 8}, {reading.scale}, {reading.real}",
        f"KEEP_RATIO, MADE_IN = {reading.keep_ratio}, torch.{reading.dtype}",
    ]
    opens, read = subject.opens, _READ_CACHE
    if subject.method is None:
        head += [f"RENUMBERS = {subject.traits.positions == 'renumbered'}"]
    else:
        method = subject.method(reading.keep_ratio)
        press = method.press  # type: ignore[attr-defined]
        late, prefill = acts_while_decoding(press), type(press).__name__ != "DecodingPress"
        head += [f"PREFILL, WHILE_DECODING, RENUMBERS = {prefill}, {late}, {renumbers(press)}"]
        if method.budget is not None:
            attribute, value = setting(method.name, press, method.budget, 1000)
            opens += f"\npress.{attribute} = {value}"
        more, read = _of_press(press)
    hooks = _FUSED if reading.family == "gpt_neox" else _SEPARATE
    return [
        "\n".join(head),
        _NOTES,
        opens,
        _MODEL,
        *more,
        _TAGS,
        _HOOKS,
        hooks,
        _keyword(_DRAW),
        read,
    ]


def _of_press(press: Any) -> tuple[list[str], str]:
    """Write what a press needs besides itself, and read(), which runs it."""
    functions, prepared = written(press, "own")
    more, given = [functions] if functions else [], "ids[:, :PROMPT]"
    if lends_tokenizer(press):
        more.append(_TOKENIZER + _LENT)
    elif reads_delimiter(press):
        more += [_TOKENIZER, _DELIMITED]
        prepared, given = 'own.update_model_and_tokenizer(model, fast, delimiter_token="</s>")', f"delimited({given})"
    read = _READ_PRESS.replace("PREPARED\n", indent(f"{prepared}\n", " " * 4) if prepared else "")
    return more, read.replace("QUESTION", given)


def _keyword(text: str) -> str:
    from knorm.laws.model import small_model

    return text.replace("CACHE=", f"{cache_keyword(small_model('cpu'))}=")
