from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pyarrow
import pytest
import torch
from commands import in_a_new_process, new_environment
from pyarrow import parquet
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny

import knorm
from knorm import exact_nll, files, load_embedded, models
from knorm.evaluation.windows import cut_windows
from knorm.models import ASSETS, detokenize_wikitext, load_model, load_text

SHIPPED = ["config.json", "encyclopedia.txt", "model.safetensors", "narrative.txt", "tokenizer.json"]
SHIPPED += ["llama/config.json", "llama/model.safetensors"]
COMMIT, OTHER = "0123456789abcdef" * 2 + "01234567", "f" * 40


def message(call, *arguments):
    with pytest.raises(ValueError) as raised:
        call(*arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_the_embedded_model_comes_in_eval_mode_in_float32(embedded):
    model, tokenizer = embedded
    assert not model.training
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert len(tokenizer) == model.config.vocab_size
    assert (
        tokenizer.decode(tokenizer("A café,  at\nnight.", add_special_tokens=False).input_ids) == "A café,  at\nnight."
    )


def test_the_embedded_model_is_of_pythias_make(embedded):
    model, config = embedded[0], embedded[0].config
    assert type(model).__name__ == "GPTNeoXForCausalLM"
    assert config.hidden_size == 64 * config.num_attention_heads
    assert config.rope_parameters["partial_rotary_factor"] == 0.25
    assert config.use_parallel_residual
    assert not config.tie_word_embeddings
    assert not torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)


def bits_per_byte(model, tokenizer, text):
    windows = cut_windows(tokenizer, load_text(text), 512, 2)
    bits = float(exact_nll(model, windows.input_ids, knorm.Policy()).sum() / torch.tensor(2.0).log())
    return bits / windows.scored_bytes(1)


@pytest.mark.parametrize(("text", "most"), [("narrative", 2.0), ("encyclopedia", 2.4)])
def test_the_embedded_models_are_trained_and_the_llama_as_well_as_the_gpt_neox(embedded, twin, text, most):
    theirs, ours = (bits_per_byte(*loaded, text) for loaded in (embedded, twin))
    assert theirs < most
    assert ours < 1.03 * theirs


@pytest.fixture(scope="module")
def twin():
    return load_model("embedded-llama")


def test_the_embedded_llama_is_a_llama_of_the_same_size_with_the_same_tokenizer(embedded, twin):
    model, config = twin[0], twin[0].config
    assert type(model).__name__ == "LlamaForCausalLM"
    assert config.hidden_size == 64 * config.num_attention_heads
    assert config.num_attention_heads == 2 * config.num_key_value_heads
    assert abs(model.num_parameters() / embedded[0].num_parameters() - 1) < 0.01
    assert twin[1].backend_tokenizer.to_str() == embedded[1].backend_tokenizer.to_str()
    assert model.name_or_path == twin[1].name_or_path == "embedded-llama"
    assert not model.training


def test_one_pass_on_the_embedded_llama_is_the_loop(twin):
    ids = cut_windows(twin[1], load_text("narrative"), 96, 1).input_ids
    policy = knorm.Policy(0.5, prune_after=32, protocol="streaming")
    torch.testing.assert_close(exact_nll(twin[0], ids, policy), knorm.stream_nll(twin[0], ids, policy))


def test_weights_are_stored_in_bfloat16_and_exact_in_float32(embedded):
    for file in ("model.safetensors", "llama/model.safetensors"):
        with safe_open(ASSETS / file, "pt") as weights:
            assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118
    stored = load_embedded(dtype=torch.bfloat16)[0].state_dict()
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
    assert all(torch.equal(weight, stored[name].float()) for name, weight in embedded[0].state_dict().items())


def test_the_box_is_small_and_sealed():
    files = [*ASSETS.glob("*"), *ASSETS.glob("llama/**/*")]  # goldens lie below, once installed
    sizes = {file.relative_to(ASSETS).as_posix(): file.stat().st_size for file in files if file.is_file()}
    llama = sum(size for name, size in sizes.items() if name.startswith("llama/"))
    assert llama <= 16_000_000
    assert sum(sizes.values()) - llama <= 16_000_000
    sealed = [line.split()[1] for line in (ASSETS / "SHA256SUMS").read_text().splitlines()]
    assert {*sealed, "README.md", "SHA256SUMS"} == set(sizes)


@pytest.fixture
def box(tmp_path, monkeypatch):
    copy = shutil.copytree(ASSETS, tmp_path / "assets")
    monkeypatch.setattr(models, "ASSETS", copy)
    return copy


def test_an_undamaged_copy_of_the_box_loads(box, embedded):
    ours, theirs = (model.get_output_embeddings().weight for model, _ in (load_embedded(), embedded))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", SHIPPED)
def test_one_flipped_bit_in_the_box_is_found(box, name):
    damaged = bytearray((box / name).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (box / name).write_bytes(damaged)
    assert f"the embedded {name} is damaged: sha256" in message(load_embedded)


@pytest.mark.parametrize(
    "name",
    [*SHIPPED, "SHA256SUMS"],
)
def test_a_file_missing_from_the_box_is_named(box, name):
    (box / name).unlink()
    assert name in message(load_embedded)


@pytest.fixture
def folder(tmp_path):
    tiny("gpt_neox", vocab_size=4096).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / name, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_folder_is_loaded_in_eval_mode_and_the_dtype_asked_for(folder, dtype, embedded):
    model, tokenizer = load_model(str(folder), dtype=dtype)
    saved = load_file(folder / "model.safetensors")
    assert not model.training
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert torch.equal(model.get_input_embeddings().weight, saved["gpt_neox.embed_in.weight"].to(dtype))
    assert tokenizer("One two.").input_ids == embedded[1]("One two.").input_ids


def truncated(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])


def with_a_broken_header(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(b"\xff" * 8 + weights[8:])


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def lacking_a_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["gpt_neox.layers.1.attention.query_key_value.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def with_a_tensor_too_many(folder):
    save_file({**load_file(folder / "model.safetensors"), "extra.weight": torch.zeros(2)}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip


def reconfigured(**changes):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return damage


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(truncated, "are damaged (", id="truncated"),
        pytest.param(with_a_broken_header, "are damaged (", id="header"),
        pytest.param(pickled, "no file named model.safetensors", id="pickled"),
        pytest.param(without("config.json"), "config.json cannot be read: it is not there", id="no config"),
        pytest.param(without("tokenizer.json"), "tokenizer", id="no tokenizer"),
        pytest.param(reconfigured(model_type="nope"), "nope", id="unknown type"),
        pytest.param(without("tokenizer.json", "tokenizer_config.json"), "tokenizer", id="no tokenizer at all"),
        pytest.param(lacking_a_tensor, "query_key_value", id="lacks a tensor"),
        pytest.param(with_a_tensor_too_many, "extra.weight, of which it has none", id="a tensor too many"),
        pytest.param(reconfigured(num_hidden_layers=2), "of which it has none", id="fewer layers"),
        pytest.param(reconfigured(num_attention_heads=0), "ZeroDivisionError", id="no heads"),
        pytest.param(reconfigured(hidden_size="x"), "hidden_size", id="a width that is no number"),
        pytest.param(reconfigured(hidden_act="nope"), "KeyError: 'nope'", id="unknown activation"),
        pytest.param(reconfigured(hidden_size=128), "as [4096, 64], not [4096, 128]", id="another width"),
    ],
)
def test_a_folder_that_cannot_be_loaded_is_refused(folder, damage, words):
    damage(folder)
    refusal = message(load_model, str(folder))
    assert str(folder) in refusal
    assert words in refusal


def test_code_that_a_model_brings_is_never_run(folder):
    (folder / "evil.py").write_text(f"open({str(folder / 'was_run')!r}, 'w')\nclass Config: pass\n")
    reconfigured(model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Config"})(
        folder
    )
    assert "custom code" in message(load_model, str(folder))
    assert not (folder / "was_run").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pythia", "model 'pythia' should be embedded, embedded-llama, smollm2, a folder, a .gguf file, or a Hub id"),
        ("a/b/c", "model 'a/b/c' should be embedded, embedded-llama, smollm2, a folder, a .gguf file, or a Hub id"),
        ("", "model ''"),
        ("org/name", "needs a pinned revision: org/name@ and the 40 digits of a commit"),
        ("org/name@main", "needs a pinned revision: org/name@ and"),
        ("org/name@0123456", "needs a pinned revision: org/name@ and"),
    ],
)
def test_a_name_that_names_no_model_is_refused(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in message(load_model, name)


FROM_THE_HUB = f"""
import json
import os
from knorm.models import load_model, load_text

def refused(load, name):
    try:
        load(name)
    except ValueError as error:
        return str(error)

model, tokenizer = load_model("org/name@{COMMIT}")
print(json.dumps({{
    "weight": float(model.get_input_embeddings().weight[0, 0]),
    "ids": tokenizer("One two.").input_ids,
    "text": load_text("hub:org/data@{COMMIT}:data/test-*.parquet"),
    "column": load_text("hub:org/data@{COMMIT}:data/test-*.parquet", "body"),
    "no such model": refused(load_model, "org/name@{"0" * 40}"),
    "no such data": refused(load_text, "hub:org/data@{"0" * 40}:data/test-*.parquet"),
    "no such file": refused(load_text, "hub:org/data@{COMMIT}:data/valid-*.parquet"),
}}))
"""


@pytest.mark.processes
def test_a_pinned_revision_comes_from_the_hubs_cache_and_what_is_not_there_is_refused(tmp_path, folder, embedded):
    hub = tmp_path / "hub"
    name, data = hub / "models--org--name", hub / "datasets--org--data"
    for commit, value in ((COMMIT, 0.25), (OTHER, 0.75)):  # the newest revision is another
        weights = load_file(folder / "model.safetensors")
        weights["gpt_neox.embed_in.weight"][0, 0] = value
        snapshot = shutil.copytree(folder, name / "snapshots" / commit)
        save_file(weights, snapshot / "model.safetensors", {"format": "pt"})
    files = data / "snapshots" / COMMIT / "data"
    files.mkdir(parents=True)
    for part, rows in (("test-0", ["one ", "two\r\n"]), ("test-1", ["three"]), ("train-0", ["unwanted"])):
        parquet.write_table(pyarrow.table({"text": rows, "body": ["x"] * len(rows)}), files / f"{part}.parquet")
    for repository in (name, data):
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(OTHER)

    places = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    result = in_a_new_process(FROM_THE_HUB, env=new_environment(**places), cwd=tmp_path, check=True)
    said = json.loads(result.stdout)
    assert said["weight"] == 0.25
    assert said["ids"] == embedded[1]("One two.").input_ids
    assert said["text"] == "one two\nthree"
    assert said["column"] == "xxx"
    assert f"model 'org/name@{'0' * 40}' cannot be loaded" in said["no such model"]
    assert "data/test-*.parquet' cannot be fetched" in said["no such data"]
    assert "the data set has no data/valid-*.parquet at this commit" in said["no such file"]
    assert not any("\n" in said[key] for key in said if key.startswith("no such"))


@pytest.mark.parametrize(("name", "least"), [("encyclopedia", 15_000), ("narrative", 40_000)])
def test_the_texts_in_the_box_are_long_enough_and_clean(name, least):
    text = load_text(name)
    assert len(text.encode()) >= least
    assert not {"\r", "\ufeff", "\ufffd"} & {*text}


@pytest.fixture
def text_file(tmp_path):
    def write(name, content):
        file = tmp_path / name
        if isinstance(content, dict):
            parquet.write_table(pyarrow.table(content), file)
        else:
            file.write_bytes(content)
        return str(file)

    return write


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.txt", "\ufeffcafé\r\nnoir\r\n".encode(), "café\nnoir\n"),
        ("a.md", b"one , two", "one , two"),
        ("a.txt", b"one @-@ two , three", "one-two, three"),
        ("a.jsonl", b'{"text": "one", "n": 1}\n{"text": "two\\r\\nthree"}\n', "one\ntwo\nthree"),
        ("a.parquet", {"n": [1, 2], "text": ["one", "two\r\nthree"]}, "one\ntwo\nthree"),
    ],
)
def test_a_file_is_read_as_its_ending_says(text_file, name, content, text):
    assert load_text(text_file(name, content)) == text


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", b'{"text": "x", "body": "y"}\n'), ("a.parquet", {"body": ["y"]})]
)
def test_another_column_is_read_when_asked_for(text_file, name, content):
    assert load_text(text_file(name, content), "body") == "y"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"body": "one", "n": 1}\n', "has no column 'text', but body, n"),
        ("a.parquet", {"body": ["one"]}, "has no column 'text', but body"),
        ("a.jsonl", b"not json\n", "cannot be read as json"),
        ("a.jsonl", b"", "no rows"),
        ("a.parquet", b"not parquet, but longer than its magic", "cannot be read as parquet"),
        ("a.parquet", b"", "cannot be read as parquet"),
        ("a.txt", "café".encode("latin-1"), "is not UTF-8"),
        pytest.param("a.jsonl", b'{"text": "x"}\n{"n": 1}\n', "text"),
        pytest.param("a.parquet", {"text": [1, 2]}, "text"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_refused(text_file, name, content, words):
    file = text_file(name, content)
    refusal = message(load_text, file)
    assert file in refusal
    assert words in refusal


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere.txt", "text 'nowhere.txt' is no file here, and none of narrative, encyclopedia, wikitext2, pg19"),
        (".", "text '.' is no file here"),
        ("hub:org/data", "should be hub:organisation/name@commit:files"),
        ("hub:org/data@main:data/*.parquet", "should be hub:organisation/name@commit:files"),
        (f"hub:org/data@{COMMIT}:data/*.csv", "with parquet files"),
    ],
)
def test_a_source_that_is_no_text_is_refused(source, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in message(load_text, source)


def a_pipe(place):
    os.mkfifo(place)


def a_device(place):
    place.symlink_to("/dev/zero")


def a_loop(place):
    place.symlink_to(place.name)


def a_dangling_link(place):
    place.symlink_to("gone")


def a_large_file(place):
    with place.open("wb") as file:
        file.truncate(models.MOST_TEXT + 1)  # takes no room on the disk


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (a_pipe, "is a pipe, but should be a file"),
        (a_device, "is a device, but should be a file"),
        (a_loop, "Too many levels of symbolic links"),
        (a_dangling_link, "is a link to gone, which is not there"),
        (a_large_file, "bytes, but should have at most 268,435,456"),
    ],
)
def test_what_would_be_read_without_end_is_refused(tmp_path, ending, make, words):
    make(tmp_path / f"a{ending}")
    assert words in message(load_text, str(tmp_path / f"a{ending}"))


@pytest.mark.parametrize("name", ["a\0b.txt", "x" * 5000 + ".txt"])
def test_a_text_whose_name_is_no_path_is_refused(name):
    assert "is no file here, and none of" in message(load_text, name)


def test_a_column_is_read_up_to_a_limit(text_file, monkeypatch):
    file = text_file("a.jsonl", b'{"text": "' + b"x" * 600 + b'"}\n{"text": "' + b"y" * 600 + b'"}\n')
    monkeypatch.setattr(models, "MOST_TEXT", 1300)  # of the file too
    assert len(load_text(file)) == 1201
    monkeypatch.setattr(models, "file_size", lambda *_: 0)  # as compressed rows, which are larger than their file
    monkeypatch.setattr(models, "MOST_TEXT", 1000)
    assert "has more than 1,000 characters of text" in message(load_text, file)


def test_a_file_that_grows_beyond_its_limit_is_refused():
    assert "has more than 10 bytes" in message(files.read_file, Path("/proc/self/status"), 10)  # says that it is empty


@pytest.mark.parametrize(
    ("tokenised", "written"),
    [
        ("a well @-@ known , long @-@ lived man .", "a well-known, long-lived man."),
        ("3 @.@ 5 km of 1 @,@ 200 @,@ 000 km ; 12 % ?", "3.5 km of 1,200,000 km; 12%?"),
        ('" Yes , " he said , " and no . "', '"Yes," he said, "and no."'),
        ("It didn 't ; Tom 's dogs ' bones : they 're ours .", "It didn't; Tom's dogs' bones: they're ours."),
        ("a town ( now [ in 2 ] a city ) .", "a town (now [in 2] a city)."),
        ('the song ( " Home " ) !', 'the song ("Home")!'),
        ("from 1939 – 1945 , 10 – 12 May – or June", "from 1939–1945, 10–12 May – or June"),
        ("$ 5 , £ 3 @.@ 50 and € 1 at 20 ° C , 9 / 10", "$5, £3.50 and €1 at 20° C, 9/10"),
        (" = = Early <unk> = = \n \n Text , here . \n", " = = Early <unk> = = \n \n Text, here. \n"),
        ('nothing to do: it\'s (all) "well", 1,000.5', 'nothing to do: it\'s (all) "well", 1,000.5'),
        ("a .44 Magnum", "a .44 Magnum"),
    ],
)
def test_wikitexts_tokens_are_joined_again(tokenised, written):
    assert detokenize_wikitext(tokenised) == written
