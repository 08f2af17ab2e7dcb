"""Convert in a process of its own and print its peak memory: `stream_worker SOURCE TARGET MAP LAYOUT`, as JSON."""

import json
import sys
import time
import warnings
from pathlib import Path

import orbax.checkpoint  # noqa: F401  so that its import is in the base

from ..checkpoint.convert import Wanted, convert_checkpoint
from ..checkpoint.errors import UnverifiedCheckpoint
from ..conversion.mapping import StateMapping


def kilobytes(name: str) -> int:
    """Return a line of what the system says of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def main() -> None:
    """Convert, the peak counted from here on."""
    source, target, mapping, layout = sys.argv[1:]
    base = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    begin = time.perf_counter()
    wanted: Wanted = "torch" if layout == "torch" else "flax"
    done = convert_checkpoint(source, target, mapping=StateMapping.load(mapping), layout=wanted)
    seconds = time.perf_counter() - begin
    print(
        json.dumps(
            {"base": base, "peak": kilobytes("VmHWM"), "seconds": seconds, "bytes": done.nbytes}
        )
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore", UnverifiedCheckpoint)
    main()
