"""The report's protocol on the report's own model: which of its claims hold (golden/reported/kv-cache-order.json).

Weights and texts come from a folder and two files (KNORM_PYTHIA70M, KNORM_WIKITEXT, KNORM_PG19), else from the Hub's
cache, else, with KNORM_DOWNLOAD=1, from the Hub.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE  # read before conftest.py hides the user's own cache
from huggingface_hub.errors import LocalEntryNotFoundError

from knorm.evaluation.published.judge import UnexpectedVerdict, claims_text, judge_model, require_expected
from knorm.evaluation.published.schema import PYTHIA, read_claims
from knorm.models import ASSETS
from knorm.sources import HUB_TEXTS

FILE = Path(__file__).parents[2] / "golden" / "reported" / "kv-cache-order.json"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def cached(address: str, kind: str, *files: str) -> list[Path]:
    """The files of a pinned repository in the Hub's cache; fetched first where KNORM_DOWNLOAD is set."""
    name, _, revision = address.partition("@")
    local = not os.environ.get("KNORM_DOWNLOAD")
    try:
        folder = snapshot_download(
            name,
            repo_type=kind,
            revision=revision,
            allow_patterns=list(files),
            cache_dir=HF_HUB_CACHE,
            local_files_only=local,
        )
    except LocalEntryNotFoundError:
        if not local:
            raise
        return []
    return sorted(path for pattern in files for path in Path(folder).glob(pattern))


def how_to_bring(what: str, variable: str, address: str, options: str) -> str:
    name, _, revision = address.partition("@")
    return (
        f"{what} is missing: {variable} is not set, and {HF_HUB_CACHE} has no {name} at {revision[:7]}. Bring it by\n"
        f"    hf download {name} {options} --revision {revision}\n"
        f"or set {variable}, or KNORM_DOWNLOAD=1 to let this test fetch it"
    )


def find_model() -> tuple[str | None, str]:
    """The folder of the weights, and what to say where there is none."""
    if given := os.environ.get("KNORM_PYTHIA70M"):
        return given, ""
    found = cached(PYTHIA, "model", *FILES)
    if {path.name for path in found} == {*FILES}:
        return str(found[0].parent), ""
    return None, how_to_bring("pythia-70m-deduped", "KNORM_PYTHIA70M (a folder)", PYTHIA, " ".join(FILES))


def find_text(variable: str, name: str) -> tuple[str | None, str]:
    """The file of a text, and what to say where there is none."""
    if given := os.environ.get(variable):
        return given, ""
    _, address, files = HUB_TEXTS[name].split(":")
    if found := cached(address, "dataset", files):
        return str(found[0]), ""
    options = f"--repo-type dataset --include '{files}'"
    return None, how_to_bring(name, f"{variable} (a .txt or .parquet)", address, options)


@pytest.fixture(scope="module")
def place():
    """The model's folder, and the texts' files by name; skips with all that is missing."""
    found = {
        "model": find_model(),
        "wikitext": find_text("KNORM_WIKITEXT", "wikitext2"),
        "pg19": find_text("KNORM_PG19", "pg19"),
    }
    if missing := [said for where, said in found.values() if where is None]:
        pytest.skip("\n".join(missing))
    return {name: where for name, (where, _) in found.items()}


def test_the_claims_of_the_report(place):
    judged = judge_model(read_claims(FILE), place["model"], {n: place[n] for n in ("wikitext", "pg19")}, device="cuda")
    require_expected(judged)
    print(claims_text(judged))


def test_the_golden_of_this_device_class(place, golden, monkeypatch):
    for name, variable in (("model", "KNORM_PYTHIA70M"), ("wikitext", "KNORM_WIKITEXT"), ("pg19", "KNORM_PG19")):
        monkeypatch.setenv(variable, place[name])
    golden("pythia-70m", device="cuda")


def test_the_gate_fails_on_another_model():
    texts = {"wikitext": str(ASSETS / "encyclopedia.txt"), "pg19": str(ASSETS / "narrative.txt")}
    report = read_claims(FILE)
    brief = [text.model_copy(update={"new_tokens": 10}) for text in report.protocol.texts]
    protocol = report.protocol.model_copy(update={"texts": tuple(brief), "streamed_tokens": 96})
    report = report.model_copy(update={"protocol": protocol})
    judged = judge_model(report, str(ASSETS), texts, device="cuda", rounds=5)
    with pytest.raises(UnexpectedVerdict, match=r"baseline-wikitext, baseline-pg19.*\n\nverdict +claim") as raised:
        require_expected(judged)
    print(raised.value)
    verdicts = {each.claim.id: each.verdict for each in judged}
    assert verdicts["order"] == verdicts["untouched"] == "holds"  # of any model
    assert verdicts["ttft-0.9"] == verdicts["ttft-0.5"] == "does not hold"
