"""Files that commands write: what must not be overwritten, and what is left where writing fails."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from importlib import metadata
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from commands import strict_json

from knorm.cli import outputs
from knorm.cli.options import COMMON, with_options
from knorm.cli.outputs import replace_file, write_json
from knorm.cli.schemas import FORMS
from knorm.cli.schemas.parts import Result
from knorm.paths import goldens


@click.group()
def cli():
    pass


@cli.command()
@with_options(*COMMON)
def measure(json, quiet):
    """Count a run that a refused file must prevent."""
    click.echo("measured")
    write_json(json, {"rows": [1]})


class Measured(Result):
    """Hold what `measure` writes."""

    rows: list[int]


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    monkeypatch.setitem(FORMS, "knorm-measure", Measured)


def run(*arguments):
    result = CliRunner().invoke(cli, ["measure", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def refused(*arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "measured" not in result.output
    return " ".join(result.output.replace("│", " ").split())


def test_a_result_names_its_schema_and_may_overwrite_an_older_one(tmp_path):
    file = tmp_path / "out.json"
    for _ in range(2):
        assert run("--json", file).exit_code == 0
    result = strict_json(file)
    assert [*result][:3] == ["schema", "schema_version", "environment"]
    assert (result["schema"], result["schema_version"], result["rows"]) == ("knorm-measure", 1, [1])
    assert os.listdir(tmp_path) == ["out.json"]


@pytest.mark.parametrize("content", ['{"rows": []}', "a letter", '{"schema": "other"}', "\0" * 10_000])
def test_a_file_that_knorm_did_not_write_is_kept_unless_forced(tmp_path, content):
    file = tmp_path / "letter"
    file.write_text(content)
    assert "knorm did not write what is there: give another name, or --force" in refused("--json", file)
    assert file.read_text() == content
    for arguments in (("--force", "--json", file), ("--json", file)):
        assert run(*arguments).exit_code == 0
    file.write_text(content)
    assert run("--json", file, "--force").exit_code == 0


def test_results_of_the_first_edition_and_empty_files_may_be_overwritten(tmp_path):
    for content in ('{\n "environment": {\n  "knorm": "0.1.0"\n }\n}\n', ""):
        file = tmp_path / "out.json"
        file.write_text(content)
        assert run("--json", file).exit_code == 0


@pytest.mark.parametrize("place", ["new.json", "counters/new.json", "counters/cpu-x86_64.json"])
def test_nothing_is_written_among_goldens_wherever_they_lie(tmp_path, place):
    store = tmp_path / "golden"
    shutil.copytree(goldens() / "counters", store / "counters")
    before = {file: file.read_bytes() for file in store.rglob("*.json")}
    assert "lies among goldens" in refused("--json", store / place, "--force")
    assert "lies among goldens" in refused("--json", goldens() / place, "--force")
    assert {file: file.read_bytes() for file in store.rglob("*") if file.is_file()} == before
    link = tmp_path / "link.json"
    link.symlink_to(store / "counters" / "cpu-x86_64.json")
    assert "lies among goldens" in refused("--json", link, "--force")


def test_what_is_no_file_is_refused_by_name(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "away").symlink_to(tmp_path / "none" / "out.json")
    for name, words in (
        ("/dev/null", "is a device"),
        (tmp_path / "pipe", "is a pipe"),
        (tmp_path, "it is a folder"),
        (tmp_path / "none" / "out.json", "there is no folder"),
        (tmp_path / "loop", "loop"),
        (tmp_path / "away", "to which it links"),
        (tmp_path / ("n" * 300), "name too long"),
    ):
        assert words in refused("--json", name, "--force").lower(), name


def test_a_link_is_followed_and_stays(tmp_path):
    (tmp_path / "results").mkdir()
    link = tmp_path / "latest.json"
    link.symlink_to(Path("results") / "out.json")
    assert run("--json", link).exit_code == 0
    assert link.is_symlink()
    assert strict_json(tmp_path / "results" / "out.json")["rows"] == [1]


def test_what_was_there_stays_whole_where_writing_fails(tmp_path):
    file = tmp_path / "out.json"
    file.write_text("before")

    def fails(beside):
        beside.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        replace_file(file, fails)
    assert (file.read_text(), os.listdir(tmp_path)) == ("before", ["out.json"])


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_new_file_has_the_users_mode_and_an_old_one_keeps_its_own(tmp_path, mask):
    before = os.umask(mask)
    try:
        assert run("--json", tmp_path / "new.json").exit_code == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new.json").stat().st_mode) == 0o666 & ~mask
    (tmp_path / "new.json").chmod(0o640)
    assert run("--json", tmp_path / "new.json").exit_code == 0
    assert stat.S_IMODE((tmp_path / "new.json").stat().st_mode) == 0o640


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_a_figure_is_known_as_knorms_own(tmp_path, suffix):
    from knorm.cli.figures import new_figure, save_figure

    file = tmp_path / f"curve{suffix}"
    figure, axes = new_figure((2, 2))
    axes.plot([0, 1], [0, 1])
    save_figure(figure, file)
    assert outputs.is_ours(file)
    figure.savefig(file)
    assert not outputs.is_ours(file), "drawn by somebody else"


@pytest.mark.parametrize(
    "line",
    [
        "sweep loop out --dry-run",
        "sweep plan.toml loop --dry-run",
        "check loop.py:f",
        "check ./loop:f",
        "ppl --reported loop",
        "ppl --reported table.csv --json loop",
        "golden list --golden-dir loop",
        "golden verify prefill --json loop",
        "check knorm:compress --baseline loop",
        "ppl --text loop.txt",
        "ppl --model loop",
        "page loop out",
        "page loop.txt loop",
    ],
)
def test_links_that_lead_round_are_wrong_usage_wherever_they_are_given(line, run_knorm):
    for name in ("loop", "loop.py", "loop.txt"):
        Path(name).symlink_to(name)
    Path("plan.toml").write_text('methods = ["knorm"]\n')
    Path("table.csv").write_text("keep_ratio,ppl\n1.0,30.5\n0.9,31\n")
    code, out, err = run_knorm(*line.split())
    assert (code, out) == (2, ""), err
    assert "loop" in err.splitlines()[-1]


def test_the_environment_names_kvpress_where_it_is_installed(monkeypatch):
    def version(name):
        if name == "kvpress":
            raise metadata.PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr(metadata, "version", lambda name: "1.2.3")
    assert outputs.environment()["kvpress"] == "1.2.3"
    monkeypatch.setattr(metadata, "version", version)
    assert outputs.environment()["kvpress"] is None
