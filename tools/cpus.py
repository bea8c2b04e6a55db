"""Runs the tests as other makes of CPU would: python tools/cpus.py [--short] [pytest's arguments].

A result that differs from one CPU to the next is no result. PyTorch on x86_64 takes its kernels from three libraries,
each of which can be kept from the CPU's newer instructions: MKL (products of float32 and float64 matrices), oneDNN
(those of half precision, with AMX where there is some) and ATen (the rest). A setting limits all three, and says how
many threads share the sums. The settings hold every value of each at least once, beside the plain run of the tests.

--short   the first two settings, and only the tests marked `cpus`: those that compare numbers that a CPU computes
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")  # as PyTorch names its own, each with those before it


@dataclass(frozen=True)
class Setting:
    """Limits of one run, by the values of the libraries' own variables; None for no limit."""

    mkl: str | None
    onednn: str | None
    aten: str | None
    threads: int

    def variables(self) -> dict[str, str]:
        """The environment variables that make the setting."""
        limits = {
            "MKL_ENABLE_INSTRUCTIONS": self.mkl,
            "ONEDNN_MAX_CPU_ISA": self.onednn,
            "ATEN_CPU_CAPABILITY": self.aten,
            "KNORM_THREADS": str(self.threads),
        }
        return {name: value for name, value in limits.items() if value is not None}


SETTINGS = (
    Setting("SSE4_2", "AVX2", "default", 1),
    Setting("AVX2", "AVX512_CORE", "avx2", 4),
    Setting("AVX512", "AVX512_CORE_BF16", "avx512", 1),
    Setting(None, None, None, 4),
)
SHORT = 2


def capability() -> str:
    """What PyTorch takes this CPU to be capable of when nothing limits it; in a process of its own, which ends."""
    environment = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()


def possible(setting: Setting, able: str) -> bool:
    """True where the CPU has what ATen is told to use: ATen does not look, and dies of an illegal instruction."""
    return setting.aten is None or setting.aten.upper() in CAPABILITIES[: CAPABILITIES.index(able) + 1]


def marked() -> list[str]:
    """The files that have a test with the mark: importing all the others takes longer than the tests."""
    files = sorted(Path("tests").rglob("test_*.py"))
    return [str(file) for file in files if "mark.cpus" in file.read_text(encoding="utf-8")]


def main(arguments: list[str]) -> int:
    short = "--short" in arguments
    given = [argument for argument in arguments if argument != "--short"]
    able = capability()
    if platform.machine().lower() not in ("x86_64", "amd64") or able not in CAPABILITIES:
        print(f"no settings for {platform.machine()} ({able}): they limit MKL, oneDNN and ATen on x86_64")
        return 0
    pytest = str(Path(sys.executable).with_name("pytest"))  # not -m: what is installed is tested, not this folder
    command = [pytest, "-q", "-n", "auto", *(("-m", "cpus", *marked()) if short else ()), *given]
    failed = []
    for setting in SETTINGS[:SHORT] if short else SETTINGS:
        title = " ".join(f"{name}={value}" for name, value in setting.variables().items())
        if not possible(setting, able):
            print(f"== {title}: left out, this CPU has {able} only", flush=True)
            continue
        print(f"== {title}", flush=True)
        begin = time.perf_counter()
        # Threads that wait for their turn on a core must not spin; many workers on one GPU get in each other's way.
        waiting = {"OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "")}
        if subprocess.run(command, env={**os.environ, **waiting, **setting.variables()}, check=False).returncode:
            failed.append(title)
        print(f"== {time.perf_counter() - begin:.0f} s", flush=True)
    print("\n".join(f"FAILED under {title}" for title in failed) or "All settings pass.")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
