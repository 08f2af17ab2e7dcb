"""`python -m compare`: see `compare.cli`."""

from .cli import app

if __name__ == "__main__":
    app(prog_name="python -m compare")
