"""README says what is so: its files, its outputs, its list of modules; docs/targets.md names every kind and trait."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from test_house import ORDER

from knorm.laws import Traits
from knorm.laws.adapters import KINDS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SPEC = spec_from_file_location("readme", ROOT / "tools" / "readme.py")
readme = module_from_spec(SPEC)
SPEC.loader.exec_module(readme)
FILES = [what for kind, what, _ in readme.blocks() if kind == "file"]
COMMANDS = [(what, said) for kind, what, said in readme.blocks() if kind == "run"]


def test_it_stays_short_and_every_block_has_a_source():
    assert len(TEXT.splitlines()) < 200
    assert TEXT.count("```\n") == len(FILES) + len(COMMANDS)


@pytest.mark.parametrize("file", FILES)
def test_a_snippet_is_a_file_of_the_examples(file):
    assert ("file", file, (ROOT / file).read_text(encoding="utf-8")) in readme.blocks()


@pytest.mark.processes
@pytest.mark.parametrize(("command", "said"), COMMANDS, ids=[command.split(" --")[0] for command, _ in COMMANDS])
def test_an_output_is_what_is_printed(command, said):
    printed = readme.truth("run", command)
    assert readme.same(said, printed), printed


@pytest.mark.processes
@pytest.mark.parametrize("name", sorted(file.name for file in (ROOT / "examples").glob("*.py")))
def test_every_example_runs(name):
    command = [sys.executable, *(["-m", "pytest", "-q", "-p", "no:cacheprovider"] if name.startswith("test_") else [])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [*command, name], cwd=ROOT / "examples", env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "False" not in run.stdout


@pytest.mark.parametrize(
    ("said", "printed", "equal"),
    [
        ("PPL 33.84 in 1.2 s", "PPL 33.86 in 9.9 s", True),
        ("PPL 33.84", "PPL 36.84", False),
        ("at most 8e-06 per token", "at most 2e-05 per token", True),
        ("holds", "REFUTED", False),
        ("a\nb", "a", False),
        ("positions [1, 0]", "positions [0, 1]", False),
    ],
)
def test_outputs_agree_but_for_times_and_roundings(said, printed, equal):
    assert readme.same(said, printed) == equal


def test_the_reading_list_is_the_order_of_the_house():
    listed = TEXT.partition("## Reading the code")[2].partition("\n\n`docs/`")[0]
    names = re.findall(r"^\d+\. (.*?):", listed, re.MULTILINE)
    names = [name.strip("`").removesuffix(".py").strip("/") for line in names for name in line.split(", ")]
    behind = re.findall(r"; (`[\w./, `]+`):", listed)
    assert names == sorted(names, key=ORDER[""].split().index)
    named = {*names, *re.findall(r"`(\w+)(?:\.py|/)`", " ".join([listed, *behind]))}
    assert {*ORDER[""].split()} <= named


@pytest.mark.parametrize("name", [*KINDS, *(field.name for field in fields(Traits))])
def test_every_kind_and_trait_is_told(name):
    targets = (ROOT / "docs" / "targets.md").read_text(encoding="utf-8")
    assert re.search(rf"^\| `?{name}`? \|", targets, re.MULTILINE)
