"""What `knorm check` shows: each verdict as it comes, a line for each family that holds, and how to see one again."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from textwrap import indent, wrap
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from knorm.cli.options import visible
from knorm.cli.tables import print_text

if TYPE_CHECKING:
    from knorm.laws.results import Result

_HEADS = {
    "holds": ("holds    ", "green"),
    "refuted": ("REFUTED  ", "bold red"),
    "expected failure": ("expected ", "yellow"),
    "unexpectedly holds": ("HOLDS THOUGH EXPECTED TO FAIL  ", "bold red"),
    "untested": ("untested ", "yellow"),
    "does not apply": ("n/a      ", "dim"),
    "not run": ("not run  ", "dim"),
    "not loaded": ("NOT LOADED  ", "bold red"),
}
_MOST_LINES = 40  # of a snippet that is shown
_WIDTH = 80  # of a log; a terminal has its own
_AS_IT_IS: dict[str, Any] = {
    "expand_tabs": False,
    "replace_whitespace": False,
    "break_long_words": False,
    "break_on_hyphens": False,
}


class Report:
    """Show the results of `knorm check` as they come.

    Args:
        console: where they are shown.
        command: what was typed, without --select: it is shown again with the name of one check that is refuted.
        verbose: True to show each law that holds, and those that do not apply.
        heading: the target's name, where there are several: what holds of it is one line then.

    Example:
        >>> from knorm.laws.results import Result
        >>> report = Report(Console(width=60), ["knorm", "check", "mine.py:compress"])
        >>> report.add(Result("time_order", "Retained positions ascend.", "order", "holds", 60, answered=60))
        >>> report.close()
        holds    order: time_order [60 tried, 60 answered; 0.0 s]
        1 hold, 0 refuted, 0 untested, 0 do not apply, in 0 s
    """

    def __init__(self, console: Console, command: Sequence[str], verbose: bool = False, heading: str = "") -> None:
        self.console, self.command, self.verbose, self.heading = console, command, verbose, heading
        self.results: list[Result] = []
        self._held: list[Result] = []
        if heading:
            print_text(console, Text(visible(heading), "bold"), soft_wrap=True)

    def add(self, result: Result) -> None:
        """Show a result, or keep it until its family is over."""
        if self._held and self._held[0].family != result.family and not self.heading:
            self._fold()
        self.results.append(result)
        if self.verbose:
            self._show(result)
        elif result.verdict == "holds":
            self._held.append(result)
        elif result.verdict != "does not apply":
            self._show(result)

    def close(self, told: Sequence[str] = ()) -> None:
        """Show what was kept, what is `told` of how it was asked, what was refuted, and how many of each verdict."""
        self._fold()
        for line in told:
            self._write("", (line, "dim"))
        if (count := self._count("does not apply")) and not self.heading:
            names = ", ".join(dict.fromkeys(name for result in self.results for name in result.needs))
            laws = "1 law does" if count == 1 else f"{count} laws do"
            self._write("", (f"{laws} not apply" + (f"; promise more with --trait: {names}" if names else ""), "dim"))
        wrong = [result for result in self.results if result.failed]
        if wrong:
            self._write("", (f"to be mended: {', '.join(result.check for result in wrong)}; to see one alone:", "bold"))
            again = shlex.join([*self.command, "--select", wrong[0].check])
            print_text(self.console, Text(f"    {again}"), soft_wrap=True)  # it is to be copied
        if self.heading:
            return
        style = "bold red" if wrong else "bold yellow" if self._count("untested") else "bold green"
        self._write("", (f"{summary(self.results)}, in {sum(r.seconds for r in self.results):.0f} s", style))

    def _fold(self) -> None:
        if held := self._held:
            names, seconds = ", ".join(result.check for result in held), sum(result.seconds for result in held)
            what = "" if self.heading else f"{held[0].family}: "
            why = dict.fromkeys(result.reason for result in held if result.reason)
            evidence = "; ".join([*why, _tried(held), f"{seconds:.1f} s"])
            self._write("holds", (f"{what}{names} ", ""), (f"[{evidence}]", "dim"))
        self._held = []

    def _show(self, result: Result) -> None:
        name = (f"{result.check}: ", "bold" if result.failed else "")
        self._write(result.verdict, name, (f"{result.law} ", ""), (f"[{_evidence(result)}]", "dim"))
        if result.verdict != "refuted":
            return
        # the name stands in the line above
        said = (result.counterexample or "").removeprefix(f"{result.check.replace('_', ' ')}: ")
        for text in (said, f"given: {result.given}" if result.given else ""):
            for line in text.splitlines():
                self._write("    ", (line, ""))
        if result.snippet and len(lines := result.snippet.splitlines()) > _MOST_LINES:
            said = f"A program of {len(lines)} lines shows it without knorm: add --snippets FOLDER."
            self._write("    ", (said, "dim"))
        elif result.snippet:
            code = Text(f"\n{indent(result.snippet, ' ' * 8)}\n")
            print_text(self.console, code, soft_wrap=True)  # it is to be copied: no line may be broken

    def _write(self, head: str, *parts: tuple[str, str]) -> None:
        write(self.console, head, *parts)

    def _count(self, verdict: str) -> int:
        return sum(result.verdict == verdict for result in self.results)


def write(console: Console, head: str, *parts: tuple[str, str]) -> None:
    """Write a line behind a verdict, or behind blanks; what does not fit stands below it, indented alike.

    Args:
        console: where it is written.
        head: a verdict, or blanks.
        parts: texts, each with its style.
    """
    start = Text(*_HEADS[head]) if head in _HEADS else Text(head)
    body = Text.assemble(*((visible(text), style) for text, style in parts))
    width = (console.width if console.is_terminal else _WIDTH) - len(start)
    at, before = 0, start
    for line in wrap(body.plain, width, **_AS_IT_IS):
        at = body.plain.index(line, at)
        print_text(console, before + body[at : at + len(line)], soft_wrap=True)
        at, before = at + len(line), Text(" " * len(start))


def summary(results: Sequence[Result]) -> str:
    """Count the results by verdict, in words.

    >>> summary([])
    '0 hold, 0 refuted, 0 untested, 0 do not apply'
    """
    counts: Counter[str] = Counter(result.verdict for result in results)
    said = [f"{counts['holds']} hold", f"{counts['refuted']} refuted"]
    for verdict, words in (
        ("expected failure", "failed as expected"),
        ("unexpectedly holds", "held though expected to fail"),
    ):
        said += [f"{counts[verdict]} {words}"] if counts[verdict] else []
    return ", ".join([*said, f"{counts['untested']} untested", f"{counts['does not apply']} do not apply"])


class Summary:
    """Say at the end which of several targets are to be mended, and which were not tried.

    Args:
        console: where it is shown.
        several: False: nothing is shown.
    """

    def __init__(self, console: Console, several: bool) -> None:
        self.console, self.several = console, several
        self._lines: list[tuple[str, str, str]] = []  # a head, the target, what is said of it
        self._results: list[Result] = []
        self._count = 0

    def add(self, name: str, results: Sequence[Result], not_run: str = "", *, wrong: bool = False) -> None:
        """Note what came of a target.

        Args:
            name: the target's.
            results: of its checks.
            not_run: why it was not tried; shown at once.
            wrong: it could not be, though it was asked for.
        """
        self._count += 1
        self._results += results
        for verdict in ("refuted", "unexpectedly holds", "untested"):
            if names := [result.check for result in results if result.verdict == verdict]:
                self._lines.append((verdict, name, ", ".join(names)))
        if not_run:
            self._lines.append(("not loaded" if wrong else "not run", name, not_run))
            write(self.console, self._lines[-1][0], (not_run, ""))

    def close(self) -> None:
        """Show it."""
        if not self.several:
            return
        self.console.print("")
        for head, name, said in self._lines:
            write(self.console, head, (f"{name}: ", "bold"), (said, ""))
        wrong = any(head in ("refuted", "unexpectedly holds", "not loaded") for head, _, _ in self._lines)
        style = "bold red" if wrong else "bold yellow" if self._lines else "bold green"
        write(self.console, "", (f"{self._count} targets: {summary(self._results)}", style))


def _tried(results: Sequence[Result]) -> str:
    """Say how many cases each of several laws was tried on, at the least."""
    least = [min(result.examples for result in results), min(result.answered for result in results)]
    words = f"{least[0]} tried, {least[1]} answered"
    if evicted := [result.evicted for result in results if result.evicted]:
        words += f", {min(evicted)} evicted"
    alike = len({(result.examples, result.answered, result.evicted) for result in results}) == 1
    return words if alike else f"each at least {words}"


def _evidence(result: Result) -> str:
    if result.verdict == "does not apply":
        return result.reason or ""
    refuted = result.verdict in ("refuted", "expected failure")
    tried = f"example {result.examples}" if refuted else _tried([result])
    why = result.reason or ("no drawn case was answered" if result.verdict == "untested" else "")
    parts = [why, tried if result.examples else "", f"{result.seconds:.1f} s"]
    return "; ".join(part for part in parts if part)
