"""The CUDA path of the compression (Triton): norms in one launch; threshold, time order and gather in another.

Norms become integers: a float that is not negative orders as its bits. A radix search over these finds the count-th
lowest, and a prefix sum over the programs' shares keeps time order, so nothing is ever sorted. The programs of a row
meet at barriers, so the second launch is cooperative: the whole grid is resident at once. The host waits for the norms
alone: the kernels write whether they are finite into its memory before anything has moved.
"""

from __future__ import annotations

import functools
import math
import threading
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.runtime import driver
except ImportError:  # torch without CUDA brings none
    triton = None

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Tuned on an NVIDIA H200 (docs/kernels.md).
_NORM_BYTES, _NORM_WARPS = 32768, 8  # of keys that a program reads; how many warps share them
_MOVE_BYTES = 16384  # that a program moves at once
_WARPS, _PER_PROCESSOR = 8, 2  # programs on each multiprocessor: all of the grid has to fit
_MANY = 2048  # norms that a program looks at at once
_LEAST = 128  # tokens of a program's share at least
_FUSED_BYTES = 2**24  # of keys up to which launches are what takes time: one does all
_SMALL_SCRATCH = 2**19  # int32 entries that stay allocated
_COARSE_FROM = 16384  # tokens: a search through as many first looks which of 128 parts the cut lies in
_PASSES = 4  # 7 bits at first, then 12 at a time, of 31
_POLLS = 10_000  # looks at the host's memory, some 0.1 us each, before other threads get a turn
_TICKETS = 2**28

# Arguments that are not compiled for, so that another length compiles nothing.
_NUMBERS = ["heads", "length", "first", "recent", "tiles", "rows", "count", "members", "ticket"]
_NUMBERS += [f"{of}_{stride}" for of in ("key", "value") for stride in ("batch", "head", "token")]

if triton is not None:
    _INFINITY = tl.constexpr(0x7F800000)
    _SMALL = tl.constexpr((127 - 100) << 23)  # 2^-100: below it, float32 squares have lost bits

    @triton.jit
    def _measure(keys, order, control, counter, length, first, recent, start, end, key_token, KEYS: tl.constexpr):
        """The squared norms of a row's keys from start on as integers that order alike; protected ones are -1."""
        HIGHEST: tl.constexpr = KEYS[0]
        WIDTH: tl.constexpr = KEYS[1]
        PADDED: tl.constexpr = KEYS[2]
        UNIT: tl.constexpr = KEYS[3]
        TOKENS: tl.constexpr = KEYS[4]
        token = start + tl.arange(0, TOKENS)
        column = tl.arange(0, PADDED)[None, :]
        there = token < end
        offsets = (token.to(tl.int64) * key_token)[:, None] * UNIT + column
        key = tl.load(keys + offsets, mask=there[:, None] & (column < WIDTH), other=0.0).to(tl.float32)
        bits = tl.sum(key * key, 1).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        if tl.max(tl.where(there, bits, 0), 0) >= _INFINITY:
            tl.atomic_or(control, 1, sem="relaxed")
        if tl.min(tl.where(there, bits, 0x7FFFFFFF), 0) < _SMALL:
            tl.atomic_or(control, 2, sem="relaxed")
        bits = tl.minimum(bits, _INFINITY)
        if HIGHEST:
            bits = _INFINITY - bits
        free = there & (token >= first) & (token < length - recent)
        tl.atomic_max(counter + 1, tl.max(tl.where(free, bits, 0), 0), sem="relaxed")
        tl.atomic_max(counter + 2, _INFINITY - tl.min(tl.where(free, bits, _INFINITY), 0), sem="relaxed")
        tl.store(order + token, tl.where(free, bits, -1), mask=there)

    @triton.jit
    def _clear(counts, part, parts, PASSES: tl.constexpr):
        """A program's part of the search's counts, to zero."""
        for block in range(part, PASSES * 4, parts):
            tl.store(counts + block * 1024 + tl.arange(0, 1024), tl.zeros([1024], tl.int32))

    @triton.jit(do_not_specialize=_NUMBERS)
    def _norms(
        keys,
        control,
        scratch,
        heads,
        length,
        first,
        recent,
        tiles,
        key_batch,
        key_head,
        key_token,
        KEYS: tl.constexpr,
        PASSES: tl.constexpr,
    ):
        row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
        wide_row, wide_rows = row.to(tl.int64), (tl.num_programs(0) // tiles).to(tl.int64)
        offset = (row // heads).to(tl.int64) * key_batch + (row % heads).to(tl.int64) * key_head
        order = scratch + wide_row * length
        start = tile * KEYS[4]
        row_keys, counter = keys + offset * KEYS[3], control + 4 + 4 * row
        _measure(row_keys, order, control, counter, length, first, recent, start, length, key_token, KEYS)
        _clear(scratch + wide_rows * length + wide_row * (PASSES * 4096), tile, tiles, PASSES)

    @triton.jit
    def _meet(counter, arrivals):
        """Wait for all programs of the row: what each wrote before, all read after."""
        tl.debug_barrier()
        tl.atomic_add(counter, 1, sem="release")
        while tl.atomic_add(counter, 0, sem="acquire") < arrivals:
            pass
        tl.debug_barrier()

    @triton.jit
    def _tell(control, told, ticket):
        """To the host, in one word: whose norms these are, and what is wrong with any of them."""
        tl.store(told, ticket * 4 + tl.load(control, cache_modifier=".cg"), cache_modifier=".wt")
        tl.store(control, 0)

    @triton.jit
    def _find(counts, wanted):
        """The bin of the wanted-th entry, and which of its entries that is: sums of 64 bins first, then the 64."""
        line = tl.arange(0, 64)
        sums = tl.sum(tl.load(counts + line[:, None] * 64 + line[None, :], cache_modifier=".cg"), 1)
        coarse = tl.sum((tl.cumsum(sums, 0) < wanted).to(tl.int32), 0)
        wanted -= tl.sum(tl.where(line < coarse, sums, 0), 0)
        bins = tl.load(counts + coarse * 64 + line, cache_modifier=".cg")
        fine = tl.sum((tl.cumsum(bins, 0) < wanted).to(tl.int32), 0)
        return coarse * 64 + fine, wanted - tl.sum(tl.where(line < fine, bins, 0), 0)

    @triton.jit(do_not_specialize=_NUMBERS)
    def _gather(
        keys,
        values,
        positions,
        kept_keys,
        kept_values,
        kept_positions,
        control,
        scratch,
        told,
        ticket,
        rows,
        heads,
        length,
        count,
        first,
        recent,
        members,
        key_batch,
        key_head,
        key_token,
        value_batch,
        value_head,
        value_token,
        FUSED: tl.constexpr,
        GIVEN_POSITIONS: tl.constexpr,
        KEYS: tl.constexpr,
        VALUES: tl.constexpr,
        TOKENS: tl.constexpr,
        MANY: tl.constexpr,
        SHARES: tl.constexpr,
        PASSES: tl.constexpr,
        COARSE: tl.constexpr,
    ):
        """Gather each row's protected tokens and those of the lowest norms, in time order; FUSED: the norms too."""
        KEY_WIDTH: tl.constexpr = KEYS[1]
        KEY_UNIT: tl.constexpr = KEYS[3]
        VALUE_WIDTH: tl.constexpr = VALUES[0]
        VALUE_UNIT: tl.constexpr = VALUES[2]
        group, groups = tl.program_id(0) // members, tl.num_programs(0) // members
        member = tl.program_id(0) % members
        share = tl.cdiv(length, members)
        begin = tl.minimum(member * share, length)
        end = tl.minimum(begin + share, length)
        key_column = tl.arange(0, KEYS[2])[None, :]
        value_column = tl.arange(0, VALUES[1])[None, :]
        if not FUSED:  # noqa: SIM102
            if tl.program_id(0) == 0:
                _tell(control, told, ticket)
        for turn in range(0, tl.cdiv(rows - group, groups)):
            row = group + turn * groups
            batch, head, wide_row, wide_rows = (
                (row // heads).to(tl.int64),
                (row % heads).to(tl.int64),
                row.to(tl.int64),
                rows.to(tl.int64),
            )
            row_keys = keys + (batch * key_batch + head * key_head) * KEY_UNIT
            row_values = values + (batch * value_batch + head * value_head) * VALUE_UNIT
            order = scratch + wide_row * length
            counts = scratch + wide_rows * length + wide_row * (PASSES * 4096)
            chosen = scratch + wide_rows * (length + PASSES * 4096) + wide_row * count
            shares = scratch + wide_rows * (length + PASSES * 4096 + count) + wide_row * (2 * members)
            counter = control + 4 + 4 * row  # arrivals, the highest norm, the lowest one counted from above, departures

            met = 0
            if FUSED:
                for start in range(begin, end, KEYS[4]):
                    _measure(row_keys, order, control, counter, length, first, recent, start, end, key_token, KEYS)
                _clear(counts, member, members, PASSES)
                met += members
                _meet(counter, met)
                if member == 0:  # noqa: SIM102 - `and` would count for every member
                    if tl.atomic_add(control + 1, 1, sem="acq_rel") == rows - 1:
                        tl.store(control + 1, 0)
                        _tell(control, told, ticket)

            # The cut, from the highest bits down.
            wanted = count - first - recent
            cut = _INFINITY - tl.load(counter + 2, cache_modifier=".cg")
            span = tl.load(counter + 1, cache_modifier=".cg") - cut
            shift = 0
            searching = (span > 0) & (wanted > 0)
            if COARSE:
                while (span >> shift) >= 128:
                    shift += 1
                if searching:
                    own = tl.zeros([128], tl.int32)
                    for start in range(begin, end, MANY):
                        token = start + tl.arange(0, MANY)
                        above = tl.load(order + token, mask=token < end, other=-1) - cut
                        own += tl.histogram(tl.maximum(above, 0) >> shift, 128, mask=above >= 0)
                    bins = tl.arange(0, 128)
                    tl.atomic_add(counts + bins, own, mask=own > 0, sem="relaxed")
                    met += members
                    _meet(counter, met)
                    own = tl.load(counts + bins, cache_modifier=".cg")
                    bin = tl.sum((tl.cumsum(own, 0) < wanted).to(tl.int32), 0)
                    wanted -= tl.sum(tl.where(bins < bin, own, 0), 0)
                    cut += bin << shift
                    counts += 4096
                    searching = shift > 0
                    shift = tl.maximum(shift - 12, 0)
            else:
                while (span >> shift) >= 4096:
                    shift += 1
            while searching:
                for start in range(begin, end, MANY):
                    token = start + tl.arange(0, MANY)
                    above = tl.load(order + token, mask=token < end, other=-1) - cut
                    inside = (above >= 0) & ((above >> shift) < 4096)
                    tl.atomic_add(counts + (above >> shift), 1, mask=inside, sem="relaxed")
                met += members
                _meet(counter, met)
                bin, wanted = _find(counts, wanted)
                cut += bin << shift
                counts += 4096
                searching = shift > 0
                shift = tl.maximum(shift - 12, 0)

            # Where each program's share starts: below the cut all are kept, at the cut the first `wanted`.
            less, equal = 0, 0
            for start in range(begin, end, MANY):
                token = start + tl.arange(0, MANY)
                bits = tl.load(order + token, mask=token < end, other=0x7FFFFFFF)
                less += tl.sum((bits < cut).to(tl.int32), 0)
                equal += tl.sum((bits == cut).to(tl.int32), 0)
            tl.store(shares + 2 * member, less)
            tl.store(shares + 2 * member + 1, equal)
            met += members
            _meet(counter, met)
            who = tl.arange(0, SHARES)
            less_before = tl.sum(tl.load(shares + 2 * who, mask=who < member, other=0, cache_modifier=".cg"), 0)
            equal_before = tl.sum(tl.load(shares + 2 * who + 1, mask=who < member, other=0, cache_modifier=".cg"), 0)
            slot_begin = less_before + tl.minimum(equal_before, wanted)
            slot_end = less_before + less + tl.minimum(equal_before + equal, wanted)

            # Their indices in time order, then the rows themselves.
            for start in range(begin, end, MANY):
                token = start + tl.arange(0, MANY)
                bits = tl.load(order + token, mask=token < end, other=0x7FFFFFFF)
                both = (bits < cut).to(tl.int32) + ((bits == cut).to(tl.int32) << 16)  # two counts in one scan
                before = tl.cumsum(both, 0) - both
                at_cut = equal_before + (before >> 16)
                slot = less_before + (before & 0xFFFF) + tl.minimum(at_cut, wanted)
                keep = (bits < cut) | ((bits == cut) & (at_cut < wanted))
                tl.store(chosen + slot, token, mask=keep)
                position = token.to(tl.int64)
                if GIVEN_POSITIONS:
                    position = tl.load(positions + wide_row * length + token, mask=keep, other=0)
                tl.store(kept_positions + wide_row * count + slot, position, mask=keep)
                total = tl.sum(both, 0)
                less_before += total & 0xFFFF
                equal_before += total >> 16
            tl.debug_barrier()
            for start in range(slot_begin, slot_end, TOKENS):
                slot = start + tl.arange(0, TOKENS)
                there = slot < slot_end
                token = tl.load(chosen + slot, mask=there, other=0).to(tl.int64)
                target = (wide_row * count + slot)[:, None]
                of_key = there[:, None] & (key_column < KEY_WIDTH)
                of_value = there[:, None] & (value_column < VALUE_WIDTH)
                key = tl.load(row_keys + (token * key_token)[:, None] * KEY_UNIT + key_column, mask=of_key)
                value = tl.load(row_values + (token * value_token)[:, None] * VALUE_UNIT + value_column, mask=of_value)
                tl.store(kept_keys + target * KEY_WIDTH + key_column, key, mask=of_key)
                tl.store(kept_values + target * VALUE_WIDTH + value_column, value, mask=of_value)
            if tl.atomic_add(counter + 3, 1, sem="relaxed") == members - 1:  # the last one leaves all as it was
                tl.store(counter + tl.arange(0, 4), tl.zeros([4], tl.int32))


def available(keys: Tensor, values: Tensor) -> bool:
    """Tell whether these kernels suit a cache: on CUDA, 16 or 32 bits a number, no gradients, not empty.

    Args:
        keys: [batch, kv_heads, length, head_dim].
        values: [batch, kv_heads, length, head_dim].

    Returns:
        True if compress() answers, or says that it cannot.
    """
    return (
        triton is not None
        and keys.is_cuda
        and keys.dtype in DTYPES
        and values.dtype in DTYPES
        and keys.numel() > 0
        and not (torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad))
    )


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


class _Launch:
    """A kernel for one shape: its arguments after the addresses and the ticket."""

    def __init__(
        self, kernel: Any, programs: int, numbers: tuple[int, ...], constants: tuple[Any, ...], **options: Any
    ):
        self.kernel, self.grid, self.rest, self.options = kernel, (programs, 1, 1), (*numbers, *constants), options
        self.run: Any = None

    def __call__(self, stream: int, tensors: tuple[Tensor, ...], *ticket: int) -> None:
        if self.run is None:  # compiles, where no other shape has
            self.run = self.kernel[self.grid](*tensors, *ticket, *self.rest, **self.options)[self.grid]
        else:  # past the compiler's look at each argument; an address is taken as it is, a tensor is looked up
            self.run(*[tensor.data_ptr() for tensor in tensors], *ticket, *self.rest, stream=stream)


class _Plan(NamedTuple):
    """What all calls of one shape share.

    norms     None: the other kernel does all
    scratch   int32 entries
    kept      positions, keys and values to be, a number each, expanded: the fast way to allocate such
    """

    norms: _Launch | None
    gather: _Launch
    scratch: int
    kept: list[Tensor]


def _power(least: int) -> int:
    return 1 << (least - 1).bit_length()


@functools.lru_cache(maxsize=1024)
def _plan(
    device: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype],
    shape: tuple[int, int, int, int],
    value_width: int,
    key_strides: tuple[int, ...],
    value_strides: tuple[int, ...],
    count: int,
    first: int,
    recent: int,
    highest: bool,
    given_positions: bool,
) -> _Plan:
    batch, heads, length, width = shape
    rows, processors, (size, value_size) = batch * heads, _processors(device), (dtype.itemsize for dtype in dtypes)
    # Strides in units of a power of two, which tells the compiler of alignment.
    unit, value_unit = math.gcd(16, *key_strides[:3]), math.gcd(16, *value_strides[:3])
    key_strides = tuple(stride // unit for stride in key_strides[:3])
    value_strides = tuple(stride // value_unit for stride in value_strides[:3])
    fused = rows * length * width * size <= _FUSED_BYTES
    tokens = max(1, _NORM_BYTES // (_power(width) * size))
    tiles = -(-length // tokens)
    keys = highest, width, _power(width), unit, tokens
    members = max(1, min(_PER_PROCESSOR * processors // rows, length // _LEAST))
    groups = min(rows, _PER_PROCESSOR * processors // members)
    norms = (heads, length, first, recent, tiles, *key_strides), (keys, _PASSES)
    numbers = rows, heads, length, count, first, recent, members, *key_strides, *value_strides
    constants = (
        fused,
        given_positions,
        keys,
        (value_width, _power(value_width), value_unit),
        max(1, _MOVE_BYTES // max(_power(width) * size, _power(value_width) * value_size)),
        min(_MANY, max(256, _power(-(-length // members)))),
        _power(members),
        _PASSES,
        length >= _COARSE_FROM,
    )
    registers = 65536 // (32 * _WARPS * _PER_PROCESSOR)
    options = {"num_warps": _WARPS, "maxnreg": registers, "launch_cooperative_grid": True}
    shapes = (batch, heads, count), (batch, heads, count, width), (batch, heads, count, value_width)
    kept = zip(shapes, (torch.int64, *dtypes), strict=True)
    return _Plan(
        None if fused else _Launch(_norms, rows * tiles, *norms, num_warps=_NORM_WARPS),
        _Launch(_gather, groups * members, numbers, constants, **options),
        rows * (length + _PASSES * 4096 + count + 2 * members),
        [torch.empty(1, dtype=dtype, device=device).expand(shape) for shape, dtype in kept],
    )


class _Held:
    """What a thread's launches on one stream share.

    control   int32 [4 + 4 * rows], where programs meet; all zero: every launch leaves it as it was
    scratch   int32, for all that is small
    told      int32 [1] in memory that host and device share: four times a call's ticket, with what is wrong with the
              norms: 1 one that is not finite, 2 one that is too small
    """

    def __init__(self, device: torch.device, rows: int) -> None:
        self.control = torch.zeros(4 + 4 * rows, dtype=torch.int32, device=device)
        self.scratch = self.control.new_empty(_SMALL_SCRATCH)
        self.told = torch.zeros(1, dtype=torch.int32, device="cpu").pin_memory()
        self.seen = self.told.numpy().data
        self.stream = torch.cuda.current_stream(device)
        self.rows, self.ticket = rows, 0

    def wait(self) -> int:
        """Until the norms of the last call are known: what is wrong with them."""
        for _ in range(_POLLS):
            if (said := self.seen[0]) >> 2 == self.ticket:
                return said & 3
        while self.seen[0] >> 2 != self.ticket and not self.stream.query():  # raises what broke a kernel off
            time.sleep(0)  # to other threads
        return self.seen[0] & 3


_held: dict[tuple[torch.device, int, int], _Held] = {}


def _hold(device: torch.device, stream: int, rows: int) -> _Held:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a CUDA graph is being captured, which cannot wait for norms: compress before or after that")
    place = device, stream, threading.get_ident()
    held = _held.get(place)
    if held is None or held.rows < rows:
        held = _held[place] = _Held(device, max(rows, 256))
    return held


def _aligned(rows: Tensor) -> Tensor:
    """The same numbers, each row of them in one piece, from an address that every load may rely on."""
    if rows.stride(-1) == 1 and rows.data_ptr() % 16 == 0:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def compress(
    keys: Tensor,
    values: Tensor,
    positions: Tensor | None,
    count: int,
    first: int = 0,
    recent: int = 0,
    *,
    highest: bool = False,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Keep the `count` tokens of lowest key norm of each row, in time order; ties to the earlier.

    Args:
        keys: float16, bfloat16 or float32 [batch, heads, length, head_dim] on CUDA, of any strides.
        values: the same; their head_dim may be another.
        positions: int64 [batch, heads, length]; None: 0 to length - 1.
        count: tokens that stay.
        first: tokens at the start that are kept whatever their norm; with `recent` at most `count`.
        recent: newest tokens that are kept likewise.
        highest: True to keep the highest norms.

    Returns:
        What is kept of the three, [batch, heads, count, ...]; None where a squared norm is no finite float32, or lies
        below 2^-100, where float32 has lost bits. Waits for the norms, not for what is kept.
    """
    device = keys.device
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return compress(keys, values, positions, count, first, recent, highest=highest)
    keys, values = _aligned(keys), _aligned(values)
    dtypes, widths, given = (keys.dtype, values.dtype), values.shape[3], positions is not None
    shape, strides = keys.shape, (keys.stride(), values.stride())
    plan = _plan(device, dtypes, shape, widths, *strides, count, first, recent, highest, given)
    stream = driver.active.get_current_stream(device.index)
    held = _hold(device, stream, shape[0] * shape[1])
    scratch = held.scratch if plan.scratch <= _SMALL_SCRATCH else held.scratch.new_empty(plan.scratch)
    if plan.norms is not None:
        plan.norms(stream, (keys, held.control, scratch))
    kept_positions, *kept = [torch.empty_like(each, memory_format=torch.contiguous_format) for each in plan.kept]
    held.ticket = held.ticket % _TICKETS + 1
    where = scratch if positions is None else _aligned(positions.contiguous())
    plan.gather(stream, (keys, values, where, *kept, kept_positions, held.control, scratch, held.told), held.ticket)
    return None if held.wait() else (kept[0], kept[1], kept_positions)
