from __future__ import annotations

import ast
import json
import sys
import tomllib
from pathlib import Path

import pytest
from commands import in_a_new_process

import knorm
from knorm import laws

PACKAGE = Path(knorm.__file__).parent
ORDER = {  # of each package: a module, or a package below, imports only those before it
    "": "policy strict paths files processes sources git limits statistics tensors kernels core schedule "
    "masked_attention rounding model_attention cache perplexity weights gguf models methods bench evaluation engines "
    "golden laws sweep page verify scaffold cli plugin __main__",
    "bench": "latency counters worker policies methods commits",
    "methods": "kinds known budget written restored watch targets method policies caches functions presses door",
    "evaluation": "windows sums damage recovery distinct ways runner curve interventions tokens explain "
    "explain_methods doubts facts published",
    "evaluation.published": "schema measure judge",
    "engines": "frames serving forks llamacpp vllm forced process http conditions boxed partial scorer told endpoint "
    "llama_server asking kept cut ways endpoint_ways",
    "golden": "format shift rules gates project files environment store approval metrics latency pythia cases noise "
    "engine_cases declared verify values workspace history",
    "laws": "traits results targets registry ranked names strategies subjects blame probe oracle model reading witness "
    "replay readings known standins adapters loading shown scripts snippets search "
    "catalogue runner own own_model own_cache process engine engine_shown engine_run endpoint_run",
    "laws.catalogue": "count provenance order identity protection independence selection numerics memory seen "
    "cache perplexity schedule",
    "laws.process": "protocol usage worker start supervisor",
    "sweep": "plan inputs cells folder drive measure local cluster table estimate",
    "page": "form axes figures words matrix text render",
    "cli": "schemas outputs figures numbers options prompts tables timings setting compared engined endpointed "
    "explained verdicts verify asked check ppl explain bench golden_log golden_shown golden swept sweep joined results "
    "paged page init",
    "cli.schemas": "parts quality timing verdicts swept paged",
}
TESTS = Path(__file__).parent
SOURCES = sorted(file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py"))


def tree(source):
    return ast.parse((PACKAGE / source).read_text(encoding="utf-8"))


def module(source):
    """golden/format.py -> golden.format; a package's __init__ -> the package."""
    return source.removesuffix(".py").removesuffix("__init__").strip("/").replace("/", ".")


MODULES = {module(source) for source in SOURCES}


def imported(nodes):
    """Dotted names of what import statements bring in, with each name of a `from` import appended."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def own_modules(names):
    """Those of knorm's modules that dotted names lead to; a public name leads to its home."""
    found = set()
    for name in names:
        parts = name.split(".")[1:] if name.startswith("knorm.") else []
        if len(parts) == 1:
            parts = [knorm._HOME.get(parts[0], parts[0])]
        elif parts[:1] == ["laws"] and parts[1] in laws._HOME:
            parts = ["laws", laws._HOME[parts[1]]]
        while parts and ".".join(parts) not in MODULES:
            parts.pop()
        if parts:
            found.add(".".join(parts))
    return found


def too_early(name, imports):
    """The modules among imports that come after the module `name`, where their ways part."""
    late = set()
    for other in own_modules(imports):
        ours, theirs = name.split("."), other.split(".")
        shared = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if shared is None:
            continue  # one lies in the other
        order = ORDER[".".join(ours[:shared])].split()
        if order.index(theirs[shared]) > order.index(ours[shared]):
            late.add(other)
    return late


LIGHT = ("limits", "policy", "paths", "files", "processes", "sources")
METHODS = ("kinds", "known", "targets")
LAWS = ("traits", "results", "targets", "registry", "names")
COMMANDS = (
    "__init__",
    *(
        "outputs",
        "numbers",
        "options",
        "setting",
        "compared",
        "engined",
        "prompts",
        "verify",
        "check",
        "ppl",
        "explain",
        "bench",
        "golden",
        "golden_log",
        "golden_shown",
        "sweep",
        "page",
        "init",
    ),
)


def run(code):
    return json.loads(in_a_new_process(code, check=True).stdout)


def test_every_module_has_its_place_in_the_house():
    placed = {f"{package}.{name}".strip(".") for package, names in ORDER.items() for name in names.split()}
    assert placed | {""} == MODULES


def test_the_tests_mirror_the_packages():
    packages = {name for name in ORDER[""].split() if (PACKAGE / name).is_dir()}
    needing = {"gpu", "presses"}  # what not every machine has
    assert {file.parent.name for file in TESTS.glob("*/**/test_*.py")} == packages | needing


@pytest.mark.parametrize("source", [source for source in SOURCES if not source.endswith("__init__.py")])
def test_a_module_imports_only_earlier_ones(source):
    names = [*imported(ast.walk(tree(source)))]
    assert not [name for name in names if name.startswith(".")], "imports are absolute"
    assert not too_early(module(source), names)


@pytest.mark.parametrize(
    "line", ["import knorm.cache", "from knorm.cache import KnormCache", "from knorm import cache, KnormCache"]
)
def test_an_import_of_a_later_module_is_noticed(line):
    assert too_early("core", imported(ast.walk(ast.parse(f"def late():\n    {line}")))) == {"cache"}


def test_an_import_across_packages_and_within_one_is_noticed():
    lines = "from knorm.golden import store\nfrom knorm.cli.tables import curve_table"
    assert too_early("evaluation.curve", imported(ast.walk(ast.parse(lines)))) == {"golden.store", "cli.tables"}
    assert too_early("golden.gates", imported(ast.walk(ast.parse(lines)))) == {"golden.store", "cli.tables"}
    assert not too_early("cli.ppl", imported(ast.walk(ast.parse(lines))))


@pytest.mark.parametrize(
    ("source", "others"),
    [
        *((f"cli/{name}.py", {"click"}) for name in COMMANDS),
        *((f"{name}.py", set()) for name in LIGHT),
        ("plugin.py", {"pytest"}),
        *((f"laws/{name}.py", set()) for name in LAWS),
        *((f"methods/{name}.py", set()) for name in METHODS),
        ("laws/process/protocol.py", {"pydantic"}),
        *((f"laws/process/{name}.py", set()) for name in ("usage", "start", "supervisor")),
    ],
)
def test_what_starts_first_loads_little(source, others):
    names = [*imported(tree(source).body)]
    assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "knorm", *others}
    light = {"", *LIGHT, "laws.process.protocol", *(f"cli.{name}" for name in COMMANDS)}  # held to the same
    light |= {f"laws.{name}" for name in LAWS} | {f"methods.{name}" for name in METHODS} | {"methods"}
    assert not own_modules(names) - light, "knorm's own modules load when they are needed"


@pytest.mark.parametrize(
    ("line", "loaded"),
    [
        ("import knorm", []),
        ("from knorm import Policy", []),
        ("import knorm.policy, knorm.cli", []),
        ("import knorm.plugin", []),
        ("import knorm.laws.process.supervisor, knorm.cli.tables", []),
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


LONG = ("kernels.py", "perplexity.py")  # one idea each


def functions_over(most, top):
    """The functions of a syntax tree with more lines than that, nested ones and methods too."""
    functions = [node for node in ast.walk(top) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [node.name for node in functions if node.end_lineno - node.lineno + 1 > most]


def test_a_long_function_is_noticed_wherever_it_stands():
    long = "\n".join(f"            {n}" for n in range(60))
    source = f"class A:\n    def short(self):\n        async def long():\n{long}\n        return long\n"
    assert functions_over(60, ast.parse(source)) == ["short", "long"]
    assert functions_over(63, ast.parse(source)) == []


@pytest.mark.parametrize("source", [source for source in SOURCES if source not in LONG])
def test_a_module_has_400_lines_and_a_function_60_at_most(source):
    assert len((PACKAGE / source).read_text(encoding="utf-8").splitlines()) <= 400
    assert not functions_over(60, tree(source))


def test_everything_public_says_what_it_does():
    bare = []
    for source in SOURCES:
        top = tree(source)
        definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        public = [node for node in top.body if isinstance(node, definitions) and not node.name.startswith("_")]
        bare += [f"{source}: {getattr(node, 'name', '')}" for node in (top, *public) if not ast.get_docstring(node)]
    assert not bare


OPENERS = (
    "Of",
    "Whether",
    "The",
    "A",
    "An",
    "What",
    "How",
    "Where",
    "Why",
)  # of a phrase, not of a sentence with a verb


def unwritten(top):
    """What has a phrase for a docstring: a public name's first line, or any line that begins with "Of" or "Whether"."""
    for node in ast.walk(top):
        said = (
            ast.get_docstring(node) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) else ""
        )
        if said and not node.name.startswith("check_"):  # a law is a claim
            phrase = said.split(maxsplit=1)[0] in OPENERS and not node.name.startswith("_")
            if phrase or any(line.strip().startswith(("Of ", "Whether ")) for line in said.splitlines()):
                yield node.name


def test_a_phrase_in_place_of_a_sentence_is_noticed():
    source = 'def a():\n    """The count."""\ndef b():\n    """Count.\n\n    Of all."""\ndef c():\n    """Count."""'
    assert [*unwritten(ast.parse(source))] == ["a", "b"]


@pytest.mark.parametrize("source", SOURCES)
def test_docstrings_begin_with_a_sentence(source):
    questions = {Path(source).stem} if source.startswith("cli/") else set()  # what a command answers
    assert not {*unwritten(tree(source))} - questions


def test_public_names_resolve_and_are_those_that_type_checkers_see():
    (block,) = (node for node in tree("__init__.py").body if isinstance(node, ast.If))
    seen = {name.rsplit(".", 1)[1]: name.rsplit(".", 1)[0] for name in imported(block.body)}
    assert {name: getattr(knorm, name).__module__ for name in knorm.__all__} == seen
    assert {*knorm.__all__} <= {*dir(knorm)}
    with pytest.raises(AttributeError, match="module 'knorm' has no attribute 'compres'"):
        knorm.compres  # noqa: B018


@pytest.mark.parametrize("package", [knorm, laws])
def test_a_public_name_is_not_a_modules_which_would_take_its_place_once_imported(package):
    folder = Path(package.__file__).parent
    assert not {*package.__all__} & {file.stem for file in folder.iterdir()}


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


@pytest.mark.processes
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
