"""Write what docs/peers/results.json says into docs/peers/README.md, and draw its picture: python tools/peers.py

What stands between `<!-- peers: NAME -->` and `<!-- end -->` is written anew; the words around it are a person's. The
picture, frontier.svg, is a figure of the page, for one model and budget. What a person makes of a refutation is read
from tools/exam.toml, as tools/exam.py does.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from math import isclose
from pathlib import Path
from statistics import median

from scipy.special import stdtrit
from scipy.stats import spearmanr

from knorm.page.figures import front_of
from knorm.page.form import Frontier, Judged, MethodVerdicts, Pace, Page, Point, Source, TimedRow
from knorm.page.render import render
from knorm.page.words import told
from knorm.sources import SMOLLM2
from knorm.statistics import smallest_difference

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "peers"
GPU = FOLDER / "gpu"  # prompts of 2,048 tokens: `nox -s peers -- --gpu`
_PART = re.compile(r"(<!-- peers: (\w+) -->\n\n).*?(<!-- end -->)", re.DOTALL)
_WINDOWS = (32, 128, 512)
_TARGET = 0.01  # nats, 1% of perplexity
_SLOWEST = 8  # rows, of the slowest or of those whose place differs most
_FEW = 8  # methods, below which an order of them says little
_BUDGETS = (0.5, 0.1)
_HELD, _SEEN = 0.9, 0.8  # shares: more bytes than the one at fewer tokens than the other have not been freed
_STYLE = (
    "svg{background:#fff}text{fill:#1b1f24;font:12px system-ui,sans-serif}.y{text-anchor:end}.x,.name,.point text"
    "{text-anchor:middle}.name,.minor{fill:#57606a}.band{fill:#8c959f55}.rule{stroke:#d0d7de}.tick,.axis,.full"
    "{stroke:#57606a;fill:none}.full{stroke-dasharray:2 4}.front{stroke:#0550ae;fill:none;opacity:.6}.point circle"
    "{fill:#fff;stroke:#0550ae;stroke-width:1.8}.best circle{fill:#0550ae}.bar{stroke:#0550ae;opacity:.55}.point text"
    "{font-size:11px}"
)


def read(folder: Path = FOLDER) -> Page:
    """Read the JSON of the page in `folder`."""
    fields = json.loads((folder / "results.json").read_text(encoding="utf-8"))
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
    said = f"- {source.name}: {', '.join(f'{name} {source.versions[name]}' for name in names)}"
    said += f"; {source.cells} cells" if source.cells is not None else ""
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
    """Count the pairs that perplexity and KL order otherwise, and show those that KL tells apart most clearly."""
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
        clearest = {a.label: (a, b) for a, b in sorted(sure, key=lambda pair: -pair[1].kl / pair[0].kl)}
        rows = [
            [f"`{a.label}`", f"{a.delta_nll:+.4f}", f"{a.kl:.4f}", f"`{b.label}`", f"{b.delta_nll:+.4f}", f"{b.kl:.4f}"]
            for a, b in sorted(clearest.values(), key=lambda pair: pair[1].kl / pair[0].kl)[:_SLOWEST]
        ]
        if rows:
            parts.append(table("| better by perplexity | ΔNLL | KL | better by KL | ΔNLL | KL |", rows))
    return "\n".join(parts)


def _otherwise(one: Point, other: Point) -> bool:
    return (one.delta_nll - other.delta_nll) * (one.kl - other.kl) < 0


def best(page: Page) -> str:
    """Show which methods cost least by KL, at two budgets, on each model that kvpress runs on."""
    parts = []
    for frontier, budget in ((f, budget) for f in page.frontiers[:2] for budget in _BUDGETS):
        mine = sorted((p for p in measured(frontier) if p.keep_ratio == budget), key=lambda point: point.kl)
        by_nll = sorted(mine, key=lambda point: point.delta_nll)
        rows = [
            [f"`{p.method}`", f"{p.kl:.4f}", f"{p.kl_low:.4f} to {p.kl_high:.4f}", f"{p.delta_nll:+.4f}",
             by_nll.index(p) + 1, f"{p.same_top:.1%}", f"{p.bytes_per_token / p.bytes_per_token_full:.0%}"]
            for p in mine[:_SLOWEST]
        ]  # fmt: skip
        where = f"{frontier.model}, keep {budget}, {len(mine)} methods"
        parts.append(table(f"| {where} | KL | 95% | ΔNLL | rank by ΔNLL | same top | bytes |", rows))
    return "\n".join(parts)


def alike(page: Page) -> str:
    """List methods of different names that cost the same, up to rounding, at every budget that both were given."""
    found: dict[str, list[Frontier]] = {}
    for frontier in page.frontiers:
        methods: dict[str, dict[object, Point]] = {}
        for p in measured(frontier):
            if p.changed:
                methods.setdefault(p.method, {})[p.keep_ratio, p.keep_tokens] = p
        for one, other in combinations(methods, 2):
            pairs = [(methods[one][budget], p) for budget, p in methods[other].items() if budget in methods[one]]
            if pairs and all(isclose(a.kl, b.kl, rel_tol=1e-5) and a.source == b.source for a, b in pairs):
                found.setdefault(f"`{one}` and `{other}`", []).append(frontier)
    return "".join(f"- {names}: {_where(page, there)}\n" for names, there in found.items())


def _where(page: Page, frontiers: Iterable[Frontier]) -> str:
    """Name the models of `frontiers`, and the texts of those that are not among them with every text."""
    texts: dict[str, list[str]] = {}
    for frontier in frontiers:
        texts.setdefault(frontier.model, []).append(frontier.text)
    every = {model: [f.text for f in page.frontiers if f.model == model] for model in texts}
    return ", ".join(
        model if read == every[model] else f"{model} on {' and '.join(read)} alone" for model, read in texts.items()
    )


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
    least: dict[str, tuple[float, float, str, list[str]]] = {}
    for frontier in page.frontiers:
        tokens = next(point.mean_seen for point in frontier.points if point.control)
        for p in measured(frontier):
            held, seen = p.bytes_per_token / p.bytes_per_token_full, p.mean_seen / tokens
            if held <= 1.001 and (held <= _HELD or seen >= _SEEN):
                continue
            before = least.get(p.method, (2.0, 0.0, "", []))
            names = [*before[3], *([] if frontier.model in before[3] else [frontier.model])]
            least[p.method] = (seen, held, p.label, names) if seen < before[0] else (*before[:3], names)
    rows = [
        [f"`{label}`", ", ".join(names), f"{seen:.0%}", f"{held:.0%}"] for seen, held, label, names in least.values()
    ]
    return table("| method, smallest budget | models | tokens that a query sees | bytes |", rows)


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


def gpu_time(_: Page) -> str:
    """Show the same of the GPU's page."""
    return time(read(GPU))


def models(page: Page) -> str:
    """Compare what methods cost on the first figure's model with what they cost on each other one."""
    first = page.frontiers[0]
    others = [f for f in page.frontiers[1:] if (f.text, f.prompt_length) == (first.text, first.prompt_length)]
    return "\n".join(_compared(first, other, first.model, other.model) for other in others)


def texts(page: Page) -> str:
    """Compare what methods cost each model on its first text with what they cost on its other ones; where there are few
    methods, an order of them says little."""
    parts = []
    for first in page.frontiers:
        if max(Counter(p.keep_ratio for p in measured(first) if p.keep_ratio).values()) < _FEW:
            continue
        mine = [f for f in page.frontiers if (f.model, f.prompt_length) == (first.model, first.prompt_length)]
        if first is mine[0]:
            parts += [_compared(first, f, *(f"{each.model} on {each.text}" for each in (first, f))) for f in mine[1:]]
    return "\n".join(parts) or "Not measured in this form: `nox -s peers` reads another text too.\n"


def prompts(page: Page) -> str:
    """Compare what methods cost after the prompts of this page with what they cost after those of the GPU's."""
    parts = []
    for long in read(GPU).frontiers:
        short = next(f for f in page.frontiers if (f.model, f.text) == (long.model, long.text))
        parts.append(_compared(short, long, *(f"{f.model}, prompts of {f.prompt_length:,}" for f in (short, long))))
    return "\n".join(parts)


def _compared(one: Frontier, other: Frontier, here: str, there: str) -> str:
    """Say how far two frontiers put methods in the same order, and show whose place differs most."""
    mine, theirs = ({point.label: point for point in measured(f) if point.changed} for f in (one, other))
    shared = [(mine[label], theirs[label]) for label in mine if label in theirs]
    lines, moved = [], []
    for budget in sorted({here.keep_ratio for here, _ in shared if here.keep_ratio}, reverse=True):
        both = [pair for pair in shared if pair[0].keep_ratio == budget]
        if len(both) < _FEW:
            continue
        ranks = [[sorted(x.kl for x in column).index(y.kl) + 1 for y in column] for column in zip(*both, strict=True)]
        pairs = [(a, b) for a, b in combinations(both, 2) if a[0].source == b[0].source]  # letters are a source's own
        told = [(a, b) for a, b in pairs if apart(a[0], b[0]) and apart(a[1], b[1])]
        turned = sum((a[0].kl - b[0].kl) * (a[1].kl - b[1].kl) < 0 for a, b in told)
        lines.append([budget, len(both), f"{spearmanr(*ranks).statistic:.2f}", len(told), turned])
        moved += [(abs(there - here), here, there, *pair) for here, there, pair in zip(*ranks, both, strict=True)]
    head = "| keep | methods in both | rank correlation of KL | pairs apart in both | of these the other way round |"
    rows = [
        [f"`{a.label}`", f"{a.kl:.4f}", f"{a.delta_nll:+.4f}", place, f"{b.kl:.4f}", f"{b.delta_nll:+.4f}", other_place]
        for _, place, other_place, a, b in sorted(moved, key=lambda row: -row[0])[:_SLOWEST]
    ] or [
        [f"`{a.label}`", f"{a.kl:.4f}", f"{a.delta_nll:+.4f}", "-", f"{b.kl:.4f}", f"{b.delta_nll:+.4f}", "-"]
        for a, b in shared
    ]
    said = f"**{here}** and **{there}**\n\n" + (table(head, lines) if lines else "")
    columns = f"| method, budget | {here}: KL | ΔNLL | place | {there}: KL | ΔNLL | place |"
    return f"{said}\n{table(columns, rows)}"


def front(page: Page) -> str:
    """List the Pareto front of the first figure, smallest first."""
    points = [point for point in page.frontiers[0].points if not point.control]
    best = front_of(points, lambda point: max(point.kl, page.frontiers[0].noise_kl))
    rows = [
        [f"`{p.label}`", f"{p.bytes_per_token / p.bytes_per_token_full:.0%}", f"{p.kl:.4f}", f"{p.delta_nll:+.4f}"]
        for p in sorted((points[index] for index in best), key=lambda point: point.bytes_per_token)
    ]
    return table("| on the front | bytes | KL | ΔNLL |", rows)


def shown(page: Page) -> Frontier:
    """Choose what the picture shows: the public model, and what keeps half or takes no budget."""
    frontier = next(frontier for frontier in page.frontiers if frontier.model == SMOLLM2)
    points = [p for p in frontier.points if p.keep_ratio in (0.5, None) and p.keep_tokens is None]
    return frontier.model_copy(update={"points": points})


def numbers(page: Page) -> str:
    """List the points of the picture by their numbers."""
    points = shown(page).points
    short = [re.sub(r"^kvpress:(\w+).*", r"\1", point.method) for point in points]
    named = (f"{at} {name}" for at, (name, p) in enumerate(zip(short, points, strict=True), 1) if not p.control)
    return f"*{', '.join(named)}.*\n"


PARTS: dict[str, Callable[[Page], str]] = {
    part.__name__: part
    for part in (
        numbers,
        what,
        defects,
        best,
        front,
        alike,
        disagreement,
        noise,
        memory,
        time,
        gpu_time,
        models,
        texts,
        prompts,
    )
}


def written(text: str, page: Page) -> str:
    """Return a text with its parts written anew."""
    return _PART.sub(lambda match: f"{match[1]}{PARTS[match[2]](page)}\n{match[3]}", text)


def picture(page: Page) -> str:
    """Draw what `shown` chooses as the page does, with a style of its own."""
    html = render(page.model_copy(update={"frontiers": [shown(page)]}))
    found = re.search(r"<svg (.*?)</svg>", html, re.DOTALL)
    assert found is not None, "the page has no figure"
    head, body = found[1].split(">", 1)
    body = re.sub(r"<a href=[^>]*class=\"([^\"]*)\"[^>]*>", r'<g class="\1">', body).replace("</a>", "</g>")
    return f'<svg xmlns="http://www.w3.org/2000/svg" {head}><style>{_STYLE}</style>{body}</svg>\n'


def main() -> None:
    readme = FOLDER / "README.md"
    readme.write_text(written(readme.read_text(encoding="utf-8"), read()), encoding="utf-8")
    (FOLDER / "frontier.svg").write_text(picture(read()), encoding="utf-8")


if __name__ == "__main__":
    main()
