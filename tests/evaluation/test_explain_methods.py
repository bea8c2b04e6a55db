"""What any method's queries see is recovered, and what is changed about it evaluated on the same tokens."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny, tokens
from transformers import DynamicCache

from knorm import KnormCache, Policy, exact_nll
from knorm.core import squared_norms
from knorm.evaluation.explain_methods import explain_method
from knorm.evaluation.recovery import Exact, Recovery, Unrecoverable, fingerprints
from knorm.evaluation.ways import Ways
from knorm.evaluation.windows import Windows
from knorm.methods.door import method
from knorm.perplexity import exact_run
from knorm.schedule import cache_lengths, evicted_at, evicted_like, recent_cached

PROMPT, LENGTH = 40, 64
IDS = tokens(2, LENGTH)


class Numbered:
    """A tokenizer of bare numbers."""

    def decode(self, ids):
        return " ".join(map(str, torch.as_tensor(ids).flatten().tolist()))


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


def ways_of(model, ids=IDS, batch=2):
    return Ways(model, Windows(ids), PROMPT, batch=batch, tokenizer=Numbered())


def schedule_of(ways, chosen, how):
    made = []

    def make(rows):
        made.append(Recovery(rows, PROMPT, LENGTH))
        return made[-1]

    ways.beside(chosen, how, make)
    return [torch.cat(layer) for layer in zip(*(recovery.schedule() for recovery in made), strict=True)], made


def keep_low_norms(keys, values, keep_ratio):
    index = keys.norm(dim=-1).argsort(-1)[..., : int(keys.shape[2] * keep_ratio)].sort(-1).values[..., None]
    return tuple(x.gather(2, index.expand(*index.shape[:3], x.shape[3])) for x in (keys, values))


def halved(keys, values, keep_ratio):
    return keys, values.half().float()


@pytest.mark.parametrize("kind", ["gpt_neox", "llama", "qwen3"])
@pytest.mark.parametrize(("how", "batch"), [("two calls", 2), ("loop", 1)])
@pytest.mark.parametrize("protocol", ["prefill", "streaming"])
def test_the_schedule_of_a_cache_that_is_only_watched_is_the_one_that_its_policy_follows(kind, how, batch, protocol):
    if protocol == "streaming" and how == "two calls":
        how = "loop"
    skipped = (1,) if how == "loop" else ()  # in two calls transformers' one mask fits no layers of other lengths
    policy = Policy("0.6", 24 if protocol == "streaming" else 0, skipped, protocol=protocol)
    model = tiny(kind)
    found, recoveries = schedule_of(ways_of(model, batch=batch), method(lambda: KnormCache(policy), kind="cache"), how)
    expected = exact_run(model, IDS, policy, prompt_length=PROMPT).evicted_at
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert not recoveries[0].changed
    assert recoveries[0].evicts


def test_a_function_that_evicts_in_another_order_is_recovered_too(llama):
    def shuffled(keys, values, keep_ratio):
        kept = keep_low_norms(keys, values, keep_ratio)
        return tuple(x.flip(2) for x in kept)

    plain, _ = schedule_of(ways_of(llama), method(keep_low_norms, keep_ratio=0.5), "two calls")
    found, _ = schedule_of(ways_of(llama), method(shuffled, keep_ratio=0.5), "two calls")
    assert all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))
    assert (cache_lengths(found[0])[..., PROMPT] == 21).all()


@pytest.fixture(scope="module")
def explained(llama):
    return explain_method(ways_of(llama), method(keep_low_norms, keep_ratio=0.5))


def test_each_effect_is_the_run_with_that_one_change(llama, explained):
    found, policy = explained.explanation, Policy("0.5")
    assert (explained.acts, explained.how) == ("evicts", "two calls")
    assert explained.seen == "after the prompt 20 of its 40 tokens are seen, by layer and head"
    own = exact_nll(llama, IDS, policy, prompt_length=PROMPT)[:, PROMPT - 1 :].double()
    full = exact_nll(llama, IDS, Policy())[:, PROMPT - 1 :].double()
    assert found.nll == pytest.approx(float(own.mean()), abs=1e-5)
    assert found.nll_full == pytest.approx(float(full.mean()), abs=1e-5)
    effects = {effect.name: effect for effect in found.effects}
    for layer in range(3):
        spared = exact_nll(llama, IDS, Policy("0.5", skip_layers=(layer,)), prompt_length=PROMPT)[:, PROMPT - 1 :]
        assert effects[f"layer {layer} spared"].change == pytest.approx(float((spared - own).mean()), abs=1e-5)
    age = -torch.arange(LENGTH, dtype=torch.float64)

    def newest(layer, keys):
        return evicted_at(age.expand(keys.shape[:3]), policy, PROMPT)

    amount = exact_nll(llama, IDS, Policy(), prompt_length=PROMPT, schedule=newest)[:, PROMPT - 1 :].double()
    assert effects["as many tokens, the newest"].change == pytest.approx(float((amount - own).mean()), abs=1e-5)
    assert effects["slots shuffled"].is_rounding
    assert {"newest 10 protected", "first 4 protected", "a random choice instead of its own"} <= effects.keys()
    assert "content" not in {effect.kind for effect in found.effects}, "evictions explain all of it"
    assert found.worst[0].nll > found.worst[0].nll_full


def test_what_a_method_does_to_what_it_retains_is_an_effect_of_its_own(llama):
    def doubled(keys, values, keep_ratio):
        kept = keep_low_norms(keys, values, keep_ratio)
        return kept[0], 1.5 * kept[1]

    found = explain_method(ways_of(llama), method(doubled, keep_ratio=0.5)).explanation
    content = next(effect for effect in found.effects if effect.kind == "content")
    own = exact_nll(llama, IDS, Policy("0.5"), prompt_length=PROMPT)[:, PROMPT - 1 :].double().mean()
    assert content.change == pytest.approx(float(own) - found.nll, abs=1e-5)
    assert abs(content.change) > 1e-3


def test_values_that_are_rounded_are_blamed_and_exact_ones_give_the_full_cache_back(llama):
    found = explain_method(ways_of(llama), method(halved, keep_ratio=0.5))
    assert found.acts == "changes"
    assert found.seen == "every query sees every token; changed: values"
    effects = {effect.name: effect for effect in found.explanation.effects}
    assert effects["values exact"].kl <= 1e-12
    assert effects["values exact"].recovered == pytest.approx(1, abs=1e-3)
    assert effects["keys exact"].is_rounding
    assert found.explanation.verdict[0].startswith("The values cost most: ")


def test_a_quantised_cache_gets_exact_keys_values_and_layers_back(llama):
    ways, fp8 = ways_of(llama), method('transformers:QuantizedCache(backend="fp8")')
    found = explain_method(ways, fp8)
    assert found.seen == "every query sees every token; changed: keys and values"
    names = {effect.name for effect in found.explanation.effects}
    assert names == {"keys exact", "values exact", "layer 0 exact", "layer 1 exact", "layer 2 exact"}
    exact, _ = ways.beside(fp8, "loop", lambda rows: Exact())
    assert (exact.nll - exact.nll_full).abs().max() <= 1e-4
    rounded, _ = ways.beside(fp8, "loop", lambda rows: Exact(frozenset()))
    assert rounded.kl.mean() > 100 * exact.kl.mean()


@pytest.mark.parametrize(
    ("choose", "words"),
    [
        (lambda keys, values, keep_ratio: (keys[:, :, ::2] + 1, values[:, :, ::2] + 1), "are no token's of the text"),
        (lambda keys, values, keep_ratio: (keys, values), "nothing to explain: .* no token's prediction changed"),
    ],
)
def test_what_cannot_be_recovered_or_explained_is_said_in_one_line(llama, choose, words):
    with pytest.raises(ValueError, match=words) as raised:
        explain_method(ways_of(llama), method(choose, keep_ratio=0.5, name="it"))
    assert "\n" not in str(raised.value)


def test_a_token_that_comes_back_has_no_schedule(llama):
    class Blinking(DynamicCache):
        def update(self, key, value, layer, *rest, **keywords):
            key, value = super().update(key, value, layer, *rest, **keywords)
            if key.shape[2] > PROMPT and key.shape[2] % 2:
                return key[:, :, 1:], value[:, :, 1:]
            return key, value

    with pytest.raises(Unrecoverable, match="is seen again by a later one"):
        schedule_of(ways_of(llama), method(Blinking), "loop")


def test_a_model_whose_schedules_cannot_be_run_is_refused():
    model = tiny("mistral", sliding_window=200)
    with pytest.raises(ValueError, match="sliding window"):
        explain_method(ways_of(model), method(keep_low_norms, keep_ratio=0.5))


def test_other_choices_keep_the_counts_of_every_query():
    scores = squared_norms(torch.randn(2, 3, LENGTH, 8, generator=torch.Generator().manual_seed(0)))
    lost = evicted_at(scores, Policy("0.6", 16, protocol="streaming"), 20)
    draw = torch.rand(lost.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    same, _ = evicted_like(lost, draw - lost)
    assert torch.equal(same, lost), "what went first goes first: the schedule itself"
    other, most = evicted_like(lost, draw, protect_first=3, protect_recent=5)
    assert torch.equal(cache_lengths(other), cache_lengths(lost))
    assert not torch.equal(other, lost)
    assert most == 5
    assert (other[..., :3] == LENGTH).all()
    assert (recent_cached(other, 5)[..., 5:] == 5).all()


def test_fingerprints_tell_single_bits_apart():
    vectors = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    other = vectors.clone()
    other[:, 7] = other[:, 7].nextafter(torch.tensor(9.0))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert len(fingerprints(vectors.to(dtype)).unique()) == 50
    assert not (fingerprints(vectors) == fingerprints(other)).any()


def test_the_embedded_model_is_explained_from_the_command_line(run_knorm, embedded, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def newest(keys, values, keep_ratio):\n"
        "    count = int(keys.shape[2] * keep_ratio)\n"
        "    return keys[:, :, -count:], values[:, :, -count:]\n"
    )
    target = f"{tmp_path / 'mine.py'}:newest"
    size = ("--windows", "2", "--window", "96")
    code, out, err = run_knorm("explain", target, *size, "--keep-ratio", "0.5", "--json", "out.json")
    assert (code, err) == (0, "")
    assert "Recovered: after the prompt 24 of its 48 tokens are seen" in out
    assert "as many tokens, the newest" not in out, "that is what it does"
    for wrong, words in (
        (("--plot", "p.png"), "are about knorm's own policies"),
        (("--keep-tokens", "4", "--keep-ratio", "0.5"), "two budgets"),
    ):
        code, _, err = run_knorm("explain", target, *size, *wrong)
        assert code == 2
        assert words in err
    code, _, err = run_knorm("explain", "--keep-tokens", "4", *size)
    assert (code, "are about a TARGET" in err) == (2, True)


class Short(DynamicCache):
    """Gives even the prompt's own queries the newest 8 keys."""

    def update(self, keys, values, layer, *rest, **more):
        keys, values = super().update(keys, values, layer, *rest, **more)
        return keys[:, :, -8:], values[:, :, -8:]


def test_a_prompt_that_does_not_see_its_own_keys_cannot_be_explained():
    model = tiny("gpt_neox")
    with pytest.raises(ValueError, match="cannot be recovered: the prompt's own 40 tokens attend to 8 keys"):
        explain_method(ways_of(model), method(Short))
