"""A text as it is drawn: how much worse each token got, what had been evicted by then, and who paid for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from knorm.page.figures import retained_outline
from knorm.page.form import Explained, TokenShown, WindowShown

BINS = (0.1, 0.5, 1.0, 2.0)  # nats: from one to the next a token is coloured deeper
MOST_PAYERS = 5


@dataclass(frozen=True)
class Head:
    """Hold what one key/value head retains of a window.

    Attributes:
        layer: from 0 up; head: its number in the layer.
        outline: path of an SVG, see figures.retained_outline.
        share: of the window's tokens, those that it never evicted, 0 to 1.
    """

    layer: int
    head: int
    outline: str
    share: float


@dataclass(frozen=True)
class Piece:
    """Hold one token as it is drawn.

    Attributes:
        position: in its window; data: the token.
        change: of its NLL; None where it was not scored.
        shade: "" for none, w1 to w4 for worse, b1 and b2 for better.
        gone: time at which most heads had evicted it; None: never.
        evictions: number of heads that evicted it, first and last: when; 0, None, None where none did.
        payers: (position, share of attention) of later tokens, those first that would have attended to it most.
    """

    position: int
    data: TokenShown
    change: float | None
    shade: str
    gone: int | None
    evictions: int
    first: int | None
    last: int | None
    payers: list[tuple[int, float]]


@dataclass(frozen=True)
class Shown:
    """Hold a window as it is drawn.

    Attributes:
        length: tokens of the window.
        head_count: key/value heads of all layers together; 0 where every query saw every token.
        pieces: a token each, in their order.
        heads: by layer; empty where every query saw every token.
    """

    length: int
    head_count: int
    pieces: list[Piece]
    heads: list[list[Head]]


def shown(part: Explained) -> Shown | None:
    """Prepare the text of `part`, an explanation; None where it was made without one (`per_token` is None)."""
    window = part.per_token
    if window is None:
        return None
    length = len(window.shown_tokens)
    flat = [head for layer in window.evicted_at or () for head in layer]
    payers: dict[int, list[tuple[int, float]]] = {}
    for position, token in enumerate(window.shown_tokens):
        for lost in token.lost:
            payers.setdefault(lost.position, []).append((position, lost.attention))
    pieces = [
        _piece(position, token, [head[position] for head in flat], length, payers.get(position, []))
        for position, token in enumerate(window.shown_tokens)
    ]
    return Shown(length, len(flat), pieces, _heads(window, length))


def _heads(window: WindowShown, length: int) -> list[list[Head]]:
    return [
        [Head(i, j, retained_outline(head), sum(at >= length for at in head) / length) for j, head in enumerate(layer)]
        for i, layer in enumerate(window.evicted_at or ())
    ]


def _piece(
    position: int, token: TokenShown, gone: Sequence[int], length: int, payers: list[tuple[int, float]]
) -> Piece:
    times = sorted(at for at in gone if at < length)
    most = len(gone) // 2  # so many heads, and one more, are most
    change = None if token.nll is None or token.nll_full is None else token.nll - token.nll_full
    return Piece(
        position, token, change, _shade(change), times[most] if len(times) > most else None, len(times),
        times[0] if times else None, times[-1] if times else None,
        sorted(payers, key=lambda payer: -payer[1])[:MOST_PAYERS],
    )  # fmt: skip


def _shade(change: float | None) -> str:
    if change is None:
        return ""
    depth = sum(abs(change) >= edge for edge in BINS)
    if change < 0:
        return f"b{min(2, depth - 1)}" if depth > 1 else ""
    return f"w{depth}" if depth else ""
