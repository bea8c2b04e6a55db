"""Write what docs/peers/results.json says into docs/peers/README.md, and draw its picture: python tools/peers.py

What stands between `<!-- peers: NAME -->` and `<!-- end -->` is written anew; the words around it are a person's. The
picture, frontier.svg, is the first figure of the page, with its style. What a person makes of a refutation is read from
tools/exam.toml, as tools/exam.py does.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from pathlib import Path
from statistics import median

from scipy.special import stdtrit

from knorm.page.figures import front_of
from knorm.page.form import Frontier, Judged, MethodVerdicts, Pace, Page, Point, Source, TimedRow
from knorm.page.words import told
from knorm.statistics import smallest_difference

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "peers"
_PART = re.compile(r"(<!-- peers: (\w+) -->\n\n).*?(<!-- end -->)", re.DOTALL)
_WINDOWS = (32, 128, 512)
_TARGET = 0.01  # nats, 1% of perplexity
_SLOWEST = 8  # rows
_HELD, _SEEN = 0.9, 0.8  # shares: more bytes than the one at fewer tokens than the other have not been freed
_STYLE = (
    "svg{background:#fff}text{fill:#1b1f24;font:12px system-ui,sans-serif}.y{text-anchor:end}.x,.name,.point text"
    "{text-anchor:middle}.name,.minor{fill:#57606a}.band{fill:#8c959f55}.rule{stroke:#d0d7de}.tick,.axis,.full"
    "{stroke:#57606a;fill:none}.full{stroke-dasharray:2 4}.front{stroke:#0550ae;fill:none;opacity:.6}.point circle"
    "{fill:#fff;stroke:#0550ae;stroke-width:1.8}.best circle{fill:#0550ae}.bar{stroke:#0550ae;opacity:.55}.point text"
    "{font-size:11px}"
)


def read() -> Page:
    """Read the page's JSON."""
    fields = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    return Page.model_validate({name: fields[name] for name in Page.model_fields})


def read_verdicts() -> dict[str, dict[str, str]]:
    """Read what a person makes of each refutation, by class and check."""
    declared: dict[str, dict[str, str]] = tomllib.loads((ROOT / "tools" / "exam.toml").read_text())["verdicts"]
    return declared


def class_of(target: str) -> str:
    """Name the class or function of a target, as tools/exam.toml does."""
    return re.sub(r".*?:(\w+).*", r"\1", target)


def refuted(page: Page) -> Iterator[tuple[MethodVerdicts, Judged]]:
    """Generate what is red on the page."""
    for matrix in page.matrices:
        for method in matrix.methods:
            yield from ((method, result) for result in method.results if result.verdict == "refuted")


def measured(frontier: Frontier, source: int | None = None) -> list[Point]:
    """List the methods of a frontier; those of one environment, if it is given."""
    points = [point for point in frontier.points if not point.control and point.complete]
    return points if source is None else [point for point in points if point.source == source]


def apart(one: Point, other: Point) -> bool:
    """Tell whether KL tells two methods of one environment apart: by their letters, or, without, by their intervals."""
    if one.letters and other.letters:  # the 27th is aa
        letters = [{run[0] for run in re.finditer(r"([a-z])\1*", point.letters)} for point in (one, other)]
        return not letters[0] & letters[1]
    ends = [(point.kl_low or 0.0, point.kl_high or 0.0) for point in (one, other)]
    return ends[0][1] < ends[1][0] or ends[1][1] < ends[0][0]


def rivals(points: Iterable[Point]) -> list[tuple[Point, Point]]:
    """List the pairs of methods that keep the same, and change anything."""
    return [
        (one, other)
        for one, other in combinations([point for point in points if point.changed], 2)
        if (one.keep_ratio, one.keep_tokens) == (other.keep_ratio, other.keep_tokens) != (None, None)
    ]


def deviation(point: Point) -> float:
    """Compute the standard deviation of the windows' mean changes of NLL from their interval."""
    assert point.delta_nll_high is not None
    reach = float(stdtrit(point.windows - 1, 0.975))
    return (point.delta_nll_high - point.delta_nll) / reach * point.windows**0.5


def table(head: str, rows: Iterable[Iterable[object]]) -> str:
    """Write a table; columns but the first `text` ones are numbers."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([head, re.sub(r"[^|]+", " --- ", head), *lines]) + "\n"


def _source(source: Source) -> str:
    names = [name for name in ("kvpress", "transformers", "torch") if source.versions.get(name)]
    said = f"- {source.name}: {', '.join(f'{name} {source.versions[name]}' for name in names)}; {source.cells} cells"
    said += f", {source.missing} missing" if source.missing else ""
    return said + (f", {len(source.failed_cells)} failed" if source.failed_cells else "")


def what(page: Page) -> str:
    """Say what was tried and measured, and what could not be."""
    methods = [method for matrix in page.matrices for method in matrix.methods]
    results = [result for method in methods for result in method.results]
    words = ("holds", "refuted", "untested")
    counts = ", ".join(f"{sum(result.verdict == word for result in results):,} {word}" for word in words)
    red = {method.name for method, _ in refuted(page)}
    parts = ["\n".join(map(_source, page.sources))]
    parts.append(f"**{len(methods)} methods** under the laws: {counts}; {len(red)} of the methods have a refutation.")
    for frontier in page.frontiers:
        points = measured(frontier)
        count = len({point.method for point in points})
        parts.append(
            f"**{frontier.model} on {frontier.text}**: {count} methods in {len(points)} rows, {frontier.windows} "
            f"windows of {frontier.window} tokens, prompts of {frontier.prompt_length}."
        )
    reasons = {cell.split(": ", 1)[1] for source in page.sources for cell in source.failed_cells}
    parts += ["Not measured:", "\n".join(f"- {reason}" for reason in sorted(reasons))] if reasons else []
    return "\n\n".join(parts) + "\n"


def defects(page: Page) -> str:
    """Write each refutation with what a person makes of it."""
    judged = read_verdicts()
    rows = []
    for method, result in refuted(page):
        verdict = judged.get(class_of(method.name), {}).get(result.check, "read by nobody yet")
        rows.append([f"`{method.name}`", f"`{result.check}`", verdict.removeprefix("true: ")])
    return table("| method | law | what is so |", rows)


def disagreement(page: Page) -> str:
    """Count the pairs that perplexity and KL order otherwise, and show those that KL tells apart."""
    parts = []
    for frontier in page.frontiers:
        pairs = [pair for at in range(len(page.sources)) for pair in rivals(measured(frontier, at))]
        other = [pair for pair in pairs if _otherwise(*pair)]
        sure = [sorted(pair, key=lambda point: point.delta_nll) for pair in other if apart(*pair)]
        lower = [point.label for point in measured(frontier) if point.changed and point.delta_nll < 0]
        parts.append(
            f"**{frontier.model} on {frontier.text}**: of {len(pairs)} pairs of methods at one budget, perplexity and "
            f"KL order {len(other)} otherwise, of which KL tells {len(sure)} apart. A lower perplexity than the full "
            f"cache's: {', '.join(f'`{label}`' for label in lower) or 'none'}.\n"
        )
        rows = [
            [f"`{a.label}`", f"{a.delta_nll:+.4f}", f"{a.kl:.4f}", f"`{b.label}`", f"{b.delta_nll:+.4f}", f"{b.kl:.4f}"]
            for a, b in sorted(sure, key=lambda pair: pair[1].kl / pair[0].kl)
        ]
        if rows:
            parts.append(table("| better by perplexity | ΔNLL | KL | better by KL | ΔNLL | KL |", rows))
    return "\n".join(parts)


def _otherwise(one: Point, other: Point) -> bool:
    return (one.delta_nll - other.delta_nll) * (one.kl - other.kl) < 0


def best(page: Page) -> str:
    """Show which methods cost least by KL at each budget of the first figure."""
    points = measured(page.frontiers[0])
    parts = []
    for budget in sorted({point.keep_ratio for point in points if point.keep_ratio}, reverse=True):
        mine = sorted((p for p in points if p.keep_ratio == budget), key=lambda point: point.kl)
        by_nll = sorted(mine, key=lambda point: point.delta_nll)
        rows = [
            [f"`{p.method}`", f"{p.kl:.4f}", f"{p.kl_low:.4f} to {p.kl_high:.4f}", f"{p.delta_nll:+.4f}",
             by_nll.index(p) + 1, f"{p.same_top:.1%}", f"{p.bytes_per_token / p.bytes_per_token_full:.0%}"]
            for p in mine[:8]
        ]  # fmt: skip
        head = f"| keep {budget}, {len(mine)} methods | KL | 95% | ΔNLL | rank by ΔNLL | same top | bytes |"
        parts.append(table(head, rows))
    return "\n".join(parts)


def noise(page: Page) -> str:
    """Say which differences this much text tells, and how much would tell more."""
    parts = []
    for frontier in page.frontiers:
        lines = []
        for budget in sorted({point.keep_ratio for point in measured(frontier) if point.keep_ratio}, reverse=True):
            mine = [p for p in measured(frontier) if p.keep_ratio == budget]
            pairs = [pair for at in range(len(page.sources)) for pair in rivals(p for p in mine if p.source == at)]
            none = sum(not apart(*pair) for pair in pairs)
            zero = sum((p.delta_nll_low or 0) <= 0 <= (p.delta_nll_high or 0) for p in mine)
            lines.append([budget, len(pairs), none, f"{zero} of {len(mine)}"])
        values = [deviation(point) for point in measured(frontier) if point.changed and point.windows > 1]
        middle = median(values)
        few, least = frontier.windows, smallest_difference(middle, frontier.windows)
        need = next(n for n in range(2, 10**6) if smallest_difference(middle, n) <= _TARGET)
        more = ", ".join(f"{n} windows {smallest_difference(middle, n):.3f}" for n in _WINDOWS)
        parts += [
            f"**{frontier.model} on {frontier.text}**\n",
            table("| keep | pairs | KL does not tell apart | ΔNLL not told from 0 |", lines),
            f"The middle row's smallest ΔNLL that {few} windows tell from 0, 19 times of 20: {least:.3f} nats "
            f"({smallest_difference(min(values), few):.3f} to {smallest_difference(max(values), few):.3f} over "
            f"{len(values)} rows); {more}. {_TARGET} nats want {need:,} windows.\n",
        ]
    return "\n".join(parts)


def memory(page: Page) -> str:
    """List the methods that hide tokens and hold them none the less, and caches larger than what they hold."""
    rows = []
    for frontier in page.frontiers:
        tokens = next(point.mean_seen for point in frontier.points if point.control)
        for p in measured(frontier):
            held, seen = p.bytes_per_token / p.bytes_per_token_full, p.mean_seen / tokens
            if held > 1.001 or (held > _HELD and seen < _SEEN):
                rows.append([f"`{p.label}`", frontier.model, f"{seen:.0%}", f"{held:.0%}"])
    return table("| method, budget | model | tokens that a query sees | bytes |", rows)


def time(page: Page) -> str:
    """Show whose prompts take longest, and say whose decoding is told faster or slower than the full cache's."""
    if not page.timings:
        return "Not measured in this form: `nox -s peers` times every method, on a machine that does nothing else.\n"
    parts = []
    for timing in page.timings:
        names = [name for name in ("kvpress", "transformers", "torch") if timing.versions.get(name)]
        parts.append(
            f"**{timing.model}, prompts of {timing.prompt_length:,} and {timing.new_tokens:,} new tokens**: "
            f"{len(timing.rows)} methods on {timing.device_class}, "
            f"{', '.join(f'{name} {timing.versions[name]}' for name in names)}.\n"
        )
        rows = [
            [f"`{row.method}`", *(f"{pace.ratio:.2f} | {pace.low:.2f} to {pace.high:.2f}" for pace in _paces(row))]
            for row in sorted(timing.rows, key=lambda row: -row.first_token.ratio)[:_SLOWEST]
        ]
        level = f"{100 * (1 - 2 * timing.alpha):.3g}%"
        parts.append(table(f"| slowest prompts | to the first token | {level} | per output token | {level} |", rows))
        parts.append(f"First token: {_said([(row.method, row.first_token) for row in timing.rows], listed=False)}.\n")
        parts.append(f"Decoding: {_said([(row.method, row.output_token) for row in timing.rows], listed=True)}.\n")
        parts.append(f"*Not slower* is by a margin of {timing.margin:.1%}.\n")
    return "\n".join(parts)


def _said(paces: Iterable[tuple[str, Pace]], *, listed: bool) -> str:
    """Count what is told of times; with `listed`, name the methods that are told faster or slower, fastest first."""
    groups: dict[str, list[tuple[str, Pace]]] = {"faster": [], "slower": [], "not slower": [], "undecided": []}
    for method, pace in sorted(paces, key=lambda pair: pair[1].ratio):
        groups[told(pace)[2]].append((method, pace))
    said = []
    for word, mine in groups.items():
        names = ", ".join(f"`{method}` {pace.ratio:.2f}" for method, pace in mine)
        said.append(f"{len(mine)} {word}" + (f" ({names})" if listed and mine and word in ("faster", "slower") else ""))
    return ", ".join(said)


def _paces(row: TimedRow) -> tuple[Pace, Pace]:
    return row.first_token, row.output_token


def models(page: Page) -> str:
    """Compare what a method costs on one model and on another, and name the pairs that they order otherwise."""
    names = [frontier.model for frontier in page.frontiers]
    costs = {f.model: {p.label: p for p in measured(f) if p.changed} for f in page.frontiers}
    shared = [label for label in costs[names[0]] if all(label in costs[name] for name in names)]
    rows = [
        [f"`{label}`", *(f"{costs[name][label].kl:.4f} | {costs[name][label].delta_nll:+.4f}" for name in names)]
        for label in shared
    ]
    head = "| method, budget | " + " | ".join(f"{name}: KL | ΔNLL" for name in names) + " |"
    other = []
    for pair in combinations(shared, 2):
        one, another = ([costs[name][label] for label in pair] for name in names[:2])
        if (one[0].kl - one[1].kl) * (another[0].kl - another[1].kl) < 0 and apart(*one) and apart(*another):
            other.append(f"`{pair[0]}` and `{pair[1]}`")
    said = f"Pairs that KL tells apart on {names[0]} and on {names[1]}, but the other way round: "
    return table(head, rows) + f"\n{said}{'; '.join(other) or 'none'}.\n"


def front(page: Page) -> str:
    """List the Pareto front of the first figure, smallest first."""
    points = [point for point in page.frontiers[0].points if not point.control]
    best = front_of(points, lambda point: max(point.kl, page.frontiers[0].noise_kl))
    rows = [
        [f"`{p.label}`", f"{p.bytes_per_token / p.bytes_per_token_full:.0%}", f"{p.kl:.4f}", f"{p.delta_nll:+.4f}"]
        for p in sorted((points[index] for index in best), key=lambda point: point.bytes_per_token)
    ]
    return table("| on the front | bytes | KL | ΔNLL |", rows)


PARTS: dict[str, Callable[[Page], str]] = {
    part.__name__: part for part in (what, defects, best, disagreement, noise, memory, time, models, front)
}


def written(text: str, page: Page) -> str:
    """Return a text with its parts written anew."""
    return _PART.sub(lambda match: f"{match[1]}{PARTS[match[2]](page)}\n{match[3]}", text)


def picture() -> str:
    """Take the first figure out of the page, and give it its style."""
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    found = re.search(r"<svg (.*?)</svg>", html, re.DOTALL)
    assert found is not None, "the page has no figure"
    head, body = found[1].split(">", 1)
    body = re.sub(r"<a href=[^>]*class=\"([^\"]*)\"[^>]*>", r'<g class="\1">', body).replace("</a>", "</g>")
    return f'<svg xmlns="http://www.w3.org/2000/svg" {head}><style>{_STYLE}</style>{body}</svg>\n'


def main() -> None:
    readme = FOLDER / "README.md"
    readme.write_text(written(readme.read_text(encoding="utf-8"), read()), encoding="utf-8")
    (FOLDER / "frontier.svg").write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
