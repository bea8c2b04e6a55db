"""Sessions for nox: what tox runs, and the tests against other versions of transformers."""

import os
from pathlib import Path

import nox

PINS = "constraints.txt"
NO_CUDA = {"CUDA_VISIBLE_DEVICES": ""}  # many workers on one GPU would get in each other's way


@nox.session(python=["3.11", "3.12"])
def tests(session: nox.Session) -> None:
    session.install("-c", PINS, ".[test]")
    session.run("pytest", "-n", "auto", *session.posargs, env=NO_CUDA)


@nox.session
def lint(session: nox.Session) -> None:
    session.install("-c", PINS, "codespell", "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("codespell")


@nox.session
def types(session: nox.Session) -> None:
    session.install("-c", PINS, ".[test]", "mypy")
    session.run("mypy")


@nox.session
@nox.parametrize("version", ["5.2.0", "newest"])
def transformers(session: nox.Session, version: str) -> None:
    free = ("transformers=", "huggingface_hub=", "tokenizers=")
    pins = Path(session.create_tmp()) / PINS
    pins.write_text("\n".join(line for line in Path(PINS).read_text().splitlines() if not line.startswith(free)))
    wanted = "transformers" if version == "newest" else f"transformers=={version}"
    session.install("--upgrade", "-c", str(pins), ".[test]", wanted)
    session.run("pytest", "tests", "-n", "auto", *session.posargs, env=NO_CUDA)


@nox.session
@nox.parametrize("version", ["5.2.0", "newest"])
def projects(session: nox.Session, version: str) -> None:
    """A project from `knorm init` to the update of its goldens: with kvpress, and with the newest transformers."""
    old = version == "5.2.0"
    session.install("-c", "constraints-kvpress.txt" if old else PINS, ".[test,kvpress]" if old else ".[test]")
    own = {"KNORM_PROCESSES": "1"} | ({"KNORM_REQUIRE_KVPRESS": "1"} if old else {})
    tests = ["tests/cli/test_init.py", "tests/golden/test_project.py", "tests/golden/test_values.py"]
    tests += ["tests/presses/test_press_project.py"] if old else []
    session.run("pytest", *tests, "-n", "auto", *session.posargs, env=NO_CUDA | own)


@nox.session
def cpus(session: nox.Session) -> None:
    """The tests as other makes of CPU would run them; `-- --short` as .ci/run does."""
    session.install("-c", PINS, ".[test]")
    session.run("python", "tools/cpus.py", *session.posargs, env=NO_CUDA)


@nox.session
def exam(session: nox.Session) -> None:
    """What the laws say of kvpress' presses and of transformers' caches: writes docs/exam.md."""
    session.install("-c", "constraints-kvpress.txt", ".[test,kvpress]")
    session.run("python", "tools/exam.py", "Presses of kvpress", "kvpress:*", "--write", env=NO_CUDA)
    session.install("--upgrade", "-c", PINS, ".[test]")
    session.run("python", "tools/exam.py", "Caches of transformers", "transformers:*", "--write", env=NO_CUDA)
    if "KNORM_CHECKOUTS" in os.environ:  # a folder of other projects' repositories, as tools/exam_targets.py says
        session.run("python", "tools/exam.py", "Public functions", "functions:*", "--write", env=NO_CUDA)


@nox.session
def matrix(session: nox.Session) -> None:
    """Every law on every mutant: fails where docs/laws.md changes, or a check has no mutant of its own."""
    session.install("-c", PINS, ".[test]")
    session.run("python", "tools/bench_laws.py", "matrix", env=NO_CUDA)


@nox.session
def fuzz(session: nox.Session) -> None:
    """5,000 command lines and 2,000 calls that nobody would write, where nothing can be harmed."""
    session.install("-c", PINS, ".[test]")
    session.run("python", "tools/fuzz.py", *session.posargs, env=NO_CUDA)
