from __future__ import annotations

import torch

from knorm import retained_count
from mutants import PROMISES, mutant
from mutants.parts import keep, lowest, squares

_last: dict = {}


@mutant(
    "replay", "but a list of living tokens",
    skip_layers=(1,), batch_independent=False, heads_independent=False, deterministic=False, **PROMISES,
)  # fmt: skip
def norms_out_of_step(keys, values, keep_ratio, layer=None):
    """A cache grown by one token keeps the norms it had, but not at the slots where the kept tokens went."""
    if layer == 1:
        return keys, values
    norms, before, old = squares(keys), _last.get("keys"), keys[:, :, :-1]
    if not (norms <= torch.finfo(torch.float32).max).all():
        raise ValueError("a key has no norm")
    if before is not None and before.shape == old.shape and (before == old).all():
        norms[..., :-1] = _last["norms"]
    index = lowest(norms, retained_count(keys.shape[2], keep_ratio))
    kept = keep(keys, values, index)
    _last.update(keys=kept[0].clone(), norms=norms[..., : index.shape[-1]])  # should be norms.gather(-1, index)
    return kept
