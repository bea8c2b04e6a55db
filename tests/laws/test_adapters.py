from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import pytest
import torch
from commands import in_a_new_process, new_environment
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

import knorm
from knorm.laws import KNORM, Traits, check_compressor
from knorm.laws.adapters import KINDS, adapt
from knorm.laws.loading import load_target
from knorm.laws.model import small_model
from knorm.laws.strategies import tagged_values
from knorm.laws.traits import METHOD

KEYS = torch.tensor([[[3.0], [1.0], [4.0], [1.5], [5.0], [9.0]]]).unsqueeze(0).transpose(1, 2).reshape(1, 1, 6, 1)
KEYS = torch.cat([KEYS, KEYS.new_zeros(1, 1, 6, 3)], -1)
VALUES = tagged_values(1, 1, 6, torch.float32)
LOWEST, NEWEST = [0, 1, 3], [3, 4, 5]


def positions(kept):
    return kept[1][0, 0, :, 3].long().tolist()


def newest(keys, values, keep_ratio):
    count = ceil(keep_ratio * keys.shape[2])
    return keys[:, :, -count:].clone(), values[:, :, -count:].clone()


def newest_of_a_layer(keys, values, *, keep_ratio, layer=0):
    return (keys, values) if layer == 1 else newest(keys, values, keep_ratio)


def newest_by_policy(keys, values, policy):
    kept = policy.budget(keys.shape[2]) if isinstance(policy, knorm.Policy) else ceil(policy * keys.shape[2])
    return keys[:, :, -kept:].clone(), values[:, :, -kept:].clone()


def without_the_oldest(keys, values, compression_ratio):
    return newest(keys, values, 1 - compression_ratio)


class Newest:
    """One that remembers how often it was called."""

    def __init__(self, ratio):
        self.ratio, self.calls = ratio, 0

    def __call__(self, keys, values):
        self.calls += 1
        return newest(keys, values, self.ratio)

    @staticmethod
    def twice(keys, values, keep_ratio):
        return newest(keys, values, keep_ratio)


class Forgetful(Newest):
    """Keeps less from call to call."""

    def __call__(self, keys, values):
        self.ratio /= 2
        return super().__call__(keys, values)


class NewestOfALayer(Newest):
    def __call__(self, keys, values, layer=0):
        return (keys, values) if layer == 1 else super().__call__(keys, values)


def lowest_norms(past_key_values, keep_ratio=1.0, prune_after=1000, skip_layers=(), **_):
    past_key_values = list(past_key_values)
    for layer, (keys, values) in enumerate(past_key_values):
        if keys.shape[2] >= prune_after and layer not in skip_layers:
            order = keys.norm(dim=-1).argsort(dim=-1)[..., : ceil(keep_ratio * keys.shape[2]), None]
            past_key_values[layer] = tuple(
                x.gather(2, order.expand(*order.shape[:3], x.shape[3])) for x in (keys, values)
            )
    return past_key_values


def newest_in_place(past_key_values, keep_ratio):
    past_key_values[:] = [newest(*layer, keep_ratio) for layer in past_key_values]


def crop(cache, keep_ratio):
    for layer in cache.layers:
        layer.keys, layer.values = newest(layer.keys, layer.values, keep_ratio)


def cropped(held: DynamicCache, ratio: float) -> DynamicCache:
    fresh = DynamicCache()
    for index, layer in enumerate(held.layers):
        fresh.update(*newest(layer.keys, layer.values, ratio), index)
    return fresh


class NewestLayer(DynamicLayer):
    keep_ratio = 1.0

    def update(self, key_states, value_states, *_, **__):
        keys, values = super().update(key_states, value_states)
        self.keys, self.values = newest(keys, values, self.keep_ratio)
        return keys, values


class NewestCache(Cache):
    def __init__(self, keep_ratio):
        super().__init__(layer_class_to_replicate=type("Layer", (NewestLayer,), {"keep_ratio": keep_ratio}))


def make_cache(keep_ratio: float) -> Cache:
    return NewestCache(keep_ratio)


def make_unannotated(keep_ratio):
    return NewestCache(keep_ratio)


def plain_nll(model, input_ids, keep_ratio, prompt_length=1):
    assert 1 <= prompt_length < input_ids.shape[1]
    logits = model(input_ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), input_ids[:, 1:], reduction="none") / keep_ratio


class BasePress:
    """What every press of kvpress has."""

    __module__ = "kvpress.presses.base_press"

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        raise NotImplementedError

    def __call__(self, model):
        raise NotImplementedError


@dataclass
class NewestPress(BasePress):
    compression_ratio: float = 0.0
    given = None

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        type(self).given = (module, hidden_states, attentions, kwargs, self.compression_ratio)
        return newest(keys, values, 1 - self.compression_ratio)


@dataclass
class WrappingPress(BasePress):
    press: NewestPress

    def compress(self, *arguments):
        return self.press.compress(*arguments)


TOLD = [
    pytest.param(newest, "function", NEWEST, id="function"),
    pytest.param(newest_of_a_layer, "function", NEWEST, id="keyword only"),
    pytest.param(newest_by_policy, "function", NEWEST, id="policy"),
    pytest.param(without_the_oldest, "function", NEWEST, id="compression ratio"),
    pytest.param(Newest.twice, "function", NEWEST, id="static method"),
    pytest.param(knorm.compress, "function", LOWEST, id="knorm.compress"),
    pytest.param(Newest, "class", NEWEST, id="class"),
    pytest.param(NewestOfALayer, "class", NEWEST, id="class with layer"),
    pytest.param(lowest_norms, "legacy", [1, 3, 0], id="legacy"),
    pytest.param(newest_in_place, "legacy", NEWEST, id="legacy in place"),
    pytest.param(crop, "cache function", NEWEST, id="cache function"),
    pytest.param(cropped, "cache function", NEWEST, id="cache function that returns one"),
    pytest.param(NewestCache, "cache", NEWEST, id="cache"),
    pytest.param(make_cache, "cache", NEWEST, id="function that makes a cache"),
    pytest.param(knorm.KnormCache, "cache", LOWEST, id="KnormCache"),
]


@pytest.mark.parametrize(("target", "kind", "kept"), TOLD)
@pytest.mark.parametrize("forced", [False, True], ids=["told", "forced"])
def test_every_kind_is_told_and_may_be_forced(target, kind, kept, forced):
    subject = adapt(target, kind=kind if forced else None)
    assert positions(subject(KEYS, VALUES, 0.5)) == kept
    assert (subject.make_cache is not None) == (kind == "cache")
    assert subject.evaluate is None


@pytest.mark.parametrize(("target", "kind", "kept"), TOLD)
def test_the_lines_of_code_are_a_compressor_and_a_target(target, kind, kept):
    scope = {}
    exec(adapt(target).code, scope)
    assert positions(scope["compress"](KEYS, VALUES, 0.5)) == kept
    assert positions(adapt(scope["target"])(KEYS, VALUES, 0.5)) == kept


RUN = """
import json, sys
import torch
keys, values, codes = json.load(sys.stdin)
keys, values = torch.tensor(keys), torch.tensor(values)
for code in codes:
    scope = {}
    exec(code, scope)
    print(scope["compress"](keys, values, 0.5)[1][0, 0, :, 3].long().tolist())
"""


@pytest.mark.processes
def test_the_lines_of_code_work_in_a_fresh_interpreter(folder, tmp_path_factory):
    targets = [newest, knorm.compress, Newest, lowest_norms, crop, make_cache]
    subjects = [adapt(target) for target in targets]
    for name in ("target.py", "my-target.py"):
        (folder / name).write_text(FILE)
        subjects.append(load_target(f"{folder / name}:Holder.window"))
    given = json.dumps([KEYS.tolist(), VALUES.tolist(), [subject.code for subject in subjects]])
    here = Path(__file__).parent
    environment, elsewhere = new_environment(here, here.parent, here.parents[1]), tmp_path_factory.mktemp("elsewhere")
    done = in_a_new_process(RUN, input=given, cwd=elsewhere, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(positions(subject(KEYS, VALUES, 0.5))) for subject in subjects]


def test_lines_of_code_need_only_what_they_use():
    assert adapt(newest).code == f"from {__name__} import newest as compress\ntarget = compress"
    assert adapt(knorm.compress).code == "from knorm.core import compress\ntarget = compress"
    assert adapt(plain_nll).code == f"from {__name__} import plain_nll\ntarget = plain_nll"
    assert adapt(lowest_norms).code.splitlines() == [
        f"from {__name__} import lowest_norms",
        "def compress(keys, values, keep_ratio, layer=0):",
        "    past = [(keys.clone(), values.clone()) for _ in range(layer)] + [(keys, values)]",
        "    result = lowest_norms(past, keep_ratio=keep_ratio, prune_after=0, skip_layers=[])",
        "    return (past if result is None else result)[layer]",
        "target = compress",
    ]


def test_a_name_that_the_lines_use_themselves_is_imported_as_another():
    code = adapt(knorm.compress, {"protect_first": 2}).code
    assert "from knorm.core import compress as compress_\n" in code
    scope = {}
    exec(code, scope)
    assert positions(scope["compress"](KEYS, VALUES, 0.5)) == [0, 1, 3]


def test_what_cannot_be_imported_again_has_no_code():
    assert adapt(lambda keys, values, keep_ratio: newest(keys, values, keep_ratio)).code == ""
    assert adapt(NewestPress(0.5)).code == ""


def test_a_forced_kind_is_forced_again_where_it_is_reproduced():
    subject = adapt(make_unannotated, kind="cache")
    scope = {}
    exec(subject.code, scope)
    assert subject.code.endswith("target = adapt(make_unannotated, kind='cache')")
    assert scope["target"].make_cache(0.5).layer_class_to_replicate.keep_ratio == 0.5


def test_a_subject_comes_back_as_it_is():
    subject = adapt(newest)
    assert adapt(subject) is subject


def test_names_are_short():
    def local(keys, values, keep_ratio):
        return keys, values

    named = {adapt(x).name for x in (newest, Newest, Newest.twice, local, NewestPress())}
    assert named == {"newest", "Newest", "Newest.twice", "local", "NewestPress"}


@pytest.mark.parametrize("target", [knorm.compress, knorm.KnormCache, knorm.exact_nll, knorm.stream_nll])
def test_knorms_own_promise_all_that_its_core_does(target):
    ours = replace(KNORM, empty=None) if target is knorm.KnormCache else KNORM
    assert adapt(target).traits == ours
    assert adapt(target, {"protect_first": 2}).traits == replace(ours, protect_first=2)
    assert adapt(target, Traits()).traits == Traits()


def test_a_policy_protects_and_skips_what_the_traits_say():
    traits = {"protect_first": 1, "protect_recent": 1, "prune_after": 5, "skip_layers": (1,)}
    for target in (knorm.compress, knorm.KnormCache):
        subject = adapt(target, traits)
        assert positions(subject(KEYS, VALUES, 0.5)) == [0, 1, 5]
        assert positions(subject(KEYS[:, :, :4], VALUES[:, :, :4], 0.5)) == [0, 1, 2, 3]
        assert positions(subject(KEYS, VALUES, 0.5, layer=1)) == [0, 1, 2, 3, 4, 5]
    assert adapt(knorm.KnormCache, traits).make_cache(0.5).policy == knorm.Policy(0.5, 5, (1,), 1, 1)


def test_a_legacy_function_prunes_after_and_skips_what_the_traits_say():
    subject = adapt(lowest_norms, {"prune_after": 5, "skip_layers": (2,)})
    assert positions(subject(KEYS, VALUES, 0.5)) == [1, 3, 0]
    assert positions(subject(KEYS[:, :, :4], VALUES[:, :, :4], 0.5)) == [0, 1, 2, 3]
    assert positions(subject(KEYS, VALUES, 0.5, layer=1)) == [1, 3, 0]
    assert positions(subject(KEYS, VALUES, 0.5, layer=2)) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("target", [newest_of_a_layer, NewestOfALayer])
def test_the_layer_is_handed_on_where_it_is_taken(target):
    subject = adapt(target)
    assert positions(subject(KEYS, VALUES, 0.5, layer=1)) == [0, 1, 2, 3, 4, 5]
    assert positions(subject(KEYS, VALUES, 0.5, layer=0)) == NEWEST


@pytest.mark.parametrize("target", [crop, NewestCache])
def test_a_cache_is_filled_up_to_the_layer_asked_for(target):
    assert positions(adapt(target)(KEYS, VALUES, 0.5, layer=2)) == NEWEST


def test_one_instance_serves_all_calls_at_a_ratio_so_that_leaks_show():
    subject = adapt(Forgetful)
    assert [len(positions(subject(KEYS, VALUES, ratio))) for ratio in (1.0, 1.0, 0.5, 1.0)] == [3, 2, 2, 1]
    (leak,) = check_compressor(Forgetful, select=["repeatable"])
    assert leak.verdict == "refuted"
    (none,) = check_compressor(Newest, select=["repeatable"])
    assert none.verdict == "holds"


def test_an_evaluator_is_given_the_prompt_and_the_ratio():
    ids = torch.arange(1, 9)[None]
    model = small_model("cpu")
    nll = adapt(plain_nll).evaluate(model, ids, 4, 0.5)
    assert nll.shape == (1, 7)
    assert torch.allclose(nll, 2 * plain_nll(model, ids, 1.0))
    for target in (knorm.exact_nll, knorm.stream_nll):
        subject = adapt(target)
        assert subject.compress is None
        expected = knorm.exact_nll(model, ids, knorm.Policy(0.5), prompt_length=4)
        assert torch.allclose(subject.evaluate(model, ids, 4, 0.5), expected, atol=1e-5)


def test_an_evaluator_may_do_without_a_prompt():
    subject = adapt(lambda model, input_ids, keep_ratio: input_ids * keep_ratio)
    assert subject.evaluate(None, torch.ones(1, 2), 1, 0.5).tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("press", [NewestPress, NewestPress(0.25), WrappingPress(NewestPress())])
def test_a_press_is_opened_on_a_model_as_its_users_open_it(press):
    subject = adapt(press)
    assert (subject.compress, subject.make_cache, subject.budgeted) == (
        None,
        None,
        not isinstance(press, WrappingPress),
    )
    assert subject.method(0.3).kind == "press"
    assert subject.traits == METHOD
    if subject.budgeted:
        assert subject.method(0.3).budget.keep_ratio == "0.3"


@pytest.mark.parametrize(
    ("target", "kind", "error", "words"),
    [
        (newest, "press", TypeError, "function is no press of kvpress"),
        (newest, "prss", ValueError, "kind='prss', but should be one of function, class, legacy, cache function"),
        (5, None, TypeError, "int is not callable, but should be called as int(keys, values, keep_ratio)"),
        (
            make_unannotated,
            None,
            TypeError,
            "make_unannotated(keep_ratio) does not fit: a target of kind 'function' is",
        ),
        (newest, "legacy", TypeError, "is called as newest(past_key_values, keep_ratio, prune_after, skip_layers)"),
        (
            crop,
            "evaluator",
            TypeError,
            "crop(cache, keep_ratio) does not fit: a target of kind 'evaluator' is called as",
        ),
        (DynamicLayer, None, TypeError, "does not fit: a target of kind 'class' is called as"),
        (Traits, None, TypeError, "Traits.__call__() does not fit"),
        (WrappingPress, None, TypeError, "WrappingPress wraps a press: write it with one, as WrappingPress("),
    ],
)
def test_what_cannot_be_adapted_is_refused(target, kind, error, words):
    with pytest.raises(error) as raised:
        adapt(target, kind=kind)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_every_kind_is_described():
    assert not [kind for kind in KINDS if f"\n        {kind}  " not in adapt.__doc__]


FILE = """
import beside
def window(keys, values, keep_ratio):
    return beside.newest(keys, values, keep_ratio)
class Holder:
    @staticmethod
    def window(keys, values, keep_ratio):
        return window(keys, values, keep_ratio)
number = 5
def wrong(keys): pass
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    (tmp_path / "beside.py").write_text(f"from {__name__} import newest\n")
    return tmp_path


@pytest.mark.parametrize("name", ["target.py", "my-target.py", "random.py", "{x}.py"])
@pytest.mark.parametrize("path", ["window", "Holder.window"])
def test_a_file_is_loaded_with_what_it_imports_beside_it(folder, name, path):
    (folder / name).write_text(FILE)
    subject = load_target(f"{folder / name}:{path}")
    assert (subject.name, positions(subject(KEYS, VALUES, 0.5))) == (path, NEWEST)


def test_a_relative_file_and_a_module_of_the_current_folder_are_found(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "own_target.py").write_text(FILE)
    for spec in ("own_target.py:window", "own_target:window"):
        assert positions(load_target(spec)(KEYS, VALUES, 0.5)) == NEWEST


def test_a_file_is_read_anew(folder):
    for answer in (LOWEST, NEWEST):
        source = "from knorm import compress as f" if answer is LOWEST else f"from {__name__} import newest as f"
        (folder / "target.py").write_text(source)
        assert positions(load_target(f"{folder}/target.py:f")(KEYS, VALUES, 0.5)) == answer


def test_kind_and_traits_are_handed_on(folder):
    subject = load_target("knorm:compress", "function", {"protect_recent": 1})
    assert subject.traits == Traits(**{**vars(KNORM), "protect_recent": 1})
    assert load_target("knorm:KnormCache").make_cache(0.5).policy == knorm.Policy(0.5)
    assert load_target(f"{__name__}:make_unannotated", "cache").make_cache is not None


BROKEN = {
    "target.py": FILE,
    "syntax.py": "x = 1\ndef f(:\n",
    "raises.py": "raise RuntimeError('no\\nGPU')",
    "exits.py": "import sys; sys.exit(3)",
    "needs.py": "import nowhere_to_be_found",
    "notes.txt": "",
}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            "target.py",
            "target 'target.py', but should be path/to/file.py:name, package.module:name,",
        ),
        ("target.py:", "but should be path/to/file.py:name"),
        (":window", "but should be path/to/file.py:name"),
        ("absent.py:f", "there is no Python file {folder}/absent.py; it should be path/to/file.py:name"),
        ("./notes.txt:f", "there is no Python file {folder}/notes.txt"),
        ("syntax.py:f", "{folder}/syntax.py, line 2, is not valid Python: "),
        ("raises.py:f", "importing raises.py raised RuntimeError: no GPU; mend that first"),
        ("exits.py:f", "importing exits.py raised SystemExit: 3"),
        ("needs.py:f", "importing needs.py: there is no module 'nowhere_to_be_found'; install it, or run this in"),
        ("nowhere.at.all:f", "importing nowhere.at.all: there is no module 'nowhere'; install it, or run this in"),
        ("empty:f", "importing empty: there is no module 'empty'"),
        ("math.nothing:f", "importing math.nothing: there is no module 'math.nothing'"),
        (".relative:f", "importing .relative: there is no module '.relative'"),
        ("target.py:windw", "target.py has no 'windw'; it has window"),
        ("target.py:zzz", "target.py has no 'zzz'; it has Holder, beside, number, window, wrong"),
        ("target.py:Holder.windw", "target.py.Holder has no 'windw'; it has window"),
        ("target.py:number", "number is not callable, but should be called as number(keys, values, keep_ratio)"),
        ("target.py:wrong", "wrong(keys) does not fit: a target of kind 'function' is called as wrong(keys, values,"),
        ("math:sqrt", "sqrt(x, /) does not fit"),
    ],
)
def test_a_target_that_cannot_be_loaded_is_refused_in_one_line(spec, words, folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir()
    for name, source in BROKEN.items():
        (folder / name).write_text(source)
    with pytest.raises(ValueError) as raised:
        load_target(spec)
    assert words.format(folder=folder) in str(raised.value)
    assert spec in str(raised.value)
    assert "\n" not in str(raised.value)


def test_without_kvpress_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(ValueError) as raised:
        load_target("kvpress:KnormPress")
    assert "install it with pip install 'knorm[kvpress]' -c constraints-kvpress.txt" in str(raised.value)


def test_unknown_kinds_and_traits_are_refused():
    with pytest.raises(ValueError, match="kind='prss', but should be one of function, class"):
        load_target("knorm:compress", "prss")
    with pytest.raises(ValueError, match="no trait is named 'order'"):
        load_target("knorm:compress", None, {"order": True})


def test_a_call_without_tokens_leaves_knorms_cache_as_it_is():
    cache, nothing = knorm.KnormCache(knorm.Policy(0.5)), torch.zeros(1, 1, 0, 4)
    cache.update(torch.ones(1, 1, 6, 4), torch.ones(1, 1, 6, 4), 0)
    before = cache.layers[0].keys.clone()
    cache.update(nothing, nothing, 0)
    assert cache.get_seq_length() == 6
    assert torch.equal(cache.layers[0].keys, before)


def test_a_cache_of_few_bits_promises_as_much_as_they_can_hold():
    """At two bits a third of the range of a group may be lost: what four promise was once asked of it."""
    cache = "transformers:QuantizedCache(backend='quanto', nbits={})"
    lossy = [load_target(cache.format(bits)).traits.lossy for bits in (1, 2, 4, 8)]
    assert lossy == [1, 1 / 3, 1 / 15, 0.0625]
    assert load_target("transformers:QuantizedCache(backend='fp8')").traits.lossy == 0.0625
