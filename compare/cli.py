"""`python -m compare`: the notebook in both frameworks, and each part of it as a command."""

import importlib.util
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from datetime import datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from typer.core import TyperGroup

from .commands.jobs import Job
from .report.machine import machine
from .report.model import Report, Section
from .report.terminal import print_section, print_summary

STATE = ("inspect", "convert", "verify", "kill", "fuzz", "state", "stream", "attention")
CHECKS = ("state", "stages", "outputs", "causality", "determinism", "gradients", "fused", "dropout", "training")
# What a second process does meanwhile, in this order: the longest first.
AHEAD = {"fused": 1, "checkpoints": 2, "devices": 3, "training": 4, "gradients": 5}
PACKAGES = ("torch", "jax", "flax", "optax", "orbax-checkpoint", "safetensors", "numpy")

Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", dir_okay=False, help="Also write everything shown to FILE."),
]

Html = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", dir_okay=False, help="Also write it, with pictures, as one page to FILE."),
]
Place = Annotated[
    Literal["cpu", "cuda"] | None,
    typer.Option("--device", help="Run on this device alone; without, on the CPU, and on CUDA if there is one."),
]


class _AsTyped(TyperGroup):
    """The commands; `line` is the last one as it was given, for the record: "compare bound --cases 10"."""

    line = "compare"

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        """Keep the arguments before parsing takes one after the other."""
        _AsTyped.line = shlex.join(["compare", *args])
        return super().make_context(info_name, args, *rest, **extra)


app = typer.Typer(
    cls=_AsTyped,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def everything(context: typer.Context, device: Place = None, json_file: Json = None, html_file: Html = None) -> None:
    """Causal attention whose mask is state: PyTorch, Flax Linen and Flax NNX side by side.

    Without a command: the source notebook cell by cell in all three, then every other part, then a summary.

    Exit code 0 if everything held, 1 if something did not, 2 for bad usage.
    """
    if context.invoked_subcommand is None:
        on_device = [Job("outputs", {"device": device})]
        on_device += [Job("checks", {"names": [name], "device": device}, AHEAD.get(name)) for name in CHECKS]
        others = [
            Job("devices", ahead=AHEAD["devices"]),
            Job("checkpoints", ahead=AHEAD["checkpoints"]),
            Job("recorded"),
        ]
        jobs = on_device if device else [Job("notebook"), *on_device, *others]
        _run_jobs(jobs, json_file, html_file, device=device)
        return
    for option, value in (("--json", json_file), ("--html", html_file), ("--device", device)):
        if value is not None:
            raise typer.BadParameter(f"write it after the command: {context.invoked_subcommand} {option} {value}")


@app.command()
def notebook(json_file: Json = None, html_file: Html = None) -> None:
    """Tell the notebook's story, and match every figure that it printed."""
    _run("notebook", json_file, html_file)


@app.command()
def outputs(device: Place = None, json_file: Json = None, html_file: Html = None) -> None:
    """Same weights, same inputs: how far the outputs are apart, in float64 and float32."""
    _run("outputs", json_file, html_file, device=device)


@app.command()
def checks(
    names: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(CHECKS)}; none: all.")] = None,
    device: Place = None,
    json_file: Json = None,
    html_file: Html = None,
) -> None:
    """State, stages, outputs, causality, determinism, gradients, fused, dropout, training: each against its limit."""
    for name in names or ():
        if name not in CHECKS:
            raise typer.BadParameter(f"there is no check {name!r}; there are {', '.join(CHECKS)}")
    _run("checks", json_file, html_file, device=device, names=names or (), slow=True)


@app.command()
def devices(json_file: Json = None, html_file: Html = None) -> None:
    """What `.to()` and `device_put` move, and what a mask left behind does."""
    _run("devices", json_file, html_file)


@app.command()
def checkpoints(json_file: Json = None, html_file: Html = None) -> None:
    """Edit the mask, save it in every format, load it in new processes of every implementation."""
    _run("checkpoints", json_file, html_file)


@app.command()
def bound(
    cases: Annotated[int, typer.Option(min=4, help="How many cases to draw, a fourth in each dtype.")] = 400,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
    json_file: Json = None,
    html_file: Html = None,
) -> None:
    """Draw weights, inputs and masks in every dtype: does any implementation exceed the rounding bound?"""
    _run("bound", json_file, html_file, cases=cases, seed=seed)


@app.command()
def mutants(
    configurations: Annotated[int, typer.Option(min=1, help="How many unbroken ones to draw.")] = 1000,
    first: Annotated[bool, typer.Option("--first", help="End with the first check that sees a bug.")] = False,
    json_file: Json = None,
    html_file: Html = None,
) -> None:
    """Plant bugs in every implementation, one at a time: which check sees each, and with what margin?"""
    _run("mutants", json_file, html_file, configurations=configurations, first=first)


@app.command()
def kill(
    tries: Annotated[int, typer.Option(min=1, help="How often to kill a process that saves, in each format.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Of the moments.")] = 0,
    json_file: Json = None,
    html_file: Html = None,
) -> None:
    """Kill a process at random moments of saving while another reads: is a whole checkpoint always there?"""
    _run("kill", json_file, html_file, tries=tries, seed=seed)


@app.command()
def fuzz(
    seconds: Annotated[int, typer.Option(min=10, help="How long to read mutated checkpoints.")] = 60,
    seed: Annotated[int, typer.Option(min=0, help="Of the mutations: the same seed makes the same inputs.")] = 0,
    keep: Annotated[
        Path | None, typer.Option("--keep", metavar="FOLDER", help="For inputs that did what none may: ./fuzz-cases.")
    ] = None,
    json_file: Json = None,
    html_file: Html = None,
) -> None:
    """Mutate valid checkpoints of every format: does anything but CheckpointError come out?"""
    _run("fuzz", json_file, html_file, seconds=seconds, seed=seed, keep=keep)


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Of attention: a minute instead of twenty.")] = False,
    state: Annotated[bool, typer.Option("--state", help="Instead: saving, loading, converting.")] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Instead: memory of converting what is larger than memory.")
    ] = False,
    megabytes: Annotated[
        int | None, typer.Option(min=1, help="Of state: 1000, or 4000 with --stream.", show_default=False)
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is timed, in turn.")] = 5,
    device: Place = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", dir_okay=False, help="Draw causal float32, .png or .svg, log-log."),
    ] = None,
    json_file: Json = None,
    html_file: Html = None,
) -> None:
    """Time of attention beside its peers, or of state beside plain library calls, in turn in one run, as ratios."""
    if state and stream:
        raise typer.BadParameter("one at a time: compare bench --state, or compare bench --stream")
    if state or stream:
        if quick or plot or device:
            raise typer.BadParameter("--quick, --plot and --device are of attention: leave --state and --stream away")
        size = megabytes or (4000 if stream else 1000)
        part = "stream" if stream else "state"
        _run(part, json_file, html_file, megabytes=size, rounds=rounds)
    if megabytes:
        raise typer.BadParameter("--megabytes is of state: add --state or --stream")
    if plot is not None and plot.suffix not in (".png", ".svg"):
        raise typer.BadParameter(f"--plot {plot}: name a .png or .svg file")
    if plot is not None:
        _require("matplotlib")
    _run("attention", json_file, html_file, quick=quick, rounds=rounds, device=device, plot=plot)


Source = Annotated[Path, typer.Argument(help="A checkpoint: a file, an Orbax folder, or shards with their index.")]
Map = Annotated[
    Path | None, typer.Option("--map", metavar="FILE", help="How torch and Flax names pair: JSON of `compare.match`.")
]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="Cast floating tensors but masks: float64, float32, float16, bfloat16.")
]


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="A file, a folder, or package.module:name of a module.")],
    other: Annotated[str | None, typer.Argument(help="With a second one: what differs.")] = None,
    json_file: Json = None,
    html_file: Html = None,
) -> None:
    """What a module, a file or a folder holds: names, kinds, shapes, statistics, masks; of two, what differs."""
    _run("inspect", json_file, html_file, look=other is None, source=source, other=other)


@app.command()
def convert(
    source: Source,
    target: Annotated[Path, typer.Argument(help="What to write: the suffix names the format.")],
    mapping: Map = None,
    like: Annotated[
        Path | None, typer.Option("--like", metavar="CHECKPOINT", help="Pair with the names of this one instead.")
    ] = None,
    layout: Annotated[
        Literal["torch", "flax"] | None,
        typer.Option("--layout", help="Of a .safetensors target; without, the source's."),
    ] = None,
    dtype: Dtype = None,
    shard_megabytes: Annotated[
        int | None, typer.Option("--shard-size", min=1, help="Write a folder of shards of at most so many MB.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the table.")] = False,
    verify: Annotated[bool, typer.Option(help="Read both again afterwards and compare every element.")] = True,
    json_file: Json = None,
    html_file: Html = None,
) -> None:
    """Carry a checkpoint into another format, layout or dtype: torch, safetensors, msgpack, Orbax, each to each."""
    _run(
        "convert", json_file, html_file, look=dry_run, source=source,
        target=target, mapping=mapping, like=like, layout=layout, dtype=dtype, dry_run=dry_run, verify=verify,
        shard_bytes=shard_megabytes * 1_000_000 if shard_megabytes else None,
    )  # fmt: skip


@app.command()
def verify(
    source: Source,
    target: Source,
    mapping: Map = None,
    dtype: Dtype = None,
    json_file: Json = None,
    html_file: Html = None,
) -> None:
    """Compare two checkpoints of the same state, in whatever formats and layouts, bit for bit."""
    _run(
        "verify", json_file, html_file, source=source, target=target,
        mapping=mapping, dtype=dtype,
    )  # fmt: skip


def _run(
    part: str,
    json_file: Path | None,
    html_file: Path | None,
    look: bool = False,
    device: str | None = None,
    **options: Any,
) -> NoReturn:
    """Run one part with those of the options that it takes."""
    _require(*_packages(part))
    parameters = signature(import_module(Job(part).module).sections).parameters
    given = {name: value for name, value in {**options, "device": device}.items() if name in parameters}
    _run_jobs([Job(part, given)], json_file, html_file, look, device)


def _run_jobs(
    jobs: Sequence[Job],
    json_file: Path | None,
    html_file: Path | None,
    look: bool = False,
    device: str | None = None,
) -> NoReturn:
    """Run the jobs, printing each section as it is found; exit with the verdict, or with 0 if nothing is claimed."""
    _require(*_packages(jobs[0].part))
    if device is not None:
        _require_device(device)
    for file in filter(None, (json_file, html_file)):
        if not file.absolute().parent.is_dir():
            raise typer.BadParameter(f"{file}: the folder {file.absolute().parent} does not exist; make it first")
    if html_file is not None:
        _require("jinja2", "matplotlib")
    console = Console(highlight=False)
    date = datetime.now().astimezone().isoformat(timespec="seconds")
    report = Report(_AsTyped.line, date, versions(), look=look, machine=machine())
    console.print(", ".join(f"{name} {number}" for name, number in report.versions.items()))
    console.print(escape("{processor}, {cores} cores, {features}".format_map(report.machine)))
    for section in _found(jobs, console):
        report.sections.append(section)
        print_section(console, section)
    if report.claims:
        print_summary(console, report)
    if json_file is not None:
        _write(console, json_file, json.dumps(report.as_json(), indent=1, allow_nan=False))
    if html_file is not None:
        from .report.html import html

        _write(console, html_file, html(report))
    raise typer.Exit(1 if report.claims and not report.held else 0)


def _found(jobs: Sequence[Job], console: Console) -> Iterator[Section]:
    """Yield the sections of each job in turn, and show what is being done."""
    from .checkpoint.errors import CheckpointError
    from .commands.ahead import Ahead
    from .conversion.errors import MappingError
    from .runners.compile_cache import compilation_cache
    from .runners.run import sees_accelerator

    # Two processes would each reserve most of an accelerator's memory.
    alone = sees_accelerator() or all(job.ahead is None for job in jobs)
    live = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"),
        console=console if console.is_terminal else Console(stderr=True), transient=True,
    )  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(live)
        if jobs[0].part not in STATE:  # of which one times what is compiled
            stack.enter_context(compilation_cache())
        task = live.add_task("starting", total=None, amount="")

        def show_bytes(done: int, total: int) -> None:
            live.update(task, completed=done, total=total, amount=f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB")

        second: Ahead | None = None
        for job in jobs:
            live.update(task, description=f"{job.part}: running", total=None, amount="")
            if second is not None and (sections := second.take(job)) is not None:
                yield from sections
                continue
            run_part = import_module(job.module).sections
            more = {"progress": show_bytes} if "progress" in signature(run_part).parameters else {}
            try:
                for found in run_part(**job.options, **more):
                    if isinstance(found, str):
                        live.update(task, description=f"{job.part}: {escape(found)}", total=None, amount="")
                        continue
                    yield found
                    if second is None and not alone:  # the first section is on the screen
                        second = stack.enter_context(closing(Ahead(jobs)))
            except (CheckpointError, MappingError) as error:  # a missing package, a full disk: nothing was found out
                raise typer.BadParameter(str(error)) from error


def _packages(part: str) -> tuple[str, ...]:
    return ("torch", "jax", "flax", *(() if part in STATE else ("scipy", "optax")))


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise typer.BadParameter(
            f"{' and '.join(missing)} cannot be imported, and this needs it: pip install 'attention-parity[all]'"
        )


def _require_device(device: str) -> None:
    from .runners.run import missing_cuda

    if device == "cuda" and (missing := missing_cuda()):
        raise typer.BadParameter(f"--device cuda: {missing}")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that the figures depend on."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _write(console: Console, path: Path, text: str) -> None:
    from .files import atomic_file

    try:
        if path.exists() and not path.is_file():  # a pipe or a device is written to, not replaced
            path.write_text(text, encoding="utf-8")
        else:
            with atomic_file(path) as stream:
                stream.write(text.encode())
    except OSError as error:
        raise typer.BadParameter(f"{path} could not be written: {error}") from error
    console.print(f"Written to {path}")
