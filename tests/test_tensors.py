"""What has no rows of numbers is refused by name, wherever a tensor is taken."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny, tokens
from torch._subclasses.fake_tensor import FakeTensorMode

from knorm import Policy, compress, evicted_at, exact_nll, stream_nll

KINDS = {
    "a meta tensor": lambda tensor: tensor.to("meta"),
    "a sparse_coo tensor": lambda tensor: tensor.to_sparse(),
    "a nested tensor": lambda tensor: torch.nested.nested_tensor([tensor[0], tensor[0]]),
    "a NestedTensor": lambda tensor: torch.nested.nested_tensor([tensor[0], tensor[0]], layout=torch.jagged),
    "a FakeTensor": lambda tensor: FakeTensorMode().from_tensor(tensor),
    "a MaskedTensor": lambda tensor: torch.masked.masked_tensor(tensor, torch.ones_like(tensor, dtype=torch.bool)),
}
KEYS, SCORES = torch.randn(1, 2, 8, 4), torch.rand(1, 2, 8)
POSITIONS = torch.arange(8).expand(1, 2, 8).contiguous()
IDS, POLICY = tokens(2, 12), Policy(0.5)
MODEL = tiny("llama")
CALLS = {
    "keys": (KEYS, lambda given: compress(given, KEYS, POLICY)),
    "values": (KEYS, lambda given: compress(KEYS, given, POLICY)),
    "positions": (POSITIONS, lambda given: compress(KEYS, KEYS, POLICY, positions=given)),
    "scores": (SCORES, lambda given: evicted_at(given, POLICY, 4)),
    "input_ids": (IDS, lambda given: exact_nll(MODEL, given, POLICY, prompt_length=4)),
    "attention_mask": (
        torch.ones_like(IDS),
        lambda given: stream_nll(MODEL, IDS, POLICY, prompt_length=4, attention_mask=given),
    ),
    "position_ids": (
        torch.arange(12).expand(2, 12).contiguous(),
        lambda given: exact_nll(MODEL, IDS, POLICY, prompt_length=4, position_ids=given),
    ),
    "evicted_at": (
        torch.full((2, 2, 12), 12),
        lambda given: exact_nll(MODEL, IDS, Policy(), schedule=lambda *_: given),
    ),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLS)
def test_a_tensor_without_rows_of_numbers_is_refused_by_name(name, kind):
    tensor, call = CALLS[name]
    with pytest.raises(ValueError) as raised:
        call(KINDS[kind](tensor))
    assert f"{name} is {kind}, but should be a dense tensor with numbers in it" in str(raised.value)


@pytest.mark.parametrize("name", CALLS)
def test_a_list_is_refused_by_name(name):
    tensor, call = CALLS[name]
    with pytest.raises((TypeError, ValueError), match="list, but should"):
        call(tensor.tolist())


@pytest.mark.parametrize("name", CALLS)
def test_parameters_and_views_are_tensors(name):
    tensor, call = CALLS[name]
    call(tensor.as_subclass(Ordinary))
    call(tensor[:] if not tensor.is_floating_point() else torch.nn.Parameter(tensor))


class Ordinary(torch.Tensor):
    """A subclass that adds a name and changes nothing."""
