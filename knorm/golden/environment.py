"""What the numbers of a case may depend on besides the code: the machine, the versions, and how the case is run."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from knorm.golden.format import Environment
from knorm.masked_attention import Attend
from knorm.policy import Policy


@dataclass(frozen=True)
class How:
    """Say how a case is run. What differs from the default must not matter, or is an injected change (golden-power.md).

    batch     windows at a time
    order     of the windows
    attend    replaces masked_attention.attend_seen
    numerics  of batch, order and attend in words: part of the environment
    policy    changes each policy
    model     changes the model
    way       of a declared case that is known: it is not looked for again
    on_step   is told how much of the measurement is made, from 0 to 1, where that takes long
    """

    batch: int = 8
    order: Callable[[int], list[int]] = field(default=lambda count: list(range(count)))
    attend: Attend | None = None
    numerics: str = "8 windows at a time, in order; attention in blocks"
    policy: Callable[[Policy], Policy] = field(default=lambda policy: policy)
    model: Callable[[Any], Any] = field(default=lambda model: model)
    way: str | None = None
    on_step: Callable[[float], None] = field(default=lambda share: None, compare=False)


def device_class(device: str) -> str:
    """Name the exact class of `device` ("cpu", "cuda:1"): cpu-x86_64, nvidia-h200 ...: goldens never cross it.

    >>> device_class("cpu").startswith("cpu-")
    True
    """
    if torch.device(device).type == "cpu":
        return f"cpu-{platform.machine().lower()}"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def environment(device: str, how: How | None = None) -> Environment:
    """Collect what this process' numbers may depend on besides the code.

    Args:
        device: cpu, cuda, cuda:1 ...
        how: the way that a case is run.

    Returns:
        The device, what limits it, and versions.
    """
    cuda = torch.device(device).type == "cuda"
    return Environment(
        device=torch.cuda.get_device_name(device) if cuda else _processor(),
        driver=_driver() if cuda else None,
        cuda=torch.version.cuda if cuda else None,
        capability=".".join(map(str, torch.cuda.get_device_capability(device))) if cuda else _instructions(),
        threads=torch.get_num_threads(),
        numerics=(how or How()).numerics + _products(cuda),
        torch=torch.__version__,
        transformers=transformers.__version__,
        numpy=np.__version__,
        python=platform.python_version(),
    )


# Variables that keep a CPU's libraries from its newest instructions. PyTorch's own, ATEN_CPU_CAPABILITY, is in what
# it says of itself; float32 matrix products follow MKL's.
_LIMITS = ("MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


def _instructions() -> str:
    """Which instructions the CPU's kernels are chosen for, and what limits the choice."""
    limits = [f"{name}={os.environ[name]}" for name in _LIMITS if os.environ.get(name)]
    return " ".join([torch.backends.cpu.get_cpu_capability(), *limits])


def _products(cuda: bool) -> str:
    """In what products of float32 matrices are computed, where PyTorch was told to use less; else nothing."""
    precision = (torch.backends.cuda if cuda else torch.backends.mkldnn).matmul.fp32_precision
    return "" if precision in ("none", "ieee") else f"; products of float32 in {precision}"


def _processor() -> str:
    """The CPU's model, as Linux names it: kernels are chosen by it."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def _driver() -> str | None:
    """The driver's version, where nvidia-smi is there to tell it."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return said.splitlines()[0].strip() if said.strip() else None
