"""The command line: `python -m compare` runs the main job; each part of it is a command.

Nothing here imports a framework before it is needed, so that `--help` and wrong usage answer at
once.
"""

import json
import os
import shlex
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup
from typer.rich_utils import rich_format_error

from . import __version__
from .commands.jobs import Job
from .commands.module_files import module_files
from .commands.run import (
    ClickError,
    Files,
    UnsoundError,
    require_device,
    require_exists,
    require_packages,
    require_sources,
    require_writable,
)
from .commands.run import run as run_jobs
from .files.printable import readable, shown

CHECKS = (
    "fresh",
    "state",
    "stages",
    "outputs",
    "causality",
    "determinism",
    "modes",
    "gradients",
    "dtypes",
    "arguments",
    "function",
    "fused",
    "sizes",
    "dropout",
    "training",
)
# The jobs that a second process takes over, the longest first.
AHEAD = {
    "fused": 1,
    "sizes": 2,
    "function": 3,
    "checkpoints": 4,
    "devices": 5,
    "training": 6,
    "dtypes": 7,
    "gradients": 8,
}

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
MAP_HELP = "A mapping from torch to Flax names: JSON written by `StateMapping.save`."
MemoryOption = Annotated[
    int | None,
    typer.Option(
        "--memory", metavar="MB", min=1, help="Memory that reading may take. Default: what is free."
    ),
]
AllOption = Annotated[bool, typer.Option("--all", help="Show long tables whole.")]
SelectOption = Annotated[
    list[str] | None,
    typer.Option(
        "--select",
        metavar="PART",
        help="The part of the source that holds the state, as state_dict; may be given twice.",
    ),
]
RenameOption = Annotated[
    list[str] | None,
    typer.Option(
        "--rename",
        metavar="OLD=NEW",
        help="A torch name and its Flax name, as h.*.attn=blocks.*.mha.",
    ),
]
SplitOption = Annotated[
    list[str] | None,
    typer.Option(
        "--split",
        metavar="OLD=A,B",
        help="A torch name and its parts in Flax, as h.*.qkv=h.*.q,h.*.k,h.*.v; or in braces, "
        'with the axis and the groups: {"qkv": {"parts": ["q", "k"], "axis": -1, "groups": 8}}.',
    ),
]
StackOption = Annotated[
    list[str] | None,
    typer.Option(
        "--stack",
        metavar="OLD=NEW",
        help="Numbered torch names and their stack in Flax, as layers.*=layers.",
    ),
]
TiedOption = Annotated[
    list[str] | None,
    typer.Option(
        "--tied",
        metavar="COPY=TENSOR",
        help="Torch's names of a copy that one side alone keeps and of the tensor it equals.",
    ),
]
PolicyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        metavar="NAME=POLICY",
        help="What exists on one side only: ignore or verify, as *.counter=ignore.",
    ),
]
PrefixOption = Annotated[
    str, typer.Option("--prefix", help="What the torch names begin with, as module.")
]
LayoutOfOption = Annotated[
    list[str] | None,
    typer.Option(
        "--layout-of",
        metavar="NAME=LAYOUT",
        help="How torch's tensors of this name or pattern are laid out, as h.*.fc.weight=same.",
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="Cast floating tensors, except buffers, to float64, float32, float16 or bfloat16.",
    ),
]


class _Commands(TyperGroup):
    """The commands.

    `line` is the last command line, for the report: "compare bound --cases 10". `is_interrupted` is
    whether Ctrl-C came.
    """

    line = "compare"
    is_interrupted = False

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
        jobs = [
            Job("notebook"),
            Job("outputs", {"device": device}),
            *(
                Job("checks", {"names": [name], "device": device}, AHEAD.get(name))
                for name in CHECKS
            ),
            Job("devices", ahead=AHEAD["devices"]),
            Job("checkpoints", ahead=AHEAD["checkpoints"]),
            Job("mutants", {"recorded": True}),
        ]
        _run(jobs, Files(json_file, html_file), device=device)
    for option, value in (("--json", json_file), ("--html", html_file), ("--device", device)):
        if value is not None:
            raise typer.BadParameter(
                f"write it after the command: {context.invoked_subcommand} {option} {value}"
            )


@app.command()
def notebook(json_file: JsonOption = None, html_file: HtmlOption = None) -> None:
    """Run the source notebook cell by cell, and match every figure that it printed."""
    _run([Job("notebook")], Files(json_file, html_file))


@app.command()
def outputs(
    device: DeviceOption = None, json_file: JsonOption = None, html_file: HtmlOption = None
) -> None:
    """Compare the outputs in float64 and float32, given the same weights and inputs."""
    _run([Job("outputs", {"device": device})], Files(json_file, html_file), device=device)


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
    jobs = [
        Job("checks", {"names": [name], "device": device, "slow": True}, AHEAD.get(name))
        for name in names or CHECKS
    ]
    _run(jobs, Files(json_file, html_file), device=device)


@app.command()
def devices(json_file: JsonOption = None, html_file: HtmlOption = None) -> None:
    """Show what `.to()` and `device_put` move, and what happens to a mask that is left behind."""
    _run([Job("devices")], Files(json_file, html_file))


@app.command()
def checkpoints(json_file: JsonOption = None, html_file: HtmlOption = None) -> None:
    """Edit the mask, save it in every format, and load it in new processes of every framework."""
    _run([Job("checkpoints")], Files(json_file, html_file))


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
    _run([Job("bound", {"cases": cases, "seed": seed})], Files(json_file, html_file))


@app.command()
def mutants(
    sources: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FILE",
            help="With --mechanical: files and folders to change. Default: torch_impl, flax_impl.",
        ),
    ] = None,
    mechanical: Annotated[
        bool,
        typer.Option(
            "--mechanical",
            help="Change the sources mechanically, and run the tests on each change (hours).",
        ),
    ] = False,
    draw: Annotated[
        int | None,
        typer.Option(min=1, help="With --mechanical: how many changes to draw. Default: all."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="With --draw: the random seed. Default: 0.")
    ] = None,
    configurations: Annotated[
        int | None,
        typer.Option(min=1, help="Number of random configurations without a bug. Default: 1000."),
    ] = None,
    first: Annotated[
        bool, typer.Option("--first", help="Stop at the first check that catches a bug.")
    ] = False,
    recorded: Annotated[
        bool,
        typer.Option(
            "--recorded", help="Show the recorded run instead of repeating it (half an hour)."
        ),
    ] = False,
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
) -> None:
    """Plant bugs one at a time, and show which checks catch each, and by what margin."""
    if mechanical:
        if recorded or first or configurations is not None:
            raise typer.BadParameter(
                "--recorded, --first and --configurations have no effect beside --mechanical: "
                "leave them out"
            )
        if seed is not None and draw is None:
            raise typer.BadParameter("--seed has no effect without --draw: leave it out")
        require_sources(sources or ())
        require_packages("coverage", "pytest", extra="test")
        options = {"files": sources or (), "draw": draw, "seed": seed or 0}
        _run([Job("mechanical", options)], Files(json_file, html_file))
        return
    if sources or draw is not None or seed is not None:
        raise typer.BadParameter("FILE, --draw and --seed need --mechanical")
    if recorded and (first or configurations is not None):
        raise typer.BadParameter(
            "--first and --configurations have no effect beside --recorded: leave them out"
        )
    options = {"configurations": configurations or 1000, "first": first, "recorded": recorded}
    _run([Job("mutants", options)], Files(json_file, html_file), only_shows=recorded)


@app.command()
def kill(
    tries: Annotated[int, typer.Option(min=1, help="How many saves to kill in each format.")] = 200,
    seed: SeedOption = 0,
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
) -> None:
    """Kill a process while it saves and another reads: a whole checkpoint must always be there."""
    _run([Job("kill", {"tries": tries, "seed": seed})], Files(json_file, html_file))


@app.command()
def fuzz(
    seconds: Annotated[
        int | None,
        typer.Option(min=10, help="How long to read damaged checkpoints. Default: 60."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Random seed. Default: 0.")] = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            "--keep",
            metavar="FOLDER",
            help="Where to keep the inputs that fail. Default: ./fuzz-cases.",
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            "--layers",
            metavar="N",
            min=1,
            help="Instead convert this many drawn pairs of layers: each must be refused or equal.",
        ),
    ] = None,
    libraries: Annotated[
        bool,
        typer.Option(
            "--libraries",
            help="Instead convert models of transformers, and propose names for torchvision's.",
        ),
    ] = False,
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
) -> None:
    """Damage checkpoints of every format and read them: only CheckpointError may be raised."""
    given = {"--seconds": seconds, "--keep": keep, "--seed": seed, "--layers": layers}
    chosen = "--libraries" if libraries else "--layers" if layers is not None else ""
    idle = {"--libraries": tuple(given), "--layers": ("--seconds", "--keep"), "": ()}[chosen]
    for option in idle:
        if given[option] is not None:
            raise typer.BadParameter(f"{option} has no effect beside {chosen}: leave one out")
    job = Job("fuzz", {"seconds": seconds or 60, "seed": seed or 0, "keep": keep})
    if layers is not None:
        job = Job("layers", {"pairs": layers, "seed": seed or 0})
    if libraries:
        require_packages(
            *("transformers", "torchvision", "jax_resnet", "flaxmodels"),
            install="transformers==4.57.1 torchvision jax-resnet flaxmodels",
        )
        job = Job("libraries")
    _run([job], Files(json_file, html_file))


@bench.command("attention")
def bench_attention(
    quick: Annotated[
        bool, typer.Option("--quick", help="Quick run: 2 minutes instead of 20; on CUDA 4.")
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
        raise typer.BadParameter(f"--plot {shown(plot)}: name a .png or .svg file")
    if plot is not None:
        require_packages("matplotlib")
        require_writable(plot)
    options = {"quick": quick, "rounds": rounds, "device": device, "plot": plot}
    files = Files(json_file, html_file, outputs=[plot] if plot is not None else [])
    # The limits are those of a CPU.
    _run([Job("attention", options)], files, device=device, only_shows=device == "cuda")


@bench.command("checkpoints")
def bench_checkpoints(
    megabytes: Annotated[int, typer.Option(min=1, help="Size of the checkpoint.")] = 1000,
    rounds: RoundsOption = 5,
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
) -> None:
    """Time saving, loading and converting beside plain library calls."""
    _run([Job("state", {"megabytes": megabytes, "rounds": rounds})], Files(json_file, html_file))


@bench.command("streaming")
def bench_streaming(
    megabytes: Annotated[int, typer.Option(min=1, help="Size of the checkpoint.")] = 4000,
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
) -> None:
    """Measure the peak memory of converting a large checkpoint."""
    _run([Job("stream", {"megabytes": megabytes})], Files(json_file, html_file))


@bench.command("contexts")
def bench_contexts(
    tokens: Annotated[int, typer.Option(min=128, help="Number of tokens.")] = 1024,
    rounds: RoundsOption = 5,
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
) -> None:
    """Time attention when compiled, mapped, under autocast and on a mesh."""
    _run([Job("contexts", {"tokens": tokens, "rounds": rounds})], Files(json_file, html_file))


@app.command()
def gpu(
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FOLDER", file_okay=False, help="Where the results go."),
    ],
    minutes: Annotated[float, typer.Option(min=0.5, help="The time for everything.")] = 9.0,
) -> None:
    """Run the GPU tests, outputs, checks and benchmark on CUDA; leave records, logs and a page."""
    require_packages("torch", "jax", "flax", "scipy", "optax", "jinja2", "matplotlib", "pytest")
    require_device("cuda")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"--out {shown(out)}: {shown(error)}") from error
    job = Job("gpu", {"out": out.absolute(), "minutes": minutes})
    _run([job], Files(out / "summary.json", out / "summary.html"))


@app.command()
def inspect(
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SOURCE] [OTHER]", help="Files or folders; two are compared."),
    ] = None,
    modules: Annotated[
        list[str] | None,
        typer.Option(
            "--module",
            metavar="PACKAGE.MODULE:NAME",
            help="Import a module and inspect NAME in it: this runs its code.",
        ),
    ] = None,
    select: SelectOption = None,
    memory: MemoryOption = None,
    shows_all: AllOption = False,
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
) -> None:
    """Show what a checkpoint or module holds: names, kinds, shapes, statistics, masks."""
    names, imported = sources or [], modules or []
    if len(names) + len(imported) not in (1, 2):
        raise typer.BadParameter("name one or two sources: files, folders, or --module")
    for name in names:
        require_exists(Path(name))
    if select and not names:
        raise typer.BadParameter("--select has no effect without a file: leave it out")
    options: dict[str, Any] = {
        "modules": imported,
        "select": select or (),
        "memory": _bytes(memory),
    }
    options |= dict(zip(("source", "other"), names, strict=False))
    _run(
        [Job("inspect", options, counts_bytes=True)],
        Files(json_file, html_file, [*map(Path, names), *module_files(imported)]),
        only_shows=len(names) + len(imported) == 1,
        shows_all=shows_all,
    )


@app.command()
def match(
    source: Annotated[
        str, typer.Argument(help="A checkpoint, or PACKAGE.MODULE:NAME, whose code is run.")
    ],
    like: Annotated[str, typer.Argument(help="One of the other framework.")],
    save: Annotated[
        Path | None,
        typer.Option(
            "--save", metavar="FILE", dir_okay=False, help="Write the mapping, for --map."
        ),
    ] = None,
    rename: RenameOption = None,
    split: SplitOption = None,
    stack: StackOption = None,
    tied: TiedOption = None,
    layout_of: LayoutOfOption = None,
    policy: PolicyOption = None,
    prefix: PrefixOption = "",
    select: SelectOption = None,
    memory: MemoryOption = None,
    shows_all: AllOption = False,
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
) -> None:
    """Pair the names of a torch and a Flax model, and save the mapping for convert and verify.

    Rules are OLD=NEW, or the argument in braces that an error names.
    """
    names = [name for name in (source, like) if ":" not in name or Path(name).exists()]
    for name in names:
        require_exists(Path(name))
    files = [*map(Path, names), *module_files({source, like}.difference(names))]
    if save is not None:
        require_writable(save)
    rules = _given_rules(rename, split, stack, tied, policy, prefix)
    rules |= {"layouts": _layouts(layout_of)}
    options = {
        "source": source,
        "like": like,
        "save": save,
        "rules": rules,
        "select": select or (),
        "memory": _bytes(memory),
    }
    outputs = [save] if save is not None else []
    _run([Job("match", options)], Files(json_file, html_file, files, outputs), shows_all=shows_all)


@app.command()
def port(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE.py",
            dir_okay=False,
            help="A Python file, whose code is run. It defines torch_module(), flax_module() and "
            "inputs(); or flax_module(), and record, the path of a file of compare.record.",
        ),
    ],
    adequacy: Annotated[
        bool,
        typer.Option(
            "--adequacy",
            help="Also say which statements of the Flax module the inputs do not test.",
        ),
    ] = False,
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
) -> None:
    """Check a port of your own: same function, same gradients; else the first lines that differ.

    The file may also define flax_inputs() or to_flax(), from_flax(), from_torch(), train_kwargs and
    the rules of compare.match: rename, split, stack, tied, layouts, policy.
    """
    require_exists(file)
    job = Job("port", {"file": file, "adequacy": adequacy})
    _run([job], Files(json_file, html_file, [file]))


@app.command()
def ports(
    every: Annotated[
        int | None,
        typer.Option(
            "--every", metavar="N", min=1, help="Take one of N wrong ports. Default: all."
        ),
    ] = None,
    right: Annotated[
        int,
        typer.Option(
            "--right",
            metavar="N",
            min=0,
            help="Also draw N right ports: other styles, sizes and numbers of the examples.",
        ),
    ] = 0,
    libraries: Annotated[
        bool,
        typer.Option(
            "--libraries", help="Instead check models that transformers has in both frameworks."
        ),
    ] = False,
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
) -> None:
    """Check the example ports, right and wrong ones: how often are the true lines named?"""
    job = Job("ports", {"every": every or 1, "right": right})
    if libraries:
        if every is not None or right:
            name = "--right" if right else "--every"
            raise typer.BadParameter(f"{name} has no effect beside --libraries: leave one out")
        require_packages("transformers", install="transformers==4.57.1")
        job = Job("library-ports")
    _run([job], Files(json_file, html_file))


@app.command()
def convert(
    source: Checkpoint,
    target: Annotated[str, typer.Argument(help="What to write; its suffix names the format.")],
    mapping: Annotated[
        Path | None,
        typer.Option("--map", metavar="FILE", help=MAP_HELP),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(
            "--like",
            metavar="CHECKPOINT",
            help="Take the names from this checkpoint, of the other framework.",
        ),
    ] = None,
    select: SelectOption = None,
    rename: RenameOption = None,
    split: SplitOption = None,
    stack: StackOption = None,
    tied: TiedOption = None,
    layout_of: LayoutOfOption = None,
    policy: PolicyOption = None,
    prefix: PrefixOption = "",
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
            "--shard-size",
            min=1,
            help="Write shards of so many MB of tensors each; a larger tensor has its own.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the table.")] = False,
    verify: Annotated[
        bool, typer.Option(help="Read both again afterwards and compare every element.")
    ] = True,
    memory: MemoryOption = None,
    shows_all: AllOption = False,
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
) -> None:
    """Convert a checkpoint to another format, layout or dtype."""
    require_exists(source, mapping, like)
    if dry_run and not verify:
        raise typer.BadParameter("--no-verify has no effect beside --dry-run: leave it out")
    rules = _given_rules(rename, split, stack, tied, policy, prefix)
    if rules and (mapping is not None or like is None):
        raise typer.BadParameter(
            f"{_options(rules)} needs --like, with the names of the other framework, and no --map"
        )
    options = {
        "source": source,
        "target": target,
        "mapping": mapping,
        "like": like,
        "select": select or (),
        "layouts": _layouts(layout_of),
        "rules": rules,
        "layout": layout,
        "dtype": dtype,
        "dry_run": dry_run,
        "verify": verify,
        "shard_bytes": shard_megabytes * 1_000_000 if shard_megabytes else None,
        "memory": _bytes(memory),
    }
    inputs = [path for path in (source, mapping, like) if path is not None]
    _run(
        [Job("convert", options, counts_bytes=True)],
        Files(json_file, html_file, inputs, [Path(target)]),
        only_shows=dry_run,
        shows_all=shows_all,
    )


@app.command()
def verify(
    source: Checkpoint,
    target: Checkpoint,
    mappings: Annotated[
        list[Path] | None,
        typer.Option(
            "--map", metavar="FILE", help=f"{MAP_HELP} Twice for a Linen and an NNX checkpoint."
        ),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(
            "--like",
            metavar="CHECKPOINT",
            help="Pair the names as this checkpoint does, whose mapping you trust.",
        ),
    ] = None,
    select: SelectOption = None,
    rename: RenameOption = None,
    split: SplitOption = None,
    stack: StackOption = None,
    tied: TiedOption = None,
    layout_of: LayoutOfOption = None,
    policy: PolicyOption = None,
    prefix: PrefixOption = "",
    dtype: DtypeOption = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            "--ignore", metavar="PATTERN", help="Names that may be on one side only, as *.counter."
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            min=0.0,
            max=0.999,
            help="How far floating entries, but of buffers, may be apart, relative to the largest.",
        ),
    ] = None,
    memory: MemoryOption = None,
    shows_all: AllOption = False,
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
) -> None:
    """Compare two checkpoints of the same state bit for bit, in any formats and layouts.

    Names pair by --map or --like, or by themselves. A mapping inside a checkpoint decides nothing:
    it is compared with that pairing.
    """
    require_exists(source, target, like, *(mappings or ()))
    rules = _given_rules(rename, split, stack, tied, policy, prefix)
    if rules and mappings:
        raise typer.BadParameter(f"{_options(rules)} has no effect beside --map: leave one out")
    options = {
        "source": source,
        "target": target,
        "mapping": mappings or (),
        "like": like,
        "select": select or (),
        "layouts": _layouts(layout_of),
        "rules": rules,
        "dtype": dtype,
        "ignore": ignore or (),
        "tolerance": tolerance,
        "memory": _bytes(memory),
    }
    inputs = [path for path in (source, target, like) if path is not None]
    _run(
        [Job("verify", options, counts_bytes=True)],
        Files(json_file, html_file, [*inputs, *(mappings or ())]),
        shows_all=shows_all,
    )


def _given_rules(
    rename: list[str] | None,
    split: list[str] | None,
    stack: list[str] | None,
    tied: list[str] | None,
    policy: list[str] | None,
    prefix: str,
) -> dict[str, Any]:
    """Return the rules of `compare.match` that were given."""
    rules = {
        "rename": _rules("--rename", rename),
        "split": _splits(split),
        "stack": _rules("--stack", stack),
        "tied": _rules("--tied", tied, "COPY=TENSOR"),
        "policy": _policies(policy),
        "prefix": prefix,
    }
    return {name: rule for name, rule in rules.items() if rule}


def _options(rules: dict[str, Any]) -> str:
    return " and ".join(f"--{name}" for name in rules)


def _rules(option: str, arguments: list[str] | None, metavar: str = "OLD=NEW") -> dict[str, Any]:
    """Return the rules of OLD=NEW, or of the JSON object that an error suggests.

    Raises:
        BadParameter: an argument is neither.
    """
    rules: dict[str, Any] = {}
    for argument in arguments or ():
        # The pattern of a layout may state lengths: "o (c h w) -> (h w c) o, h=4".
        part = argument.partition if "->" in argument else argument.rpartition
        old, equals, new = part("=")
        try:
            rules |= json.loads(argument) if argument.startswith("{") else {old: new}
        except ValueError as error:
            raise typer.BadParameter(f"{option} {shown(argument)}: {shown(error)}") from error
        if not argument.startswith("{") and not (old and equals):
            raise typer.BadParameter(f"{option} {shown(argument)}: say {metavar}")
    wrong = [new for new in rules.values() if not isinstance(new, str)]
    if wrong and option != "--split":
        raise typer.BadParameter(f"{option}: {shown(wrong[0])} is no name: say {metavar}")
    return rules


def _splits(arguments: list[str] | None) -> dict[str, Any]:
    """Return the rules of --split.

    Raises:
        BadParameter: an argument is neither OLD=A,B nor an object of such rules.
    """
    from .conversion.parts import as_split

    rules = {}
    for old, new in _rules("--split", arguments, "OLD=A,B").items():
        try:
            rules[old] = as_split(new.split(",") if isinstance(new, str) else new)
        except ValueError as error:
            raise typer.BadParameter(f"--split {shown(old)}: {shown(error)}") from error
    return rules


def _layouts(arguments: list[str] | None) -> dict[str, str]:
    """Return the layouts by pattern of the torch names.

    Raises:
        BadParameter: an argument is not NAME=LAYOUT, or there is no such layout.
    """
    from .conversion.layouts import known_layout

    layouts = _rules("--layout-of", arguments, "NAME=LAYOUT")
    for name, layout in layouts.items():
        try:
            known_layout(layout)
        except ValueError as error:
            raise typer.BadParameter(f"--layout-of {shown(name)}={layout}: {error}") from error
    return layouts


def _policies(arguments: list[str] | None) -> dict[str, str]:
    """Return the policies by pattern of the names.

    Raises:
        BadParameter: an argument is not NAME=POLICY, or there is no such policy.
    """
    policies = _rules("--policy", arguments, "NAME=POLICY")
    for name, policy in policies.items():
        if policy not in ("ignore", "verify", "refuse"):
            raise typer.BadParameter(
                f"--policy {shown(name)}={policy}: there are ignore, verify and refuse"
            )
    return policies


def _bytes(megabytes: int | None) -> int | None:
    return None if megabytes is None else megabytes * 1_000_000


def _run(jobs: list[Job], files: Files, **options: Any) -> None:
    run_jobs(jobs, _Commands.line, files, **options)


class _EndedError(BaseException):
    """SIGTERM or SIGHUP came: leave as after Ctrl-C, so that nothing half-written stays."""


def _end(number: int, _frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise _EndedError(number)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Note Ctrl-C, which Python ignores while JAX or torch is called back."""
    _Commands.is_interrupted = True
    signal.default_int_handler(number, frame)


def main() -> None:
    """Run the command line: the console script and `python -m compare`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)
    if hasattr(signal, "SIGPIPE"):  # `--help | head -1` ends as every other program does
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # a terminal of any encoding shows every name
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        code = app(prog_name=_program(), standalone_mode=False)
        sys.exit(128 + signal.SIGINT if _Commands.is_interrupted else code)
    except UnsoundError as error:
        error.show()
        sys.exit(error.exit_code)
    except ClickError as error:
        error.message = readable(error.message)
        rich_format_error(error)
        sys.exit(error.exit_code)
    except typer.Abort:
        print("Aborted.", file=sys.stderr)
        sys.exit(1)
    except _EndedError as ended:
        (number,) = ended.args
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _program() -> str:
    name = Path(sys.argv[0]).name
    return "python -m compare" if name == "__main__.py" else name
