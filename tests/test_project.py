"""What surrounds the package: its citation, its pins, the hooks and the jobs that GitHub runs."""

from __future__ import annotations

import ast
import configparser
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import yaml

import knorm
from knorm import core
from knorm.cli import cli

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TOX = configparser.ConfigParser(interpolation=None)
TOX.read(ROOT / "tox.ini")
WORKFLOWS = sorted(file.relative_to(ROOT).as_posix() for file in (ROOT / ".github" / "workflows").glob("*.yml"))


def load(file):
    return yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))


def test_the_citation_is_of_this_version_and_of_the_paper_that_the_core_names():
    citation = load("CITATION.cff")
    assert citation["version"] == knorm.__version__
    assert citation["license"] == PROJECT["project"]["license"]
    assert citation["authors"] == PROJECT["project"]["authors"]
    (paper,) = citation["references"]
    source = " ".join(core.__doc__.split())
    assert f'"{paper["title"]}", {paper["conference"]["name"]}' in source
    assert ", ".join(author["family-names"] for author in paper["authors"]) in source


def test_the_source_distribution_has_what_its_tests_read():
    sdist = {*PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]}
    assert {f"/{PROJECT['tool']['pytest']['ini_options']['testpaths'][0]}", "/golden", "/docs", "/examples"} <= sdist
    assert {"/CITATION.cff", "/.ci", "/.github", "/.pre-commit-config.yaml", "/noxfile.py", "/tox.ini"} <= sdist


def test_an_index_finds_the_plugin_and_the_types():
    assert {"Framework :: Pytest", "Typing :: Typed"} <= {*PROJECT["project"]["classifiers"]}
    assert (Path(knorm.__file__).parent / "py.typed").is_file()
    assert PROJECT["project"]["entry-points"]["pytest11"]


def test_the_hooks_run_the_pinned_versions():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    hooks = {repo["repo"].split("/")[-1]: repo for repo in load(".pre-commit-config.yaml")["repos"]}
    assert {name: repo["rev"] for name, repo in hooks.items()} == {
        "ruff-pre-commit": f"v{pins['ruff']}",
        "codespell": f"v{pins['codespell']}",
    }
    assert [hook["id"] for hook in hooks["ruff-pre-commit"]["hooks"]] == ["ruff-check", "ruff-format"]


def test_what_the_hooks_run_is_what_tox_and_nox_run():
    tox = TOX["testenv:lint"]["commands"].split("\n")
    nox = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    for command in ("ruff check .", "ruff format --check .", "codespell"):
        assert command in tox
        assert f"session.run({', '.join(map(json.dumps, command.split()))})" in nox


def test_two_test_modules_of_one_name_are_two_and_find_what_lies_in_tests(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for folder, number in (("tests", 1), ("tests/gpu", 2), ("tests/laws", 2)):
        (tmp_path / folder).mkdir()
        test = f"from helper import number\n\ndef test_{number}():\n    assert number({number}) == {number}\n"
        (tmp_path / folder / "test_same.py").write_text(test)
    (tmp_path / "tests" / "helper.py").write_text("def number(n):\n    return n\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1].startswith("3 passed"), result.stdout


def test_contributors_are_told_which_tests_a_desk_skips():
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    marked = [file for file in (ROOT / "tests").rglob("test_*.py") if "\n@pytest.mark.processes\n" in file.read_text()]
    assert len(marked) >= 2
    for words in ("KNORM_PROCESSES=1", "`tests/gpu`", "`tests/presses`", *(f"`{file.name}`" for file in marked)):
        assert words in contributing, words


def run_lines(workflow):
    """The lines of a workflow's run steps."""
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    return [line for step in steps for line in step.get("run", "").splitlines()]


def nox_sessions():
    """The names of the functions in noxfile.py that are decorated as sessions."""
    functions = [
        node for node in ast.parse((ROOT / "noxfile.py").read_text()).body if isinstance(node, ast.FunctionDef)
    ]
    return {node.name for node in functions if "nox.session" in " ".join(map(ast.unparse, node.decorator_list))}


def lacking(line):
    """What a command line asks for that is not there: environments, sessions, subcommands, files."""
    words = shlex.split(line, comments=True)
    names = [Path(word).name for word in words]
    after = dict(itertools.pairwise(words))
    asked, there = set(), set()
    if "tox" in names and "-e" in after:
        asked = {*after["-e"].split(",")}
        there = {section.removeprefix("testenv:") for section in TOX} | {*TOX["tox"]["env_list"].split(", "), "py"}
    elif "nox" in names and "-s" in after:
        asked, there = {after["-s"]}, nox_sessions()
    elif "pip" in names and "-c" in after:
        asked, there = {after["-c"]}, {file.name for file in ROOT.iterdir()}
    elif "knorm" in names:
        command = next(word for word in words[names.index("knorm") + 1 :] if not word.startswith("-"))
        asked, there = {command}, {*cli.list_commands(click.Context(cli))}
    return asked - there


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('"$tmp/venv/bin/tox" -qq -e lint,kvpres -- -x', {"kvpres"}),
        ("nox -s transformer", {"transformer"}),
        ("pip install -c constraint.txt tox", {"constraint.txt"}),
        ("knorm verifies -q", {"verifies"}),
        ("tox -e py,lint # tox -e nothing", set()),
    ],
)
def test_a_command_that_does_not_exist_is_noticed(line, words):
    assert lacking(line) == words


@pytest.mark.parametrize("file", [*WORKFLOWS, ".ci/run", "CONTRIBUTING.md"])
def test_what_is_called_exists(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    if file in WORKFLOWS:
        lines = run_lines(load(file))
        assert {shlex.split(line)[0].split("/")[-1] for line in lines} <= {
            "cd",
            "knorm",
            "nox",
            "pip",
            "python",
            "python3",
            "test",
            "tox",
        }
    elif file == ".ci/run":
        lines = [line for line in text.splitlines() if "tox" in line and not line.startswith("#")]
    else:
        lines = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    assert lines
    assert not {line: lacking(line) for line in lines if lacking(line)}


@pytest.mark.parametrize("file", WORKFLOWS)
def test_a_workflow_is_pinned_modest_and_alone(file):
    workflow = load(file)
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    actions = [step["uses"] for step in steps if "uses" in step]
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@((release/)?v\d+(\.\d+)*|[0-9a-f]{40})", action) for action in actions)
    assert workflow["permissions"] == {"contents": "read"}
    assert {*workflow["concurrency"]} == {"group", "cancel-in-progress"}
    for step in steps:
        if step.get("uses", "").startswith("actions/setup-python") and "release" not in file:  # which trusts no cache
            assert step["with"]["cache"] == "pip"
            assert (ROOT / step["with"]["cache-dependency-path"]).is_file()


def test_ci_runs_once_for_a_change_and_not_for_a_superseded_one():
    workflow = load(".github/workflows/ci.yml")
    assert workflow[True] == {"push": {"branches": ["main"]}, "pull_request": None}  # YAML 1.1 reads `on` as true
    assert workflow["concurrency"]["cancel-in-progress"] is True
    called = run_lines(workflow)
    assert {"tox -e py -- --require-goldens", "tox -e kvpress", "tox -e lint,types"} <= {*called}
    tested = workflow["jobs"]["cpu"]["strategy"]["matrix"]["python"]
    assert [f"py{version.replace('.', '')}" for version in tested] == TOX["tox"]["env_list"].split(", ")[: len(tested)]


def test_every_week_the_oldest_and_the_newest_transformers_are_tried():
    workflow = load(".github/workflows/weekly.yml")
    assert {*workflow[True]} == {"schedule", "workflow_dispatch"}
    assert "nox -s transformers" in run_lines(workflow)


def test_a_release_is_a_tag_that_is_the_version_and_needs_no_password():
    workflow = load(".github/workflows/release.yml")
    assert workflow[True] == {"push": {"tags": ["v*"]}}
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    assert publish["needs"] == "build"
    assert publish["environment"] == "pypi"
    assert publish["permissions"] == {"id-token": "write"}
    assert "secrets." not in (ROOT / ".github/workflows/release.yml").read_text()
    (check,) = (step["run"] for step in build["steps"] if "GITHUB_REF_NAME" in step.get("run", ""))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for tag, code in ((f"v{knorm.__version__}", 0), ("v99.0", 1), (knorm.__version__, 1)):
        environment = {**os.environ, "GITHUB_REF_NAME": tag, "PATH": path, "PYTHONPATH": str(ROOT)}
        assert subprocess.run(["bash", "-c", check], cwd=ROOT, env=environment, check=False).returncode == code


def test_a_bug_report_brings_the_verdicts_and_the_counterexample():
    form = load(".github/ISSUE_TEMPLATE/bug.yml")
    assert {"name", "description", "body"} <= {*form}
    required = {field["id"]: field["attributes"] for field in form["body"] if field["validations"]["required"]}
    assert "`knorm verify --json`" in required["verify"]["label"]
    assert "counterexample" in required["counterexample"]["label"]
    quoted = [line for field in form["body"] for line in re.findall(r"`(knorm [^`]+)`", str(field["attributes"]))]
    assert not [line for line in quoted if lacking(line)]


@pytest.mark.parametrize("tool", sorted((ROOT / "tools").glob("*.py")), ids=lambda file: file.stem)
def test_what_a_tool_takes_from_the_package_is_there(tool):
    for node in ast.walk(ast.parse(tool.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "knorm":
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")
