"""Bits per byte of a model on held-out text: python tools/evaluate_embedded.py MODEL TEXT [TEXT ...]

MODEL is "embedded" or a folder. A TEXT is what knorm.models.load_text takes, or a .zip of .txt. Each is cut into
windows of the model's full context, without overlap; a window's first token is given, not scored.
"""

from __future__ import annotations

import sys

from train_embedded import documents

from knorm.evaluation.curve import measure_row
from knorm.evaluation.runner import Runner
from knorm.evaluation.windows import cut_windows
from knorm.models import load_model
from knorm.policy import Policy


def main() -> None:
    name, *sources = sys.argv[1:]
    model, tokenizer = load_model(name)
    for source in sources:
        text = "\n".join(documents(source))
        windows = cut_windows(tokenizer, text, model.config.max_position_embeddings)
        row = measure_row(Runner(model, windows), Policy())
        print(
            f"{source.rpartition('/')[2]}: {row.bits_per_byte:.4f} bits per byte, perplexity {row.ppl:.2f} "
            f"± {row.standard_error or 0:.2f}, accuracy {row.accuracy:.1%}, "
            f"{row.tokens:,} tokens in {row.windows} windows",
            flush=True,
        )


if __name__ == "__main__":
    main()
