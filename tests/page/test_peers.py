"""docs/peers: the page says what its JSON says, and what README says follows from it."""

from __future__ import annotations

import ast
import os
import re
import tomllib
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from page.test_page import WORDS, Read, verdicts_of
from transformers import cache_utils

from knorm.methods.known import lacking, version_of
from knorm.page.form import Page
from knorm.page.render import MOST_BYTES, render
from knorm.sweep.plan import Plan

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "peers"
PLANS = FOLDER / "plans"


def tool(name):
    spec = spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


peers = tool("peers")


@pytest.fixture(scope="module")
def told():
    return peers.read()


@pytest.fixture(scope="module")
def html():
    return (FOLDER / "index.html").read_text()


def test_the_page_shows_every_verdict_of_the_json(told, html):
    tried = [(m, row) for matrix in told.matrices for m in matrix.methods for row in m.results]
    assert not any(row.fault for _, row in tried)
    words = {**WORDS, "untested": "untested"}
    assert verdicts_of(html) == {(m.name, row.check): words[row.verdict] for m, row in tried}


def test_the_page_shows_the_numbers_of_every_row(told, html):
    rows = {given["id"]: ("".join(texts), numbers) for given, texts, numbers in Read(html).rows if "id" in given}
    for number, frontier in enumerate(told.frontiers):
        for at, p in enumerate(frontier.points):
            text, numbers = rows[f"point-{number}-{at + 1}"]
            assert p.label in text
            assert {float(f"{x:.7g}") for x in (p.ppl, p.delta_nll, p.kl, p.same_top, p.bytes_per_token)} <= {*numbers}
            for low, high, form in ((p.delta_nll_low, p.delta_nll_high, "+.4f"), (p.kl_low, p.kl_high, ".3g")):
                assert f"{low:{form}} to {high:{form}}".replace("-", "−") in text


@pytest.mark.parametrize("folder", [FOLDER, peers.GPU])
def test_the_page_is_what_its_json_makes_now(folder):
    """A template that changes is tried on both pages, and both are made again."""
    assert render(peers.read(folder)) == (folder / "index.html").read_text()


def test_it_is_as_wide_as_it_says_and_small(told):
    methods = [m for matrix in told.matrices for m in matrix.methods]
    tried = [m for m in methods if m.not_run is None and any(row.answered for row in m.results)]
    assert len({m.name for m in tried}) == len(tried) >= 40
    assert len({point.method for point in peers.measured(told.frontiers[0])}) >= 30
    names = {source.name for source in told.sources}
    forms = [{f"{library}{kind}" for library in ("kvpress", "transformers")} for kind in ("", "-encyclopedia", "-time")]
    assert names - {"functions", "functions-laws.json"} in (forms[0], set.union(*forms))
    assert len(names & {"functions", "functions-laws.json"}) in (0, 2)
    assert bool(told.timings) == (forms[2] <= names)
    assert not any(source.missing for source in told.sources)
    assert (FOLDER / "index.html").stat().st_size <= MOST_BYTES
    assert (FOLDER / "frontier.svg").stat().st_size < 100_000


def test_no_refutation_is_false_and_each_shows_itself(told, html):
    """Each red cell was read by a person who found it true, and says what came, with the program that shows it."""
    judged = tomllib.loads((ROOT / "tools" / "exam.toml").read_text())["verdicts"]
    evidence = {(method, check): text for method, check, text in Read(html).evidence}
    red = [*peers.refuted(told)]
    assert red
    for method, result in red:
        assert judged[peers.class_of(method.name)][result.check].startswith("true: "), (method.name, result.check)
        said = evidence[method.name, result.check]
        assert result.counterexample
        assert result.counterexample in said
        assert result.snippet
        assert result.snippet in said
        assert not re.search(r"^\s*(import|from) knorm", result.snippet, re.MULTILINE)
        ast.parse(result.snippet)


@pytest.mark.processes
@pytest.mark.parametrize("index", range(len([*peers.refuted(peers.read())])))
def test_each_program_shows_its_refutation_where_its_library_is_installed(told, index, monkeypatch):
    """In a new interpreter without knorm, for the environment that this one is; the other has a run of its own."""
    method, result = [*peers.refuted(told)][index]
    theirs = told.sources[method.source].versions
    for name in ("kvpress", "transformers"):
        if (here := version_of(name)) != theirs.get(name):
            pytest.skip(f"it is of {name} {theirs.get(name)}, but here is {here}")
    if told.sources[method.source].name == "functions-laws.json" and "KNORM_CHECKOUTS" not in os.environ:
        pytest.skip(f"KNORM_CHECKOUTS names no folder of checkouts, out of one of which {method.name} is called")
    if missing := lacking(method.name.partition(":")[2]):
        pytest.skip(f"{method.name} needs {missing}")
    monkeypatch.chdir(PLANS)  # where windows.py lies
    assert tool("exam").shown(result)


def test_readme_says_what_the_json_says(told):
    text = (FOLDER / "README.md").read_text()
    names = re.findall(r"<!-- peers: (\w+) -->", text)
    assert sorted(names) == sorted(peers.PARTS)
    assert peers.written(text, told) == text
    assert (FOLDER / "frontier.svg").read_text() == peers.picture(told)


def test_nothing_names_the_machine_that_it_was_made_on():
    for file in ("index.html", "results.json", "README.md"):
        assert re.findall(r"(?:/home/|/root/|/tmp/|/Users/)\w+|sys\.path\.insert", (FOLDER / file).read_text()) == []


def test_a_changed_number_is_noticed(told):
    text = (FOLDER / "README.md").read_text()
    fields = told.model_dump()
    point = next(point for point in fields["frontiers"][0]["points"] if point["changed"])
    point["kl"], point["delta_nll"] = 9.5, -9.5
    moved = Page.model_validate(fields)
    assert peers.written(text, moved) != text


def test_what_readme_says_in_words(told):
    functions = {at for at, source in enumerate(told.sources) if source.name == "functions-laws.json"}
    theirs = [result.check for method, result in peers.refuted(told) if method.source in functions]
    assert bool(theirs) == bool(functions)
    assert theirs.count("accepts") + theirs.count("own_bytes") >= len(theirs) / 2
    red = [
        (peers.class_of(method.name), result)
        for method, result in peers.refuted(told)
        if method.source not in functions
    ]
    kinds = [result.check for _, result in red]
    rows = [name for name, result in red if result.check == "runs" and "takes one row only" in judgement(name)]
    covered = sum(kinds.count(check) for check in ("sees_alone", "sees_by_numbers", "rows_move", "reset")) + len(rows)
    assert covered > len(red) * 3 / 4
    small, public = told.frontiers[:2]
    assert (small.model, public.model) == ("embedded-llama", "smollm2")
    front = [line for line in peers.front(told).splitlines() if "| `" in line]
    sizes = {re.search(r"`\w+:(\w+)", line)[1]: int(re.search(r"(\d+)%", line)[1]) for line in front}
    assert sizes["QuantizedCache"] < 35
    assert min(sizes["KVComposePress"], sizes["ExpectedAttentionPress"]) > 75
    frontier = small
    points = [point for point in peers.measured(frontier, 0) if point.keep_ratio == 0.5]
    pairs = peers.rivals(points)
    assert sum(peers.apart(*pair) for pair in pairs) > len(pairs) / 2
    doubt = [point for point in points if point.delta_nll_low <= 0 <= point.delta_nll_high]
    assert 0.4 < len(doubt) / len(points) < 0.6
    count = sum(len(method.results) for matrix in told.matrices for method in matrix.methods)
    same = re.search(r"the same ([\d,]+)\sverdicts and counterexamples", (FOLDER / "README.md").read_text())
    assert int(same[1].replace(",", "")) <= count


def test_what_readme_says_in_words_of_times_on_a_gpu():
    rows = [row for timing in peers.read(peers.GPU).timings for row in timing.rows]
    first, later = (
        {
            peers.class_of(row.method) + ("fp8" if "fp8" in row.method else ""): getattr(row, name).ratio
            for row in rows
            if peers.told(getattr(row, name))[2] == "slower"
        }
        for name in ("first_token", "output_token")
    )
    assert 12 < first.pop("KVgradPress") < 13
    caches = ("StaticCache", "DynamicSlidingCache", "StaticSlidingCache", "QuantizedCache")
    whole = [first.pop(name) for name in caches]
    assert (round(min(whole), 1), round(max(whole), 1)) == (1.1, 1.5)
    assert (round(min(first.values()), 1), round(max(first.values()), 1)) == (1.3, 6.3)
    own = ("DecodingPress", "CompressionRatioDecodingPress", "PrefillDecodingPress", "CAMPress")
    compressing = [later.pop(name) for name in own]
    assert (round(min(compressing), 2), round(max(compressing), 1)) == (1.15, 1.6)
    quantised = [round(later.pop(name), 2) for name in ("QuantizedCachefp8", "QuantizedCache")]
    assert quantised == [1.16, 1.44]
    assert round(later.pop("StaticSlidingCache"), 2) == 1.09
    assert (round(min(later.values()), 1), round(max(later.values()), 1)) == (1.3, 1.5)
    assert not any(row.output_token.high < 1 for row in rows)
    full = [row.output_token.ms_full for row in rows]
    assert (round(min(full)), round(max(full))) == (21, 44)


def test_the_program_about_keys_that_outgrow_a_prompt_shows_what_it_says(capsys):
    (program,) = re.findall(r"```python\n(.*?)```", (peers.FOLDER / "README.md").read_text(), re.DOTALL)
    if not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this transformers has no fp8 cache")
    exec(program, {})
    said = capsys.readouterr().out
    assert "1.5" not in said
    assert "nan" in said or "1." in said


def test_the_repository_s_readme_counts_as_the_json_does(told):
    methods = sum(len(matrix.methods) for matrix in told.matrices)
    text = (ROOT / "README.md").read_text()
    count = len(peers.measured(peers.shown(told)))
    assert f"bytes of cache, for {count} methods](docs/peers/frontier.svg)](docs/peers/README.md)" in text
    red = len([*peers.refuted(told)])
    assert f"{methods} methods under the laws, {red} refutations that a person found true" in text


def judgement(name):
    return peers.read_verdicts()[name]["runs"]


@pytest.mark.parametrize("library", ["kvpress", "transformers"])
def test_the_quick_form_is_a_part_of_the_full_one(library):
    """So that what was done quickly is not done again."""
    plans = [tomllib.loads((PLANS / f"{library}{form}.toml").read_text()) for form in ("-quick", "", "-gpu")]
    quick, full, gpu = map(Plan.model_validate, plans)
    assert {*quick.models} <= {*full.models}
    assert {*quick.texts} <= {*full.texts}
    for name in ("window", "windows_per_cell", "prompt_lengths", "device"):
        assert getattr(quick, name) == getattr(full, name)
    assert quick.windows <= full.windows
    assert gpu.prompt_lengths == [2048]
    budgets = {ratio for entry in (full, *full.methods) for ratio in entry.keep_ratio}
    assert budgets == {"0.9", "0.7", "0.5", "0.3", "0.1"} > {*quick.keep_ratio}
    assert any(128 in entry.keep_tokens for entry in full.methods)


@pytest.mark.parametrize("library", ["kvpress", "transformers"])
def test_on_the_other_text_the_same_is_measured(library):
    one, other = (tomllib.loads((PLANS / f"{library}{kind}.toml").read_text()) for kind in ("", "-encyclopedia"))
    assert (one.pop("texts"), other.pop("texts")) == (["narrative"], ["encyclopedia"])
    assert one.pop("measure") == ["damage", "laws"]
    assert one == other


@pytest.mark.parametrize("form", ["", "-gpu"])
@pytest.mark.parametrize("library", ["kvpress", "transformers"])
def test_what_is_timed_is_what_is_measured(library, form):
    """The same methods after the same prompts, one budget of each, and nothing beside the time."""
    times, costs = (
        Plan.model_validate(tomllib.loads((PLANS / f"{library}{form}{kind}.toml").read_text()))
        for kind in ("-time", "")
    )
    assert times.measure == ["latency"]
    assert (times.prompt_lengths, times.device) == (costs.prompt_lengths, costs.device)
    assert {*times.models} <= {*costs.models}
    assert {*times.texts} <= {*costs.texts}
    assert times.keep_ratio == ["0.5"]
    named = [{(entry.target, *entry.policy) for entry in plan.methods} for plan in (times, costs)]
    assert named[0] == named[1]


def pace(ratio, low, high, verdict):
    return {"ms": 10 * ratio, "ms_full": 10, "ratio": ratio, "low": low, "high": high, "mde": 0.05, "verdict": verdict}


def test_times_are_told_by_their_intervals(told):
    """The slowest prompt first; faster and slower only what the interval says."""
    same, slow = pace(1.0, 0.9, 1.2, "INCONCLUSIVE"), pace(3.0, 2.8, 3.2, "FAIL")
    fast, near = pace(0.8, 0.7, 0.9, "PASS"), pace(0.97, 0.93, 1.02, "PASS")
    cases = {"a": (slow, fast), "b": (same, slow), "c": (near, near), "d": (pace(5.0, 4, 6, "FAIL"), same)}
    rows = [
        {"source": 0, "method": name, "first_token": first, "output_token": later, "blocks": 12, "verdict": "FAIL"}
        for name, (first, later) in cases.items()
    ]
    setting = {"model": "m", "dtype": "float32", "text": "t", "prompt_length": 2048, "new_tokens": 33, "seed": 0}
    timing = {"device_class": "cpu-x86_64", "threads": 1, "versions": {"torch": "2"}, "margin": 0.05, "alpha": 0.005}
    page = Page.model_validate({**told.model_dump(), "timings": [{**setting, **timing, "rows": rows}]})
    said = peers.time(page)
    assert "**m, prompts of 2,048 and 33 new tokens**: 4 methods on cpu-x86_64, torch 2." in said
    assert re.findall(r"^\| `(.)`", said, re.MULTILINE) == ["d", "a", "b", "c"]
    assert "| `a` | 3.00 | 2.80 to 3.20 | 0.80 | 0.70 to 0.90 |" in said
    assert "First token: 0 faster, 2 slower, 1 not slower, 1 undecided." in said
    assert "Decoding: 1 faster (`a` 0.80), 1 slower (`b` 3.00), 1 not slower, 1 undecided." in said
    assert "by a margin of 5.0%" in said


def test_what_was_not_timed_is_said_with_its_command(told):
    assert peers.time(told.model_copy(update={"timings": []})).startswith("Not measured in this form: `nox -s peers`")
