"""What --json holds is what docs/schemas says."""

import importlib.util
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from inline import Inline
from pydantic import ValidationError

from knorm.cli import cli, schemas
from knorm.cli.schemas import quality

ROOT = Path(__file__).parents[2]
SMALL = ("--windows", "2", "--window", "64")


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("schemas_tool", ROOT / "tools" / "schemas.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_schemas_under_docs_are_those_of_today(tool):
    texts = tool.written()
    assert {file.name for file in tool.FOLDER.iterdir()} == {*texts}
    for name, text in texts.items():
        assert (tool.FOLDER / name).read_text(encoding="utf-8") == text, "python tools/schemas.py"


REPOSITORY = ("--golden-dir", str(Path(__file__).parents[2] / "golden"))  # an installed package has no history


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("ppl", "--keep-ratio", "0.9,1/3", "--prune-after", "16", *SMALL), "knorm-ppl"),
        (("ppl", "knorm", "--keep-ratio", "0.5", *SMALL), "knorm-ppl-methods"),
        (("explain", "--keep-ratio", "0.5", "--prune-after", "16", "--tokens", "1", *SMALL), "knorm-explain"),
        pytest.param(
            ("explain", 'transformers:QuantizedCache(backend="fp8")', "--tokens", "0", *SMALL),
            "knorm-explain-method",
            marks=pytest.mark.processes,
        ),
        (("bench", "--blocks", "8", "--new-tokens", "2", "--prompt-tokens", "32"), "knorm-bench"),
        (("check", "knorm:compress", "--select", "dtype,ties"), "knorm-check"),
        (("golden", "list"), "knorm-golden-list"),
        (("golden", "verify", "selections"), "knorm-golden-verify"),
        (("golden", "log", "selections", "--device-class", "nvidia-h200", *REPOSITORY), "knorm-golden-log"),
    ],
)
def test_a_result_is_what_its_schema_says(arguments, name, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # its times are not looked at
    monkeypatch.setattr("knorm.laws.process.supervisor.Worker", Inline)
    file = tmp_path / "out.json"
    outcome = CliRunner().invoke(cli, [*arguments, "-q", "--json", str(file)])
    assert outcome.exception is None or isinstance(outcome.exception, SystemExit), outcome.exception
    assert outcome.exit_code in (0, 1), outcome.output
    result = json.loads(file.read_text(encoding="utf-8"))
    assert (result["schema"], result["schema_version"]) == (name, schemas.VERSION)
    again = schemas.FORMS[name].model_validate(result, strict=False).model_dump(mode="json", by_alias=True)
    assert again == result


def test_a_ratio_is_a_number():
    part = quality.Recall(nll=1, ppl=2.7, accuracy="1/2", tokens=3, others=1.5)
    assert part.model_dump()["accuracy"] == 0.5


@pytest.mark.parametrize("change", [{"more": 1}, {"ppl": None}])
def test_a_field_that_no_schema_names_is_refused(change):
    fields = {"nll": 1.0, "ppl": 2.7, "accuracy": 0.5, "tokens": 3, "others": 1.5}
    with pytest.raises(ValidationError):
        quality.Recall.model_validate({**fields, **change})


def kinds(field):
    """Return the types that a field may have, null left out."""
    return frozenset(part.get("type") or part["$ref"] for part in field.get("anyOf", [field])) - {"null"}


def test_a_name_has_one_type_in_all_results():
    seen = {}
    for form in schemas.FORMS.values():
        whole = form.model_json_schema(mode="serialization")
        for part in (whole, *whole["$defs"].values()):
            for name, field in part["properties"].items():
                seen.setdefault(name, set()).add(kinds(field))
    assert {name: types for name, types in seen.items() if len(types) > 1} == {}
