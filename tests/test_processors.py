"""The numeric tests under each instruction set and thread count that this machine can force."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from compare.report.machine import machine

ROOT = Path(__file__).parent.parent
NUMERIC = (
    "modules/test_outputs",
    "modules/test_fused",
    "modules/test_closed_rows",
    "checks/test_dropout",
    "checks/test_checks",
    "runners/test_extreme_values",
    "runners/test_notebook_figures",
    "runners/test_differentiate",
    "runners/test_train",
    "checkpoint/test_masks",
)
FEATURES = machine()["features"].split(", ")
XLA_AVX2 = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_max_isa=AVX2".strip()
LOWEST = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "XLA_FLAGS": XLA_AVX2,
    "OMP_NUM_THREADS": "1",
}
# A variable, its value, and the processor feature without which the value has no effect.
SETTINGS = [
    ("ATEN_CPU_CAPABILITY", "default", "avx2"),
    ("ATEN_CPU_CAPABILITY", "avx2", "avx512f"),
    ("ONEDNN_MAX_CPU_ISA", "AVX2", "avx2"),
    ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE", "avx512f"),
    ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16", "avx512_bf16"),
    ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX", "amx_bf16"),
    ("MKL_ENABLE_INSTRUCTIONS", "AVX2", "avx2"),
    ("XLA_FLAGS", XLA_AVX2, "avx2"),
    ("OMP_NUM_THREADS", "1", ""),
    ("OMP_NUM_THREADS", "2", ""),
]


def run(limits: dict[str, str], *arguments: str) -> str:
    """Run tests in a process with these limits and return the last line of its output."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-m",
        "not gpu",
        *arguments,
    ]
    environment = {**os.environ, **limits}
    del environment["TORCHINDUCTOR_CACHE_DIR"]  # its programs are for other instructions
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.processors
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "value", "feature"), SETTINGS, ids=[f"{name}={value}" for name, value, _ in SETTINGS]
)
def test_the_numbers_hold(name: str, value: str, feature: str) -> None:
    if feature and feature not in FEATURES:
        pytest.skip(f"this processor has no {feature}, so {name}={value} has no effect")
    assert " passed" in run({name: value}, *(f"tests/{module}.py" for module in NUMERIC))


@pytest.mark.slow
def test_the_lowest_of_all() -> None:
    """A selection: lower precision, values that are not finite, and leaking products."""
    last = run(
        LOWEST,
        "tests/modules/test_fused.py",
        "tests/modules/test_closed_rows.py",
        "-k",
        "lower_precision or test_what_is_not_finite or leaking",
    )
    assert int(re.findall(r"(\d+) passed", last)[0]) > 40


@pytest.mark.slow
def test_the_limit_is_obeyed() -> None:
    """If the limits had no effect, the other tests here would prove nothing."""
    script = "import torch; print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())"
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **LOWEST}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["DEFAULT", "1"]
