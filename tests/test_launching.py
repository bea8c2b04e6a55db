"""What the host does around the kernels; what they compute is in tests/gpu."""

from __future__ import annotations

import pytest
import torch

from knorm import kernels


class Stream:
    """Work that is done at the third look, when its word arrives."""

    def __init__(self, seen, word):
        self.seen, self.word, self.looks = seen, word, 0

    def query(self):
        self.looks += 1
        if self.looks == 3:
            self.seen[0] = self.word
        return self.looks >= 3


def held(ticket, word, late=0):
    one = object.__new__(kernels._Held)
    one.ticket, one.seen = ticket, [word]
    one.stream = Stream(one.seen, late)
    return one


@pytest.mark.parametrize("said", [0, 1, 2, 3])
@pytest.mark.parametrize("ticket", [1, 7, kernels._TICKETS])
def test_the_host_reads_what_is_wrong_with_the_norms_of_its_own_call(ticket, said):
    at_once, late = held(ticket, 4 * ticket + said), held(ticket, 4 * (ticket - 1) + 3, late=4 * ticket + said)
    assert (at_once.wait(), at_once.stream.looks) == (said, 0)
    assert (late.wait(), late.stream.looks) == (said, 3), "the word of the call before is not its own"
    assert 4 * ticket + said < 2**31


def test_what_breaks_a_kernel_off_is_raised_by_the_wait(monkeypatch):
    broken = held(2, 4)
    monkeypatch.setattr(broken.stream, "query", lambda: (_ for _ in ()).throw(RuntimeError("illegal address")))
    with pytest.raises(RuntimeError, match="illegal address"):
        broken.wait()


def test_a_graph_under_capture_is_refused_before_anything_is_allocated(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"a CUDA graph is being captured, .*: compress before or after that"):
        kernels._hold(torch.device("cuda", 0), 0, 8)
