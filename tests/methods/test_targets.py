"""How targets are written, told apart and refused."""

from __future__ import annotations

import re
import sys
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch
from tiny import tiny, tokens
from transformers import DynamicCache

import knorm
from knorm import Policy
from knorm.laws import CHECKS
from knorm.laws.loading import load_target as load_subject
from knorm.laws.runner import run_check
from knorm.methods.budget import NeedsBudget, TakesNoBudget
from knorm.methods.door import method
from knorm.methods.kinds import kind_of
from knorm.methods.known import CACHES
from knorm.methods.method import Method, Session
from knorm.methods.restored import restored
from knorm.methods.targets import Call, expanded, load_target, parse_target

MINE = """
import torch
from transformers import DynamicCache

class Window(DynamicCache):
    def __init__(self, keep_tokens, label="x"):
        super().__init__()
        self.keep_tokens, self.label = keep_tokens, label

def newest(keys, values, keep_ratio, sinks=0):
    count = max(1, int(keys.shape[2] * keep_ratio))
    return keys[:, :, -count:], values[:, :, -count:]

class Newest:
    def __init__(self, ratio):
        self.ratio = ratio
    def __call__(self, keys, values):
        return newest(keys, values, self.ratio)

def legacy(past_key_values, keep_ratio, prune_after, skip_layers):
    return [pair if i in skip_layers else newest(*pair, keep_ratio) for i, pair in enumerate(past_key_values)]

def changes(cache, keep_ratio):
    for layer in cache.layers:
        layer.keys, layer.values = newest(layer.keys, layer.values, keep_ratio)

def tokens(keys, values, keep_tokens):
    return keys[:, :, -keep_tokens:], values[:, :, -keep_tokens:]

def own(keys, values):
    return keys[:, :, -12:], values[:, :, -12:]

number = 3
"""


@pytest.fixture
def mine(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    return str(file)


def test_a_target_is_parsed_into_literals_names_and_calls():
    target = parse_target('knorm.core:compress(1, -2, a=[Thing(3.5), (None, "x")], b={"c": True})')
    assert target.call == Call("compress", (1, -2), {"a": [Call("Thing", (3.5,)), (None, "x")], "b": {"c": True}})
    assert (target.where, target.path) == ("knorm.core", "compress")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", "but should be path/to/file.py:name"),
        ("nothing", "but should be path/to/file.py:name"),
        (":x", "but should be"),
        ("knorm.core:", "but should be"),
        ("knorm.core:compress(", "but should be"),
        ("knorm.core:compress(1))", "unmatched"),
        ("knorm.core:compress(1 +)", "invalid syntax"),
        ("knorm.core:compress(__import__('os').system('x'))", "is not a name of the target's module"),
        ("knorm.core:compress(1 + 1)", "is neither a literal nor"),
        ("knorm.core:compress([x for x in y])", "is neither a literal nor"),
        ("knorm.core:compress(**x)", r"\* and \*\* have no place"),
        ("knorm.core:compress(lambda: 0)", "is neither a literal nor"),
        ("no/such/file.py:name", "there is no Python file"),
        ("no_such_package:name", "there is no module 'no_such_package'"),
        ("knorm.core\0:x", "but should be"),
    ],
)
def test_what_does_not_parse_is_refused_in_a_line(spec, words):
    with pytest.raises(ValueError, match=words) as raised:
        parse_target(spec)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("knorm.core:compres", "has no 'compres'; it has compress"),
        ("knorm.core:compress(nothing=nowhere)", "has no 'nowhere'"),
        ("knorm.core:Compressed(Policy(2))", r"Policy refused: keep_ratio=2"),
    ],
)
def test_what_is_not_there_is_refused_in_a_line(spec, words):
    with pytest.raises(ValueError, match=words) as raised:
        load_target(parse_target(spec))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("newest", "function"), ("Newest", "class"), ("legacy", "legacy"), ("changes", "cache function"),
        ("tokens", "function"), ("own", "function"), ("Window", "cache"),
    ],
)  # fmt: skip
def test_kinds_are_told_from_parameters(mine, name, kind):
    assert kind_of(load_target(parse_target(f"{mine}:{name}"))[0]) == kind


@pytest.mark.parametrize("name", ["newest", "Newest", "legacy", "changes", "newest(sinks=4)"])
def test_the_same_compression_in_every_form_gives_the_same_numbers(mine, name):
    model, ids = tiny("llama"), tokens(1, 48)
    reference = knorm.evaluate(model, ids, method(f"{mine}:newest", keep_ratio=0.5), prompt_length=32)
    found = knorm.evaluate(model, ids, method(f"{mine}:{name}", keep_ratio="0.5"), prompt_length=32)
    assert torch.allclose(found.per_token.nll, reference.per_token.nll, atol=1e-6)
    assert found.how == "two calls"
    assert found.method == f"{mine}:{name}"


def test_budgets_in_tokens_and_of_their_own(mine):
    model, ids = tiny("llama"), tokens(1, 48)
    for chosen in (
        method(f"{mine}:tokens", keep_tokens=12),
        method(f"{mine}:own"),
        method(f"{mine}:tokens", keep_ratio="0.375"),
        method(f"{mine}:newest", keep_tokens=12),
    ):
        found = knorm.evaluate(model, ids, chosen, prompt_length=32)
        assert found.tokens_seen.unique().tolist() == [12 + 8], chosen.name


def test_budgets_that_do_not_fit_are_refused(mine):
    with pytest.raises(NeedsBudget, match="is called with a budget: give keep_ratio or keep_tokens"):
        method(f"{mine}:newest")
    with pytest.raises(TakesNoBudget, match="names a budget of its own, keep_tokens"):
        method(f"{mine}:tokens(keep_tokens=3)", keep_ratio=0.5)
    with pytest.raises(TakesNoBudget, match="takes no budget"):
        method("transformers:DynamicCache", keep_ratio=0.5)
    with pytest.raises(TakesNoBudget, match="keeps a share of the cache"):
        method("knorm", keep_tokens=3)
    with pytest.raises(NeedsBudget, match="is made with a budget"):
        method(f"{mine}:Window")
    with pytest.raises(TypeError, match=r"newest needs keys, values, but a cache is .*newest\(keys=...\)"):
        method(f"{mine}:newest", kind="cache", keep_ratio=0.5)
    with pytest.raises(TypeError, match=r"needs backend, but .*QuantizedCache\(backend=...\)"):
        method("transformers:QuantizedCache")
    with pytest.raises(ValueError, match="has no parameter sinkz; it has keys, values, keep_ratio, sinks"):
        method(f"{mine}:newest(sinkz=3)", keep_ratio=0.5)
    with pytest.raises(TypeError, match="number is a int, but should be called as"):
        method(f"{mine}:number")
    with pytest.raises(ValueError, match="kind 'guess', but should be one of policy, function"):
        method(f"{mine}:newest", kind="guess")


def test_objects_are_methods_too():
    assert method(Policy(0.5)).policy == Policy(0.5)
    assert method("knorm", keep_ratio="0.25").policy == Policy("0.25")
    assert method(DynamicCache).kind == "cache"
    assert method(lambda: DynamicCache()).kind == "cache"
    assert method(DynamicCache).name == "DynamicCache"


def test_a_cache_that_is_none_is_refused():
    with pytest.raises(ValueError, match="made a dict, but should make a cache of transformers"):
        knorm.evaluate(tiny("llama"), tokens(1, 48), method(dict, kind="cache", name="d"), prompt_length=32)


def test_a_star_stands_for_what_a_package_ships(monkeypatch):
    monkeypatch.setattr("knorm.methods.known.find_spec", lambda name: object())
    assert expanded("transformers:*") == [f"transformers:{cache}" for cache in CACHES]
    monkeypatch.setattr("knorm.methods.known.find_spec", lambda name: None)
    assert expanded("transformers:*") == [f"transformers:{cache}" for cache in CACHES if "quanto" not in cache]
    assert expanded("knorm") == ["knorm"]
    with pytest.raises(ValueError, match="no other module"):
        expanded("torch:*")


def test_a_model_is_put_back_as_it_was():
    model = tiny("llama")
    layer, weight = model.model.layers[0].self_attn, model.lm_head.weight.data.clone()

    def spoil():
        with restored(model) as changed:
            layer.rotary_emb = model.model.rotary_emb
            layer.masked_key_indices = [1]
            layer._own = layer.layer_idx = 7
            layer.register_forward_hook(lambda *_: None)
            model.config.use_cache = False
            model.resize_token_embeddings(90)
            yield changed
            raise KeyError

    spoiling = spoil()
    changed = next(spoiling)
    with pytest.raises(KeyError):
        next(spoiling)
    assert not hasattr(layer, "rotary_emb")
    assert not hasattr(layer, "masked_key_indices")
    assert not hasattr(layer, "_own")
    assert layer.layer_idx == 0
    assert not layer._forward_hooks
    assert (model.config.vocab_size, model.config.use_cache) == (97, True)
    assert torch.equal(model.lm_head.weight, weight)
    assert model(input_ids=tokens(1, 4)).logits.shape == (1, 4, 97)
    assert {"model.layers.0.self_attn.rotary_emb", "config"} <= {*changed}


def test_what_breaks_a_session_off_is_told_not_what_follows_from_it():
    class Late(Method):
        def start(self, model, length, batch, tokenizer):
            session = Session(model, DynamicCache())
            session._prefill.enter_context(scored())
            return session

    @contextmanager
    def scored():
        yield
        raise TypeError("there are no scores")

    model = tiny("llama")
    with pytest.raises(IndexError, match="first"), Late("late", None).open(model):
        raise IndexError("first")
    with pytest.raises(TypeError, match="no scores"), Late("late", None).open(model):
        pass


@pytest.fixture
def another_kvpress(monkeypatch, tmp_path):
    """A kvpress whose presses are called otherwise than those of the version that was tried."""
    file = tmp_path / "kvpress" / "__init__.py"
    file.parent.mkdir()
    file.write_text(NEWER)
    spec = spec_from_file_location("kvpress", file)
    package = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "kvpress", package)
    spec.loader.exec_module(package)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.1")


NEWER = """
class BasePress:
    compression_ratio: float = 0.5
    def __call__(self, model, cache): ...
class SnapPress(BasePress):
    def __init__(self, share=0.5): ...
class Opened(BasePress):
    def __call__(self, model): ...
class DecodingPress(Opened): ...
class SharePress(Opened):
    compression_ratio = property(lambda self: 0.5)
    __annotations__ = {}
class FinchPress(Opened):
    def update_model_and_tokenizer(self, model, tokenizer): ...
class FailingPress(Opened):
    def __call__(self, model):
        raise KeyError("cache_position")
"""


@pytest.mark.usefixtures("another_kvpress")
@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("kvpress:SnapPress", "SnapPress has no __call__(model), but __call__(model, cache): its interface is another"),
        ("kvpress:DecodingPress", "DecodingPress has no target_size: its interface is another"),
        ("kvpress:FinchPress", "has no update_model_and_tokenizer(model, tokenizer, delimiter_token), but update_"),
        ("kvpress:SharePress", "takes no compression_ratio"),
        ("kvpress:SnapKVPress", "kvpress has no 'SnapKVPress'; it has SnapPress"),
        ("kvpress:SnapPress(window_size=8)", "got an unexpected keyword argument 'window_size'"),
        ("kvpress:FailingPress", "FailingPress raised KeyError: 'cache_position'"),
    ],
)
def test_a_press_of_another_kvpress_is_one_line_that_names_the_version_that_was_tried(target, said):
    with pytest.raises(ValueError, match=re.escape(said)) as raised:
        knorm.evaluate(tiny("llama"), tokens(1, 48), method(target, keep_ratio=0.5), prompt_length=32)
    assert str(raised.value).endswith("kvpress 9.1 is installed, but 0.5.5 was tried: pip install kvpress==0.5.5")
    assert "\n" not in str(raised.value)
    if target == "kvpress:FailingPress":
        result = run_check(CHECKS["runs"], load_subject(target))
        assert result.verdict == "refuted"
        assert "but 0.5.5 was tried: pip install kvpress==0.5.5" in result.counterexample
    elif target != "kvpress:SharePress":  # no budget is needed
        with pytest.raises(ValueError, match=re.escape(said)) as raised:
            load_subject(target)
        assert str(raised.value).endswith("but 0.5.5 was tried: pip install kvpress==0.5.5")
