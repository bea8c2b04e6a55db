"""The examples in docstrings run, and the docstrings of public names say what goes in and what comes out."""

from __future__ import annotations

import ast
import builtins
import doctest
import inspect
import re
import types
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from typing import Literal

import pytest
import torch
from test_house import SOURCES, module, tree

import knorm
from knorm import laws

PUBLIC = {f"{package.__name__}.{name}": getattr(package, name) for package in (knorm, laws) for name in package.__all__}
NAMES = {"knorm": knorm, "torch": torch, **{name: getattr(knorm, name) for name in knorm.__all__}}
SILENT = ("None", "NoReturn", "Iterator[None]")  # a context may yield nothing
MODULES = [name for name in map(module, SOURCES) if name != "__main__"]


def sections(thing):
    """The sections of a docstring, or of that of a thing, title -> text."""
    said = thing if isinstance(thing, str) else inspect.getdoc(thing) or ""
    parts = re.split(r"^(Args|Returns|Yields|Raises|Attributes|Example):\n", said, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def entries(text):
    """What a section has entries for: `name: ...` at its first indentation."""
    return {*re.findall(r"^ {4}(\w+): ", text, re.MULTILINE)}


def functions(thing):
    """A function itself; of a class, the public methods that it defines."""
    if inspect.isfunction(thing):
        yield thing
    elif inspect.isclass(thing):
        for name, method in vars(thing).items():
            if not name.startswith("_") and inspect.isfunction(method) and method.__name__ != "<lambda>":
                yield method


def lacking(thing):
    """What the docstrings of a public name do not say."""
    if isinstance(thing, type):
        kept = [field.name for field in fields(thing)] if is_dataclass(thing) else getattr(thing, "_fields", ())
        if missing := {*kept} - entries(sections(thing).get("Attributes", "")):
            yield f"{thing.__name__}: attributes {missing}"
    for function in functions(thing):
        signature, said = inspect.signature(inspect.unwrap(function)), sections(function)
        taken = {*signature.parameters} - {"self"}
        own = vars(knorm.KnormCache).values()  # a transformers cache: short, and documented there
        if function not in own and taken != entries(said.get("Args", "")):
            yield f"{function.__qualname__}: arguments {taken ^ entries(said.get('Args', ''))}"
        if function not in own and signature.return_annotation not in SILENT and not {"Returns", "Yields"} & {*said}:
            yield f"{function.__qualname__}: what it returns"


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_docstring_names_every_argument_attribute_and_result(name):
    assert not [*lacking(PUBLIC[name])]


def test_a_gap_in_a_docstring_is_noticed():
    def gap(keys: int, values: int) -> int:
        """Do something.

        Args:
            keys: what is given.
        """

    assert [words.rpartition(".")[2] for words in lacking(gap)] == ["gap: arguments {'values'}", "gap: what it returns"]


ELSEWHERE = {"property", "cached_property", "model_validator", "field_validator", "check", "fixture", "jit"}
BRIEF = 2  # arguments that a sentence may name in place of a list


def defined(top, home):
    """The functions without underscore, methods and constructors of a syntax tree: (name, node, docstring).

    Left out is what keeps to an interface that is documented elsewhere: methods that a base class has too, pydantic's
    validators, laws (of a compressor, a cache, an engine), pytest's hooks and fixtures, Triton's kernels.
    """
    laws = {law.__name__ for law in getattr(home, "LAWS", ())}  # of engines
    for node in top.body:
        inside = isinstance(node, ast.ClassDef) and not node.name.startswith("_")
        bases = getattr(home, node.name).__mro__[1:] if inside else ()
        for part in node.body if inside else [node]:
            if not isinstance(part, ast.FunctionDef):
                continue
            marks = {word for mark in part.decorator_list for word in re.findall(r"\w+", ast.unparse(mark))}
            if inside and part.name == "__init__":
                yield node.name, part, ast.get_docstring(node) or ""
            inherited = any(hasattr(base, part.name) for base in bases)
            if not (inherited or part.name.startswith(("_", "pytest_")) or marks & ELSEWHERE or part.name in laws):
                yield f"{node.name}.{part.name}" if inside else part.name, part, ast.get_docstring(part) or ""


def raised(statements, home, caught=frozenset()):
    """The errors of a wrong call that statements of a function raise and let out: for each, the names of its bases."""
    for node in statements:
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = ast.unparse(node.exc.func)
            kind = getattr(home, name, getattr(builtins, name, None))
            if isinstance(kind, type) and issubclass(kind, (ValueError, TypeError, LookupError, ImportError)):
                bases = [base.__name__ for base in kind.__mro__]
                if not caught & {*bases}:
                    yield bases
        if isinstance(node, ast.Try):
            kinds = [ast.unparse(handler.type) if handler.type else "BaseException" for handler in node.handlers]
            yield from raised(node.body, home, caught | {*re.findall(r"\w+", " ".join(kinds))})
            yield from raised([*node.handlers, *node.orelse, *node.finalbody], home, caught)
        elif not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
            yield from raised(ast.iter_child_nodes(node), home, caught)


def unsaid(top, home, brief=BRIEF):
    """What the docstrings of a module do not say of arguments, results and errors.

    Args, Returns (or Yields) and Raises list them. Where there are few arguments, sentences do that name each in
    backticks. A docstring that begins with "Return" or "Yield" needs no section that says it again.
    """
    for name, node, said in defined(top, home):
        parts, given = sections(said), node.args
        taken = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
        names = [arg.arg for arg in taken if arg and arg.arg not in ("self", "cls")]
        if len(names) > brief or "Args" in parts:
            listed = re.findall(r"^ {4}\*{0,2}(\w+): ", parts.get("Args", ""), re.MULTILINE)
            if listed != names:
                yield f"{name}: arguments {[arg for arg in names if arg not in listed] or listed}"
            silent = node.returns is None or ast.unparse(node.returns) in SILENT
            if not silent and not {"Returns", "Yields"} & {*parts} and said.split()[0] not in ("Return", "Yield"):
                yield f"{name}: what it returns"
        elif missing := [arg for arg in names if not re.search(rf"`{arg}\b[^`]*`|^ {{4}}{arg}: ", said, re.MULTILINE)]:
            yield f"{name}: arguments {missing}"
        for error in raised(node.body, home):
            if not {*error[:-3]} & {*re.findall(r"\w+", said)}:
                yield f"{name}: raises {error[0]}"


def unnamed(home):
    """The fields of a module's dataclasses and named tuples that their docstrings do not name anywhere."""
    for name, kind in inspect.getmembers(home, inspect.isclass):
        if kind.__module__ == home.__name__ and not name.startswith("_"):
            kept = {field.name: str(field.type) for field in fields(kind)} if is_dataclass(kind) else {}
            kept |= dict.fromkeys(getattr(kind, "_fields", ()) if issubclass(kind, tuple) else (), "")
            words = {*re.findall(r"\w+", inspect.getdoc(kind) or "")}
            marks = {field for field, type in kept.items() if re.search(r"\bLiteral\[['\"]\w+['\"]\]$", type)}
            yield from (f"{name}.{field}" for field in {*kept} - words - marks if not field.startswith("_"))


COMMANDS = "cli/"  # say it in their --help
SPARE = {"core.py": 4}  # 200 lines at most, so sentences


@pytest.mark.parametrize("source", [source for source in SOURCES if not source.startswith(COMMANDS)])
def test_what_others_call_says_what_it_takes_gives_and_raises(source):
    home = import_module(f"knorm.{module(source)}".rstrip("."))
    assert not [*unsaid(tree(source), home, SPARE.get(source, BRIEF)), *unnamed(home)]


def test_an_argument_a_result_and_an_error_that_are_not_named_are_noticed():
    source = """
def brief(a: int, b: int) -> int:
    '''Add `a` and another.'''

def long(a: int, b: int, *, c: int) -> int:
    '''Add.

    Args:
        b: one.
        a: another.
        c: a third.
    '''
    if a:
        raise ValueError("a")

class Held:
    '''Hold `a`.'''

    def __init__(self, a: int, b: int) -> None: ...

    def caught(self) -> int:
        '''Return it.'''
        try:
            raise TypeError("a")
        except (TypeError, OSError):
            raise IndexError("a")

    def held(self) -> int:
        '''Return it, or raise KeyError.'''
        raise KeyError("a")

    def keys(self, other: int) -> int:
        '''Keep to another's interface.'''
"""
    home = types.SimpleNamespace(Held=type("Held", (dict,), {}))
    assert [*unsaid(ast.parse(source), home)] == [
        "brief: arguments ['b']",
        "long: arguments ['b', 'a', 'c']",
        "long: what it returns",
        "long: raises ValueError",
        "Held: arguments ['b']",
        "Held.caught: raises IndexError",
    ]


def test_a_field_that_is_not_named_is_noticed():
    @dataclass
    class Kept:
        """Hold `first`."""

        first: int
        second: str
        kind: Literal["kept"] = "kept"

    Kept.__module__ = "here"
    assert [*unnamed(types.SimpleNamespace(__name__="here", Kept=Kept))] == ["Kept.second"]


@pytest.mark.parametrize("name", [name for name, thing in PUBLIC.items() if callable(thing)])
def test_a_public_name_has_an_example(name):
    assert ">>> " in sections(PUBLIC[name]).get("Example", "")


SHAPE = re.compile(
    r"\[[^\]]+\]|any (shape|tensor)|the same|as for \w|of (that|the \w+'s?) shape|^those of", re.MULTILINE
)


def shapeless(module):
    """The functions without underscore of a module that take or return tensors, and do not say of which shape.

    One line may say both: `keys [batch, kv_heads, T, head_dim] -> [batch, kv_heads, T]`.
    """
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if name.startswith(("_", "check_")) or function.__module__ != module.__name__:
            continue
        hints = {k: str(v) for k, v in inspect.get_annotations(inspect.unwrap(function)).items()}
        tensors = {k for k, v in hints.items() if re.search(r"\bTensor\b", v) and "Callable" not in v}
        said, parts = inspect.getdoc(function) or "", sections(function)
        if not tensors or ("->" in said and len(SHAPE.findall(said)) > 1):
            continue
        given, made = parts.get("Args", said), parts.get("Returns", parts.get("Yields", said))
        for tensor in sorted(tensors - {"return"}):
            entry = re.search(rf"^ {{4}}{tensor}: (.+(\n {{8}}.+)*)", given, re.MULTILINE) if "Args" in parts else None
            if not SHAPE.search(entry[1] if entry else "" if "Args" in parts else said):
                yield f"{name}: {tensor}"
        if "return" in tensors and not SHAPE.search(made):
            yield f"{name}: what it returns"


@pytest.mark.parametrize("name", MODULES)
def test_a_function_on_tensors_says_their_shapes(name):
    assert not [*shapeless(import_module(f"knorm.{name}".rstrip(".")))]


def test_a_missing_shape_is_noticed():
    def named(values: torch.Tensor) -> int:
        """Count values."""

    def listed(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Add keys and values.

        Args:
            keys: [batch, T].
            values: what is added.

        Returns:
            The sum.
        """

    for function in (named, listed):
        function.__module__ = "here"
    here = types.SimpleNamespace(__name__="here", named=named, listed=listed)
    assert [*shapeless(here)] == ["listed: values", "listed: what it returns", "named: values"]


@pytest.mark.parametrize("source", SOURCES)
def test_an_example_is_one_that_runs(source):
    kinds = (ast.FunctionDef, ast.ClassDef)
    said = [(node.name, ast.get_docstring(node) or "") for node in ast.walk(tree(source)) if isinstance(node, kinds)]
    assert not [name for name, text in said if ">>> " not in sections(text).get("Example", ">>> ")]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_run(name):
    home = import_module(f"knorm.{name}".rstrip("."))
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder().find(home, extraglobs=NAMES):
        runner.run(test)
    assert runner.summarize().failed == 0
