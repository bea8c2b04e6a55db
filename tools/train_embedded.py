"""Train the embedded models on any plain text: a small GPT-NeoX of Pythia's make, and a Llama of the same size.

    python tools/train_embedded.py prepare --out .train novels.zip wikitext2-valid.txt
    python tools/train_embedded.py train --data .train --out model --shares 1:0.98,0:0.02
    python tools/train_embedded.py prepare --out .train --tokenizer knorm/assets/tokenizer.json novels.zip ...
    python tools/train_embedded.py train --data .train --out twin --shares 1:0.98,0:0.02 --architecture llama

`prepare` needs a CPU: it trains the byte-level BPE tokenizer, or takes the one that is given, and writes one file of
uint16 tokens per source.
`train` wants a CUDA device. Weights are kept in float32 and multiplied in bfloat16; matrices of the layers
are updated by Muon (torch.optim.Muon), everything else by AdamW. The learning rate is constant for 40% of the run,
then falls linearly to zero.

A source is a .txt, a .zip of .txt, a folder of .txt, a .parquet, a .jsonl or a Hub data set, as knorm.models.load_text
takes it. A share is FIRST:LAST, the source's part of the tokens at the start and at the end of the run: a source that
is small enough to be learnt by heart is better met late and seldom.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np

VOCABULARY = 4096
END = "<|endoftext|>"


def documents(source: str) -> Iterator[str]:
    """The documents of a source, line ends as line feeds."""
    from knorm.models import load_text

    path = Path(source)
    if path.suffix == ".zip":
        with ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                yield archive.read(name).decode("utf-8-sig").replace("\r\n", "\n")
    elif path.is_dir():
        yield from (load_text(str(file)) for file in sorted(path.glob("*.txt")))
    else:
        yield load_text(source)


def train_tokenizer(texts: dict[str, list[str]], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer of the texts: source -> its documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    # A source weighs in the vocabulary as the square root of its size: a small one would not count at all otherwise.
    largest = max(sum(map(len, text)) for text in texts.values())
    repeats = {path: round((largest / sum(map(len, text))) ** 0.5) for path, text in texts.items()}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator((t for path, ts in texts.items() for _ in range(repeats[path]) for t in ts), trainer)
    return tokenizer


def prepare(sources: list[str], out: Path, tokenizer: Path | None = None, vocabulary: int = VOCABULARY) -> None:
    """Write the tokenizer, and the tokens of each source with an index."""
    from tokenizers import Tokenizer

    out.mkdir(parents=True, exist_ok=True)
    texts = {path: list(documents(path)) for path in sources}
    trained = Tokenizer.from_file(str(tokenizer)) if tokenizer else train_tokenizer(texts, vocabulary)
    trained.save(str(out / "tokenizer.json"))

    index = []
    for number, path in enumerate(sources):
        end = trained.token_to_id(END)
        encoded = [[end, *encoding.ids] for encoding in trained.encode_batch(texts[path])]
        tokens = np.fromiter((i for ids in encoded for i in ids), dtype=np.uint16)
        np.save(out / f"tokens{number}.npy", tokens)
        size = sum(len(text.encode()) for text in texts[path])
        index.append({"source": Path(path).name, "tokens": len(tokens), "bytes": size})
        print(f"{Path(path).name}: {size:,} bytes, {len(tokens):,} tokens, {size / len(tokens):.3f} bytes a token")
    (out / "index.json").write_text(json.dumps(index, indent=1))


def make_model(architecture: str, layers: int, width: int, length: int, dropout: float) -> Any:
    """An untrained model with heads of 64; `dropout` acts on what attention and the MLP add, while training."""
    from torch import nn
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64,
        "max_position_embeddings": length, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0,
        "attention_dropout": 0.0,
    }  # fmt: skip
    if architecture == "gpt_neox":
        shape |= {"intermediate_size": 4 * width, "rotary_pct": 0.25, "use_parallel_residual": True}
        return GPTNeoXForCausalLM(GPTNeoXConfig(**shape, hidden_dropout=dropout))
    # Two query heads share a key/value head; an MLP of three matrices, 3 x width, has what NeoX' two, 4 x width, have.
    model = LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=3 * width, num_key_value_heads=width // 128))
    if dropout:
        for layer in model.model.layers:
            for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
                module.register_forward_hook(lambda m, _, out: nn.functional.dropout(out, dropout, m.training))
    return model


def train(
    data: Path,
    out: Path,
    *,
    architecture: str,
    shares: str,
    layers: int,
    width: int,
    dropout: float,
    steps: int,
    batch: int,
    seed: int,
) -> None:
    """Train a model on what `prepare` wrote, and save it in bfloat16 with its tokenizer and a log."""
    import torch
    from transformers import PreTrainedTokenizerFast

    length, device = 1024, "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    index = json.loads((data / "index.json").read_text())
    tokens = [torch.from_numpy(np.load(data / f"tokens{i}.npy").astype(np.int32)).to(device) for i in range(len(index))]
    # The end of each source, at least ten windows, is never trained on: it shows over-fitting while training.
    train_ends = [len(t) - max(len(t) // 100, 10 * length) - length - 1 for t in tokens]
    first, last = torch.tensor([[float(x) for x in share.split(":")] for share in shares.split(",")], device=device).T
    draw = torch.Generator(device).manual_seed(seed)
    span = torch.arange(length + 1, device=device)

    def training_batch(progress: float) -> torch.Tensor:
        source = torch.multinomial(first + progress * (last - first), batch, replacement=True, generator=draw)
        place = torch.rand(batch, generator=draw, device=device, dtype=torch.float64)
        rows = torch.empty(batch, length + 1, dtype=torch.int64, device=device)
        for i, (stream, end) in enumerate(zip(tokens, train_ends, strict=True)):
            starts = (place * end).long()[:, None] + span
            rows = torch.where((source == i)[:, None], stream[starts.clamp(max=len(stream) - 1)].long(), rows)
        return rows

    model = make_model(architecture, layers, width, length, dropout).to(device)
    count = sum(p.numel() for p in model.parameters())
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in name)]
    optimizers = [
        torch.optim.Muon(matrices, lr=4e-3, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=3e-3, weight_decay=0.01, betas=(0.9, 0.95), fused=True),
    ]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]

    @torch.compile(dynamic=False)
    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())

    @torch.no_grad()
    def unseen() -> list[float]:
        losses = []
        model.eval()
        for stream, end in zip(tokens, train_ends, strict=True):
            held = stream[end + length + 1 :].long()
            rows = held[: (len(held) - 1) // length * length].view(-1, length)[:batch]
            rows = rows.repeat(math.ceil(batch / len(rows)), 1)[:batch]
            losses.append(loss_of(torch.cat([rows, rows[:, :1]], 1)).item())
        model.train()
        return losses

    loss_of(training_batch(0)).backward()  # compile before the clock starts
    model.zero_grad()
    print(f"{count:,} parameters; compiled", flush=True)
    begin, step, progress, log = time.perf_counter(), 0, 0.0, []
    running = torch.zeros((), device=device)
    while progress < 1:
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * min((step + 1) / 200, 1.0, (1 - progress) / 0.6)
        loss = loss_of(training_batch(progress))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        running += loss.detach()
        step += 1
        progress = step / steps
        if step % 500 == 0 or progress >= 1:
            log.append({"step": step, "train": running.item() / (step % 500 or 500), "unseen": unseen()})
            running.zero_()
            print(f"{time.perf_counter() - begin:6.0f} s  {json.dumps(log[-1])}", flush=True)

    if architecture == "gpt_neox":
        model.config.hidden_dropout = 0.0
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(data / "tokenizer.json"), bos_token=END, eos_token=END, unk_token=END,
        model_max_length=length,
    )  # fmt: skip
    tokenizer.save_pretrained(out)
    record = {
        "architecture": architecture,
        "parameters": count,
        "shares": shares,
        "dropout": dropout,
        "steps": step,
        "batch": batch,
        "tokens": step * batch * length,
        "seed": seed,
        "seconds": round(time.perf_counter() - begin),
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "data": index,
        "log": log,
    }
    (out / "training.json").write_text(json.dumps(record, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prepare", help="train the tokenizer, write the tokens")
    first.add_argument("sources", nargs="+", metavar="SOURCE")
    first.add_argument("--out", type=Path, required=True)
    first.add_argument("--tokenizer", type=Path, help="a tokenizer.json to use instead of training one")
    second = commands.add_parser("train", help="train the model")
    second.add_argument("--data", type=Path, required=True)
    second.add_argument("--out", type=Path, required=True)
    second.add_argument("--architecture", choices=("gpt_neox", "llama"), default="gpt_neox")
    second.add_argument("--layers", type=int, default=7)
    second.add_argument("--width", type=int, default=256)
    second.add_argument("--batch", type=int, default=64, help="sequences of 1,024 tokens a step")
    second.add_argument("--shares", required=True, help="FIRST:LAST for each source, comma-separated")
    second.add_argument("--dropout", type=float, default=0.0, help="of hidden states")
    second.add_argument("--steps", type=int, default=4500)
    second.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    {"prepare": prepare, "train": train}[options.pop("command")](**options)


if __name__ == "__main__":
    main()
