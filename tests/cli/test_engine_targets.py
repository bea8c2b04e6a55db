"""Engines on the command line: what is refused before anything runs."""

from __future__ import annotations

import sys

import pytest

Q8 = 'llama.cpp:embedded(type_k="q8_0")'


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((Q8, "knorm"), f"{Q8} is an engine, whose full cache is its own, and knorm is none"),
        ((Q8, "--model", "smollm2"), f"--model is not for an engine such as {Q8}: it brings its own model"),
        ((Q8, "--keep-ratio", "0.5"), f"--keep-ratio is not for an engine such as {Q8}: its settings stand in"),
        ((Q8, "--how", "schedule"), "an engine has no schedule: give --how loop, 'two calls' or auto"),
        ((Q8, "llama.cpp:embedded-llama"), "llama.cpp:embedded and llama.cpp:embedded-llama are two models"),
        (("knorm", "--engine-limit", "3"), "--engine-limit is about an engine, as llama.cpp:smollm2: give one"),
        (("llama.cpp:nowhere.gguf",), "nowhere.gguf cannot be read: it is not there"),
        (("llama.cpp:embedded(type_k='q9_9')",), "type_k='q9_9', but should be one of f32, f16"),
        ((Q8, "--engine-limit", "0"), "--engine-limit"),
    ],
)
def test_wrong_usage_is_one_line(run_knorm, arguments, said):
    code, out, err = run_knorm("ppl", *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1 or "Usage:" in err


@pytest.mark.parametrize("command", [("explain",), ("bench",)])
def test_commands_that_take_no_engine_say_so(run_knorm, command, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # of which bench speaks first
    code, out, err = run_knorm(*command, Q8)
    assert (code, out) == (2, "")
    assert f"target {Q8!r} is an engine, which" in err


def test_a_file_that_is_no_gguf_is_one_line(run_knorm, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"no such thing")
    code, out, err = run_knorm("ppl", "llama.cpp:m.gguf")
    assert (code, out) == (2, "")
    assert "it does not begin with GGUF" in err
    assert len(err.splitlines()) == 1


def test_an_engine_that_is_not_installed_is_one_line(run_knorm, tmp_path):
    pytest.importorskip("gguf", reason="needs the package gguf: pip install 'knorm[gguf]'")
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    code, out, err = run_knorm("ppl", Q8, "--windows", "1", "--window", "64", "--engine-python", str(bare))
    assert (code, out) == (2, "")
    assert "llama.cpp is not installed" in err
    assert "pip install 'knorm[llamacpp]' -c constraints-llamacpp.txt, or name a Python that has it" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            (Q8, "--trait", "rounding=ceil"),
            f"--trait is not for an engine such as {Q8}: its settings stand in the target",
        ),
        ((Q8, "--like", "knorm"), "--like is not for an engine"),
        ((Q8, "--as", "function"), "--as is not for an engine"),
        ((Q8, "--select", "surives"), "no check is named 'surives'; there are "),
        (("llama.cpp:embedded(type_k='q9_9')",), "type_k='q9_9', but should be one of f32, f16"),
    ],
)
def test_wrong_usage_of_check_is_one_line(run_knorm, arguments, said):
    code, out, err = run_knorm("check", *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1
