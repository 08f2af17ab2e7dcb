"""The processor that figures come from, and what it can do: kernels differ with the instruction set."""

import os
import platform
from pathlib import Path

# What torch, oneDNN, MKL and XLA choose their kernels by.
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
# What keeps them from using all of it.
LIMITS = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "XLA_FLAGS",
    "OMP_NUM_THREADS",
)


def machine() -> dict[str, str]:
    """Return the processor, its cores, its features, the system, and the variables that limit the kernels, if any."""
    lines = _cpu_lines()
    flags = set(lines.get("flags", lines.get("Features", "")).split())
    found = {
        "processor": lines.get("model name") or platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "features": ", ".join(feature for feature in FEATURES if feature in flags) or "unknown",
        "system": platform.platform(),
    }
    return found | {name: os.environ[name] for name in LIMITS if os.environ.get(name)}


def _cpu_lines() -> dict[str, str]:
    """Return what Linux says of the first processor; elsewhere nothing."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
