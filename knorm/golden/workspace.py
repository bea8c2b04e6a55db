"""Where one stands: the cases of a project and the folder of its goldens, or knorm's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from knorm.golden import cases
from knorm.golden.cases import Case, check_name
from knorm.golden.project import Misdeclared, Project, find_project
from knorm.golden.store import Store
from knorm.golden.values import case_of_values


@dataclass(frozen=True)
class Workspace:
    """Hold the cases that one works on, and where their goldens are kept.

    Attributes:
        store: the folder of goldens.
        project: what declares the cases; None for knorm's own.
    """

    store: Store
    project: Project | None

    @property
    def names(self) -> list[str]:
        """List the names of all cases."""
        return [*(cases.CASES if self.project is None else self.project.cases)]

    @property
    def pins(self) -> dict[str, str]:
        """Map each case's name to what it pins, in a few words; nothing is loaded."""
        if self.project is None:
            return {name: case.what for name, case in cases.CASES.items()}
        return {name: case.what or case.target for name, case in self.project.cases.items()}

    def load(self, names: Iterable[str] | None = None) -> Mapping[str, Case]:
        """Make the cases ready to be measured.

        Args:
            names: of the cases that are needed; by default all.

        Returns:
            The cases by name.

        Raises:
            Misdeclared: a case of the project that does not load; one line for each.
            ValueError: an unknown name.
        """
        chosen = self.names if names is None else [*dict.fromkeys(names)]
        for name in chosen:
            check_name(name, self.names)
        if self.project is None:
            return {name: cases.CASES[name] for name in chosen}
        from knorm.golden.declared import load_cases

        return load_cases(self.project, chosen)

    def load_of(self, names: Iterable[str]) -> dict[str, Case]:
        """Make the cases `names` that candidates are of, tests' values among them. Raises as `load`."""
        given = [*names]
        ours = [name for name in given if name in self.names]
        others = {name: case_of_values(name) for name in given if name not in ours and name in self.store.of_tests}
        return {**self.load([name for name in given if name not in others]), **others}

    def check(self, device_class: str) -> None:
        """Raise Misdeclared for goldens without a case and cases without a golden, before anything is measured.

        Only a project's: if no case has a golden of `device_class`, none is missed. knorm's own are verdicts.
        """
        if self.project is None:
            return
        folder, option = self.store.folder.name, self.store.option
        problems = [
            f"golden {folder}/{name} has no case: remove it, or declare the case in {self.project.file.name}"
            for name in self.store.orphans(self.names)
        ]
        if device_class in self.store.device_classes:
            kind = "cpu" if device_class.startswith("cpu-") else "cuda"
            on = "" if kind == "cpu" else f" --device {kind}"
            for name, case in self.project.cases.items():
                if kind in case.devices and not case.timed and (name, device_class) not in self.store.files:
                    record = f"knorm golden record {name}{on}{option}"
                    problems.append(f"case {name} has no golden of {device_class}, but others have: {record}")
        if problems:
            raise Misdeclared(self.project.file.name, problems)


def find_workspace(golden_dir: Path | None = None, start: Path | None = None) -> Workspace:
    """Find the project that a folder lies in, or knorm's own cases and goldens.

    Args:
        golden_dir: another folder of goldens.
        start: where to look from; by default the current folder.

    Returns:
        The workspace.

    Raises:
        Misdeclared: a configuration that cannot be used.
        ValueError: there is no such folder of goldens.
    """
    project = find_project(start or Path.cwd())
    if project is None or golden_dir is not None:
        return Workspace(Store(golden_dir), project)
    return Workspace(Store(project.golden_dir, ours=True), project)
