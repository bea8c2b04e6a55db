"""What `knorm init` writes into a project: knorm.toml, two tests, and a job for its CI. It overwrites nothing."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from knorm.files import read_text
from knorm.golden.project import CONFIG, NAME, PYPROJECT, Declared, Misdeclared, Project, find_project
from knorm.methods.kinds import RATIOS, TOKENS

CIS = ("github", "gitlab")
OWN, OWN_LAWS = "knorm", "knorm:compress"  # what is declared where a project has no method yet
_LEFT_OUT = {"build", "dist", "docs", "examples", "node_modules", "site-packages", "tests", "test", "venv"}
_MOST_FILES, _MOST_BYTES = 2000, 2**20
_BUDGETS = ["0.9", "0.5"]


@dataclass(frozen=True)
class Start:
    """Hold what a project starts with.

    Attributes:
        target: the method, as every command takes it.
        budgets: shares of the cache; empty where the method has its own.
        others: further methods that were seen in the project.
        laws: the target that laws are asked of; None where they cannot be.
        expected: of the laws, by check: what refuted it.
        why: why no laws are asked, or why the method that was seen is not the target; empty where neither is so.
    """

    target: str
    budgets: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    laws: str | None = None
    expected: Mapping[str, str] = field(default_factory=dict)
    why: str = ""

    @property
    def case(self) -> str:
        """Name the case after the method."""
        words = self.target.partition("(")[0].rpartition(":")[2] or self.target
        name = "".join(letter if letter.isalnum() else "-" for letter in words.lower()).strip("-")
        return name if NAME.fullmatch(name) and name.isascii() and name != "reported" else "method"


def seen_methods(root: Path) -> list[str]:
    """Find methods in a project's Python files, which are parsed and not run.

    Args:
        root: the project's folder.

    Returns:
        Targets: presses first, then caches, then functions of (keys, values, budget).

    Example:
        >>> seen_methods(Path("examples"))  # doctest: +SKIP
        ['mine.py:compress']
    """
    found: dict[str, list[str]] = {"Press": [], "Cache": [], "function": []}
    for count, file in enumerate(_python_files(root)):
        if count >= _MOST_FILES:
            break
        try:
            tree = ast.parse(file.read_bytes() if file.stat().st_size <= _MOST_BYTES else b"")
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue
        for node in tree.body:
            if kind := _kind(node):
                found[kind].append(f"{_module(file, root)}:{node.name}")  # type: ignore[attr-defined]
    return [target for targets in found.values() for target in targets]


def _python_files(root: Path) -> Iterator[Path]:
    try:
        entries = sorted(root.iterdir())
    except OSError:
        return
    for entry in entries:
        if entry.is_symlink() or entry.name.startswith((".", "test_")) or entry.name in _LEFT_OUT:
            continue
        if entry.is_dir() and not (entry / "pyvenv.cfg").exists():
            yield from _python_files(entry)
        elif entry.suffix == ".py" and entry.is_file():
            yield entry


def _kind(node: ast.stmt) -> str | None:
    if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
        bases = [ast.unparse(base).rpartition(".")[2] for base in node.bases]
        return next((kind for kind in ("Press", "Cache") if any(base.endswith(kind) for base in bases)), None)
    if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
        names = [argument.arg for argument in node.args.args]
        if names[:2] in (["keys", "values"], ["key", "value"]) and {*names[2:]} & {*RATIOS, *TOKENS}:
            return "function"
    return None


def _module(file: Path, root: Path) -> str:
    """Write a file as a target does: a module where it lies in a package, else its path."""
    folder, names = file.parent, [file.stem]
    while folder != root and (folder / "__init__.py").is_file():
        names.append(folder.name)
        folder = folder.parent
    if len(names) == 1 or (folder != root and folder.name != "src"):
        return file.relative_to(root).as_posix()
    return ".".join(reversed(names if names[0] != "__init__" else names[1:]))


def plan(root: Path, target: str | None) -> Start:
    """Choose the method that a project is started with: the one given, the first that is seen and loads, or knorm's.

    Args:
        root: the project's folder.
        target: as the user wrote it; None to look for one.

    Returns:
        The start, with laws not yet asked.

    Raises:
        ValueError: the target that was given does not load.
    """
    if target is not None:
        return Start(target, _budgets(root, target), laws=target)
    seen, why = seen_methods(root), ""
    for place, each in enumerate(seen):
        try:
            budgets = _budgets(root, each)
        except ValueError as error:
            why = why or str(error)
            continue
        return Start(each, budgets, tuple(seen[:place] + seen[place + 1 :]), laws=each)
    return Start(OWN, ("0.5",), tuple(seen), OWN_LAWS, why=why)


def _budgets(root: Path, target: str) -> tuple[str, ...]:
    """Load a target; return the budgets that it is given. Raises ValueError where it does not load."""
    from knorm.golden.declared import load_cases

    problems: list[str] = []
    for budgets in (_BUDGETS, []):
        declared = Declared(target=target, keep_ratio=budgets) if budgets else Declared(target=target)
        try:
            load_cases(Project(root / CONFIG, root / "golden", {"method": declared}))
        except Misdeclared as error:
            problems += error.problems
        else:
            return tuple(budgets)
    raise ValueError(problems[0].removeprefix("case method: "))


def refuse_started(root: Path, files: Mapping[str, str]) -> None:
    """Raise ValueError where the folder `root` declares a project already, or holds one of `files`, named by path."""
    project = find_project(root)
    if project is not None and project.root == root:
        raise ValueError(
            f"{project.file.name} declares cases already: knorm golden list shows them; nothing was written"
        )
    if there := [name for name in files if (root / name).exists()]:
        raise ValueError(f"{', '.join(there)} is there already, and stays as it is: move it away; nothing was written")


def files_of(start: Start, root: Path, ci: str) -> dict[str, str]:
    """Write what a project starts with.

    Args:
        start: of `plan`.
        root: the project's folder.
        ci: "github", "gitlab" or "none".

    Returns:
        The content of each file by its path in the project.
    """
    files = {CONFIG: _config(start), "tests/test_knorm.py": _tests(start)}
    install = "pip install knorm pytest" + (" ." if _is_package(root) else "")
    if ci == "github":
        files[".github/workflows/knorm.yml"] = _GITHUB.replace("INSTALL", install)
    elif ci == "gitlab":
        place = ".gitlab-ci.yml" if not (root / ".gitlab-ci.yml").exists() else ".gitlab/knorm.yml"
        files[place] = _GITLAB.replace("INSTALL", install)
    return files


def _is_package(root: Path) -> bool:
    file = root / PYPROJECT
    return (root / "setup.py").exists() or (file.exists() and "[project]" in read_text(file, _MOST_BYTES))


def _config(start: Start) -> str:
    budgets = f"keep_ratio = [{', '.join(start.budgets)}]\n" if start.budgets else ""
    lines = [
        "# Cases whose results are pinned: knorm golden record --all, then\n",
        '# knorm golden accept CASE --reason "the first"\n',
        f"\n[case.{start.case}]\ntarget = {json.dumps(start.target)}\n{budgets}",
    ]
    lines += [f"\n# also seen here: target = {json.dumps(other)}" for other in start.others[:8]]
    return "".join(lines) + ("\n" if start.others else "")


def _tests(start: Start) -> str:
    golden = f'\n\ndef test_nothing_moved(golden):\n    golden("{start.case}")\n'
    if start.laws is None:
        return f'"""The method costs what was accepted: see {CONFIG}."""\n{golden}'
    where, _, name = start.laws.partition(":")
    target, imports, names = json.dumps(start.laws), "", ""
    if where.endswith(".py"):
        target = f"str(ROOT / {json.dumps(where)}) + {json.dumps(f':{name}')}"
        imports, names = "from pathlib import Path\n\n", "\nROOT = Path(__file__).parents[1]\n"
    given = ""
    if expected := start.expected:
        lines = [f"    {json.dumps(check)}: {json.dumps(why)},\n" for check, why in expected.items()]
        names += f"\nEXPECTED = {{  # laws that are refuted today: see knorm check\n{''.join(lines)}}}\n"
        given = ", expected_failures=lambda _: EXPECTED"
    return (
        f'"""The method obeys the laws that apply to it, and costs what was accepted: see {CONFIG}."""\n\n'
        f"{imports}from knorm.laws import parametrize_with_checks\nfrom knorm.laws.loading import load_target\n{names}"
        f"\n\n@parametrize_with_checks([load_target({target})]{given})\n"
        f"def test_laws(compressor, check):\n    check(compressor)\n{golden}"
    )


_GITHUB = """\
name: knorm
on:
  push:
    branches: [main]
  pull_request:

permissions:
  contents: read

jobs:
  knorm:
    runs-on: ubuntu-latest
    env:
      PIP_EXTRA_INDEX_URL: https://download.pytorch.org/whl/cpu
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with:
          python-version: "3.12"
      - run: INSTALL
      # once goldens of cpu-x86_64 are accepted, add --knorm-require-goldens
      - run: pytest tests/test_knorm.py
"""

_GITLAB = """\
knorm:
  image: python:3.12
  variables:
    PIP_EXTRA_INDEX_URL: https://download.pytorch.org/whl/cpu
  before_script:
    - INSTALL
  script:
    # once goldens of cpu-x86_64 are accepted, add --knorm-require-goldens
    - pytest tests/test_knorm.py
"""
