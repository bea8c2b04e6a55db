"""`knorm ppl TARGET ...`: any methods, beside the full cache on the same tokens."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from commands import IN_FULL, strict_json

from knorm.cli.figures import MADE_BY
from knorm.cli.tables import UNCHANGED, unread
from knorm.evaluation import facts as facts_module
from knorm.evaluation.distinct import letters
from knorm.methods.budget import Budget

MINE = """
def newest(keys, values, keep_ratio):
    count = max(1, int(keys.shape[2] * keep_ratio))
    return keys[:, :, -count:], values[:, :, -count:]

def tokens(keys, values, keep_tokens):
    return keys[:, :, -keep_tokens:], values[:, :, -keep_tokens:]

def nothing(keys, values, keep_ratio):
    return keys, values

def broken(keys, values, keep_ratio):
    raise RuntimeError("no such luck")
"""
SHORT = ("--window", "64", "--windows", "3")


@pytest.fixture
def ppl(run_knorm, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    return lambda *arguments: run_knorm("ppl", *arguments, *SHORT)


def test_a_row_for_each_target_and_budget_and_the_control_first(ppl):
    targets = ("mine.py:newest", "knorm", "transformers:DynamicCache")
    code, out, err = ppl(*targets, "--keep-ratio", "0.5,0.25", "--json", "out.json")
    assert (code, out) == (2, "")
    assert "transformers:DynamicCache takes no budget: drop keep_ratio and keep_tokens" in err
    code, out, err = ppl("mine.py:newest", "knorm", "--keep-ratio", "0.5,0.25", "--json", "out.json", "--plot", "o.png")
    assert (code, err) == (0, "")
    result = strict_json("out.json")
    assert (result["schema"], result["prompt_length"], result["failed"]) == ("knorm-ppl-methods", 32, {})
    rows = {(row["method"], row["keep_ratio"]): row for row in result["rows"]}
    assert [*rows] == [
        ("full cache, again", None), ("mine.py:newest", 0.5), ("mine.py:newest", 0.25), ("knorm", 0.5),
        ("knorm", 0.25),
    ]  # fmt: skip
    newest, own, control = rows["mine.py:newest", 0.5], rows["knorm", 0.5], rows["full cache, again", None]
    assert (newest["how"], own["how"]) == ("two calls", "schedule")
    assert newest["checked"].startswith("checked on window 1: equal to the loop within ")
    assert (newest["tokens"], newest["windows"]) == (96, 3)
    assert control["kl"] < 1e-9 < newest["kl"] < rows["mine.py:newest", 0.25]["kl"]
    assert newest["kl_low"] < newest["kl"] < newest["kl_high"]
    assert newest["bytes_per_token"] < newest["bytes_per_token_full"] == control["bytes_per_token"]
    assert newest["tokens_seen"] == own["tokens_seen"]
    assert f"{newest['ppl']:.2f}" in out
    assert "Methods that share a letter cannot be told apart by KL" in out
    with open("o.png", "rb") as figure:
        assert MADE_BY.encode() in figure.read()


def test_a_method_that_changes_nothing_and_one_that_fails_are_told_so(ppl):
    code, out, err = ppl("mine.py:nothing", "mine.py:broken", "--json", "out.json")
    assert (code, err) == (1, "")
    assert "no token's prediction changed: was the cache ever read?" in out
    assert "did not act in 64 tokens" in " ".join(out.split())
    assert "FAILED mine.py:broken raised RuntimeError: no such luck (mine.py, line" in " ".join(out.split())
    assert [*strict_json("out.json")["failed"]] == ["mine.py:broken"]
    code, out, err = ppl("mine.py:broken")
    assert (code, out) == (2, "")
    assert err.startswith("knorm: mine.py:broken raised RuntimeError: no such luck")


def test_a_cache_that_keeps_everything_is_not_suspected(ppl):
    code, out, _ = ppl("transformers:DynamicCache", "transformers:StaticCache", "--json", "out.json")
    assert code == 0
    assert [row["changed"] for row in strict_json("out.json")["rows"]] == [False, False, False]
    assert UNCHANGED not in out


HALF, ALL = Budget(keep_ratio="0.5"), Budget(keep_ratio=1)


@pytest.mark.parametrize(
    ("changes", "budget", "suspected"),
    [
        ({}, None, False),
        ({"bytes_stored": 1200.0}, None, False),  # room for more tokens
        ({"bytes_stored": 1000.0 - 1e-9, "tokens_seen": [[48.0 - 1e-12, 48.0]]}, None, False),  # means of windows
        ({}, ALL, False),
        ({}, Budget(keep_tokens=32), False),
        ({}, Budget(keep_tokens=31), True),
        ({}, HALF, True),
        ({"bytes_stored": 500.0}, None, True),
        ({"tokens_seen": [[48.0, 48.0], [48.0, 40.0]]}, None, True),
        ({"bytes_stored": 500.0, "changed": True}, HALF, False),
    ],
)
def test_a_cache_is_suspected_where_something_had_to_change(changes, budget, suspected):
    row = {"changed": False, "tokens_seen": [[48.0, 48.0]], "tokens_before": 48.0, "bytes_stored": 1000.0}
    assert unread(SimpleNamespace(**row | {"bytes_full": 1000.0} | changes), budget, 32) == suspected


def test_budgets_in_tokens(ppl):
    code, _, _ = ppl("mine.py:tokens", "--keep-tokens", "8,16", "--json", "out.json")
    assert code == 0
    _, eight, sixteen = strict_json("out.json")["rows"]
    assert (eight["keep_tokens"], sixteen["keep_tokens"]) == (8, 16)
    assert [row["tokens_seen"][0][0] for row in (eight, sixteen)] == [8 + 16, 16 + 16]


def test_facts_are_recalled_by_any_method(ppl, run_knorm, monkeypatch):
    every = facts_module.fact_windows

    def a_few(*given):
        facts = every(*given)
        return facts_module.Facts(facts.names[:6], facts.input_ids[:6], facts.asked[:6])

    if not IN_FULL:
        monkeypatch.setattr(facts_module, "fact_windows", a_few)
    code, out, _ = run_knorm(
        "ppl", "mine.py:newest", "knorm", "--window", "192", "--windows", "1", "--facts", "--json", "o.json"
    )
    assert code == 0
    assert "Names that the story gives early and needs late:" in out
    facts = strict_json("o.json")["facts"]
    assert [*facts] == ["mine.py:newest 0.5", "knorm 0.5"]
    assert facts["mine.py:newest 0.5"]["tokens"] == facts["knorm 0.5"]["tokens"] > 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("mine.py:nowhere", "has no 'nowhere'; it has"),
        ("mine.py:newest(1 +)", "invalid syntax"),
        ("mine.py:newest --keep-ratio 0.5 --keep-tokens 3", "--keep-ratio and --keep-tokens are two budgets"),
        ("knorm --keep-tokens 3", "knorm keeps a share of the cache: give --keep-ratio"),
        ("mine.py:newest --as cache", "mine.py:newest needs keys, values, but a cache is made from"),
        ("mine.py:newest --stream", "--reported and --stream are about knorm's own curve"),
        ("mine.py:newest --how schedule", "mine.py:newest has no schedule"),
        ("mine.py:newest --prompt-length 64", "is the whole window"),
        ("mine.py:newest --as guess", "kind 'guess', but should be one of"),
        ("mine.py:newest --batch 0", "--batch 0, but should be at least 1"),
        ("--keep-tokens 3", "--keep-tokens is about a TARGET"),
        ("--facts", "--facts is about a TARGET"),
        ("torch:*", "no other module"),
    ],
)
def test_wrong_usage_is_one_line(ppl, arguments, words):
    code, out, err = ppl(*arguments.split(" "))
    if "(1" in arguments:
        code, out, err = ppl("mine.py:newest(1 +)")
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_letters_are_shared_by_what_cannot_be_told_apart():
    import torch

    noise = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    near, far = noise * 0.9 + 0.01, noise + 5
    assert letters([noise, near, far]) in (["a", "a", "b"], ["b", "a", "c"])
    assert letters([far, noise]) == ["b", "a"]
    assert letters([noise[:1], far[:1]]) == ["", ""]
    assert letters([noise, noise + 1e-3], least=1e-2) == ["a", "a"]
