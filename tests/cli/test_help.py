"""What --help says, at the width of an ordinary terminal."""

import re

import click
import pytest

from knorm.cli import cli
from knorm.cli.numbers import Above, AtLeast, Numbers


def commands(group=cli, path="knorm"):
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, f"{path} {name}")


COMMANDS = dict(commands())
OPTIONS = [
    (path, option)
    for path, command in COMMANDS.items()
    for option in command.params
    if isinstance(option, click.Option)
]


def shown(path, width=80):
    context = click.Context(COMMANDS[path], info_name=path, terminal_width=width)
    return COMMANDS[path].get_help(context)


@pytest.mark.parametrize("path", COMMANDS)
def test_help_fits_an_ordinary_terminal_and_nothing_is_cut(path):
    said = shown(path)
    assert max(map(len, said.splitlines())) <= 80
    assert "..." not in re.sub(r"\]\.\.\.|\|FILE\.\.\.|cuda:1\s+\.\.\.|\[,N\.\.\.\]", "", said)


def said_of(path, option):
    """The help of one option, in a line."""
    record = option.get_help_record(click.Context(COMMANDS[path], info_name=path))
    return " ".join(record[1].split())


@pytest.mark.parametrize(("path", "option"), OPTIONS, ids=lambda part: getattr(part, "name", part))
def test_a_number_has_a_least_one_that_help_names(path, option):
    kind, said = option.type, said_of(path, option)
    if kind in (click.INT, click.FLOAT):
        assert option.name == "seed", "whole numbers are AtLeast something, others Above zero"
    if isinstance(kind, AtLeast):
        assert f"x>={kind.least}]" in said
    elif isinstance(kind, Above):
        assert "x>0]" in said
    elif isinstance(kind, Numbers) and kind.least:
        assert f"at least {kind.least}" in said
    elif isinstance(kind, Numbers) and kind.least is None:
        assert "in (0, 1]" in said


@pytest.mark.parametrize(("path", "option"), OPTIONS, ids=lambda part: getattr(part, "name", part))
def test_what_may_be_repeated_says_so(path, option):
    assert ("May be repeated" in said_of(path, option)) == bool(option.multiple)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("golden record prefill --runs 2", "--runs 2, but should be at least 3: one run cannot show that runs agree"),
        ("bench --rounds 7", "--rounds 7, but should be at least 8: fewer cannot tell noise from change"),
        ("bench --new-tokens 50,1", "--new-tokens 1, but should be at least 2"),
        ("bench --seconds inf", "--seconds inf, but should be seconds above 0"),
        ("ppl --keep-tokens 0", "--keep-tokens 0, but should be at least 1"),
        ("ppl --skip-layers 0,-1", "--skip-layers -1, but should be at least 0"),
        ("explain --worst 0", "--worst 0, but should be at least 1"),
    ],
)
def test_a_number_below_the_least_is_refused_before_anything_heavy_is_loaded(run_knorm, line, said):
    assert run_knorm(*line.split()) == (2, "", f"knorm: {said}\n")
