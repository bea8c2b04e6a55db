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


@pytest.mark.processes
@pytest.mark.parametrize(
    "press", ["AdaKVPress(KnormPress())", "FinchPress", "KVzipPress", "KeyRerotationPress(KnormPress())"]
)
def test_a_program_sees_what_the_witness_sees(press):
    subject = load_target(f"kvpress:{press}")
    renumbered = subject.traits.positions == "renumbered"
    subject = replace(subject, shows=under_the_mask(renumbered=renumbered) + SEEN)
    reading = Reading(prompt=40, calls=(1, 2, 7), seed=4, real=True)
    done = in_a_new_process(ALONE, input=program(subject, reading), check=True)
    compared, seen = done.stdout.splitlines()[-2:]
    assert float(compared.rpartition("by ")[2]) < 1e-3, "the press is right"
    looks = [[x.call, x.layer, x.tokens.tolist(), x.seen.tolist()] for x in witness(subject, reading).looks]
    assert sorted(json.loads(seen)) == sorted(looks)
