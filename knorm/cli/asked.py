"""What `knorm check` is to try: targets of the command line, what * stands for, and what a project declares."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from knorm.golden.project import DeclaredCheck, Project, find_project
from knorm.laws.names import refuse_unknown
from knorm.laws.process.protocol import Request
from knorm.laws.process.usage import check_request
from knorm.methods.known import lacking
from knorm.methods.targets import expanded

NOTHING = (
    "no TARGET was given, and no knorm.toml declares one as [check.NAME]; a target is path/to/file.py:name, "
    "package.module:name, kvpress:PressName, kvpress:* or transformers:*"
)


@dataclass(frozen=True)
class Asked:
    """Hold one target, and what is asked of it.

    Attributes:
        name: what reports call it: the target, or the name under which a project declares it.
        request: what the worker is sent.
        untested: check -> why it may stay untested.
        again: what is typed to try it once more.
        left_out: why it is not tried; empty where it is.
        in_part: it is a declared check of which only some laws are tried, so that an expected failure may be idle.
    """

    name: str
    request: Request
    untested: Mapping[str, str]
    again: Sequence[str]
    left_out: str = ""
    in_part: bool = False


def asked_of(
    words: Sequence[str], request: Request, untested: Mapping[str, str], alone: Mapping[str, Any]
) -> list[Asked]:
    """List what is to be tried, and refuse what no target can make right.

    Args:
        words: of the command line: targets, and names of declared checks; none: all that the project declares.
        request: what holds for each of them; its target is ignored.
        untested: check -> why it may stay untested.
        alone: options that say something of one target, as they are written, with what was given for each.

    Returns:
        What is asked, in order; a target that stands there twice is tried once.

    Raises:
        ValueError: nothing to be tried, an option that does not fit, or what check_request refuses.
    """
    project = find_project(Path.cwd())
    declared = dict(project.checks) if project else {}
    names = list(words) or [*declared]
    if not names:
        raise ValueError(NOTHING)
    given = next((option for option, value in alone.items() if value), None)
    asked: dict[str, Asked] = {}
    for name in names:
        if ":" not in name and name in declared:
            assert project
            if given:
                raise ValueError(
                    f"{given} is for targets of the command line, but {name} is declared in {project.file.name}"
                )
            asked[name] = _declared(project, name, declared[name], request)
            continue
        if ":" not in name and declared:
            raise ValueError(f"{name!r} is neither a target nor declared in {project.file.name}: {', '.join(declared)}")  # type: ignore[union-attr]
        for target in expanded(name):
            wanted = replace(request, target=target)
            check_request(wanted)
            asked[target] = Asked(target, wanted, untested, _again(wanted), _left_out(name, target))
    vague = [option for option in ("--expect-failure", "--expect-untested") if alone[option]]
    if vague and len(asked) > 1:
        raise ValueError(
            f"{vague[0]} does not say which of {len(asked)} targets it is for: "
            "declare each as [check.NAME] in knorm.toml"
        )
    return [*asked.values()]


def _left_out(word: str, target: str) -> str:
    """Say why one of those that * stands for is not tried: it needs a package that is not there."""
    press = target.partition(":")[2].partition("(")[0]
    lacks = lacking(press) if word.endswith(":*") else ""
    return f"its stand-in weights need {lacks}, which is not installed" if lacks else ""


def _declared(project: Project, name: str, declared: DeclaredCheck, request: Request) -> Asked:
    """Ask what a project declares; it is read as seen from the project's folder."""
    asked = replace(
        request,
        target=declared.target,
        kind=declared.kind,
        like=declared.like,
        traits=tuple(f"{trait}={_written(value)}" for trait, value in declared.traits.items()),
        select=request.select or (tuple(declared.select) if declared.select else None),
        expected=tuple(declared.expected_failures.items()),
        folder=str(project.root),
    )
    try:
        refuse_unknown(declared.expected_untested)
        with contextlib.chdir(project.root):
            check_request(asked)
    except ValueError as error:
        raise ValueError(f"{project.file.name}: check {name}: {error}") from error
    again = ["knorm", "check", name, *_settings(asked)]
    return Asked(name, asked, declared.expected_untested, again, in_part=request.select is not None)


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _again(request: Request) -> list[str]:
    """Write the command with all that decides what a law is tried on, to be shown with one check selected."""
    words = ["knorm", "check", request.target]
    for option, value in (("--as", request.kind), ("--like", request.like)):
        words += [option, value] if value else []
    for trait in request.traits:
        words += ["--trait", trait]
    return words + list(_settings(request))


def _settings(request: Request) -> Iterable[str]:
    """Write the settings that are not the defaults."""
    return _options((("profile", request.profile), ("seed", request.seed), ("device", request.device)))


def _options(settings: Iterable[tuple[str, Any]]) -> Iterator[str]:
    for name, value in settings:
        if value != getattr(Request(""), name):
            yield from (f"--{name}", str(value))
