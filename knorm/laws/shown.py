"""What laws on caches and on what attention sees add to a program of laws.scripts: lines that print what is wrong.

They use what the program defines before them. After each step of a law Subject.shows is what shows it, so that a step
that breaks off is shown as well.
"""

from __future__ import annotations

from collections.abc import Sequence

from knorm.laws.ranked import RANKING


def apart(first: str, second: str) -> str:
    """Write what prints how far `first` and `second`, expressions for logits of the same shape, lie apart.

    >>> apart("a", "b")
    'print("logits differ by", float((a - b).abs().max()))'
    """
    return f'print("logits differ by", float(({first} - {second}).abs().max()))'


RESUMED = "resume(prompted())"
LENGTH = """\
cache = made(ids)
feed(cache, ids, sizes)
print(cache.get_seq_length(), "is its length after", ids.shape[1], "tokens")"""
POSITIONS = apart("feed(made(ids), ids, sizes)", "feed(made(ids), ids, sizes, position_ids=places)")
CHUNKS = apart("feed(made(ids, 1.0), ids, sizes)", "model(ids, use_cache=False).logits")
COPIED = f"""\
import copy

cache = prompted()
twin = copy.deepcopy(cache)
first = resume(cache)
{apart("resume(twin)", "first")}"""
_AGAIN = apart("feed(cache, ids, sizes)[:, prompt:]", "feed(made(ids), ids, sizes)[:, prompt:]")
_RESET = "cache = made(ids)\nfeed(cache, ids.flip(1), sizes)\ncache.reset()\n"
RESET = _RESET + _AGAIN
CROP_REFUSED = """\
cache = prompted()
cache.crop(-1)
print("crop(-1) was not refused, though the prompt was compressed:", cache.get_seq_length(), "tokens")"""
CROPPED_PROMPT = f"""\
cache = prompted()
cache.crop(-1)
feed(cache, ids[:, prompt - 1 : prompt], [1], position_ids=places[:, prompt - 1 : prompt])
{apart("resume(cache)", RESUMED)}"""


def shifted(ids: list[list[int]]) -> str:
    """Show the text `ids` [rows][tokens] read at positions from 0 and from 9."""
    two = (f"feed(made(ids), ids, sizes, position_ids=places + {by})" for by in (0, 9))
    return f"ids = torch.tensor({ids})\n{apart(*two)}"


_PADDED = "feed(made(ids), ids, sizes, attention_mask=mask, position_ids=places)"


def padded(pads: Sequence[int], row: int | None = None) -> str:
    """Show a batch with left padding, `pads` by row, and how `row` of it, if given, differs from itself alone."""
    lines = [
        f"mask = (torch.arange(ids.shape[1]) >= torch.tensor({list(pads)})[:, None]).long()",
        "places = (mask.cumsum(-1) - 1).clamp(min=0)",
    ]
    if row is None:
        return "\n".join([*lines, _PADDED])
    one, spare = f"{row} : {row + 1}", pads[row]
    lines += [
        f"alone, own = ids[{one}, {spare}:], places[{one}, {spare}:]",
        f"by_itself = feed(made(alone), alone, calls(prompt - {spare}, alone.shape[1], chunk), position_ids=own)",
        apart(f"{_PADDED}[{row}, prompt:]", f"by_itself[0, prompt - {spare} :]"),
    ]
    return "\n".join(lines)


def moved(order: list[int], call: str, rows: str) -> str:
    """Show rows of a cache that a call moved.

    Args:
        order: indices of rows, which the program calls `order`.
        call: method of the cache and arguments, as "reorder_cache(order)".
        rows: expression in `order` for which rows then stand where.

    Returns:
        Lines that print how far what they answer lies from what they should.
    """
    start = f"expected, cache, order = resume(prompted()), prompted(), torch.tensor({order})"
    return "\n".join([start, f"order = {rows}", f"cache.{call}", apart("resume(cache, order)", "expected[order]")])


def reset_for(ids: list[list[int]]) -> str:
    """Show another batch, `ids` [rows][tokens], that is read after reset()."""
    return f"{_RESET}ids = torch.tensor({ids})  # another batch\nsizes = calls(prompt, ids.shape[1], chunk)\n{_AGAIN}"


def cropped(tokens: int) -> str:
    """Show `tokens` tokens that are fed and cropped again."""
    return f"""\
cache, wrong = prompted(), ids[:, :1].expand(-1, {tokens})
feed(cache, wrong, [1] * {tokens}, position_ids=torch.arange(prompt, prompt + {tokens}).expand(wrong.shape))
cache.crop(-{tokens})
{apart("resume(cache)", RESUMED)}"""


# Of what attention sees.

READ = "run, *_ = read()\n"
RUNS = "read()"
LOGITS = """\
_, logits, _ = read()
print(int(logits.isnan().sum()), "of", logits.numel(), "logits are NaN")"""
_TURN = """\

def turned(states, places):
    half = states.shape[-1] // 2
    angles = places[..., None].double() * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    one, two = states.double().split(half, -1)
    return torch.cat([one * angles.cos() - two * angles.sin(), two * angles.cos() + one * angles.sin()], -1)


model.base_model.rotary_emb.inv_freq.zero_()  # keys and queries are turned below
"""
_START = """\
        places = torch.arange(total).expand(ROWS, HEADS, total)
"""
_SLOTS = """\
            slots = torch.zeros(ROWS, HEADS, total + 1, dtype=torch.long)
            places = slots.scatter(2, index, torch.arange(index.shape[2]).expand_as(index))[..., :-1]
"""
_PLACED = """
        queries, keys = turned(queries, places[:, :, None, at]), turned(keys, places[:, :, None])"""
_MASKED = """\
run, logits, _ = read()
total = ids.shape[1]
{turn}

def masked(module, query, key, value, *_, **__):
    \"\"\"The plain model's attention to the tokens that each query was seen to see{where}.\"\"\"
    groups, parts = query.shape[1] // key.shape[1], []
    for call, size in enumerate([PROMPT, *CALLS]):
        at = torch.arange(size) + (PROMPT + sum(CALLS[: call - 1]) if call else 0)
        allowed = (torch.arange(total) <= at[:, None]).expand(ROWS, HEADS, groups, size, total)
{start}        if (call, module.layer_idx) in run:
            tokens, seen, *_ = run[call, module.layer_idx]
            index = tokens.where((tokens >= 0) & (tokens < total), total)
            shown = torch.zeros(*seen.shape[:4], total + 1, dtype=torch.int)
            shown.scatter_add_(-1, index[:, :, None, None].expand_as(seen), seen.int())
            allowed = shown[..., :-1] > 0
{slots}        queries = query.unflatten(1, (HEADS, groups))[..., at, :].double()
        keys = key[:, :, None].double(){placed}
        weights = (queries @ keys.mT / 8).masked_fill(~allowed, -torch.inf).softmax(-1)
        parts.append(weights @ value[:, :, None].double())
    return torch.cat(parts, 3).flatten(1, 2).transpose(1, 2).to(key.dtype).contiguous(), None


functions["sdpa"] = modeling.eager_attention_forward = masked
call, start, fed = 0, 0, None
plain = model(ids, use_cache=False).logits[:, -logits.shape[1] :]
print("the logits differ from the plain model's{where}, under the same mask by", float((logits - plain).abs().max()))"""


def under_the_mask(*, renumbered: bool) -> str:
    """Show the plain model under a mask of what was seen; where `renumbered`, with its keys turned to their slots."""
    if renumbered:
        where = ", keys turned to their slots"
        return _MASKED.format(turn=_TURN, start=_START, slots=_SLOTS, placed=_PLACED, where=where)
    return _MASKED.format(turn="", start="", slots="", placed="", where="")


REPORTED = """\
_, _, cache = read()
print("compression_ratio is", own.compression_ratio, "after a prompt of", PROMPT)
earlier = [sum(token < PROMPT for token in sees(looks, 1, layer, row, head, 0)) / PROMPT
           for layer in range(2) for row in range(ROWS) for head in range(HEADS)]
print("the share of it that later queries do not see is", 1 - sum(earlier) / len(earlier))"""


RANKED = f"""\
import types

from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


def note(name, x, *args, dim=None, **_):
    \"\"\"Tell of scores that are no numbers, where the places of the largest are asked for: not by max() of all.\"\"\"
    places = name not in ("max", "min") or dim is not None or (args and isinstance(args[0], int))
    if places and x.is_floating_point() and x.isnan().any():
        print(name, "was given", int(x.isnan().sum()), "of", x.numel(), "scores that are not numbers")


class Below(TorchDispatchMode):
    def __torch_dispatch__(self, operation, kinds, args=(), kwargs=None):
        if operation.overloadpacket.__name__ in RANKING:
            note(operation.overloadpacket.__name__, *args, **(kwargs or {{}}))
        return operation(*args, **(kwargs or {{}}))


class Ranked(TorchFunctionMode):
    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        if isinstance(function, types.FunctionType):  # torch's own Python
            with Below():
                return function(*args, **(kwargs or {{}}))
        if getattr(function, "__name__", "") in RANKING:
            note(function.__name__, *args, **(kwargs or {{}}))
        return function(*args, **(kwargs or {{}}))


RANKING = {sorted(RANKING)}
with Ranked():
    read()"""


def sees(at: tuple[int, ...], query: int, run: str = "run") -> str:
    """Show the tokens that a query sees.

    Args:
        at: call, layer, row, head, place of the query in its call, group.
        query: position of the query.
        run: name of what was read, in the program.

    Returns:
        A line that prints them.
    """
    return f'print("the query at {query} sees", sees({run}, {", ".join(map(str, at))}))'


def held(should: int) -> str:
    """Show the bytes that are held after the prompt beside the `should` bytes that what is seen takes."""
    return f"""\
CALLS = []
*_, cache = read()
tensors = [x for layer in cache.layers for x in vars(layer).values() if isinstance(x, torch.Tensor)]
held = sum({{x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}}.values())
print(held, "bytes are held, but what is seen takes", {should})"""


def slot(call: int, layer: int, row: int, head: int, slot: int) -> str:
    """Show whose token a slot holds.

    Args:
        call: 0 for the prompt.
        layer: index of the layer.
        row: of the batch.
        head: key/value head.
        slot: place in the cache, from 0.

    Returns:
        Lines that print it.
    """
    at = f"[{row}, {head}, {slot}]"
    return f"""\
{READ}tokens, _, _, value = run[{call}, {layer}]
# -1: an empty slot, -2: no token's, -3: of a call of the method's own, -4: of another row, head or layer
print("slot {slot} holds", int(tokens{at}), [int(part) for part in named(value{at})])"""


def off(name: str, call: int, layer: int, row: int, head: int, slot: int, token: int) -> str:
    """Show how far the key or the value of a slot is from the one that was given.

    Args:
        name: "key" or "value".
        call: 0 for the prompt.
        layer: index of the layer.
        row: of the batch.
        head: key/value head.
        slot: place in the cache, from 0.
        token: position of the token that it holds.

    Returns:
        Lines that print it.
    """
    own = f"given[{layer}][{row}, {head}, {token}]" if name == "key" else "torch.ones(1)"
    got = f"run[{call}, {layer}][{2 if name == 'key' else 3}][{row}, {head}, {slot}]{'' if name == 'key' else '.abs()'}"
    return f"""\
{READ}own, got = {own}, {got}
print("the {name} of token {token} is off by", float((got - own).abs().max() / own.abs().max()))"""
