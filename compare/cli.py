"""The command line: `python -m compare` runs the main job; each part of it is a command.

Nothing here imports a framework before it is needed, so that `--help` and wrong usage answer at
once.
"""

import importlib.util
import json
import os
import shlex
import signal
import stat
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from typer.core import TyperGroup

from . import __version__
from .commands.jobs import Job
from .report.machine import machine
from .report.model import Report, Section
from .report.terminal import ReportConsole, print_header, print_section, print_summary

CHECKS = (
    "state",
    "stages",
    "outputs",
    "causality",
    "determinism",
    "gradients",
    "fused",
    "dropout",
    "training",
)
# Parts that prove nothing about outputs, and so need neither SciPy nor Optax.
STATE = ("inspect", "convert", "verify", "kill", "fuzz", "state", "stream", "attention")
# The jobs that a second process takes over, the longest first.
AHEAD = {"fused": 1, "checkpoints": 2, "devices": 3, "training": 4, "gradients": 5}
PACKAGES = ("torch", "jax", "flax", "optax", "orbax-checkpoint", "safetensors", "numpy")

JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", dir_okay=False, help="Also write the report to FILE as JSON."
    ),
]
HtmlOption = Annotated[
    Path | None,
    typer.Option(
        "--html",
        metavar="FILE",
        dir_okay=False,
        help="Also write the report to FILE as one HTML page.",
    ),
]
DeviceOption = Annotated[
    Literal["cpu", "cuda"] | None,
    typer.Option(
        "--device",
        help="Run on this device only. Default: the CPU, and CUDA if both frameworks see it.",
    ),
]
SeedOption = Annotated[int, typer.Option(min=0, help="Random seed.")]
RoundsOption = Annotated[
    int, typer.Option(min=1, help="How many times each contestant is timed, in turn.")
]
Checkpoint = Annotated[
    Path,
    typer.Argument(
        help="A checkpoint: a file, an Orbax folder, or a folder of shards with their index."
    ),
]
MapOption = Annotated[
    Path | None,
    typer.Option(
        "--map",
        metavar="FILE",
        help="A mapping from torch to Flax names: JSON written by `StateMapping.save`.",
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="Cast floating tensors, except masks, to float64, float32, float16 or bfloat16.",
    ),
]


class _Commands(TyperGroup):
    """The commands. `line` is the last command line, for the report: "compare bound --cases 10"."""

    line = "compare"

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        """Keep the arguments before they are parsed."""
        _Commands.line = shlex.join(["compare", *args])
        return super().make_context(info_name, args, *rest, **extra)


HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(cls=_Commands, pretty_exceptions_enable=False, context_settings=HELP)
bench = typer.Typer(
    help="Time attention or checkpoints beside their peers, in turn.", context_settings=HELP
)
app.add_typer(bench, name="bench", no_args_is_help=True)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"attention-parity {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def main_job(
    context: typer.Context,
    device: DeviceOption = None,
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Compare causal attention in PyTorch, Flax Linen and Flax NNX.

    Without a command: run the source notebook in all three, then every check, and print a summary.

    Exit code: 0 if everything held, 1 if something did not, 2 for wrong usage.
    """
    if context.invoked_subcommand is None:
        on_device = [Job("outputs", {"device": device})]
        on_device += [
            Job("checks", {"names": [name], "device": device}, AHEAD.get(name)) for name in CHECKS
        ]
        others = [
            Job("devices", ahead=AHEAD["devices"]),
            Job("checkpoints", ahead=AHEAD["checkpoints"]),
            Job("mutants", {"recorded": True}),
        ]
        jobs = on_device if device else [Job("notebook"), *on_device, *others]
        _run(jobs, json_file, html_file, device=device)
    for option, value in (("--json", json_file), ("--html", html_file), ("--device", device)):
        if value is not None:
            raise typer.BadParameter(
                f"write it after the command: {context.invoked_subcommand} {option} {value}"
            )


@app.command()
def notebook(json_file: JsonOption = None, html_file: HtmlOption = None) -> None:
    """Run the source notebook cell by cell, and match every figure that it printed."""
    _run([Job("notebook")], json_file, html_file)


@app.command()
def outputs(
    device: DeviceOption = None, json_file: JsonOption = None, html_file: HtmlOption = None
) -> None:
    """Compare the outputs in float64 and float32, given the same weights and inputs."""
    _run([Job("outputs", {"device": device})], json_file, html_file, device=device)


@app.command()
def checks(
    names: Annotated[
        list[str] | None, typer.Argument(help=f"Default: all of {', '.join(CHECKS)}.")
    ] = None,
    device: DeviceOption = None,
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
) -> None:
    """Run the checks, or only those named: each compares every result with its derived limit."""
    for name in names or ():
        if name not in CHECKS:
            raise typer.BadParameter(f"there is no check {name!r}; there are {', '.join(CHECKS)}")
    options = {"names": names or (), "device": device, "slow": True}
    _run([Job("checks", options)], json_file, html_file, device=device)


@app.command()
def devices(json_file: JsonOption = None, html_file: HtmlOption = None) -> None:
    """Show what `.to()` and `device_put` move, and what happens to a mask that is left behind."""
    _run([Job("devices")], json_file, html_file)


@app.command()
def checkpoints(json_file: JsonOption = None, html_file: HtmlOption = None) -> None:
    """Edit the mask, save it in every format, and load it in new processes of every framework."""
    _run([Job("checkpoints")], json_file, html_file)


@app.command()
def bound(
    cases: Annotated[
        int, typer.Option(min=4, help="Number of random cases, a quarter in each dtype.")
    ] = 400,
    seed: SeedOption = 0,
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
) -> None:
    """Test the rounding bound with random weights, inputs and masks in every dtype."""
    _run([Job("bound", {"cases": cases, "seed": seed})], json_file, html_file)


@app.command()
def mutants(
    configurations: Annotated[
        int, typer.Option(min=1, help="Number of random configurations without a bug.")
    ] = 1000,
    first: Annotated[
        bool, typer.Option("--first", help="Stop at the first check that catches a bug.")
    ] = False,
    recorded: Annotated[
        bool,
        typer.Option(
            "--recorded", help="Show the recorded run instead of repeating it (15 minutes)."
        ),
    ] = False,
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
) -> None:
    """Plant bugs one at a time, and show which checks catch each, and by what margin."""
    options = {"configurations": configurations, "first": first, "recorded": recorded}
    _run([Job("mutants", options)], json_file, html_file, only_shows=recorded)


@app.command()
def kill(
    tries: Annotated[int, typer.Option(min=1, help="How many saves to kill in each format.")] = 200,
    seed: SeedOption = 0,
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
) -> None:
    """Kill a process while it saves and another reads: a whole checkpoint must always be there."""
    _run([Job("kill", {"tries": tries, "seed": seed})], json_file, html_file)


@app.command()
def fuzz(
    seconds: Annotated[
        int, typer.Option(min=10, help="How long to read damaged checkpoints.")
    ] = 60,
    seed: SeedOption = 0,
    keep: Annotated[
        Path | None,
        typer.Option(
            "--keep",
            metavar="FOLDER",
            help="Where to keep the inputs that fail. Default: ./fuzz-cases.",
        ),
    ] = None,
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
) -> None:
    """Damage checkpoints of every format and read them: only CheckpointError may be raised."""
    _run([Job("fuzz", {"seconds": seconds, "seed": seed, "keep": keep})], json_file, html_file)


@bench.command("attention")
def bench_attention(
    quick: Annotated[
        bool, typer.Option("--quick", help="Quick run: 1 minute instead of 20.")
    ] = False,
    rounds: RoundsOption = 5,
    device: DeviceOption = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot", metavar="FILE", dir_okay=False, help="Plot causal float32 as .png or .svg."
        ),
    ] = None,
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
) -> None:
    """Time attention and its gradients beside the libraries' own."""
    if plot is not None and plot.suffix not in (".png", ".svg"):
        raise typer.BadParameter(f"--plot {plot}: name a .png or .svg file")
    if plot is not None:
        _require_packages("matplotlib")
        _require_writable(plot)
    options = {"quick": quick, "rounds": rounds, "device": device, "plot": plot}
    _run([Job("attention", options)], json_file, html_file, device=device)


@bench.command("checkpoints")
def bench_checkpoints(
    megabytes: Annotated[int, typer.Option(min=1, help="Size of the checkpoint.")] = 1000,
    rounds: RoundsOption = 5,
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
) -> None:
    """Time saving, loading and converting beside plain library calls."""
    _run([Job("state", {"megabytes": megabytes, "rounds": rounds})], json_file, html_file)


@bench.command("streaming")
def bench_streaming(
    megabytes: Annotated[int, typer.Option(min=1, help="Size of the checkpoint.")] = 4000,
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
) -> None:
    """Measure the peak memory of converting a large checkpoint."""
    _run([Job("stream", {"megabytes": megabytes})], json_file, html_file)


@app.command()
def gpu(
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FOLDER", file_okay=False, help="Where the results go."),
    ],
    minutes: Annotated[float, typer.Option(min=0.5, help="The time for everything.")] = 9.0,
) -> None:
    """Run the GPU tests, outputs, checks and benchmark on CUDA; leave records, a log and a page."""
    _require_packages("torch", "jax", "flax", "scipy", "optax", "jinja2", "matplotlib", "pytest")
    _require_device("cuda")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"--out {out}: {error}") from error
    job = Job("gpu", {"out": out.absolute(), "minutes": minutes})
    _run([job], out / "summary.json", out / "summary.html")


@app.command()
def inspect(
    source: Annotated[
        str, typer.Argument(help="A file, a folder, or package.module:name of a module.")
    ],
    other: Annotated[
        str | None, typer.Argument(help="A second one, to show the differences.")
    ] = None,
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
) -> None:
    """Show what a module or checkpoint holds: names, kinds, shapes, statistics, masks."""
    for name in (source, *([other] if other is not None else [])):
        if ":" not in name:
            _require_exists(Path(name))
    job = Job("inspect", {"source": source, "other": other}, counts_bytes=True)
    _run([job], json_file, html_file, only_shows=other is None)


@app.command()
def convert(
    source: Checkpoint,
    target: Annotated[Path, typer.Argument(help="What to write; its suffix names the format.")],
    mapping: MapOption = None,
    like: Annotated[
        Path | None,
        typer.Option(
            "--like",
            metavar="CHECKPOINT",
            help="Take the names from this checkpoint, of the other framework.",
        ),
    ] = None,
    layout: Annotated[
        Literal["torch", "flax"] | None,
        typer.Option(
            "--layout", help="Layout of a .safetensors target. Default: the layout of the source."
        ),
    ] = None,
    dtype: DtypeOption = None,
    shard_megabytes: Annotated[
        int | None,
        typer.Option(
            "--shard-size", min=1, help="Write a folder of shards of at most this many MB each."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the table.")] = False,
    verify: Annotated[
        bool, typer.Option(help="Read both again afterwards and compare every element.")
    ] = True,
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
) -> None:
    """Convert a checkpoint to another format, layout or dtype."""
    _require_exists(source, mapping, like)
    options = {
        "source": source,
        "target": target,
        "mapping": mapping,
        "like": like,
        "layout": layout,
        "dtype": dtype,
        "dry_run": dry_run,
        "verify": verify,
        "shard_bytes": shard_megabytes * 1_000_000 if shard_megabytes else None,
    }
    _run([Job("convert", options, counts_bytes=True)], json_file, html_file, only_shows=dry_run)


@app.command()
def verify(
    source: Checkpoint,
    target: Checkpoint,
    mapping: MapOption = None,
    dtype: DtypeOption = None,
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
) -> None:
    """Compare two checkpoints of the same state bit for bit, in any formats and layouts."""
    _require_exists(source, target, mapping)
    options = {"source": source, "target": target, "mapping": mapping, "dtype": dtype}
    _run([Job("verify", options, counts_bytes=True)], json_file, html_file)


def _run(
    jobs: Sequence[Job],
    json_file: Path | None,
    html_file: Path | None,
    *,
    device: str | None = None,
    only_shows: bool = False,
) -> NoReturn:
    """Run the jobs, print each section when it is ready, and exit with the verdict."""
    _require_packages(
        "torch", "jax", "flax", *(() if jobs[0].part in STATE else ("scipy", "optax"))
    )
    if html_file is not None:
        _require_packages("jinja2", "matplotlib")
    _require_writable(json_file, html_file)
    _require_device(device)
    with suppress(AttributeError, ValueError):  # no such signal, or not in the main thread
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # a closed pipe must not lose the files
    console = ReportConsole()
    date = datetime.now().astimezone().isoformat(timespec="seconds")
    report = Report(_Commands.line, date, versions(), look=only_shows, machine=machine())
    print_header(console, report)
    for section in _sections(jobs, console):
        report.sections.append(section)
        print_section(console, section)
    if report.claims:
        print_summary(console, report)
    if json_file is not None:
        _write(console, json_file, json.dumps(report.as_json(), indent=1, allow_nan=False))
    if html_file is not None:
        from .report.html import html

        _write(console, html_file, html(report))
    console.end_if_pipe_closed()
    raise typer.Exit(1 if report.claims and not report.held else 0)


def _sections(jobs: Sequence[Job], console: Console) -> Iterator[Section]:
    """Yield the sections of each job in turn, and show the progress."""
    from .checkpoint.errors import CheckpointError, UnverifiedCheckpoint
    from .commands.ahead import Ahead
    from .conversion.errors import MappingError
    from .runners.compile_cache import compilation_cache
    from .runners.run import sees_accelerator

    # Two processes would each reserve most of an accelerator's memory.
    alone = sees_accelerator() or all(job.ahead is None for job in jobs)
    live = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        console=console if console.is_terminal else Console(stderr=True),
        transient=True,
    )
    with ExitStack() as stack:
        stack.enter_context(live)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", UnverifiedCheckpoint)  # the sections say it
        if jobs[0].part not in STATE:  # one of these measures compilation
            stack.enter_context(compilation_cache())
        task = live.add_task("starting", total=None, amount="")

        def show_bytes(done: int, total: int) -> None:
            live.update(
                task,
                completed=done,
                total=total,
                amount=f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB",
            )

        second: Ahead | None = None
        for job in jobs:
            live.update(task, description=f"{job.part}: running", total=None, amount="")
            if second is not None and (sections := second.take(job)) is not None:
                yield from sections
                continue
            try:
                for item in job.sections(**({"progress": show_bytes} if job.counts_bytes else {})):
                    if isinstance(item, str):
                        live.update(
                            task, description=f"{job.part}: {escape(item)}", total=None, amount=""
                        )
                        continue
                    yield item
                    if second is None and not alone:  # the first section is on the screen
                        second = stack.enter_context(closing(Ahead(jobs)))
            except (
                CheckpointError,
                MappingError,
            ) as error:  # nothing was compared: a missing package, a full disk
                raise typer.BadParameter(str(error)) from error


def _require_packages(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise typer.BadParameter(
            f"{' and '.join(missing)} cannot be imported, and this needs it: "
            "pip install 'attention-parity[all]'"
        )


def _require_device(device: str | None) -> None:
    if device == "cuda":
        from .runners.run import missing_cuda

        if missing := missing_cuda():
            raise typer.BadParameter(f"CUDA cannot be used: {missing}")


def _require_exists(*paths: Path | None) -> None:
    for path in filter(None, paths):
        if not os.path.lexists(path):
            raise typer.BadParameter(f"{path}: no such file or folder")


def _require_writable(*files: Path | None) -> None:
    """Refuse a file that could not be written before the work is done for it."""
    for file in filter(None, files):
        folder = file.absolute().parent
        if not folder.is_dir():
            raise typer.BadParameter(f"{file}: the folder {folder} does not exist; make it first")
        try:
            with suppress(FileNotFoundError):
                if not stat.S_ISREG(file.stat().st_mode):
                    continue  # a pipe or a device
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:  # also a name that is too long
            raise typer.BadParameter(f"{file} could not be written: {error}") from error


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that the results depend on."""
    numbers = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:
            numbers[name] = "not installed"
    return numbers


def _write(console: Console, path: Path, text: str) -> None:
    from .files.writing import atomic_file

    try:
        if path.exists() and not path.is_file():  # a pipe or a device is written to, not replaced
            path.write_text(text, encoding="utf-8")
        else:
            with atomic_file(path) as stream:
                stream.write(text.encode())
    except OSError as error:
        raise typer.BadParameter(f"{path} could not be written: {error}") from error
    console.print(f"Written to {path}")
