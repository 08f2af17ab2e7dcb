"""Convert a checkpoint and print the peak memory of this process as JSON.

Usage: `python -m compare.bench.streaming_worker SOURCE TARGET MAP LAYOUT`.
"""

import json
import sys
import time
import warnings
from pathlib import Path

import orbax.checkpoint  # noqa: F401  so that the base includes this import

from ..checkpoint.convert import Wanted, convert_checkpoint
from ..checkpoint.errors import UnverifiedCheckpoint
from ..conversion.mapping import StateMapping


def kilobytes(name: str) -> int:
    """Return a value of /proc/self/status in kB, such as VmRSS."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def main() -> None:
    """Convert the checkpoint, and measure the peak from just before the conversion."""
    source, target, mapping, layout = sys.argv[1:]
    base = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # reset VmHWM
    begin = time.perf_counter()
    wanted: Wanted = "torch" if layout == "torch" else "flax"
    converted = convert_checkpoint(
        source, target, mapping=StateMapping.load(mapping), layout=wanted
    )
    seconds = time.perf_counter() - begin
    print(
        json.dumps(
            {
                "base": base,
                "peak": kilobytes("VmHWM"),
                "seconds": seconds,
                "bytes": converted.nbytes,
            }
        )
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore", UnverifiedCheckpoint)
    main()
