from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import knorm

PACKAGE = Path(knorm.__file__).parent
ORDER = [
    "policy",
    "strict",
    "files",
    "interval",
    "kernels",
    "core",
    "schedule",
    "masked_attention",
    "cache",
    "perplexity",
    "weights",
    "models",
    "latency",
    "counters",
    "bench_worker",
    "paired",
    "bench",
    "versus",
    "evaluation",
    "explain",
    "sanity",
    "reported",
    "facts",
    "golden",
    "store",
    "latency_cases",
    "cases",
    "laws",
    "supervisor",
    "verify",
    "report",
    "bench_report",
    "plugin",
    "options",
    "bench_cli",
    "golden_cli",
    "cli",
]
SOURCES = sorted(file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py"))


def tree(source):
    return ast.parse((PACKAGE / source).read_text(encoding="utf-8"))


def module(source):
    return Path(source).parts[0].removesuffix(".py")


def imported(nodes):
    """Dotted names of what import statements bring in, with each name of a `from` import appended."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def own_modules(names):
    """Those of knorm's modules that dotted names lead to; a public name leads to its home."""
    inside = {name.split(".")[1] for name in names if name.startswith("knorm.")}
    return {knorm._HOME.get(name, name) for name in inside} & {*ORDER}


def too_early(name, imports):
    return own_modules(imports) - {*ORDER[: ORDER.index(name)], name}


def run(code):
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    return json.loads(
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True).stdout
    )


def test_every_module_has_its_place_in_the_house():
    assert {module(source) for source in SOURCES} == {*ORDER, "__init__"}


@pytest.mark.parametrize("source", [source for source in SOURCES if source != "__init__.py"])
def test_a_module_imports_only_earlier_ones(source):
    names = [*imported(ast.walk(tree(source)))]
    assert not [name for name in names if name.startswith(".")], "imports are absolute"
    assert not too_early(module(source), names)


@pytest.mark.parametrize(
    "line", ["import knorm.cache", "from knorm.cache import KnormCache", "from knorm import cache, KnormCache"]
)
def test_an_import_of_a_later_module_is_noticed(line):
    assert too_early("core", imported(ast.walk(ast.parse(f"def late():\n    {line}")))) == {"cache"}


@pytest.mark.parametrize(
    ("source", "others"),
    [
        ("cli.py", {"click"}),
        ("bench_cli.py", {"click"}),
        ("golden_cli.py", {"click"}),
        ("options.py", {"click"}),
        ("plugin.py", {"pytest"}),
        ("supervisor.py", set()),
    ],
)
def test_what_starts_first_loads_little(source, others):
    names = [*imported(tree(source).body)]
    assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "knorm", *others}
    light = {"options", "bench_cli", "golden_cli"}  # held to the same
    assert not own_modules(names) - light, "knorm's own modules load when they are needed"


@pytest.mark.parametrize(
    ("line", "loaded"),
    [
        ("import knorm", []),
        ("from knorm import Policy", []),
        ("import knorm.policy, knorm.cli", []),
        ("import knorm.plugin", []),
        ("import knorm.supervisor, knorm.report", []),
        ("import knorm.core", ["torch"]),  # so the probe can fail
        ("import knorm.schedule", ["torch", "numba"]),
    ],
)
def test_nothing_heavy_loads_before_it_is_used(line, loaded):
    heavy = ["torch", "transformers", "numba", "hypothesis", "datasets", "matplotlib"]
    code = f"{line}\nimport sys, json; print(json.dumps([name for name in {heavy} if name in sys.modules]))"
    assert run(code) == loaded


def test_the_core_stays_under_200_lines():
    assert len((PACKAGE / "core.py").read_text().splitlines()) < 200


def test_everything_public_says_what_it_does():
    bare = []
    for source in SOURCES:
        top = tree(source)
        definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        public = [node for node in top.body if isinstance(node, definitions) and not node.name.startswith("_")]
        bare += [f"{source}: {getattr(node, 'name', '')}" for node in (top, *public) if not ast.get_docstring(node)]
    assert not bare


def test_public_names_resolve_and_are_those_that_type_checkers_see():
    (block,) = (node for node in tree("__init__.py").body if isinstance(node, ast.If))
    seen = {name.rsplit(".", 1)[1]: name.rsplit(".", 1)[0] for name in imported(block.body)}
    assert {name: getattr(knorm, name).__module__ for name in knorm.__all__} == seen
    assert {*knorm.__all__} <= {*dir(knorm)}
    with pytest.raises(AttributeError, match="module 'knorm' has no attribute 'compres'"):
        knorm.compres  # noqa: B018


REGISTRIES = """
import importlib, json
from transformers import AttentionInterface, AttentionMaskInterface
registries = AttentionInterface(), AttentionMaskInterface()
names = lambda: [sorted(registry.keys()) for registry in registries]
before = names()
import knorm.cache
once = names()
importlib.reload(knorm.cache)
new = [sorted({*after} - {*earlier}) for after, earlier in zip(once, before)]
print(json.dumps({"new": new, "same": names() == once}))
"""


def test_transformers_gets_one_name_in_each_registry_however_often_knorm_loads():
    assert run(REGISTRIES) == {"new": [["knorm"], ["knorm"]], "same": True}


def test_the_version_has_one_source():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["hatch"]["version"]["path"] == "knorm/__init__.py"
    (assigned,) = (
        node.value.value
        for node in tree("__init__.py").body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__version__"
    )
    assert assigned == knorm.__version__
