"""`python -m compare`: see `compare.cli`."""

import signal

from .cli import app

if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # `--help | head -1` ends as every other program does
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    app(prog_name="python -m compare")
