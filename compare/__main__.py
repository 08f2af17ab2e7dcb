"""`python -m compare`: the notebook in both frameworks, and each part of it as a command."""

import importlib.util
import json
import sys
from collections.abc import Sequence
from datetime import datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .errors import CheckpointError
from .findings import Report
from .terminal import print_section, print_summary

PARTS = ("notebook", "outputs", "devices", "checkpoints")
PACKAGES = ("torch", "jax", "flax", "orbax-checkpoint", "safetensors", "numpy")

Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", dir_okay=False, help="Also write everything shown to FILE."),
]

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


@app.callback(invoke_without_command=True)
def everything(context: typer.Context, json_file: Json = None) -> None:
    """Causal attention whose mask is state: PyTorch, Flax Linen and Flax NNX side by side.

    Without a command: the source notebook cell by cell in all three, then every other part, then a summary.

    Exit code 0 if everything held, 1 if something did not, 2 for bad usage.
    """
    if context.invoked_subcommand is None:
        _run("compare", PARTS, json_file)
    elif json_file is not None:
        raise typer.BadParameter(f"write it after the command: {context.invoked_subcommand} --json {json_file}")


@app.command()
def notebook(json_file: Json = None) -> None:
    """Tell the notebook's story, and match every figure that it printed."""
    _run("compare notebook", ["notebook"], json_file)


@app.command()
def outputs(json_file: Json = None) -> None:
    """Same weights, same inputs: how far the outputs are apart, on the CPU and on CUDA if there is one."""
    _run("compare outputs", ["outputs"], json_file)


@app.command()
def devices(json_file: Json = None) -> None:
    """What `.to()` and `device_put` move, and what a mask left behind does."""
    _run("compare devices", ["devices"], json_file)


@app.command()
def checkpoints(json_file: Json = None) -> None:
    """Edit the mask, save it in every format, load it in new processes of every implementation."""
    _run("compare checkpoints", ["checkpoints"], json_file)


@app.command()
def bound(
    cases: Annotated[int, typer.Option(min=4, help="How many cases to draw, a fourth in each dtype.")] = 400,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
    json_file: Json = None,
) -> None:
    """Draw weights, inputs and masks in every dtype: does any implementation exceed the rounding bound?"""
    _run(f"compare bound --cases {cases} --seed {seed}", ["bound"], json_file, cases=cases, seed=seed)


def _run(command: str, parts: Sequence[str], json_file: Path | None, **options: int) -> None:
    """Run the parts, printing each section as it is found; exit with the verdict."""
    _require_packages()
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise typer.BadParameter(f"{json_file}: the folder {json_file.absolute().parent} does not exist; make it first")
    console = Console(highlight=False)
    progress = console if console.is_terminal else Console(stderr=True)
    report = Report(command, datetime.now().astimezone().isoformat(timespec="seconds"), versions())
    console.print(", ".join(f"{name} {number}" for name, number in report.versions.items()))
    with progress.status("starting") as status:
        for part in parts:
            status.update(f"{part}: running")
            try:
                for found in import_module(f"compare.scripts.{part}").sections(**options):
                    if isinstance(found, str):
                        status.update(f"{part}: {found}")
                        continue
                    report.sections.append(found)
                    print_section(console, found)
            except CheckpointError as error:  # a missing package, a full disk: nothing was found out
                raise typer.BadParameter(str(error)) from error
    print_summary(console, report)
    if json_file is not None:
        try:
            _write_json(json_file, report)
        except OSError as error:
            raise typer.BadParameter(f"{json_file} could not be written: {error}") from error
        console.print(f"Written to {json_file}")
    raise typer.Exit(0 if report.held else 1)


def _require_packages() -> None:
    missing = [name for name in ("torch", "jax", "flax") if importlib.util.find_spec(name) is None]
    if missing:
        raise typer.BadParameter(
            f"{' and '.join(missing)} cannot be imported; comparing needs both frameworks: "
            "pip install 'attention-parity[all]'"
        )


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that the figures depend on."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _write_json(path: Path, report: Report) -> None:
    from .checkpoint.atomic import atomic_file

    text = json.dumps(report.as_json(), indent=1, allow_nan=False).encode()
    if path.exists() and not path.is_file():  # a pipe or a device is written to, not replaced
        path.write_bytes(text)
        return
    with atomic_file(path) as stream:
        stream.write(text)


if __name__ == "__main__":
    app(prog_name="python -m compare")
