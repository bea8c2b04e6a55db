"""Whatever a folder holds, transformers is shown checked files only: no pickle, no other place, no code."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny

import knorm
from knorm.models import ASSETS, load_model
from knorm.weights import INDEX, WEIGHTS, checked_folder, read_index

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny("gpt_neox", vocab_size=4096).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / name, folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


class Marking:
    """Unpickled, it leaves a file behind."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


@pytest.fixture(autouse=True)
def no_pickle(tmp_path, monkeypatch):
    """No weights of these tests may reach torch.load, whatever it would then refuse."""
    opened = []
    monkeypatch.setattr(torch, "load", lambda file, *_, **__: opened.append(str(file)) or {})
    yield
    assert not opened
    assert not (tmp_path / "marker").exists()


def pickled(folder, name):
    torch.save({**load_file(folder / WEIGHTS), "x": Marking(folder.parent / "marker")}, folder / name)


def rewrite(folder, name="config.json", **changes):
    file = folder / name
    settings = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**settings, **changes}))


def indexed(folder, target):
    """An index in place of the weights; every tensor is in `target`."""
    keys = list(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(keys, target)}))


def split(folder):
    weights = load_file(folder / WEIGHTS)
    names = sorted(weights)
    parts = {FIRST: names[::2], SECOND: names[1::2]}
    for file, keys in parts.items():
        save_file({key: weights[key] for key in keys}, folder / file, {"format": "pt"})
    (folder / WEIGHTS).unlink()
    weight_map = {key: file for file, keys in parts.items() for key in keys}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def index_to_a_pickle(folder):
    pickled(folder, "pytorch_model.bin")
    indexed(folder, "pytorch_model.bin")


def second_shard_is_a_pickle(folder):
    split(folder)
    torch.save({"x": Marking(folder.parent / "marker")}, folder / "rest.bin")
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    renamed = {key: name.replace(SECOND, "rest.bin") for key, name in weight_map.items()}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": renamed}))


def index_to_a_parent(folder):
    shutil.copy(folder / WEIGHTS, folder.parent / "x.safetensors")
    indexed(folder, "../x.safetensors")


def index_to_an_absolute_path(folder):
    shutil.copy(folder / WEIGHTS, folder.parent / "x.safetensors")
    indexed(folder, str(folder.parent / "x.safetensors"))


def index_to_a_number(folder):
    indexed(folder, 7)


def index_that_is_a_list(folder):
    indexed(folder, "x.safetensors")
    (folder / INDEX).write_text("[]")


def index_without_a_map(folder):
    indexed(folder, "x.safetensors")
    (folder / INDEX).write_text("{}")


def pickle_alone(folder):
    pickled(folder, "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def pickle_index_alone(folder):
    pickled(folder, "pytorch_model-1.bin")
    indexed(folder, "pytorch_model-1.bin")
    (folder / INDEX).rename(folder / "pytorch_model.bin.index.json")


def zip_called_safetensors(folder):
    pickled(folder, "x.bin")
    (folder / "x.bin").replace(folder / WEIGHTS)
    assert zipfile.is_zipfile(folder / WEIGHTS)


def old_pickle_called_safetensors(folder):
    torch.save({"x": Marking(folder.parent / "marker")}, folder / WEIGHTS, _use_new_zipfile_serialization=False)


def gguf_called_safetensors(folder):
    (folder / WEIGHTS).write_bytes(b"GGUF" + bytes(100))


def named_in_the_config(folder):
    pickled(folder, "adapter_model.bin")
    rewrite(folder, transformers_weights="adapter_model.bin")


def adapter_beside_the_model(folder):
    pickled(folder, "adapter_model.bin")
    rewrite(folder, "adapter_config.json", peft_type="LORA", base_model_name_or_path=str(folder), r=1)


def adapter_alone(folder):
    base = shutil.copytree(folder, folder.parent / "base")
    adapter_beside_the_model(folder)
    rewrite(folder, "adapter_config.json", base_model_name_or_path=str(base))
    (folder / "config.json").unlink()


def quantised(folder):
    rewrite(folder, quantization_config={"quant_method": "quanto", "weights": "int8"})


def quantised_inside(folder):
    rewrite(folder, text_config={"quantization_config": {"quant_method": "bitsandbytes"}})


def kernel_from_the_hub(folder):
    rewrite(folder, attn_implementation="kernels-community/flash-attn3")


def kernels_in_a_table(folder):
    rewrite(folder, _attn_implementation={"": "somebody/kernel"})


def link_to_nothing(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("gone.safetensors")


def loop_of_links(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("again")
    (folder / "again").symlink_to(WEIGHTS)


def weights_from_a_device(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/dev/zero")


def settings_from_a_device(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")


def tokenizer_from_a_pipe(folder):
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")


def template_is_a_folder(folder):
    (folder / "chat_template.jinja").mkdir()


def weights_from_a_socket(folder):
    (folder / WEIGHTS).unlink()
    here = os.getcwd()
    os.chdir(folder)  # the path of a socket is short
    try:
        socket.socket(socket.AF_UNIX).bind(WEIGHTS)
    finally:
        os.chdir(here)


def settings_without_end(folder):
    (folder / "config.json").write_bytes(b"{" + b" " * 2**25 + b"}")


def settings_too_deep(folder):
    (folder / "config.json").write_text("[" * 100_000)


def more_layers_than_there_can_be(folder):
    rewrite(folder, num_hidden_layers=2**62)


def pickled_vocabulary(folder):
    (folder / "tokenizer.json").unlink()
    torch.save(Marking(folder.parent / "marker"), folder / "vocab.pkl")
    rewrite(folder, "tokenizer_config.json", tokenizer_class="TransfoXLTokenizer", vocab_file="vocab.pkl")


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        (index_to_a_pickle, "'pytorch_model.bin', but should name a .safetensors file in the same folder"),
        (second_shard_is_a_pickle, "'rest.bin', but should name a .safetensors"),
        (index_to_a_parent, "'../x.safetensors', but should name a .safetensors file in the same folder"),
        (index_to_an_absolute_path, "x.safetensors', but should name a .safetensors file in the same folder"),
        (index_to_a_number, "in 7, but should name"),
        (index_that_is_a_list, "holds a list, but should hold an object"),
        (index_without_a_map, "has no weight_map"),
        (pickle_alone, "no file named model.safetensors"),
        (pickle_index_alone, "(but pytorch_model-1.bin): weights are read from safetensors only"),
        (zip_called_safetensors, "is a zip, as pickled weights are, but should be safetensors"),
        (old_pickle_called_safetensors, "is a pickle, but should be safetensors"),
        (gguf_called_safetensors, "is GGUF, but should be safetensors"),
        (named_in_the_config, "asks for the weights in 'adapter_model.bin'"),
        (adapter_beside_the_model, "it has an adapter (adapter_config.json), which is not read: merge it"),
        (adapter_alone, "it has an adapter"),
        (quantised, "quantised (quanto)"),
        (quantised_inside, "quantised (bitsandbytes)"),
        (kernel_from_the_hub, "'kernels-community/flash-attn3', but should to 'eager' or 'sdpa'"),
        (kernels_in_a_table, "'somebody/kernel'}, but should to"),
        (link_to_nothing, "is a link to gone.safetensors, which is not there"),
        (loop_of_links, "Too many levels of symbolic links"),
        (weights_from_a_device, "is a device, but should be a file"),
        (settings_from_a_device, "is a device, but should be a file"),
        (tokenizer_from_a_pipe, "is a pipe, but should be a file"),
        (template_is_a_folder, "is a folder, but should be a file"),
        (weights_from_a_socket, "is a socket, but should be a file"),
        (settings_without_end, "but should have at most 33,554,432"),
        (settings_too_deep, "is not JSON"),
        (more_layers_than_there_can_be, "num_hidden_layers=4611686018427387904, but should have at most 10,000"),
        (pickled_vocabulary, "no tokenizer.json"),
    ],
)
def test_what_leads_elsewhere_is_refused_before_it_is_opened(folder, attack, words):
    attack(folder)
    with pytest.raises(ValueError) as raised:
        load_model(str(folder))
    refusal = str(raised.value)
    assert words in refusal
    assert refusal.startswith(f"model {str(folder)!r} cannot be loaded: ")
    assert "\n" not in refusal
    for switch in ("use_safetensors", "trust_remote_code", "weights_only", "allow_all_kernels"):
        assert switch not in refusal


def test_shards_load_as_one_file_does(folder, saved):
    split(folder)
    ours, theirs = (load_model(str(each))[0].state_dict() for each in (folder, saved))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_links_to_blobs_load_as_the_cache_of_the_hub_keeps_them(folder, saved):
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.replace(blobs / str(number))
        file.symlink_to(Path("..", "blobs", str(number)))
    ours, theirs = (load_model(str(each))[0].get_input_embeddings().weight for each in (folder, saved))
    assert torch.equal(ours, theirs)


def test_other_formats_beside_safetensors_are_not_opened(folder):
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "__0_0.distcp"):
        pickled(folder, name)
    shutil.copy(folder / "pytorch_model.bin", folder / ".metadata")  # with it, the folder is a distributed checkpoint
    rewrite(folder, "pytorch_model.bin.index.json", weight_map={})
    (folder / "modeling.py").write_text("raise SystemExit('ran')")
    load_model(str(folder))
    with checked_folder(folder) as checked:
        assert {path.name for path in checked.iterdir()} == {
            "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS
        }  # fmt: skip
    assert not checked.exists()


def test_model_and_tokenizer_go_by_the_name_they_were_asked_for(folder):
    model, tokenizer = load_model(str(folder))
    assert model.name_or_path == model.config.name_or_path == tokenizer.name_or_path == str(folder)


def test_code_beside_a_known_model_is_not_offered_to_transformers(folder):
    (folder / "evil.py").write_text(f"open({str(folder.parent / 'marker')!r}, 'w')\n")
    rewrite(folder, auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"})
    rewrite(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    model, _ = load_model(str(folder))
    assert type(model).__module__.startswith("transformers.")


@pytest.mark.parametrize("place", ["/dev/zero", "/etc/hostname", "../elsewhere.json"])
def test_paths_in_a_tokenizers_settings_are_not_followed(folder, place, embedded):
    keys = ("vocab_file", "tokenizer_file", "merges_file", "added_tokens_file", "special_tokens_map_file")
    rewrite(folder, "tokenizer_config.json", **dict.fromkeys(keys, place))
    assert load_model(str(folder))[1]("One two.").input_ids == embedded[1]("One two.").input_ids


@pytest.mark.parametrize("kind", ["GPTNeoXForCausalLM", "AutoModelForCausalLM", "GPTNeoXConfig"])
def test_a_tokenizer_class_that_is_none_does_no_harm(folder, kind, embedded):
    rewrite(folder, "tokenizer_config.json", tokenizer_class=kind)
    with contextlib.suppress(ValueError):  # older releases of transformers fall back to tokenizer.json
        assert load_model(str(folder))[1]("One two.").input_ids == embedded[1]("One two.").input_ids


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "loop"])
def test_a_name_that_is_no_path_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match="should be embedded, embedded-llama, smollm2, a folder"):
        load_model(name)


def test_an_index_is_read(folder):
    split(folder)
    assert set(read_index(folder).values()) == {FIRST, SECOND}


FROM_THE_HUB = f"""
import json, torch
from knorm.models import load_model

torch.load = None  # would fail
said = {{}}
for name in ("shards", "pickled", "adapter"):
    try:
        said[name] = float(load_model(f"org/{{name}}@{COMMIT}")[0].get_input_embeddings().weight[0, 0])
    except ValueError as error:
        said[name] = str(error)
print(json.dumps(said))
"""


@pytest.mark.processes
def test_a_snapshot_of_the_hub_is_checked_alike(folder, tmp_path):
    hub = tmp_path / "hub"
    for name, change in {"shards": split, "pickled": index_to_a_pickle, "adapter": adapter_beside_the_model}.items():
        change(shutil.copytree(folder, hub / f"models--org--{name}" / "snapshots" / COMMIT))
    places = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    package = {"PYTHONPATH": str(Path(knorm.__file__).parents[1])}
    result = subprocess.run(
        [sys.executable, "-c", FROM_THE_HUB], env={**os.environ, **places, **package}, cwd=tmp_path, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    said = json.loads(result.stdout)
    assert said["shards"] == float(load_file(folder / WEIGHTS)["gpt_neox.embed_in.weight"][0, 0])
    assert "should name a .safetensors file in the same folder" in said["pickled"]
    assert "it has an adapter" in said["adapter"]
