"""A package with a press of its own, from `knorm init` to an intended change and its update."""

from __future__ import annotations

import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from commands import new_environment

kvpress = pytest.importorskip("kvpress", reason="kvpress is not installed: run tox -e kvpress")

PRESS = '''
from dataclasses import dataclass

from kvpress import ScorerPress


@dataclass
class LargestValues(ScorerPress):
    """Keeps the tokens with the largest values."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return values.norm(dim=-1)
'''


def git(*arguments):
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
    subprocess.run(command, capture_output=True, text=True, check=True)


def run_tests(*options):
    """Run the project's tests as its CI does; the exit code and the last line."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_knorm.py", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.splitlines()[-1]


@pytest.mark.processes
def test_a_package_with_a_press_of_its_own(tmp_path, run_knorm, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", new_environment(tmp_path)["PYTHONPATH"])
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "ourpress"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "presses.py").write_text(PRESS)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "ourpress"\nversion = "1"\n')
    git("init", "-q", ".")
    golden = partial(run_knorm, "golden")

    code, out, err = run_knorm("init")
    assert (code, err) == (0, "")
    assert "The method is ourpress.presses:LargestValues." in out
    assert 'target = "ourpress.presses:LargestValues"' in Path("knorm.toml").read_text()
    code, last = run_tests()
    assert (code, "failed" in last, "1 skipped" in last) == (0, False, True), last
    git("add", ".")
    git("commit", "-qm", "one")

    code, out, _ = golden("record", "--all")
    assert code == 0
    assert "runs in which nothing that matters differs" in out
    assert golden("accept", "largestvalues", "--reason", "the first")[0] == 0
    git("add", ".")
    git("commit", "-qm", "goldens")
    assert run_tests("--knorm-require-goldens")[0] == 0

    (package / "presses.py").write_text(PRESS.replace("values.norm(dim=-1)", "values.norm(p=1, dim=-1)"))
    git("commit", "-qam", "another norm")
    assert run_tests("--knorm-require-goldens")[0] == 1
    for module in [name for name in sys.modules if name.partition(".")[0] == "ourpress"]:
        monkeypatch.delitem(sys.modules, module)
    assert golden("record", "largestvalues")[0] == 0
    code, _, err = golden("accept", "largestvalues", "--reason", "norms are sums now")
    if code:
        pasted = shlex.split(err.splitlines()[-1].partition(": ")[2])
        assert golden(*pasted[2:])[0] == 0
    assert run_tests("--knorm-require-goldens")[0] == 0
