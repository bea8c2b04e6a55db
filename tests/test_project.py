"""What surrounds the package: its citation, its pins, the hooks and the jobs that GitHub runs."""

from __future__ import annotations

import tomllib
from pathlib import Path

import yaml

import knorm
from knorm import core

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


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
    for file in ("tox.ini", "noxfile.py"):
        words = " ".join((ROOT / file).read_text().replace('", "', " ").split())
        assert all(command in words for command in ("ruff check .", "ruff format --check .", "codespell")), file
