"""A plan says what it is, and what is wrong with it; its cells are named by all that they depend on."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from commands import in_a_new_process

from knorm.methods.targets import expanded
from knorm.sweep import inputs
from knorm.sweep.cells import cell_of, misfit, study_of
from knorm.sweep.plan import Plan, read_plan

MINE = "import helper\n\ndef compress(keys, values, keep_ratio):\n    return keys, values\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a method, its helper, and a function that reads a plan there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "helper.py").write_text("x = 1\n")
    (tmp_path / "stranger.py").write_text("x = 1\n")
    for cached in (inputs.target_digest, inputs.sources_of, inputs.text_digest, inputs.model_digest):
        cached.cache_clear()

    def read(text):
        Path("plan.toml").write_text(text)
        return read_plan(Path("plan.toml"))

    return read


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("methods = []", "plan.toml: methods is empty: the plan has no cells"),
        ('methods = ["knorm"]\nmodels = []', "plan.toml: models is empty: the plan has no cells"),
        ("", "plan.toml: methods is missing, as methods = ['knorm']"),
        ('methods = ["knorm"]\nmodel = ["embedded"]', "plan.toml: unknown key 'model'; did you mean models?"),
        (
            'methods = [{target = "knorm", plicy = {}}]',
            "unknown key 'methods.0.plicy'; did you mean policy?",
        ),
        ('methods = ["knorm"]\nmeasure = ["damag"]', "did you mean damage?"),
        ('methods = ["knorm"]\nkeep_ratio = 1.5', "plan.toml: keep_ratio=1.5, but should lie in (0, 1]"),
        ('methods = ["knorm"]\nkeep_ratio = 0.5\nkeep_tokens = 8', "are two budgets: give one of them"),
        ('methods = ["knorm"]\nprompt_lengths = [511]', "should have at most window - 2 = 510"),
        ('methods = ["knorm"]\nbatch = 3', "windows_per_cell is 4, but should be a multiple of batch = 3"),
        ('methods = ["knorm", "knorm"]', "plan.toml: methods has 'knorm' twice"),
        ('methods = ["knorm"]\nmodels = ["embeddd"]', "plan.toml: model 'embeddd' should be embedded"),
        ('methods = ["knorm"]\ntexts = ["x.txt"]', "plan.toml: text 'x.txt' is no file here"),
        ('methods = [{target = "knorm", policy = {protect_recnt = 1}}]', "policy has 'protect_recnt', but there are"),
        ('methods = [{target = "mine.py:compress", policy = {seed = 1}}]', "policy is for the target knorm alone"),
        ("methods = [", "plan.toml: is not TOML"),
    ],
)
def test_a_plan_that_cannot_be_says_why_in_a_line(text, said, here):
    with pytest.raises(ValueError) as told:
        here(text)
    assert said in str(told.value)
    assert "\n" not in str(told.value)


def test_all_problems_are_told_at_once_a_line_each(here):
    with pytest.raises(ValueError) as told:
        here('methods = ["knorm"]\nwindow = "a"\nmodel = 1\nhow = "lop"')
    assert len(str(told.value).splitlines()) == 3


def test_a_pattern_brings_what_the_plan_has_not_named(here):
    """So `kvpress:*` may stand there again, with budgets of the other kind: what has a budget of its own is there."""
    plan = here('methods = ["transformers:StaticCache", {target = "transformers:*", keep_tokens = 8}]')
    labels = [chosen.label for chosen in study_of(plan, "cpu").methods]
    assert labels[0] == "transformers:StaticCache"
    assert sorted(labels) == sorted(expanded("transformers:*"))
    with pytest.raises(ValueError, match="has transformers:StaticCache twice"):
        study_of(here('methods = ["transformers:*", "transformers:StaticCache"]'), "cpu")


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ('["mine.py:compres"]', "has no 'compres'; it has compress"),
        ('["nothere.py:compress"]', "there is no Python file"),
        ('["nosuchpackage:compress"]', "there is no module 'nosuchpackage'"),
        ('[{target = "transformers:DynamicCache", keep_ratio = 0.5}]', "takes no budget"),
        ('[{target = "knorm", keep_tokens = 8}]', "knorm keeps a share of the cache: give keep_ratio"),
        (
            '["mine.py:compress", {target = "mine.py:compress", keep_ratio = 0.5}]',
            "has mine.py:compress 0.5 twice",
        ),
    ],
)
def test_a_method_that_cannot_be_is_named_before_anything_runs(methods, said, here):
    plan = here(f"methods = {methods}")
    with pytest.raises(ValueError) as told:
        study_of(plan, "cpu")
    assert said in str(told.value)


def test_a_method_that_fits_none_of_the_models_is_named_and_one_that_fits_some_is_left_out(here):
    from knorm.sweep.cells import Chosen

    press = Chosen("kvpress:A", keep_ratio="0.5", form="press")
    assert misfit(press, "embedded") == "presses support no GPT-NeoX"
    assert misfit(press, "embedded-llama") is None
    plan = Plan(methods=["kvpress:A"], models=["embedded"])
    known = _Known([vars(press)])
    with pytest.raises(ValueError, match=r"kvpress:A 0.5 fits none of the models \(embedded\): presses support no GPT"):
        study_of(plan, "cpu", known)
    both = study_of(Plan(methods=["kvpress:A"], models=["embedded", "embedded-llama"]), "cpu", known)
    assert [(chosen.label, model) for chosen, model, _ in both.left_out] == [("kvpress:A 0.5", "embedded")]


class _Known(dict):
    """What earlier loads told of any target."""

    def __init__(self, answer):
        self.answer = answer

    def __contains__(self, key):
        return True

    def __getitem__(self, key):
        return self.answer


@pytest.fixture(autouse=True)
def _no_kvpress(monkeypatch):
    target = inputs.target_digest
    monkeypatch.setattr("knorm.sweep.cells.target_digest", lambda name: "k" if name == "kvpress:A" else target(name))


def names(plan):
    return {cell.name() for cell in study_of(plan, "cpu").cells()}


PLAN = 'methods = ["mine.py:compress", "knorm"]\nwindows = 4\nwindows_per_cell = 2\nwindow = 64\n'


def test_adding_methods_windows_budgets_seeds_keeps_the_cells_that_there_were(here):
    before = names(here(PLAN))
    assert len(before) == 6
    for more, count in (
        (PLAN.replace('"knorm"', '"knorm", "transformers:DynamicCache"'), 8),
        (PLAN.replace("windows = 4", "windows = 6"), 9),
        (PLAN.replace("windows = 4", "windows = 5"), 9),
        (PLAN + "keep_ratio = [0.5, 0.25]", 10),
        (PLAN + "seeds = [0, 1]", 12),
        (PLAN + 'models = ["embedded", "embedded-llama"]', 12),
        (PLAN + "limit = 5", 6),
    ):
        after = names(here(more))
        assert before <= after
        assert len(after) == count


@pytest.mark.parametrize("place", ["pipe", "/dev/zero"])
def test_what_is_no_regular_file_is_refused_before_it_is_read(place, here):
    os.mkfifo("pipe")
    with pytest.raises(ValueError, match=r"is a (pipe|device), but should be a file"):
        study_of(here(f'methods = ["knorm"]\ntexts = ["{place}"]\n'), "cpu").cells().__next__()


@pytest.mark.parametrize(("file", "moves"), [("mine.py", True), ("helper.py", True), ("stranger.py", False)])
def test_a_cell_depends_on_the_sources_of_its_target_and_no_others(file, moves, here):
    before = names(here(PLAN))
    Path(file).write_text(Path(file).read_text() + "# changed\n")
    inputs.target_digest.cache_clear()
    inputs.sources_of.cache_clear()
    after = names(here(PLAN))
    assert len(before - after) == (2 if moves else 0), "of the four cells of methods, two are of mine.py"


def test_a_cell_depends_on_text_model_code_and_versions(here, monkeypatch):
    Path("a.txt").write_text("one " * 500)
    plan = here(PLAN + 'texts = ["a.txt"]')
    before = names(plan)
    Path("a.txt").write_text("two " * 500)
    inputs.text_digest.cache_clear()
    assert not names(plan) & before
    before = names(plan)
    for name in ("code_digest", "versions", "model_digest"):
        with monkeypatch.context() as patch:
            patch.setattr(f"knorm.sweep.cells.{name}", lambda *_: "other")
            assert not names(plan) & before, name


def test_the_digest_of_a_folder_of_weights_follows_its_bytes(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"a" * 100)
    before = inputs.model_digest(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"a" * 99 + b"b")
    inputs.model_digest.cache_clear()
    assert inputs.model_digest(str(tmp_path)) != before


def test_a_cell_survives_json(here):
    for cell in study_of(here(PLAN + 'measure = ["damage", "laws", "counters", "latency"]'), "cpu").cells():
        assert cell_of(cell.as_json()) == cell


def test_the_windows_of_a_study_that_laws_alone_are_asked_of_are_no_cells(here):
    cells = [*study_of(here(PLAN + 'measure = ["laws"]'), "cpu").cells()]
    assert [cell.method.target for cell in cells] == ["mine.py:compress", "knorm"]


def test_too_many_cells_are_counted_not_made(here):
    plan = here(PLAN.replace("windows = 4", "windows = 100000000"))
    with pytest.raises(ValueError, match="150,000,000 cells, but should have at most 1,000,000: split it"):
        study_of(plan, "cpu")


def test_ten_thousand_cells_are_named_in_a_second(here):
    plan = here(PLAN + f"seeds = {list(range(1667))}")
    begin = time.perf_counter()
    assert len(names(plan)) == 10002
    assert time.perf_counter() - begin < 5


def test_a_plan_whose_targets_were_loaded_before_is_read_without_pytorch(here):
    known = {}
    plan = here(PLAN)
    count = len(names(plan))
    study_of(plan, "cpu", known)
    code = f"""
        import sys
        from pathlib import Path
        from knorm.sweep.cells import study_of
        from knorm.sweep.plan import read_plan
        print(len([*study_of(read_plan(Path("plan.toml")), "cpu", {known!r}).cells()]), "torch" in sys.modules)
    """
    assert in_a_new_process(code, check=True).stdout.split() == [str(count), "False"]


Q8 = 'llama.cpp:embedded-llama(type_k="q8_0")'


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (f"methods = [{{target = '{Q8}', keep_ratio = 0.5}}]", "takes no budget and no kind: its settings stand"),
        (f"methods = ['{Q8}']\nhow = 'schedule'", "how is 'schedule', but llama.cpp:embedded-llama"),
        ("methods = ['llama.cpp:embedded(type_k=\"q9\")']", "type_k='q9', but should be one of f32"),
        ("methods = ['llama.cpp:nowhere.gguf']", "nowhere.gguf cannot be read: it is not there"),
    ],
)
def test_an_engine_that_cannot_be_planned_is_named_before_anything_runs(plan, said, here):
    with pytest.raises(ValueError) as told:
        study_of(here(plan), "cpu")
    assert said in str(told.value)


def test_an_engine_runs_on_its_own_model_once_beside_a_control_of_its_own(here):
    plan = here(
        f"methods = ['{Q8}', 'knorm']\nmodels = ['embedded']\nwindows = 2\nwindows_per_cell = 2\n"
        "dtypes = ['float32', 'bfloat16']\nseeds = [0, 1]\nmeasure = ['damage', 'counters', 'laws']"
    )
    cells = [*study_of(plan, "cpu").cells()]
    on = [(cell.measure, cell.method.label) for cell in cells if cell.model.startswith("llama.cpp")]
    assert on == [("damage", "full cache, again"), ("damage", Q8)]
    others = {cell.method.label for cell in cells if cell.model == "embedded"}
    assert others == {"full cache, again", "knorm 0.5"}
    assert [cell.method.label for cell in cells if cell.measure == "laws"] == [Q8, Q8, "knorm", "knorm"]
    alone = study_of(here(f"methods = ['{Q8}']\nwindows = 2\nwindows_per_cell = 2"), "cpu")
    assert {cell.model for cell in alone.cells()} == {"llama.cpp:embedded-llama"}
    assert all(cell_of(cell.as_json()).name() == cell.name() for cell in cells)
