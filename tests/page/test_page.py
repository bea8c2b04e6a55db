"""`knorm page`: it shows what the results say, and refuses what is none."""

from __future__ import annotations

import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from commands import in_a_new_process, strict_json

from knorm.cli import schemas
from knorm.page.axes import linear_axis, log_axis, signed_axis
from knorm.page.figures import front_of, kl_figure, nll_figure, retained_outline
from knorm.page.form import Page, Point
from knorm.page.render import MOST_BYTES, render
from knorm.page.words import SIGNS

EMPTY = {"br", "hr", "img", "input", "link", "meta"}
SVG = {"path", "rect", "circle"}


class Read(HTMLParser):
    """Read a page back: its cells, its numbers, and what would load something."""

    def __init__(self, html):
        super().__init__()
        self.stack, self.rows, self.evidence, self.loads, self.ids, self.links = [], [], [], [], [], []
        self.numbers, self.texts, self.tags = [], [], []
        self.feed(html)
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append(tag)
        if tag not in EMPTY | SVG:
            self.stack.append((tag, given))
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if "href" in given else []
        self.loads += [given[name] for name in ("src", "srcset", "data", "action") if name in given]
        assert not [name for name in given if name.startswith("on")], "no handler in the markup"
        if tag == "tr":
            self.rows.append((given, [], []))
        if tag == "data":
            self.numbers.append(float(given["value"]))
            if self.rows:
                self.rows[-1][2].append(float(given["value"]))
        if tag == "div" and given.get("class") == "evidence":
            self.evidence.append([self.method(), given["data-check"], ""])

    def method(self):
        return next((given["data-method"] for _, given in reversed(self.stack) if "data-method" in given), None)

    def handle_endtag(self, tag):
        if tag not in EMPTY | SVG:
            assert self.stack.pop()[0] == tag

    def handle_data(self, data):
        if any(given.get("class") == "evidence" for _, given in self.stack):
            self.evidence[-1][2] += data
        if any(tag in ("td", "th") for tag, _ in self.stack) and self.rows:
            self.rows[-1][1].append(data)
        self.texts.append(data)


def verdicts_of(html):
    """(method, check) -> word, from the lists of every verdict below the tables."""

    class Verdicts(Read):
        def __init__(self, html):
            self.found, self.words, self.unasked = {}, None, False
            super().__init__(html)

        def handle_starttag(self, tag, attributes):
            super().handle_starttag(tag, attributes)
            classes = dict(attributes).get("class", "").split()
            if "v" in classes and any("data-check" in given for _, given in self.stack):
                self.words = ""
            names = any("unasked" in given.get("class", "").split() for kind, given in self.stack if kind == "p")
            self.unasked = tag == "code" and names

        def handle_data(self, data):
            super().handle_data(data)
            if self.words is not None:
                self.words += data
            if self.unasked:
                self.found[self.method(), data] = "not asked"

        def handle_endtag(self, tag):
            self.unasked = False
            if tag == "span" and self.words is not None and "v" in self.stack[-1][1].get("class", "").split():
                check = next(given["data-check"] for _, given in reversed(self.stack) if "data-check" in given)
                sign, word = self.words.split(maxsplit=1)
                assert SIGNS[word][0] == sign
                assert self.found.setdefault((self.method(), check), word) == word
                self.words = None
            super().handle_endtag(tag)

    return Verdicts(html).found


WORDS = {"holds": "holds", "refuted": "REFUTED", "expected failure": "declared", "does not apply": "not asked"}


@pytest.fixture
def page(results, run_knorm):
    """Make a page of some results; returns its HTML and its JSON."""

    def make(*names, out="out", arguments=()):
        paths = [str(results / name) if isinstance(name, str) else str(name) for name in names]
        code, said, problem = run_knorm("page", *paths, out, *arguments)
        assert (code, problem) == (0, "")
        assert f"{out}/index.html: " in said
        return Path(out, "index.html").read_text(), strict_json(Path(out, "results.json"))

    return make


@pytest.fixture
def refused(run_knorm, results):
    """Make no page; returns what is said, a line."""

    def make(*names, out="out"):
        code, said, problem = run_knorm("page", *(str(results / name) for name in names), out)
        assert (code, said) == (2, "")
        assert not Path(out, "index.html").exists()
        assert problem.startswith("knorm: ")
        assert problem.count("\n") == 1
        return problem

    return make


ALL = ("check.json", "declared.json", "ppl.json", "curve.json", "explain.json", "study", "timed")


def test_every_verdict_of_the_results_is_on_the_page_and_in_its_json(page, loaded):
    html, told = page("check.json")
    expected = {
        (target["name"], row["check"]): WORDS[row["verdict"]]
        for target in loaded("check.json")["targets"]
        for row in target["results"]
    }
    assert {"holds", "REFUTED"} <= {*expected.values()}
    assert verdicts_of(html) == expected
    assert expected == {
        (method["name"], row["check"]): WORDS[row["verdict"]]
        for matrix in told["matrices"]
        for method in matrix["methods"]
        for row in method["results"]
    }


def test_a_refutation_comes_with_its_counterexample_and_the_program(page, loaded):
    read = Read(page("check.json", "declared.json")[0])
    refuted = [row for row in loaded("check.json")["targets"][0]["results"] if row["verdict"] == "refuted"]
    assert refuted
    for row in refuted:
        said = next(text for _, check, text in read.evidence if check == row["check"])
        for field in ("counterexample", "given", "snippet"):
            assert row[field] in said
    assert "by norm" in next(text for _, _, text in read.evidence if "declared" in text)


def test_laws_that_are_not_asked_stand_by_what_they_need(page, loaded, tmp_path):
    result = loaded("check.json")
    rows = result["targets"][0]["results"]
    (unasked,) = [row for row in rows if row["verdict"] == "does not apply"]
    rows += [{**unasked, "check": "another"}, {**unasked, "check": "third", "needs": ["scores"]}]
    (tmp_path / "more.json").write_text(json.dumps(result))
    html, _ = page(tmp_path / "more.json")
    text = "".join(Read(html[html.index("Not asked. ") : html.index("</p>", html.index("Not asked. "))]).texts)
    assert text == f"Not asked. needs rounding: {unasked['check']}, another; needs scores: third"


def test_letters_that_nobody_can_read_are_in_the_json_alone(page):
    """Of many methods there are more groups than letters: aa, bb, ... would be words of dozens."""
    _, told = page("study")
    for letters, shown in (("abz", True), ("yzaabb", False)):
        told["frontiers"][0]["points"][1]["letters"] = letters
        html = render(Page.model_validate({name: told[name] for name in Page.model_fields}))
        assert (letters in html) == shown == ('class="letters"' in html)


BOUNDS = (("delta_nll_low", "delta_nll_high", "+.4f"), ("kl_low", "kl_high", ".3g"))  # nothing sorts by them
PACES = ("first_token", "output_token")


def short(value):
    """A number as the page has it for sorting."""
    return float(f"{value:.7g}")


def shown(value, form):
    return "–" if value is None else f"{value:{form}}".replace("-", "−")


def test_every_number_of_the_json_is_on_the_page(page, loaded):
    html, told = page("ppl.json", "study", "curve.json", "explain.json", "timed")
    read = Read(html)
    without = {
        "schema_version",
        "source",
        "cells",
        "missing",
        *(name for low, high, _ in BOUNDS for name in (low, high)),
    }

    def walk(value):
        if isinstance(value, dict):
            for name, inner in value.items():
                if name not in without:
                    yield from walk(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from walk(inner)
        elif isinstance(value, float):
            yield value

    text = "".join(read.texts)
    for point in [point for frontier in told["frontiers"] for point in frontier["points"]]:
        for low, high, form in BOUNDS:
            assert " to ".join(shown(point[x], form) for x in (low, high)) in text
    for pace in [row[name] for timing in told["timings"] for row in timing["rows"] for name in PACES]:
        assert " to ".join(shown(pace.pop(x), ",.2f") for x in ("low", "high")) in text
    there = {*walk(told)}
    # what only labels a row is written in its name
    labels = {p["keep_ratio"] for f in told["frontiers"] for p in f["points"]} | {
        e["keep_ratio"] for e in told["explained"]
    }
    assert len(there) > 100
    assert {short(x) for x in there} - {*read.numbers} <= {short(x) for x in labels - {None}}
    for row, their in zip(told["frontiers"][0]["points"], loaded("ppl.json")["rows"], strict=True):
        for name in ("ppl", "kl", "kl_low", "delta_nll_high", "bytes_per_token", "same_top"):
            assert row[name] == their[name]


def test_the_page_loads_nothing_and_every_link_leads_somewhere(page):
    html, _ = page(*ALL)
    read = Read(html)
    assert read.loads == []
    assert "http:" not in html
    assert "https:" not in html
    assert len(read.ids) == len({*read.ids})
    leads = {link.removeprefix("#") for link in read.links if link.startswith("#")}
    assert leads <= {*read.ids}
    assert {link for link in read.links if not link.startswith("#")} == {"results.json", "data:,"}
    assert "url(" not in html
    assert "@import" not in html


def test_the_same_results_give_the_same_bytes_and_the_page_follows_from_its_json(page):
    html, told = page(*ALL)
    again, _ = page(*ALL, out="again")
    assert html == again
    fields = {name: told[name] for name in Page.model_fields}
    assert render(Page.model_validate(fields)) == html
    form = schemas.FORMS["knorm-page"]
    assert form.model_validate(told).model_dump(mode="json", by_alias=True) == told


def test_the_text_is_there_with_what_each_token_lost(page, loaded):
    html, _ = page("explain.json")
    window = loaded("explain.json")["per_token"]
    tokens, heads = window["shown_tokens"], [head for layer in window["evicted_at"] for head in layer]
    spans = re.findall(
        r'<a href="#token-0-(\d+)" class="t ([^"]*)" data-at="\1"(?: data-gone="(\d+)")?>([^<]*)</a>', html
    )
    assert [unescape(text) for *_, text in spans] == [token["token"] for token in tokens]
    rows = {given["id"]: (cells, numbers) for given, cells, numbers in Read(html).rows if "id" in given}
    some_gone = False
    for at, (_, classes, gone, _) in enumerate(spans):
        times = sorted(head[at] for head in heads if head[at] < len(tokens))
        most = len(times) > len(heads) / 2
        assert ("gone" in classes.split()) == most == (gone != "")
        if most:  # by then more than half of the heads had evicted it, a token earlier half of them or fewer
            some_gone = True
            assert sum(time <= int(gone) for time in times) > len(heads) / 2 >= sum(time < int(gone) for time in times)
        token, (_, numbers) = tokens[at], rows[f"token-0-{at}"]
        expected = [at, token["nll"], token["nll_full"], token["kl"], len(times), *times[:1]]
        assert {short(x) for x in expected if x is not None} <= {*numbers}
        if token["nll"] is not None:
            change = token["nll"] - token["nll_full"]
            assert short(change) in numbers
            depth = sum(change >= edge for edge in (0.1, 0.5, 1, 2))
            assert (f"w{depth}" in classes.split()) == (depth > 0)
    assert some_gone
    assert html.count('class="kept"') == len(heads)


EVIL = '<script>alert(1)</script><img src=x onerror="alert(2)">'


def test_what_was_read_is_text_and_no_markup(page, loaded, tmp_path):
    check, ppl, explain = loaded("check.json"), loaded("ppl.json"), loaded("explain.json")
    check["suite"] = EVIL
    for target in check["targets"]:
        target["name"] = f"{EVIL} {target['name']}"
        for row in target["results"]:
            row.update(dict.fromkeys(("counterexample", "given", "snippet", "reason", "law"), EVIL))
            row["needs"] = [EVIL]
    ppl |= {"model": EVIL, "text": EVIL, "column": EVIL}
    for row in ppl["rows"]:
        row |= {"method": f"{row['method']}{EVIL}", "checked": EVIL, "how": EVIL}
    explain |= {"method": EVIL, "conclusions": [EVIL]}
    explain["per_token"]["shown_tokens"][40]["token"] = EVIL
    ppl["environment"]["torch"] = EVIL
    for effect in explain["effects"]:
        effect |= {"name": EVIL, "sentence": EVIL}
    paths = []
    for name, fields in (("<b>check.json", check), ("ppl.json", ppl), ("explain.json", explain)):
        paths.append(tmp_path / name)
        paths[-1].write_text(json.dumps(fields))
    html, _ = page(*paths, arguments=("--title", EVIL))
    read = Read(html)
    assert read.tags.count("script") == 1
    assert "img" not in read.tags
    assert "b>check" not in read.tags
    assert any(EVIL in text for text in read.texts)


def test_results_of_two_revisions_of_the_laws_stand_apart(page, loaded, tmp_path):
    other = loaded("check.json") | {"suite": "000000000000"}
    (tmp_path / "older.json").write_text(json.dumps(other))
    html, told = page("check.json", tmp_path / "older.json")
    assert [matrix["suite"] for matrix in told["matrices"]] == [loaded("check.json")["suite"], "000000000000"]
    assert "verdicts of two tables are not to be compared" in html
    assert "not to be compared" not in page("check.json", out="one")[0]


def test_environments_are_joined_with_their_versions_named(page, loaded, tmp_path):
    other = loaded("ppl.json")
    other["environment"]["transformers"] = "5.2.0"
    for row in other["rows"][1:]:
        row["method"] = f"kvpress:{row['method']}"
    (tmp_path / "older.json").write_text(json.dumps(other))
    html, told = page("ppl.json", tmp_path / "older.json")
    (frontier,) = told["frontiers"]
    assert [point["source"] for point in frontier["points"]] == [0, 0, 0, 1, 1, 1]
    assert sum(point["control"] for point in frontier["points"]) == 2
    assert "transformers 5.2.0" in html
    other["prompt_length"] -= 1
    (tmp_path / "older.json").write_text(json.dumps(other))
    assert len(page("ppl.json", tmp_path / "older.json", out="apart")[1]["frontiers"]) == 2


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_a_page_to_which_results_are_added_is_the_page_of_them_all(page, results, cut):
    whole = page(*ALL, out="whole")
    page(*ALL[:cut], out="first")
    assert page(Path("first").absolute(), *ALL[cut:], out="grown") == whole
    page(*ALL[cut:], out="second")
    assert page(Path("first/results.json").absolute(), Path("second").absolute(), out="both") == whole


def test_a_page_is_written_over_itself_and_the_same_results_are_not_added_twice(page, refused):
    page("check.json", out="grown")
    assert len(page(Path("grown").absolute(), "ppl.json", out="grown")[1]["sources"]) == 2
    Path("other").mkdir()
    said = refused(str(Path("grown").absolute()), "ppl.json", out="other/out")
    assert "ppl.json holds the same as ppl.json: give each result once" in said


@pytest.mark.parametrize("name", ALL)
def test_without_results_the_page_is_that_of_the_others(page, name):
    rest = [other for other in ALL if other != name]
    page(*ALL, out="whole")
    assert page(Path("whole").absolute(), out="less", arguments=["--without", name]) == page(*rest, out="rest")


def test_newer_results_of_the_same_name_take_the_place_of_older_ones(page, loaded):
    page("check.json", "ppl.json", out="grown", arguments=["--title", "Ours"])
    newer = loaded("ppl.json")
    newer["rows"][1]["kl"] *= 2
    Path("new").mkdir()
    Path("new/ppl.json").write_text(json.dumps(newer))
    html, told = page(
        Path("grown").absolute(), Path("new/ppl.json").absolute(), out="grown", arguments=["--without", "ppl.json"]
    )
    assert [source["name"] for source in told["sources"]] == ["check.json", "ppl.json"]
    assert [len(frontier["points"]) for frontier in told["frontiers"]] == [len(newer["rows"])]
    assert told["frontiers"][0]["points"][1]["kl"] == newer["rows"][1]["kl"]
    assert (told["title"], "<title>Ours</title>" in html) == ("Ours", True)
    page(Path("grown").absolute(), "ppl.json", out="again", arguments=["--without", "ppl.json"])  # the same, for itself


def test_noise_is_that_of_the_results_that_are_left(page, loaded, tmp_path):
    noisy = loaded("ppl.json")
    next(row for row in noisy["rows"] if row["method"] == "full cache, again")["kl"] = 0.5
    (tmp_path / "noisy.json").write_text(json.dumps(noisy))
    assert page("ppl.json", tmp_path / "noisy.json", out="both")[1]["frontiers"][0]["noise_kl"] == 1.0
    told = page(Path("both").absolute(), out="less", arguments=["--without", "noisy.json"])[1]
    assert told["frontiers"][0]["noise_kl"] < 0.5


def test_results_to_be_left_out_that_are_not_there_are_named(run_knorm, page, results):
    page("check.json", out="one")
    code, said, problem = run_knorm("page", "one", "out", "--without", "checked.json")
    words = "knorm: --without checked.json: no results of a page have this name: "
    assert (code, said, problem) == (2, "", f"{words}check.json\n")
    assert (
        run_knorm("page", str(results / "check.json"), "out", "--without", "checked.json")[2]
        == f"{words}no page is given\n"
    )
    code, _, problem = run_knorm("page", "one", "out", "--without", "check.json")
    assert (code, "nothing to show" in problem) == (2, True)


def results_twice(told):
    return told["matrices"][0]["methods"][0]["results"] * 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda told: told["frontiers"][0]["points"][0].update(source=9), "source should name one of 7 sources"),
        (lambda told: told["matrices"][0]["methods"][0].update(source=7), "source should name one of 7 sources"),
        (lambda told: told["timings"][0]["rows"][0].update(source=7), "source should name one of 7 sources"),
        (lambda told: told["curves"][0].update(source=7), "source should name one of 7 sources"),
        (lambda told: told["explained"][0].update(source=7), "source should name one of 7 sources"),
        (lambda told: told["matrices"][0]["laws"].pop(), "results should be of checks that the laws"),
        (lambda told: told["matrices"][0]["methods"][0].update(results=results_twice(told)), "name, one of each"),
        (lambda told: told["sources"][1].update(digest=told["sources"][0]["digest"]), "a digest of its own"),
        (lambda told: told["sources"][0].update(missing=3), "cells should be a number where some are missing"),
        (lambda told: told["sources"][0].pop("digest"), "field sources.0.digest: field required"),
        (lambda told: told.pop("timings"), "field timings: field required"),
    ],
)
def test_a_page_whose_parts_do_not_fit_each_other_is_refused(page, refused, tmp_path, change, words):
    _, told = page(*ALL, out="whole")
    change(told)
    (tmp_path / "bad.json").write_text(json.dumps(told))
    said = refused(str(tmp_path / "bad.json"))
    assert "bad.json is not what knorm-page should be: " in said
    assert words in said


def test_a_sweep_that_is_not_finished_is_shown_with_what_is_missing(page, results, tmp_path):
    import shutil

    shutil.copytree(results / "study", tmp_path / "half")
    for file in sorted((tmp_path / "half" / "results").iterdir())[:2]:
        file.unlink()
    html, told = page(tmp_path / "half")
    assert (told["sources"][0]["cells"], told["sources"][0]["missing"]) == (6, 2)
    assert "2</data> of" in html
    assert (
        any(not point["complete"] for point in told["frontiers"][0]["points"])
        or len(told["frontiers"][0]["points"]) < 3
    )
    for file in (tmp_path / "half" / "results").iterdir():
        file.unlink()


def test_a_whole_sweep_and_its_json_give_the_same_frontiers(page, results, run_knorm):
    _, told = page("study")
    assert all(point["complete"] for point in told["frontiers"][0]["points"])
    assert told["sources"][0]["missing"] == 0


def test_times_stand_beside_the_uncompressed_cache_s_of_the_same_run(page, results, loaded):
    html, told = page("timed")
    (timing,) = told["timings"]
    cells = [json.loads(file.read_text()) for file in (results / "timed" / "results").iterdir()]
    by_name = {cell["latency"]["rows"][1]["method"]: cell for cell in cells}
    assert {*by_name} == {"knorm 0.5", "transformers:DynamicCache"} == {row["method"] for row in timing["rows"]}
    for row in timing["rows"]:
        cell = by_name[row["method"]]
        full, mine = cell["latency"]["rows"]
        for metric, pace in (("ttft", row["first_token"]), ("tpot", row["output_token"])):
            same = {name: mine["comparisons"][metric][name] for name in ("ratio", "low", "high", "mde", "verdict")}
            assert pace.items() >= same.items()
            assert pace["ms"] == pytest.approx(1000 * mine[metric]["seconds"])
            assert pace["ms_full"] == pytest.approx(1000 * full[metric]["seconds"])
        assert row["verdict"] == cell["latency"]["verdict"]
        assert row["blocks"] == 8
    environment = cells[0]["environment"]
    setting = {"model": "embedded", "text": "encyclopedia", "prompt_length": 32, "new_tokens": 3, "threads": 1}
    assert {name: timing[name] for name in setting} == setting
    assert timing["device_class"] == environment["device_class"]
    assert timing["versions"]["torch"] == environment["torch"]
    assert f"torch {environment['torch']}" in html[html.index('id="times-0"') : html.index('id="timed-0-1"')]
    assert page("timed.json", out="json")[1]["timings"][0]["rows"] == timing["rows"]
    assert loaded("timed.json")["timed"][0]["device_class"] == environment["device_class"]


def test_every_time_has_its_verdict_in_words(page):
    _, told = page("timed")
    pace = told["timings"][0]["rows"][0]["output_token"]
    cases = [("PASS", 0.8, 0.9, "✓ faster"), ("PASS", 0.9, 1.01, "✓ not slower"), ("FAIL", 1.1, 1.3, "✗ slower"),
             ("INCONCLUSIVE", 0.9, 1.3, "? undecided")]  # fmt: skip
    for verdict, low, high, words in cases:
        pace.update(verdict=verdict, low=low, high=high)
        html = render(Page.model_validate({name: told[name] for name in Page.model_fields}))
        (texts,) = [texts for given, texts, _ in Read(html).rows if given.get("id") == "timed-0-1"]
        assert f"{low:.2f} to {high:.2f}{words}" in "".join(texts)


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told["environment"].update(torch="1.0"),
        lambda told: [cell.update(device_class="nvidia-h200") for cell in told["timed"]],
        lambda told: [cell.update(prompt_length=64) for cell in told["timed"]],
        lambda told: [cell.update(new_tokens=9) for cell in told["timed"]],
        lambda told: [cell.update(threads=2) for cell in told["timed"]],
        lambda told: [cell.update(dtype="bfloat16") for cell in told["timed"]],
    ],
)
def test_times_of_another_environment_or_prompt_stand_in_another_table(page, loaded, tmp_path, change):
    told = loaded("timed.json")
    told["cells"] = 3  # another digest, the same times
    (tmp_path / "same.json").write_text(json.dumps(told))
    assert [len(timing["rows"]) for timing in page("timed.json", tmp_path / "same.json")[1]["timings"]] == [4]
    change(told)
    (tmp_path / "other.json").write_text(json.dumps(told))
    timings = page("timed.json", tmp_path / "other.json", out="two")[1]["timings"]
    assert [{row["source"] for row in timing["rows"]} for timing in timings] == [{0}, {1}]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda cell: cell["rows"].pop(), "should have two rows"),
        (lambda cell: cell["rows"].clear(), "should have two rows"),
        (lambda cell: cell["rows"][1]["comparisons"].pop("tpot"), "should have two rows"),
        (lambda cell: cell["rows"][1]["comparisons"]["tpot"].update(ratio=-1.0), "field ratio: "),
        (lambda cell: cell["rows"][1]["comparisons"]["ttft"].update(verdict="fine"), "field verdict: "),
        (lambda cell: cell["rows"][1]["comparisons"]["ttft"].update(margin=-0.5), "field margin: "),
        (lambda cell: cell["rows"][0]["ttft"].update(seconds=0.0), "field ms_full: "),
        (lambda cell: cell.update(verdict="fine"), "field verdict: "),
        (lambda cell: cell.pop("device_class"), "field timed.0.device_class"),
    ],
)
def test_times_that_no_page_can_show_are_refused(refused, loaded, tmp_path, change, words):
    told = loaded("timed.json")
    change(told["timed"][0])
    (tmp_path / "bad.json").write_text(json.dumps(told))
    said = refused(str(tmp_path / "bad.json"))
    assert "bad.json" in said
    assert words in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda text: text.replace('"schema_version": 1', '"schema_version": 7'),
            "version 7 of knorm-ppl-methods, but",
        ),
        (lambda text: text[: len(text) // 2], "cut off"),
        (lambda text: "", "is empty"),
        (lambda text: "[" * 100_000, "is no result of knorm's"),
        (lambda text: "[1, 2]", "is no result of knorm's"),
        (lambda text: '{"a": 1}', "is no result of knorm's"),
        (lambda text: "method,ppl\nknorm,3\n", "is not JSON"),
        (lambda text: text.replace('"kl"', '"lk"'), "is not what knorm-ppl-methods should be: field rows.0.kl"),
        (lambda text: re.sub(r'"nll": [\d.]+', '"nll": NaN', text), "NaN is no JSON"),
        (lambda text: text.replace("knorm-ppl-methods", "knorm-bench"), "which a page does not show"),
    ],
)
def test_what_is_no_result_is_refused(refused, results, tmp_path, change, words):
    (tmp_path / "bad.json").write_text(change((results / "ppl.json").read_text()))
    said = refused("check.json", str(tmp_path / "bad.json"))
    assert words in said
    assert "bad.json" in said


def test_what_is_not_there_is_a_device_or_is_given_twice_is_refused(refused, tmp_path):
    assert "cannot be read: it is not there" in refused("none.json")
    assert "/dev/zero is a device, but should be a file" in refused("/dev/zero")
    assert "check.json holds the same as check.json: give each result once" in refused("check.json", "check.json")
    (tmp_path / "huge.json").write_bytes(b"")
    with open(tmp_path / "huge.json", "r+b") as file:
        file.truncate(2**30)
    assert "but should have at most" in refused(str(tmp_path / "huge.json"))
    (tmp_path / "folder").mkdir()
    assert "holds no sweep" in refused(str(tmp_path / "folder"))
    (tmp_path / "folder" / "holiday.jpg").touch()
    assert "holds holiday.jpg, and no sweep" in refused(str(tmp_path / "folder"))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("ppl.json", lambda told: told["rows"][1].update(bytes_per_token_full=0.0), "field bytes_per_token_full"),
        ("ppl.json", lambda told: told["rows"][1].update(kl=1e300), "field kl: "),
        ("check.json", lambda told: told["targets"][0]["results"][0].update(verdict="fine"), "field verdict: "),
        ("check.json", lambda told: told["targets"][0]["results"][0].update(check='a" b'), "field check: "),
        ("explain.json", lambda told: told["per_token"]["evicted_at"][0][0].pop(), "evicted_at should have a time"),
        ("explain.json", lambda told: told["per_token"]["shown_tokens"].pop(), "evicted_at should have a time"),
        ("explain.json", lambda told: told["effects"][0].update(change=None), "field effects.0.change"),
    ],
)
def test_numbers_that_no_page_can_show_are_refused_with_their_field(refused, loaded, tmp_path, name, change, words):
    told = loaded(name)
    change(told)
    (tmp_path / "bad.json").write_text(json.dumps(told))
    said = refused(str(tmp_path / "bad.json"))
    assert "bad.json" in said
    assert words in said


def test_half_a_surrogate_pair_is_shown_as_what_it_is(page, loaded, tmp_path):
    told = loaded("check.json")
    told["targets"][0]["results"][0]["law"] = "a \ud800 b \U0001f600"
    (tmp_path / "half.json").write_text(json.dumps(told))
    assert "a ? b \U0001f600" in page(tmp_path / "half.json")[0]


def test_results_in_which_there_is_nothing_are_refused(refused, loaded, tmp_path):
    nothing = loaded("check.json") | {"targets": []}
    (tmp_path / "nothing.json").write_text(json.dumps(nothing))
    assert "there is nothing to show" in refused(str(tmp_path / "nothing.json"))


def test_a_folder_that_holds_something_else_is_left_alone(refused, page, tmp_path, run_knorm, results):
    page("check.json")
    page("ppl.json")  # a page of ours is written again
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    assert "other: it holds thesis.tex, and no page: give a new or an empty folder" in refused("ppl.json", out="other")
    (tmp_path / "file").touch()
    assert "file: it is no folder" in refused("ppl.json", out="file")
    assert "there is no folder" in refused("ppl.json", out="a/b")
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "index.html").write_text("<h1>mine</h1>")
    assert "holds index.html, and no page" in refused_by_hand(run_knorm, results, "made")
    assert (tmp_path / "made" / "index.html").read_text() == "<h1>mine</h1>"
    assert run_knorm("page", str(results / "ppl.json"), "made", "--force")[0] == 0
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "results.json").write_bytes((results / "check.json").read_bytes())
    assert "holds results.json, and no page" in refused_by_hand(run_knorm, results, "kept")
    (tmp_path / "made" / "results.json").unlink()  # as where a full disk kept it from being written
    assert run_knorm("page", str(results / "ppl.json"), "made")[0] == 0


def refused_by_hand(run_knorm, results, out):
    code, _, problem = run_knorm("page", str(results / "ppl.json"), out)
    assert code == 2
    return problem


def test_a_page_that_would_be_too_large_is_not_written(refused, loaded, tmp_path):
    check = loaded("check.json")
    check["targets"][0]["results"][0] |= {"snippet": "x" * MOST_BYTES, "verdict": "refuted"}
    (tmp_path / "large.json").write_text(json.dumps(check))
    assert f"but should have at most {MOST_BYTES:,}: give fewer RESULTS" in refused(str(tmp_path / "large.json"))


def test_wrong_usage_is_told_before_anything_is_loaded_and_a_page_needs_no_pytorch(results, tmp_path):
    code = """
    import sys
    from knorm.cli import main
    sys.argv = ["knorm", "page", *sys.argv[1:]]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, ended.code
    print([name for name in ("torch", "transformers", "scipy.stats", "matplotlib") if name in sys.modules])
    """
    for name in ("check.json", "ppl.json", "study"):
        done = in_a_new_process(code, str(results / name), str(tmp_path / f"out-{name}"), check=True)
        assert done.stdout.splitlines()[-1] == "[]"


def test_jinja2_that_is_missing_is_told_with_what_to_type(refused, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert "pip install 'knorm[page]'" in refused("check.json")


def test_an_axis_holds_its_values_and_what_is_written_beside_it_stands_in_order():
    axis, ticks = log_axis([0.003, 0.2], 300, 0)
    assert [tick.words for tick in ticks] == ["0.001", "0.01", "0.1", "1"]
    assert [tick.place for tick in ticks] == sorted((tick.place for tick in ticks), reverse=True)
    assert 0 < axis.place(0.2) < axis.place(0.003) < 300
    axis, ticks = signed_axis([-0.02, 1.5], 300, 0)
    assert [tick.words for tick in ticks] == ["-0.01", "0", "+0.01", "+0.1", "+1"]
    assert axis.place(1.5) >= 0
    axis, values = linear_axis(14336, 0, 100)
    assert values == [0, 2500, 5000, 7500, 10000, 12500]
    assert axis.place(14336) <= 100
    for axis in (log_axis([1e-9], 300, 0)[0], signed_axis([0.0], 300, 0)[0], linear_axis(0, 0, 100)[0]):
        assert 0 <= axis.place(1e-9) <= 300


def test_noise_is_twice_what_the_noisiest_control_shows(page, loaded, tmp_path):
    assert page("ppl.json")[1]["frontiers"][0]["noise_kl"] == 1e-8
    told = loaded("ppl.json")
    told["rows"][0]["kl"] = 0.003
    (tmp_path / "noisy.json").write_text(json.dumps(told))
    (frontier,) = page("ppl.json", tmp_path / "noisy.json", out="noisy")[1]["frontiers"]
    assert frontier["noise_kl"] == 0.006


def test_what_stands_beside_an_engine_s_rows_is_in_the_table_and_a_lower_bound_says_so(page, loaded, tmp_path):
    told = loaded("ppl.json")
    _, one, other = told["rows"]
    one |= {"kl_at_least": True, "kl": 1e-5, "bytes_per_token": 1.0}  # the smallest and the nearest, if it were exact
    beside = [
        other | {"method": "an engine, again", "kl": 1.25e-3},
        other | {"method": "transformers, float32", "kl": 2e-9},
    ]
    names = ("name", "package", "version", "system", "full")
    (tmp_path / "engine.json").write_text(json.dumps(told))
    circles = page("ppl.json", tmp_path / "engine.json", out="plain")[0].count("<circle")
    told["engine"] = dict.fromkeys(names, "x") | {"python": None, "beside": beside}
    (tmp_path / "engine.json").write_text(json.dumps(told))
    html, made = page("ppl.json", tmp_path / "engine.json")
    (frontier,) = made["frontiers"]
    assert [point["method"] for point in frontier["beside"]] == ["an engine, again", "transformers, float32"]
    assert {point["source"] for point in frontier["beside"]} == {1}
    rows = [[cell.strip() for cell in cells if cell.strip()] for _, cells, _ in Read(html).rows]
    assert [row[0] for row in rows if "beside" in row] == ["an engine, again", "transformers, float32"]
    (bound,) = [row for row in rows if "≥" in row]
    assert bound[1].startswith(one["method"])
    assert "front" not in bound, "a lower bound beats nothing"
    assert f"KL ≥{one['kl']:.3g}" in html
    assert html.count("<circle") == circles, "what stands beside is not drawn"
    left = page(Path("out").absolute(), out="left", arguments=["--without", "engine.json"])
    assert left == page("ppl.json", out="alone")


def test_the_front_has_what_no_other_beats(loaded, page):
    _, told = page("ppl.json")
    base = told["frontiers"][0]["points"][1]
    sizes = [(4, 0.1), (2, 0.2), (3, 0.3), (1, 0.9), (4, 0.05)]
    points = [Point(**base | {"bytes_per_token": size, "kl": kl}) for size, kl in sizes]
    assert front_of(points, lambda point: point.kl) == {1, 3, 4}
    control = Point(**base | {"bytes_per_token": 1, "kl": 0.0, "control": True})
    assert front_of([control, *points], lambda point: point.kl) == {2, 4, 5}


def test_what_lies_in_the_noise_is_drawn_in_the_band(page):
    _, told = page("ppl.json")
    frontier = Page.model_validate({name: told[name] for name in Page.model_fields}).frontiers[0]
    figure = kl_figure(frontier)
    for mark in figure.marks:
        inside = figure.band[0] <= mark.y <= figure.band[1]
        assert inside == mark.within == (mark.point.kl <= frontier.noise_kl)
        assert mark.high <= mark.y <= mark.low
    assert [mark.within for mark in figure.marks] == [True, False, False]
    noisy = frontier.model_copy(update={"noise_kl": 10.0})
    assert all(mark.within for mark in kl_figure(noisy).marks)
    for mark in nll_figure(frontier).marks:
        assert mark.high <= mark.y <= mark.low


def test_an_outline_holds_a_token_while_it_is_cached():
    gone = [4, 2, 6, 5, 6, 6]
    path = retained_outline(gone)
    corners = [(0.0, 0.0), (6.0, 6.0)]
    for letter, number in re.findall(r"([HV])(\d+)", path.removeprefix("M0 0L6 6")):
        x, y = corners[-1]
        corners.append((float(number), y) if letter == "H" else (x, float(number)))

    def inside(x, y):
        crossings = 0
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
            if (y0 > y) != (y1 > y) and x < x0 + (y - y0) / (y1 - y0) * (x1 - x0):
                crossings += 1
        return crossings % 2 == 1

    for token in range(6):
        for time in range(6):
            x, y = token + 0.4, time + 0.6  # above the diagonal's staircase
            assert inside(x, y) == (token <= time < gone[token]), (token, time)


def test_points_of_one_size_stay_near_their_size(page):
    """However many there are: a point moved by half of the axis would be read as another size."""
    _, told = page("study")
    (frontier,) = Page.model_validate({name: told[name] for name in Page.model_fields}).frontiers
    point = frontier.points[1]
    many = [point.model_copy(update={"kl": point.kl * 1.04**at}) for at in range(60)]
    figure = kl_figure(frontier.model_copy(update={"points": [*many, frontier.points[0]]}))
    places = [mark.x for mark in figure.marks[:60]]
    assert max(places) - min(places) < 80
    assert len({*places}) > 3
