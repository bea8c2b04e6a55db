"""The examples in docstrings run, and the docstrings of public names say what goes in and what comes out."""

from __future__ import annotations

import doctest
import inspect
import re
import types
from dataclasses import fields, is_dataclass
from importlib import import_module

import pytest
import torch
from test_house import SOURCES, module

import knorm
from knorm import laws

PUBLIC = {f"{package.__name__}.{name}": getattr(package, name) for package in (knorm, laws) for name in package.__all__}
NAMES = {"knorm": knorm, "torch": torch, **{name: getattr(knorm, name) for name in knorm.__all__}}
MODULES = [name for name in map(module, SOURCES) if name != "__main__"]


def sections(thing):
    """The sections of a docstring, title -> text."""
    said = inspect.getdoc(thing) or ""
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
        if function not in own and signature.return_annotation != "None" and not {"Returns", "Yields"} & {*said}:
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


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_run(name):
    home = import_module(f"knorm.{name}".rstrip("."))
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder().find(home, extraglobs=NAMES):
        runner.run(test)
    assert runner.summarize().failed == 0
