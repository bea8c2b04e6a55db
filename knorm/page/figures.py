"""What figures are made of: places of points, intervals and labels, and outlines of what a head retains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from knorm.page.axes import Tick, linear_axis, log_axis, signed_axis
from knorm.page.form import Frontier, Point

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 744, 14, 372
BOX = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}
STRIP = 24  # height of the band at the bottom, in which nothing can be told from the full cache
_RADIUS, _LETTER = 5, 6.6  # of a marker; width of a digit
_AROUND = ((12, 4), (0, -9), (-12, 4), (0, 17), (12, -5), (12, 13), (-12, -5), (-12, 13))
_ASIDE, _APART = 16, 13  # between points of one size that lose nearly the same
_FARTHEST = 2  # such steps from where a point belongs


@dataclass(frozen=True)
class Mark:
    """Hold one point of a figure. Places are in the figure's units: x to the right, y down.

    Attributes:
        number: from 1 up, as in the table below the figure.
        x: place of the bytes per token; moved aside where two points would cover each other. y: place of the loss.
        low: place of the lower end of the interval, high: of the upper; both are y where there is no interval.
        number_x: place of the middle of the number, number_y: of its base line.
        front: True on the Pareto front.
        within: True where the loss is not told from that of the full cache, run again.
        point: what is shown.
    """

    number: int
    x: float
    y: float
    low: float
    high: float
    number_x: float
    number_y: float
    front: bool
    within: bool
    point: Point


@dataclass(frozen=True)
class Figure:
    """Hold a frontier as it is drawn, in a box of WIDTH x HEIGHT units.

    Attributes:
        view: "kl" or "nll"; title: how the loss is written.
        marks: the points, in the order of the frontier.
        x_ticks: bytes per token, each with its share of the full cache in words; "" where `full` is None.
        y_ticks: losses.
        band: (top, bottom) of what is not told from the full cache, run again.
        front: outline of the Pareto front, as the path of an SVG; "" where no point is on it.
        full: place of the full cache's bytes per token; None where it is not the same for all points.
    """

    view: str
    title: str
    marks: list[Mark]
    x_ticks: list[tuple[Tick, str]]
    y_ticks: list[Tick]
    band: tuple[float, float]
    front: str
    full: float | None


def front_of(points: Sequence[Point], loss: Callable[[Point], float]) -> set[int]:
    """Return the indices of the points than which no other is smaller and loses less.

    Args:
        points: of one frontier.
        loss: to be small, as the bytes are.
    """
    best, front = float("inf"), set()
    for index in sorted(range(len(points)), key=lambda i: (points[i].bytes_per_token, loss(points[i]))):
        if not points[index].control and loss(points[index]) < best:
            best = loss(points[index])
            front.add(index)
    return front


def kl_figure(frontier: Frontier) -> Figure:
    """Draw the KL of `frontier` from the full cache against bytes per token.

    The axis is logarithmic, in nats. What is not beyond the frontier's noise_kl stands in a strip below it, which is
    not to scale. The frontier has at least one point.
    """
    noise, points = frontier.noise_kl, frontier.points
    losses = [point.kl for point in points]
    beyond = [x for point in points for x in (point.kl, point.kl_high or 0.0) if x > noise]
    axis, ticks = log_axis(beyond or [1e-3], BOTTOM - STRIP, TOP)
    least = 10.0**axis.low

    def place(value: float) -> float:
        return axis.place(value) if value >= least and value > noise else BOTTOM - STRIP / 2

    top = min(BOTTOM - STRIP, axis.place(noise)) if noise >= least else BOTTOM - STRIP
    ranges = [
        (place(max(point.kl_low or 0.0, 1e-300)), place(max(point.kl_high or 0.0, 1e-300)))
        if point.kl_high is not None
        else (place(point.kl), place(point.kl))
        for point in points
    ]
    within = [point.kl <= noise and not point.kl_at_least for point in points]
    return _figure("kl", "KL", frontier, [place(loss) for loss in losses], ranges, ticks, (top, BOTTOM), within, losses)


def nll_figure(frontier: Frontier) -> Figure:
    """Draw the change of the mean NLL of `frontier` against bytes per token.

    The axis is in nats, as axes.signed_axis makes it. The band reaches as far to both sides of 0 as any interval of the
    full cache, run again. The frontier has at least one point.
    """
    points = frontier.points
    ends = [x for p in points for x in (p.delta_nll, p.delta_nll_low, p.delta_nll_high) if x is not None]
    axis, ticks = signed_axis(ends, BOTTOM, TOP)
    ranges = [
        (axis.place(_or(p.delta_nll_low, p.delta_nll)), axis.place(_or(p.delta_nll_high, p.delta_nll))) for p in points
    ]
    controls = [(p.delta_nll, p.delta_nll_low, p.delta_nll_high) for p in points if p.control]
    reach = max([0.0, *(abs(x) for ends in controls for x in ends if x is not None)])
    band = axis.place(reach) - 1, axis.place(-reach) + 1
    within = [abs(p.delta_nll) <= reach for p in points]
    losses = [p.delta_nll for p in points]
    places = [axis.place(loss) for loss in losses]
    return _figure("nll", "ΔNLL", frontier, places, ranges, ticks, band, within, losses)


def _or(value: float | None, other: float) -> float:
    return other if value is None else value


def _figure(
    view: str,
    title: str,
    frontier: Frontier,
    places: Sequence[float],
    ranges: Sequence[tuple[float, float]],
    ticks: list[Tick],
    band: tuple[float, float],
    within: Sequence[bool],
    losses: Sequence[float],
) -> Figure:
    points = frontier.points
    axis, values = linear_axis(max(p.bytes_per_token for p in points), LEFT, RIGHT)
    xs = [axis.place(point.bytes_per_token) for point in points]
    fulls = {point.bytes_per_token_full for point in points}
    full = fulls.pop() if len(fulls) == 1 else None
    x_ticks = [(Tick(axis.place(value), f"{value:,.0f}"), f"{value / full:.0%}" if full else "") for value in values]
    floor = [max(loss, frontier.noise_kl) if view == "kl" else loss for loss in losses]
    if view == "kl":  # a lower bound is no better than anything
        floor = [float("inf") if point.kl_at_least else loss for point, loss in zip(points, floor, strict=True)]
    front = front_of(points, lambda point: floor[next(i for i, p in enumerate(points) if p is point)])
    outline = _outline([(xs[i], places[i]) for i in front])
    xs = _side_by_side(xs, places, front)
    numbers = _labels([*zip(xs, places, strict=True)])
    marks = [
        Mark(i + 1, xs[i], places[i], *ranges[i], *numbers[i], i in front, within[i], point)
        for i, point in enumerate(points)
    ]
    return Figure(view, title, marks, x_ticks, ticks, band, outline, None if full is None else axis.place(full))


def _outline(places: Sequence[tuple[float, float]]) -> str:
    """Join the front by steps: between two of its points, the smaller one is what there is."""
    if not places:
        return ""
    (x, y), *rest = sorted(places)
    return f"M{x:g} {y:g}" + "".join(f"H{x:g}V{y:g}" for x, y in rest)


def _side_by_side(xs: Sequence[float], ys: Sequence[float], front: set[int]) -> list[float]:
    """Move points aside that would cover others, those of the front the least, and none so far that it misleads."""
    moved, placed = [*xs], list[tuple[float, float]]()
    steps = [0, *(sign * step for step in range(1, _FARTHEST + 1) for sign in (1, -1))]
    for index in sorted(range(len(xs)), key=lambda i: (i not in front, xs[i], ys[i])):
        tried = [xs[index] + _ASIDE * step for step in steps]
        tried = [x for x in tried if LEFT + _RADIUS <= x <= RIGHT - _RADIUS] or [xs[index]]
        covered = [
            sum(abs(x - other) < _ASIDE - 1 and abs(ys[index] - y) < _APART for other, y in placed) for x in tried
        ]
        moved[index] = round(tried[covered.index(min(covered))], 1)
        placed.append((moved[index], ys[index]))
    return moved


def _labels(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Find a place for the number of each point, where it covers no other marker and no other number if possible."""
    taken = [(x - _RADIUS, y - _RADIUS, x + _RADIUS, y + _RADIUS) for x, y in places]
    found = []
    for index, (x, y) in enumerate(places):
        half = _LETTER * len(str(index + 1)) / 2
        boxes = [(x + dx - half, y + dy - 10, x + dx + half, y + dy + 1) for dx, dy in _AROUND]
        others = [box for other, box in enumerate(taken) if other != index]
        hits = [sum(_overlap(box, other) for other in others) for box in boxes]
        hits = [hit + (box[0] < LEFT or box[3] > BOTTOM or box[1] < 0) for hit, box in zip(hits, boxes, strict=True)]
        best = hits.index(min(hits))
        taken.append(boxes[best])
        found.append((round(x + _AROUND[best][0], 1), round(y + _AROUND[best][1], 1)))
    return found


Box = tuple[float, float, float, float]


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def retained_outline(evicted_at: Sequence[int]) -> str:
    """Outline where a head's tokens are cached: token across, time down, one unit each.

    Args:
        evicted_at: for each token the first query that no longer sees it.

    Returns:
        The path of an SVG, in a square as long as the window.

    Example:
        >>> retained_outline([3, 2, 3])
        'M0 0L3 3H2V2H1V3H0Z'
    """
    length = len(evicted_at)
    path, now = [f"M0 0L{length} {length}"], length
    for token in range(length - 1, -1, -1):
        if evicted_at[token] != now:
            path.append(f"H{token + 1}V{evicted_at[token]}")
            now = evicted_at[token]
    return "".join(path) + "H0Z"
