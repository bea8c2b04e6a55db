from __future__ import annotations

import struct
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from commands import in_a_new_process, new_environment, strict_json

import knorm
from knorm import Policy, compress, exact_nll, retained_count, verify
from knorm.evaluation import runner
from knorm.evaluation.curve import measure_row
from knorm.evaluation.runner import Runner
from knorm.evaluation.windows import cut_windows
from knorm.golden import verify as golden_verify
from knorm.golden.cases import CASES
from knorm.laws import CHECKS, KNORM, Subject
from knorm.laws.runner import applies
from knorm.laws.search import EFFORT
from knorm.models import load_text

STORY = load_text("encyclopedia")[:800]
SHORT = ("--text", "story.txt", "--window", "32", "--windows", "2")


@pytest.fixture(autouse=True)
def _a_folder_with_a_story(run_knorm):
    Path("story.txt").write_text(STORY, encoding="utf-8")
    Path("empty.txt").touch()


def untimed(row):
    return {name: value for name, value in row.items() if name not in ("seconds", "scheduling")}


def test_ppl_writes_what_evaluate_returns(run_knorm, embedded):
    options = ("--prune-after", "8", "--skip-layers", "2,0", "--protect-recent", "1", "--keep-ratio", "1.0,0.55")
    code, out, err = run_knorm("ppl", *SHORT, *options, "--json", "out.json")
    result = strict_json("out.json")
    assert (code, err.strip()) == (0, "")
    assert "embedded on story.txt: 2 windows of 32 tokens, streaming, prune_after 8" in out
    assert result["environment"]["knorm"] == knorm.__version__
    assert (result["model"], result["text"], result["window"], result["windows"]) == ("embedded", "story.txt", 32, 2)
    assert result["policy"]["protocol"] == "streaming"
    assert result["policy"]["skip_layers"] == [0, 2]
    assert result["holds"] is True
    windows = cut_windows(embedded[1], STORY, 32, 2)
    for row, ratio in zip(result["rows"], ("1.0", "0.55"), strict=True):
        policy = Policy(ratio, 8, (0, 2), protect_recent=1, protocol="streaming")
        measured = asdict(measure_row(Runner(embedded[0], windows), policy))
        assert untimed(row) == untimed(measured | {"keep_ratio": float(ratio)})
        assert f"{row['ppl']:.2f}" in out
    assert result["rows"][1]["final_cache"] < result["rows"][0]["final_cache"] == 32


def test_a_prefill_scores_only_the_tokens_after_the_prompt(run_knorm, embedded):
    run_knorm("ppl", *SHORT, "--prompt-length", "20", "--keep-ratio", "0.5", "--json", "out.json")
    result = strict_json("out.json")
    ids = cut_windows(embedded[1], STORY, 32, 2).input_ids
    nll = exact_nll(embedded[0], ids, Policy(0.5), prompt_length=20)[:, 19:]
    assert result["policy"]["protocol"] == "prefill"
    assert result["rows"][0]["tokens"] == nll.numel() == 24
    assert result["rows"][0]["nll"] == pytest.approx(float(nll.double().mean()), abs=1e-9)
    assert result["rows"][0]["final_cache"] == 10 + 12


@pytest.mark.processes
def test_plot_draws_a_png(run_knorm):
    assert run_knorm("ppl", *SHORT, "--plot", "curve.png", "-q")[0] == 0
    picture = Path("curve.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", picture[16:24]) == (840, 720)


def test_quiet_prints_nothing(run_knorm):
    assert run_knorm("ppl", *SHORT, "--keep-ratio", "0.5", "--stream", "--json", "out.json", "-q") == (0, "", "")
    assert strict_json("out.json")["rows"]


def test_stream_shows_the_loop_beside_the_one_pass(run_knorm):
    policy = ("--prune-after", "8", "--skip-layers", "0", "--keep-ratio", "0.5")
    code, out, _ = run_knorm("ppl", *SHORT, *policy, "--stream", "--json", "out.json")
    (row,) = strict_json("out.json")["rows"]
    assert code == 0
    assert all(
        column in out for column in ("The loop", "largest difference", "evictions differ", "One pass against the loop")
    )
    assert row["stream_ppl"] == pytest.approx(row["ppl"], rel=1e-4)
    assert row["stream_evictions"] == 0
    assert 0 < row["stream_difference"] <= 1e-4


@pytest.mark.parametrize(("dtype", "code"), [("float32", 1), ("bfloat16", 0)])
def test_a_loop_that_disagrees_is_refuted_where_equality_is_claimed(run_knorm, monkeypatch, dtype, code):
    agreement = runner.agreement
    monkeypatch.setattr(runner, "agreement", lambda *a, **k: agreement(*a, **k)._replace(difference=0.5))
    ended, out, _ = run_knorm("ppl", *SHORT, "--keep-ratio", "1", "--stream", "--dtype", dtype, "--json", "out.json")
    assert ended == code
    assert strict_json("out.json")["holds"] is (code == 0)
    assert ("Equality is claimed for float32 and float64, not for bfloat16" in out) is (code == 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--protocol prefill", "give --prompt-length"),
        ("--keep-ratio 0", "keep_ratio='0', but should lie in (0, 1]"),
        ("--keep-ratio 1.5", "keep_ratio='1.5', but should lie in (0, 1]"),
        ("--keep-ratio nan", "keep_ratio='nan', but should lie in (0, 1]"),
        ("--keep-ratio 0.5,abc", "keep_ratio='abc', but should lie in (0, 1]"),
        ("--keep-ratio ,", "--keep-ratio is empty"),
        (
            "--model pythia",
            "model 'pythia' should be embedded, embedded-llama, smollm2, a folder, a .gguf file, or a Hub id",
        ),
        ("--model EleutherAI/pythia-70m", "needs a pinned revision"),
        ("--text nowhere.txt", "text 'nowhere.txt' is no file here"),
        ("--text empty.txt", "the text has 0 tokens, but needs at least two"),
        ("--window 1", "--window 1, but should be at least 2"),
        ("--windows 0", "--windows 0, but should be at least 1"),
        ("--batch 0", "--batch 0, but should be at least 1"),
        ("--skip-layers=-1", "--skip-layers -1, but should be at least 0"),
        ("--protect-first -1", "--protect-first -1, but should be at least 0"),
        ("--protect-recent -1", "--protect-recent -1, but should be at least 0"),
        ("--prune-after 1", "prune_after=1 with protocol='streaming', but should be at least 2"),
        ("--protect-first 100 --keep-ratio 0.5", "need 100 tokens, but keep_ratio=0.5 retains 64 of 128"),
        ("--device cuda", "PyTorch sees no CUDA device"),
        ("--text narrative --window 2000", "2000 tokens, but GPTNeoX"),
        ("--skip-layers 0,9", "the model has layers 0 to 6"),
        ("--prompt-length 20 --protect-recent 15 --keep-ratio 0.5", "retains 10 of 20"),
        ("--prompt-length 33", "between 1 and the 32 tokens"),
        pytest.param("--prompt-length 32", "prompt"),
        ("--prompt-length 0", "prompt"),
        ("--device tpu", "tpu"),
        ("--plot curve.xyz", "xyz"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run_knorm, monkeypatch, arguments, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = run_knorm("ppl", *SHORT, *arguments.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("knorm: ")
    assert words in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("ppl --json .", "cannot write .: it is a folder"),
        ("ppl --json nowhere/out.json", "there is no folder nowhere"),
        ("verify --json nowhere/out.json", "there is no folder nowhere"),
        ("ppl --plot nowhere/curve.png", "there is no folder nowhere"),
        ("ppl --no-such-option", "--no-such-option"),
        ("ppl --score lowest", "is not one of 'low_norm', 'high_norm', 'random'"),
        ("ppl --skip-layers one", "'one' should be numbers separated by commas"),
        ("ppl --windows many", "'many' is not a valid integer"),
        ("verify everything", "unexpected extra argument"),
        ("prove", "No such command 'prove'"),
    ],
)
def test_wrong_usage_shows_the_usage_and_exits_with_2(run_knorm, arguments, words):
    code, out, err = run_knorm(*arguments.split())
    assert (code, out) == (2, "")
    assert err.startswith("Usage: ")
    assert err.splitlines()[-1].startswith("Error: ")
    assert words in err
    assert "Traceback" not in err


FAILING = "from knorm import cli; cli.cli.commands['verify'].callback = lambda **_: int('x'); cli.main()"


def test_v_shows_the_traceback():
    plain, verbose = in_a_new_process(FAILING, "verify"), in_a_new_process(FAILING, "-v", "verify")
    assert plain.stderr == "knorm: invalid literal for int() with base 10: 'x'\n"
    assert verbose.stderr.startswith("Traceback (most recent call last)")
    assert verbose.stderr.endswith("ValueError: invalid literal for int() with base 10: 'x'\n")
    assert plain.returncode == 2


def test_a_bug_of_ones_own_is_not_taken_for_a_refutation():
    broken = FAILING.replace("int('x')", "1 / 0")
    result = in_a_new_process(broken, "verify")
    assert result.returncode == 3
    assert result.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_v_leaves_the_exit_code_as_it_is():
    assert in_a_new_process(FAILING, "-v", "verify").returncode == 2


def test_json_is_strict_where_a_column_has_no_number(run_knorm):
    run_knorm(
        "ppl", "--text", "story.txt", "--window", "8", "--windows", "1", "--keep-ratio", "1", "--json", "out.json"
    )
    assert strict_json("out.json")["rows"][0]["recent"] is None


def abridged(monkeypatch):
    """Leave the main job little to do; what is left out has tests of its own."""

    def judged(*_):
        """It holds."""
        return "as said"

    monkeypatch.setattr(verify, "OWN", verify.OWN[:1])
    monkeypatch.setattr(verify.own, "check_runs", judged)
    monkeypatch.setattr(verify.own_cache, "check_generation", judged)
    monkeypatch.setattr(verify.own_cache, "cache_results", lambda: iter(()))
    monkeypatch.setattr(golden_verify, "verify_goldens", partial(golden_verify.verify_goldens, cases=["selections"]))
    agreement = verify.agreement
    monkeypatch.setattr(
        verify, "agreement", lambda model, ids, *given, **more: agreement(model, ids[:1, :130], *given, **more)
    )
    quick = {slow: replace(effort, examples=effort.examples // 3) for slow, effort in EFFORT["quick"].items()}
    monkeypatch.setitem(EFFORT, "quick", quick)


@pytest.mark.parametrize("whole", [pytest.param(True, marks=pytest.mark.processes), False])
def test_verify_gives_a_verdict_for_every_claim_and_all_hold(run_knorm, monkeypatch, whole):
    windows, length = (2, 256) if whole else (1, 160)  # .ci/run does it in full
    monkeypatch.setattr(verify, "verify", partial(verify.verify, windows=windows, length=length))
    if not whole:
        abridged(monkeypatch)
    code, out, err = run_knorm("verify", "--json", "out.json")
    verdicts = strict_json("out.json")["verdicts"]
    said = " ".join(out.split())
    assert (code, err) == (0, "")
    assert all(verdict["holds"] and verdict["evidence"] for verdict in verdicts)
    heads = [
        "holds" if verdict["compared"] else "n/a" for verdict in verdicts
    ]  # a golden of this class may not be there
    assert all(f"{h} {v['claim']} [{v['evidence']}; " in said for h, v in zip(heads, verdicts, strict=True))
    assert [line.startswith(("holds ", "n/a ")) for line in out.splitlines()].count(True) == len(verdicts)
    assert "REFUTED" not in out
    assert out.splitlines()[-1].startswith(f"{heads.count('holds')} hold, 0 refuted, in ")
    claims = " ".join(verdict["claim"] for verdict in verdicts)
    ordinary = [case for case in CASES.values() if "cpu" in case.devices and not case.optional]
    ordinary = ordinary if whole else [CASES["selections"]]
    assert all(f"Nothing moved in {case.id}: {case.what}." in claims for case in ordinary)
    core = Subject("knorm.compress", KNORM, compress)
    assert all(check.law in claims for check in CHECKS.values() if applies(check, core))
    assert "Ratio 1 equals the uncompressed model." in claims
    assert all(f"One pass equals the loop, {protocol}" in claims for protocol in ("streaming", "prefill"))
    for text in ("narrative", "encyclopedia"):
        (rows,) = (verdict["rows"] for verdict in verdicts if text in verdict["claim"])
        assert [row["keep_ratio"] for row in rows] == [*map(float, verify.CURVE)]
        assert len({row["tokens"] for row in rows}) == 1
        assert all(f"{row['ppl']:.2f}" in out for row in rows)


def in_norm_order(keys, values, ratio):
    index = keys.double().norm(dim=-1).argsort(dim=-1)[..., : retained_count(keys.shape[2], ratio), None]
    return tuple(tensor.gather(2, index.expand(-1, -1, -1, tensor.shape[3])) for tensor in (keys, values))


def test_verify_exits_with_1_and_the_counterexample_where_a_law_is_refuted(run_knorm, monkeypatch):
    whole = verify.verify
    monkeypatch.setattr(verify, "OWN", ())
    monkeypatch.setattr(verify, "compress", in_norm_order)
    chosen = partial(verify.iter_results, select=("retained_count", "time_order"))
    monkeypatch.setattr(verify, "iter_results", chosen)
    monkeypatch.setattr(verify, "verify", lambda: islice(whole(), 2))
    code, out, _ = run_knorm("verify", "--json", "out.json")
    holds, refuted = strict_json("out.json")["verdicts"]
    assert code == 1
    assert holds["holds"]
    assert not refuted["holds"]
    assert refuted["evidence"].startswith("time order: positions [1, 0] retained from 2 tokens")
    assert "REFUTED  Retained positions ascend. [time order: positions [1, 0]" in out
    assert out.splitlines()[-1].startswith("1 hold, 1 refuted, in ")


def check_shapes():
    """Shapes agree."""
    raise ValueError("shape '[2, 3, 12]' is invalid for input of size 66")


def test_an_error_of_knorms_own_is_a_verdict_of_verify_not_wrong_usage(run_knorm, monkeypatch):
    whole = verify.verify
    monkeypatch.setattr(verify, "OWN", (check_shapes,))
    monkeypatch.setattr(verify, "verify", lambda: islice(whole(), 1))
    code, out, err = run_knorm("verify")
    assert (code, err) == (1, "")
    assert out.startswith(
        "REFUTED  Shapes agree. [raised ValueError: shape '[2, 3, 12]' is invalid for input of size 66"
    )


def test_verify_says_nothing_when_quiet_but_in_its_exit_code(run_knorm, monkeypatch):
    monkeypatch.setattr(verify, "verify", lambda: iter([verify.Verdict("It holds.", False, "it does not", 0.0)]))
    assert run_knorm("verify", "-q") == (1, "", "")


def test_a_verdict_in_a_log_is_one_line_however_long(run_knorm, monkeypatch):
    monkeypatch.setattr(verify, "verify", lambda: iter([verify.Verdict("word " * 50, True, "evidence", 0.0)]))
    assert len(run_knorm("verify")[1].splitlines()) == 2


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["ppl", "--help"], ["verify", "-h"]])
def test_help_loads_nothing_heavy(arguments):
    code = "import sys; from knorm.cli import main; main(); print({'torch', 'transformers', 'rich'} & {*sys.modules})"
    result = in_a_new_process(code, *arguments)
    assert result.returncode == 0
    assert result.stdout.startswith(("Usage: ", "knorm, version", "-c, version"))
    assert result.stdout.endswith("\nset()\n")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("--version", 0, f"python -m knorm, version {knorm.__version__}"),
        ("golden list --help", 0, "Usage: python -m knorm golden list [OPTIONS]"),
        ("ppl --window few", 2, "Usage: python -m knorm ppl [OPTIONS] [TARGET]..."),
    ],
)
def test_the_package_runs_as_the_command_does(arguments, code, words, tmp_path):
    command = [sys.executable, "-m", "knorm", *arguments.split()]
    result = subprocess.run(command, cwd=tmp_path, env=new_environment(), check=False, capture_output=True, text=True)
    assert result.returncode == code
    assert (result.stderr if code else result.stdout).splitlines()[0] == words


def test_importing_what_python_m_runs_runs_nothing():
    assert in_a_new_process("import knorm.__main__").returncode == 0


def test_somebody_elses_table_is_judged(run_knorm):
    Path("seed.csv").write_text("keep_ratio,ppl\n1.0,51.91\n0.9,165.81\n0.5,122.10\n")
    code, out, _ = run_knorm("ppl", "--reported", "seed.csv", "--json", "out.json")
    assert code == 1
    assert (
        "SUSPICIOUS  perplexity falls from 165.81 at 0.9 to 122.1 at 0.5, while less is kept: run `knorm explain" in out
    )
    assert len(strict_json("out.json")["suspicious"]) == out.count("SUSPICIOUS") == 2
    Path("fine.csv").write_text("keep_ratio,ppl\n1.0,33.9\n0.5,39.4\n")
    code, out, _ = run_knorm("ppl", "--reported", "fine.csv")
    assert code == 0
    assert "Nothing in fine.csv is suspicious by itself" in out
    code, out, err = run_knorm("ppl", "--reported", "nowhere.csv")
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_a_falling_curve_is_never_passed_in_silence(run_knorm):
    policy = ("--prune-after", "32", "--skip-layers", "0", "--keep-ratio", "1.0,0.95,0.5")
    code, out, _ = run_knorm("ppl", "--window", "128", "--windows", "4", *policy, "--json", "out.json")
    assert code == 0
    assert "SUSPICIOUS  perplexity falls from" in out
    assert "the newest tokens had been starved" in out
    assert strict_json("out.json")["suspicious"][0]["what"].startswith("perplexity falls from")


def test_explain_says_what_moved_perplexity(run_knorm):
    policy = ("--prune-after", "16", "--skip-layers", "0")
    code, out, err = run_knorm(
        "explain", "--window", "96", "--windows", "2", *policy, "--json", "out.json", "--plot", "e.png"
    )
    found = strict_json("out.json")
    assert (code, err) == (0, "")
    assert "order: no effect, at most" in out
    assert all(f"{e['kind']}: {e['sentence']}".split(";")[0][:40] in out for e in found["effects"])
    assert all(line in " ".join(out.split()) for line in found["conclusions"])
    assert (found["keep_ratio"], found["policy"]["prune_after"], found["windows"]) == (0.9, 16, 2)
    assert Path("e.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--prune-after 512", "nothing to explain: no token was evicted; prune_after 512 was never reached"),
        ("--keep-ratio 1", "nothing to explain: no token was evicted; keep_ratio is 1"),
        ("--keep-ratio 0.9,0.5", "keep_ratio='0.9,0.5', but should lie in (0, 1]"),
        ("--newest 0", "--newest 0, but should be at least 1"),
        ("--window 1025", "1025 tokens, but"),
    ],
)
def test_what_cannot_be_explained_is_one_line(run_knorm, arguments, words):
    code, out, err = run_knorm("explain", "--windows", "1", *arguments.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--keep-ratio 1.0,0.3 --prompt-length 20 --protect-recent 15", "retains 6 of 20"),
        ("--json same.svg --plot same.svg", "but should be two files"),
        ("--reported story.txt --plot out.png", "drop --plot and --stream"),
        ("--reported story.txt --json story.txt --force", "would overwrite the table"),
    ],
)
def test_what_would_fail_later_fails_before_the_work(run_knorm, monkeypatch, arguments, words):
    monkeypatch.setattr(runner, "exact_run", lambda *_, **__: pytest.fail("it was run"))
    code, out, err = run_knorm("ppl", *SHORT, *arguments.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
