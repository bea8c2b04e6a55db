"""Programs that show what a law found of a press: each sees what the witness sees, in a process without knorm."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from commands import in_a_new_process

pytest.importorskip("kvpress.presses", reason="kvpress is not installed: run tox -e kvpress")

from knorm.laws.loading import load_target
from knorm.laws.reading import Reading
from knorm.laws.scripts import program
from knorm.laws.shown import under_the_mask
from knorm.laws.witness import witness

ALONE = "import sys; sys.modules['knorm'] = None; exec(compile(sys.stdin.read(), 'snippet', 'exec'))"
SEEN = """
import json
print(json.dumps([[call, layer, tokens.tolist(), seen.tolist()] for (call, layer), (tokens, seen, *_) in run.items()]))
"""


PRESSES = [
    "AdaKVPress(KnormPress())",
    "DMSPress(KVzapPress(), threshold=0.0, sliding_window_size=8)",
    "DuoAttentionPress(head_compression_ratio=0.5)",
    "ExpectedAttentionStatsPress",
    "FastKVzipPress",
    "FinchPress",
    "KVzipPress",
    "KeyRerotationPress(KnormPress())",
    "LUKVPress",
    "QFilterPress",
    "RestoreKVPress",
]


@pytest.mark.processes
@pytest.mark.parametrize("press", PRESSES)
def test_a_program_sees_what_the_witness_sees(press):
    if press == "RestoreKVPress":
        pytest.importorskip("peft")
    subject = load_target(f"kvpress:{press}")
    renumbered = subject.traits.positions == "renumbered"
    subject = replace(subject, shows=under_the_mask(renumbered=renumbered) + SEEN)
    reading = Reading(prompt=40, calls=(1, 2, 7), seed=4, real=True)
    done = in_a_new_process(ALONE, input=program(subject, reading), check=True)
    compared, seen = done.stdout.splitlines()[-2:]
    run = witness(subject, reading)
    assert run.evicted
    assert float(compared.rpartition("by ")[2]) < 1e-3 or subject.traits.merges_values, "the press is right"
    looks = [[x.call, x.layer, x.tokens.tolist(), x.seen.tolist()] for x in run.looks]
    assert sorted(json.loads(seen)) == sorted(looks)
