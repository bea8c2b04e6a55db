from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from commands import IN_FULL, in_a_new_process

import knorm
from knorm.evaluation.ways import Ways
from knorm.evaluation.windows import cut_windows
from knorm.golden import declared, latency, noise
from knorm.golden import project as module
from knorm.golden.declared import load_cases
from knorm.golden.environment import How
from knorm.golden.project import Declared, Misdeclared, find_project
from knorm.golden.store import Store
from knorm.models import load_text

CPU = f"cpu-{platform.machine().lower()}"
NEWEST = """
import math

def newest(keys, values, keep_ratio):
    kept = math.ceil(keys.shape[2] * keep_ratio)
    return keys[:, :, -kept:], values[:, :, -kept:]
"""
TWO = """
[case.half]
target = "mine.py:newest"
keep_ratio = [0.9, 0.5]
window = 32
windows = 2

[case.tokens]
target = "mine.py:newest"
keep_tokens = 4
window = 24
windows = 2
metrics = ["kl", "counts"]
"""


@pytest.fixture
def project(tmp_path, run_knorm, monkeypatch):
    """A project with a method and two cases; returns a function that runs `knorm golden` in it."""
    monkeypatch.setenv("KNORM_COMMIT", "a" * 40)
    monkeypatch.setenv("COLUMNS", "200")
    if not IN_FULL:
        monkeypatch.setattr(noise, "ROUNDINGS", 1)
    Path("mine.py").write_text(NEWEST)
    Path("knorm.toml").write_text(TWO)
    return lambda *arguments: run_knorm("golden", *arguments)


@pytest.fixture
def unmeasured(monkeypatch):
    """Fail where anything is measured."""
    monkeypatch.setattr(declared, "Ways", lambda *_, **__: pytest.fail("something was measured"))


FIRST: dict[Path, bytes] = {}  # what was accepted first, which is measured once


@pytest.fixture
def accepted(project):
    """The same, with both goldens accepted."""
    if not FIRST:
        assert project("record", "--all")[0] == 0
        assert project("accept", "half", "tokens", "--reason", "the first")[0] == 0
        FIRST.update((file, file.read_bytes()) for file in Path("golden").rglob("*") if file.is_file())
    for file, content in FIRST.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return project


# What is declared

CASE = '[case.a]\ntarget = "mine.py:newest"\n'
REFUSED = {
    "an unknown key": (CASE + "keep_ration = 0.5", "case a: unknown key 'keep_ration'; did you mean keep_ratio?"),
    "an unknown key above": (
        'golden_dri = "x"\n' + CASE,
        "unknown key 'golden_dri'; did you mean golden_dir?",
    ),
    "a key like no other": (
        CASE + "zzz = 1",
        "case a: unknown key 'zzz'; there are keep_ratio, keep_tokens, target, kind",
    ),
    "two cases of one name": (CASE + CASE, "two cases are named 'a' (line 3)"),
    "no TOML": ("[case.a", "is not TOML: Expected ']'"),
    "no target": ("[case.a]\nkeep_ratio = 0.5", "case a: target is missing, which names the method"),
    "a ratio": (CASE + "keep_ratio = 1.5", "case a: keep_ratio=1.5, but should lie in (0, 1]"),
    "a ratio that is true": (CASE + "keep_ratio = true", "case a: keep_ratio is True, but should be a number in"),
    "no ratio": (CASE + "keep_ratio = []", "case a: keep_ratio is empty, but should name a budget"),
    "a number of tokens": (CASE + "keep_tokens = 0.5", "case a: keep_tokens is 0.5, but should be a whole number"),
    "two budgets": (CASE + "keep_ratio = 1\nkeep_tokens = 4", "case a: keep_ratio and keep_tokens are two budgets"),
    "a budget twice": (CASE + "keep_tokens = [4, 4]", "case a: the budget 4 stands there twice"),
    "a type": (CASE + 'window = "8"', "case a: window is '8': input should be a valid integer"),
    "a prompt": (CASE + "prompt_length = 256", "case a: prompt_length is 256, but should be below window = 256"),
    "a metric": (CASE + 'metrics = ["nl"]', "case a: metrics has 'nl', but should have 'nll', 'kl'"),
    "a threshold's metric": (CASE + "thresholds = {klx = 1.0}", "case a: thresholds has 'klx', but should have"),
    "a threshold": (CASE + "thresholds = {kl = -1.0}", "case a: thresholds has kl = -1.0, but should not be negative"),
    "an unused threshold": (
        CASE + 'metrics = ["kl"]\nthresholds = {nll = 1.0}',
        "case a: thresholds names nll, which is not among its metrics",
    ),
    "a clock beside others": (
        CASE + 'metrics = ["kl", "latency"]',
        "case a: metrics has latency, but a clock needs the machine to itself: give it a case of its own",
    ),
    "a clock without tokens": (
        CASE + 'metrics = ["latency"]\nprompt_length = 255',
        "case a: prompt_length is 255, but latency needs two tokens after it",
    ),
    "a name": ('[case."A b"]\ntarget = "x"', "case 'A b': the name should be at most 64 of a-z, 0-9, - and _"),
    "a reserved name": ('[case.reported]\ntarget = "x"', "case 'reported': the name is reserved"),
    "a folder outside": ('golden_dir = "../x"', "golden_dir is '../x', but should be a folder below"),
    "the folder itself": ('golden_dir = "."', "golden_dir is '.', but should be a folder below"),
}


@pytest.mark.parametrize(("text", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_declared_wrongly_is_one_line_before_anything_is_loaded(project, text, words, unmeasured):
    Path("knorm.toml").write_text(text)
    for command in ("verify", "list"):
        code, out, err = project(command)
        assert (code, out) == (2, "")
        assert err.startswith(f"knorm: knorm.toml: {words}")
        assert err.count("\n") == 1


def test_every_problem_is_a_line(project, unmeasured):
    Path("knorm.toml").write_text(f'other = 1\n{CASE}windos = 3\n[case.b]\ntarget = ""\nhow = "fast"\n')
    code, _, err = project("verify")
    assert code == 2
    assert [line.removeprefix("knorm: ") for line in err.splitlines()] == [
        "knorm.toml: case a: unknown key 'windos'; did you mean windows?",
        "knorm.toml: case b: target is '': string should have at least 1 character",
        "knorm.toml: case b: how has 'fast', but should have 'auto', 'schedule', 'two calls' or 'loop'",
        "knorm.toml: unknown key 'other'; there are golden_dir, case, check",
    ]


def test_a_declaration_is_refused_before_torch_is_loaded(tmp_path):
    (tmp_path / "knorm.toml").write_text("[case.a]\n")
    code = """
        import sys
        from knorm.cli import main
        sys.argv = ["knorm", "golden", "verify"]
        try:
            main()
        finally:
            print("torch" in sys.modules)
    """
    ended = in_a_new_process(code, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "False\n")


def test_the_keys_and_their_defaults_are_those_of_the_documentation():
    fields = Declared(target="x")
    assert (fields.window, fields.windows, fields.prompt, fields.batch) == (256, 4, 128, 1)
    assert fields.metrics == ["nll", "kl", "same_top", "counts", "bytes"]


# Where it is found


def test_the_first_configuration_upwards_is_found(tmp_path):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    assert find_project(inner) is None
    (tmp_path / "pyproject.toml").write_text("[tool.knorm.case.one]\ntarget = 'x'\n[project]\nname = 3\n")
    (tmp_path / "a" / "pyproject.toml").write_text('[project]\nname = "[tool.knorm]"\n')
    found = find_project(inner)
    assert (found.root, found.golden_dir, [*found.cases]) == (tmp_path, tmp_path / "golden", ["one"])
    (tmp_path / "a" / "knorm.toml").write_text('golden_dir = "tests/golden"')
    found = find_project(inner)
    assert (found.golden_dir, found.cases) == (tmp_path / "a" / "tests" / "golden", {})
    (tmp_path / "knorm.toml").touch()
    with pytest.raises(Misdeclared, match=r"^knorm.toml: pyproject.toml beside it has \[tool.knorm\] too: keep one"):
        find_project(tmp_path)


def test_the_search_ends_at_the_top_of_a_checkout(tmp_path):
    (tmp_path / "knorm.toml").touch()
    (tmp_path / "a" / ".git").mkdir(parents=True)
    assert find_project(tmp_path / "a") is None
    assert find_project(tmp_path).cases == {}


def test_a_broken_pyproject_of_others_is_not_read(tmp_path):
    (tmp_path / "pyproject.toml").write_text("[project\n")
    assert find_project(tmp_path) is None
    (tmp_path / "pyproject.toml").write_text("[project\n[tool.knorm]\n")
    with pytest.raises(Misdeclared, match=r"^pyproject.toml: is not TOML"):
        find_project(tmp_path)


# What does not load

UNLOADABLE = {
    "no such file": ('target = "none.py:x"', "target 'none.py:x': there is no Python file"),
    "no such name": ('target = "mine.py:newst"', "mine.py has no 'newst'; it has newest"),
    "no such parameter": (
        'target = "mine.py:newest(widow=3)"\nkeep_ratio = 0.5',
        "has no parameter widow; it has keys",
    ),
    "no budget": ('target = "mine.py:newest"', "is called with a budget: give keep_ratio or keep_tokens"),
    "a Hub model without revision": (
        'target = "mine.py:newest"\nkeep_ratio = 0.5\nmodel = "EleutherAI/pythia-70m"',
        "model 'EleutherAI/pythia-70m' is no folder here; from the Hub it needs a pinned revision: ",
    ),
    "no such model": ('target = "mine.py:newest"\nkeep_ratio = 0.5\nmodel = "x.gguf"', "model 'x.gguf' cannot be load"),
    "no such text": ('target = "mine.py:newest"\nkeep_ratio = 0.5\ntext = "x.txt"', "text 'x.txt' is no file here"),
    "no such kind": ('target = "mine.py:newest"\nkeep_ratio = 0.5\nkind = "pres"', "kind 'pres', but should be one of"),
    "no schedule": (
        'target = "mine.py:newest"\nkeep_ratio = 0.5\nhow = "schedule"',
        "how is 'schedule', but mine.py:newest has none: give 'two calls', 'loop' or 'auto'",
    ),
}


@pytest.mark.parametrize(("lines", "words"), UNLOADABLE.values(), ids=UNLOADABLE)
def test_a_case_that_does_not_load_is_one_line_before_anything_is_measured(project, lines, words, unmeasured):
    Path("knorm.toml").write_text(f"{TWO}\n[case.a]\n{lines}\n")
    for command in (["verify"], ["record", "--all"], ["record", "half", "a"]):
        code, out, err = project(*command)
        assert (code, out) == (2, "")
        assert err.startswith("knorm: knorm.toml: case a: ")
        assert words in err
        assert err.count("\n") == 1
    assert project("list")[0] == 0, "what is declared can be listed"


SIGNATURES = {
    "an argument less": ("(keys, values)", "is called with (keys, values, 0.5): too many positional arguments"),
    "an argument more": (
        "(keys, values, keep_ratio, sinks)",
        "(keys, values, keep_ratio): missing a required argument",
    ),
    "another class": ("(self)", "is called with (keys, values, 0.5): too many positional arguments"),
}


Q8 = """target = 'llama.cpp:embedded(type_k="q8_0")'"""


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (f"{Q8}\nkeep_ratio = [0.5]", "is an engine, whose settings stand in the target: drop keep_ratio"),
        (f'{Q8}\nmodel = "embedded"', "drop model"),
        (f"{Q8}\nbatch = 2", "drop batch above 1"),
        (f'{Q8}\nmetrics = ["latency"]', "drop latency among the metrics"),
        (f'{Q8}\nhow = "schedule"', "how is 'schedule', but llama.cpp:embedded(type_k=\"q8_0\") has none"),
        (f'{Q8}\ndevices = ["cuda"]', "runs on a CPU"),
        ("target = 'llama.cpp:embedded(type_k=\"q9\")'", "type_k='q9', but should be one of f32"),
    ],
)
def test_an_engine_that_cannot_be_a_case_is_one_line(tmp_path, lines, words):
    (tmp_path / "knorm.toml").write_text(f"[case.engine]\n{lines}\n")
    with pytest.raises(Misdeclared) as raised:
        load_cases(find_project(tmp_path))
    (problem,) = raised.value.problems
    assert words in problem


def test_an_engines_case_is_measured_on_a_cpu_by_its_own_noise(tmp_path):
    (tmp_path / "knorm.toml").write_text(f"[case.engine]\n{Q8}\nwindow = 64\n")
    (case,) = load_cases(find_project(tmp_path)).values()
    assert (case.devices, case.own_noise, case.how.numerics) == (("cpu",), True, "batches of 512 tokens")
    assert {*case.packages} == {"knorm", "llama_cpp_python"}
    assert case.configuration()["model"] == "embedded"


@pytest.mark.parametrize(("signature", "words"), SIGNATURES.values(), ids=SIGNATURES)
def test_a_target_that_changed_its_signature_is_refused_before_anything_is_measured(
    accepted, signature, words, unmeasured
):
    Path("mine.py").write_text(f"def newest{signature}:\n    return keys, values\n")
    code, out, err = accepted("verify", "half")
    assert (code, out) == (2, "")
    assert err.startswith(f"knorm: knorm.toml: case half: mine.py:newest{signature} is called with ")
    assert words in err
    assert err.count("\n") == 1


def test_a_golden_without_a_case_and_a_case_without_a_golden_are_refused_before_anything_is_measured(
    accepted, unmeasured
):
    Path("knorm.toml").write_text(TWO.replace("case.half", "case.new"))
    code, out, err = accepted("verify")
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        "knorm: knorm.toml: golden golden/half has no case: remove it, or declare the case in knorm.toml",
        f"knorm.toml: case new has no golden of {CPU}, but others have: knorm golden record new",
    ]
    assert accepted("list")[0] == 1


def test_only_what_moved_becomes_a_candidate(accepted, monkeypatch):
    runs, real = [], Ways.evaluate
    monkeypatch.setattr(Ways, "evaluate", lambda self, *rest: runs.append(rest[0].label) or real(self, *rest))
    code, out, _ = accepted("record", "--all")
    assert code == 0
    assert out.splitlines() == [f"{name} ({CPU}): nothing moved, no candidate" for name in ("half", "tokens")]
    assert len(runs) == 3, "one run shows it"
    assert not [*Path("golden").rglob("*.candidate")]
    Path("mine.py").write_text(NEWEST.replace("* keep_ratio)", "* keep_ratio) - (keep_ratio >= 0.5)"))
    code, out, _ = accepted("record", "--all", "--json", "out.json")
    assert code == 0
    assert [Path(name).parent.name for name in json.loads(Path("out.json").read_text())["written"]] == ["half"]
    assert f"tokens ({CPU}): nothing moved, no candidate" in out
    assert out.splitlines()[-1] == 'To accept: knorm golden accept half --reason "..."'
    Path("mine.py").write_text(NEWEST)
    code, out, _ = accepted("record", "half")
    assert out == f"half ({CPU}): nothing moved, no candidate; the earlier candidate is removed\n"
    assert not [*Path("golden").rglob("*.candidate")]
    assert accepted("record", "half", "--unmoved")[0] == 0
    assert [*Path("golden").rglob("*.candidate")]


def test_record_says_what_the_noise_was_and_what_the_gates_let_pass(project):
    Path("knorm.toml").write_text(TWO.replace('"kl", "counts"', '"nll", "kl"'))
    code, out, _ = project("record", "tokens", "--json", "out.json")
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    start = next(place for place, line in enumerate(lines) if "runs in which nothing that matters differs" in line)
    assert f"({noise.ROUNDINGS} other roundings of the weights, another attention, batch 2" in lines[start]
    assert lines[start + 1] == "metric noise lets pass the method does"
    assert lines[start + 2].startswith("nll/full, a typical window ")
    assert " 1.0e-04 - nats/token" in lines[start + 2]
    seen = json.loads(Path("out.json").read_text())["noise"]["tokens"]
    rows = {row["metric"]: row for row in seen["bounds"]}
    typical = rows["kl/4 tokens, a typical window"]
    assert 0 < typical["most"] < 1e-5 < typical["passes"] < typical["does"]


FAST = """
[case.fast]
target = "mine.py:newest"
keep_ratio = [0.9, 0.5]
window = 24
prompt_length = 16
metrics = ["latency"]
"""


def timed(monkeypatch, slower=0.0):
    """Measure as usual, with the log-ratios that are told in place of the clock's."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # under which nothing may be timed
    real = latency.bench_methods

    def bench(model, prompts, methods, tokenizer, **options):
        made = real(model, prompts, methods, tokenizer, **options | {"blocks": 8})
        assert [(prompt.ids.shape, prompt.new_tokens) for prompt in prompts.values()] == [((1, 16), 8)]
        logs = {metric: tuple(slower + 0.001 * (n % 3) for n in range(8)) for metric in ("ttft", "tpot")}
        return replace(made, rows=(made.rows[0], *(replace(row, logs=logs) for row in made.rows[1:])))

    monkeypatch.setattr(latency, "bench_methods", bench)


@pytest.mark.processes
def test_a_case_that_a_clock_measures_is_measured_where_it_is_named(accepted, monkeypatch):
    Path("knorm.toml").write_text(TWO + FAST)
    timed(monkeypatch)
    code, out, _ = accepted("verify")
    assert (code, out.splitlines()[-1].partition(", in")[0]) == (
        0, "2 hold, 0 failed, left out, since a clock measures them: fast"
    )  # fmt: skip
    code, out, err = accepted("record", "fast")
    assert code == 0, err
    assert "nothing that matters" not in out, "its gate is the margin"
    assert accepted("accept", "fast", "--reason", "the first")[0] == 0
    golden, tensors = Store(Path("golden")).read("fast", CPU)
    assert {metric.name: metric.gate.rule for metric in golden.metrics} == {"weights": "exact"} | dict.fromkeys(
        ("ttft/0.9", "tpot/0.9", "ttft/0.5", "tpot/0.5"), "timing"
    )
    assert tensors["tpot/0.5"].shape == (8, 1)
    assert (golden.configuration["windows"], golden.metric("tpot/0.5").gate.threshold) == (1, 0.05)
    assert accepted("verify", "fast")[0] == 0
    timed(monkeypatch, slower=0.2)
    code, out, _ = accepted("verify", "fast")
    assert code == 1
    assert "the ratio rose: +22.1%" in out


# Life of a project's goldens


@pytest.mark.processes
def test_the_life_of_a_projects_golden(project, monkeypatch):
    Path("sub").mkdir()
    monkeypatch.chdir("sub")
    code, out, _ = project("verify")
    assert code == 0
    assert "0 hold, 0 failed, 2 NOT COMPARED" in out
    assert not Path("../golden").exists(), "verify writes nothing"
    assert project("record", "--all")[0] == 0
    assert Path("../golden/.gitignore").read_text() == "*.candidate\n.lock\n.*.tmp\n"
    code, out, _ = project("accept", "half", "tokens", "--reason", "the first")
    assert code == 0
    code, out, _ = project("verify")
    assert code == 0
    assert "2 hold, 0 failed, in " in out
    Path("../mine.py").write_text(NEWEST.replace("-kept:]", "-kept + 1:]"))
    code, out, _ = project("verify", "half")
    assert code == 1
    assert "MOVED         half" in out
    assert "seen/0.5" in out
    assert "nll/0.5" in out
    assert "nll/full" not in out, "the full cache did not move"
    assert out.splitlines()[-1] == "If the change is intended, commit it, then: knorm golden record half"
    assert project("record", "half", "-q")[0] == 0
    code, _, err = project("accept", "half", "--reason", "one less")
    assert code == 2
    pasted = shlex.split(err.splitlines()[-1].partition(": ")[2])
    assert pasted[:2] == ["knorm", "golden"]
    assert project(*pasted[2:])[0] == 0
    assert project("verify", "half")[0] == 0


def test_the_numbers_are_those_of_knorm_evaluate(project, embedded):
    (case,) = load_cases(find_project(Path.cwd()), ["half"]).values()
    measured = case.measure("cpu", case.how)
    values = {metric.name: metric.value for metric in measured.metrics}
    model, tokenizer = embedded
    ids = cut_windows(tokenizer, load_text("narrative"), 32, 2).input_ids
    for ratio in ("0.9", "0.5"):
        run = knorm.evaluate(model, ids, knorm.method("mine.py:newest", keep_ratio=ratio), prompt_length=16)
        assert values[f"nll/{ratio}"] == pytest.approx(run.damage.nll, abs=1e-6)
        assert values[f"kl/{ratio}"] == pytest.approx(run.damage.kl, abs=1e-6)
        assert values[f"same_top/{ratio}"] == run.damage.same_top
        assert values[f"bytes/{ratio}"] == run.bytes_stored
        assert values[f"seen/{ratio}"] == run.tokens_seen.sum() * 2 * 15
        assert measured.tensors[f"kl/{ratio}"].shape == (2, 16)
    assert values["nll/full"] == pytest.approx(float(run.per_token.nll_full.mean()))
    assert values["way"] == "two calls"


def test_the_way_is_checked_on_the_smallest_budget(project, monkeypatch):
    runs, real = [], Ways.evaluate

    def evaluate(self, method, how="auto"):
        runs.append((str(method.budget), how))
        return real(self, method, how)

    monkeypatch.setattr(Ways, "evaluate", evaluate)
    (case,) = load_cases(find_project(Path.cwd()), ["half"]).values()
    case.measure("cpu", case.how)
    assert runs == [("0.5", "auto"), ("0.9", "two calls")]


def test_only_the_metrics_that_are_declared_are_pinned_by_the_gates_that_are_declared(project):
    with Path("knorm.toml").open("a") as file:
        file.write("thresholds = {kl = 0.01, counts = 0.5}\n")
    (case,) = load_cases(find_project(Path.cwd()), ["tokens"]).values()
    gates = {metric.name: (metric.gate.rule, metric.gate.threshold) for metric in case.measure("cpu", How()).metrics}
    assert gates == {
        "weights": ("exact", None),
        "tokens": ("exact", None),
        "way": ("same_environment", None),
        "kl/4 tokens": ("tokens", 0.01),
        "seen/4 tokens": ("near", 0.5),
        "seen_by_head/4 tokens": ("same_environment", None),
    }


def test_another_declaration_is_another_configuration(accepted):
    Path("knorm.toml").write_text(TWO.replace("keep_tokens = 4", "keep_tokens = 5").replace("windows = 2", "windows=3"))
    code, out, _ = accepted("verify")
    assert code == 1
    assert "its configuration changed: windows was 2, is 3" in out
    assert "its configuration changed: keep_tokens.0 was 4, is 5 (2 differences): record it again" in out
    code, out, _ = accepted("record", "tokens")
    assert [line for line in out.splitlines() if line.startswith("configuration: ")] == [
        "configuration: keep_tokens.0 was 4, is 5",
        "configuration: windows was 2, is 3",
    ], "only what differs is shown"
    assert accepted("accept", "tokens", "--reason", "more")[0] == 2, "the metrics of 4 tokens are gone"


def test_other_weights_have_moved(accepted, monkeypatch):
    monkeypatch.setattr(declared, "_loaded", declared._loaded.__wrapped__)
    monkeypatch.setattr(declared, "digest_of", lambda model: "0" * 64)
    code, out, _ = accepted("verify", "half")
    assert code == 1
    assert "weights: differs" in out


def test_a_candidate_of_other_code_of_the_project_is_refused(project):
    assert project("record", "half")[0] == 0
    Path("mine.py").write_text(NEWEST + "\n# another\n")
    code, _, err = project("accept", "half", "--reason", "x")
    assert code == 2
    assert "half/" in err
    assert "was made by other code than this" in err
    assert "knorm golden record half" in err.splitlines()[-1]


def test_a_package_of_others_is_environment_and_ones_own_is_under_test(project, monkeypatch):
    there = Path("venv/site-packages/thirdparty")
    there.mkdir(parents=True)
    (there / "__init__.py").write_text(NEWEST)
    monkeypatch.syspath_prepend(str(there.parent.resolve()))
    monkeypatch.setattr(declared, "packages_distributions", lambda: {"thirdparty": ["third-party"]})
    monkeypatch.setattr(declared, "version", lambda name: f"version of {name}")
    Path("knorm.toml").write_text(TWO.replace("mine.py:newest", "thirdparty:newest", 1))
    cases = load_cases(find_project(Path.cwd()))
    assert cases["half"].packages == {"knorm": knorm.__version__, "third-party": "version of third-party"}
    assert cases["half"].sources == ()
    assert cases["tokens"].packages == {"knorm": knorm.__version__}
    assert cases["tokens"].sources == (Path("mine.py").resolve(),)
    sys.modules.pop("thirdparty", None)


def test_another_version_of_a_package_is_another_environment(accepted, monkeypatch):
    monkeypatch.setattr(declared, "__version__", "9")
    code, out, _ = accepted("verify")
    assert code == 0
    assert "in another environment (packages)" in out


def test_a_project_in_git(project, monkeypatch):
    monkeypatch.delenv("KNORM_COMMIT")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q", "."], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    assert project("record", "tokens")[0] == 0
    assert project("accept", "tokens", "--reason", "the first")[0] == 0
    status = subprocess.run(
        ["git", "status", "--porcelain", "-uall"], capture_output=True, text=True, check=True
    ).stdout
    written = [line for line in status.split()[1::2] if "__pycache__" not in line]  # bytecode makes no tree dirty
    assert sorted(line.split("/")[-1].split("-")[0] for line in written) == [".gitignore", "cpu", "cpu"]
    fields = json.loads(Path(f"golden/tokens/{CPU}.json").read_text())
    assert fields["provenance"]["clean"]
    Path("mine.py").write_text(NEWEST + "\n")
    _, out, _ = project("record", "tokens")
    assert "The tree has changes outside the goldens" in out


def test_elsewhere_the_cases_are_knorms_own(project):
    Path("knorm.toml").unlink()
    code, out, _ = project("list")
    assert code == 0
    assert "streaming-32" in out


def test_a_misspelled_case_is_offered_the_nearest(project):
    code, _, err = project("verify", "hal")
    assert (code, err) == (2, "knorm: no case is named 'hal'; did you mean half? There are half, tokens\n")


def test_the_configuration_is_read_within_limits(project, monkeypatch):
    monkeypatch.setattr(module, "_MOST_BYTES", 10)
    code, _, err = project("list")
    assert code == 2
    assert "but should have at most 10" in err
