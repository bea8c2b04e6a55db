"""A small part of `nox -s fuzz`, and that its sandbox holds."""

import subprocess
import sys
from pathlib import Path

import pytest
from commands import in_a_new_process, new_environment

TOOLS = Path(__file__).parents[1] / "tools"
CONFINED = f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {str(TOOLS)!r})
from sandbox import NoSandbox, confine

try:
    confine(Path(sys.argv[1]))
except NoSandbox as error:
    sys.exit(f"no sandbox: {{error}}")
"""


def confined(code, folder):
    done = in_a_new_process(CONFINED + code, str(folder))
    if done.stderr.startswith("no sandbox"):
        pytest.skip(done.stderr.strip())
    return done


def test_nothing_is_written_outside_of_the_sandbox(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "kept").write_text("as it was")
    code = f"""
(Path(sys.argv[1]) / "new").write_text("written")
for attempt in (
    lambda: Path({str(outside)!r}, "new").write_text("x"),
    lambda: Path({str(outside)!r}, "kept").write_text("x"),
    lambda: Path({str(outside)!r}, "kept").unlink(),
    lambda: os.truncate({str(outside / "kept")!r}, 0),
    lambda: os.rename({str(outside / "kept")!r}, Path(sys.argv[1]) / "moved"),
    lambda: os.mkdir({str(outside / "folder")!r}),
    lambda: os.system("echo x > " + {str(outside / "kept")!r} + " 2> /dev/null") and os.open("/none", os.O_WRONLY),
):
    try:
        attempt()
    except OSError:
        continue
    sys.exit("written outside")
"""
    done = confined(code, inside)
    assert done.returncode == 0, done.stderr
    assert (inside / "new").read_text() == "written"
    assert [file.name for file in outside.iterdir()] == ["kept"]
    assert (outside / "kept").read_text() == "as it was"


@pytest.mark.processes
def test_a_few_hundred_attacks_find_nothing(tmp_path):
    commands, calls = 60, 300
    sizes = ("--commands", str(commands), "--calls", str(calls))
    command = [sys.executable, str(TOOLS / "fuzz.py"), *sizes, "--seed", "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=new_environment(TMPDIR=str(tmp_path)), timeout=300
    )
    if done.returncode == 2:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout
    assert f"calls: {calls} " in done.stdout
    assert f"command lines: {commands} " in done.stdout
