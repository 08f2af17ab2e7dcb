"""Describe the processor: libraries choose their kernels by its instruction sets."""

import os
import platform
import subprocess
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..subprocesses import ROOT
from .model import Report

# The instruction sets by which torch, oneDNN, MKL and XLA choose their kernels.
FEATURES = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_fp16",
    "asimd",
    "bf16",
    "sve",
)
NVIDIA = Path("/proc/driver/nvidia")
PACKAGES = ("torch", "jax", "flax", "optax", "orbax-checkpoint", "safetensors", "numpy")
# The environment variables that restrict this choice.
LIMITS = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "XLA_FLAGS",
    "OMP_NUM_THREADS",
)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that the results depend on."""
    numbers = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:
            numbers[name] = "not installed"
    return numbers


def report_here(command: str, *, look: bool = False) -> Report:
    """Return an empty report on a command that is run here and now."""
    date = datetime.now().astimezone().isoformat(timespec="seconds")
    return Report(command, date, versions(), look=look, machine=machine())


def machine() -> dict[str, str]:
    """Return the processor, any GPU, system, threads, commit, and the variables of LIMITS set."""
    lines = _cpu_lines()
    flags = set(lines.get("flags", lines.get("Features", "")).split())
    description = {
        "processor": lines.get("model name") or platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "features": ", ".join(feature for feature in FEATURES if feature in flags) or "unknown",
        "system": platform.platform(),
        "threads": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())),
        "commit": commit(),
    }
    if gpus := [
        line for path in sorted(NVIDIA.glob("gpus/*/information")) for line in _models(path)
    ]:
        description["gpu"] = ", ".join(gpus)
    return description | {name: os.environ[name] for name in LIMITS if os.environ.get(name)}


def _models(information: Path) -> list[str]:
    """Return what follows "Model:" in the driver's description of a GPU."""
    lines = [line.partition(":") for line in information.read_text().splitlines()]
    return [value.strip() for name, _, value in lines if name == "Model"]


def commit() -> str:
    """Return the commit of this checkout, with "-dirty" if it was changed, or "unknown"."""
    if not (ROOT / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def _cpu_lines() -> dict[str, str]:
    """Return the first entry of /proc/cpuinfo; an empty dict if the system has no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
