"""Run jobs, print each section when it is ready, write the reports, and exit with the verdict.

Everything that came from outside is made printable here, once, for the terminal and every report.
"""

import importlib.util
import json
import logging
import os
import signal
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from ..files.errors import FileError
from ..files.printable import all_readable, readable, shown
from ..files.writing import require_apart, require_distinct, write_text
from ..report.machine import report_here
from ..report.model import Section
from ..report.terminal import ReportConsole, print_header, print_section, print_summary
from ..subprocesses import ROOT
from .jobs import Job

# Parts that prove nothing about outputs, and so need neither SciPy nor Optax.
STATE = (
    "inspect",
    "match",
    "convert",
    "verify",
    "kill",
    "fuzz",
    "state",
    "stream",
    "attention",
    "contexts",
)
_SECONDS_BETWEEN_UPDATES = 0.05


@dataclass(frozen=True)
class Files:
    """The files of one command.

    Attributes:
        json: where to write the report as JSON.
        html: where to write the report as HTML.
        inputs: what the command reads.
        outputs: what else it writes.
    """

    json: Path | None = None
    html: Path | None = None
    inputs: Sequence[Path] = ()
    outputs: Sequence[Path] = ()


def run(
    jobs: Sequence[Job],
    command: str,
    files: Files,
    *,
    device: str | None = None,
    only_shows: bool = False,
    shows_all: bool = False,
) -> NoReturn:
    """Run the jobs, print each section when it is ready, and exit with the verdict.

    Args:
        jobs: the jobs.
        command: the command line, for the reports.
        files: what is read and written.
        device: the device that the jobs need.
        only_shows: whether the command has a verdict only if it has checks.
        shows_all: whether long tables are shown whole.
    """
    part = jobs[0].part
    if part == "port":  # a record needs no torch
        require_packages("jax", "flax")
    else:
        require_packages("torch", "jax", "flax", *(() if part in STATE else ("scipy", "optax")))
    if files.html is not None:
        require_packages("jinja2", "matplotlib")
    require_device(device)
    _require_safe(files)
    with _quiet():
        _print_and_write(jobs, command, files, only_shows, shows_all)


def _print_and_write(
    jobs: Sequence[Job], command: str, files: Files, only_shows: bool, shows_all: bool
) -> NoReturn:
    with suppress(AttributeError, ValueError):  # no such signal, or not in the main thread
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # a closed pipe must not lose the files
    console = ReportConsole(shows_all)
    report = report_here(readable(command.replace("\n", "\\n")), look=only_shows)
    print_header(console, report)
    for unsafe in _sections(jobs, console):
        section = all_readable(unsafe)
        report.sections.append(section)
        print_section(console, section)
    if report.claims:
        print_summary(console, report)
    if files.json is not None:
        _write(console, files.json, json.dumps(report.as_json(), indent=1, allow_nan=False))
    if files.html is not None:
        from ..report.html import html

        _write(console, files.html, html(report, shows_all))
    console.end_if_pipe_closed()
    raise typer.Exit(1 if report.claims and not report.held else 0)


def _is_alone(jobs: Sequence[Job]) -> bool:
    """Return whether no second process shall work ahead."""
    if all(job.ahead is None for job in jobs):
        return True
    from ..runners.run import sees_accelerator

    # Two processes would each reserve most of an accelerator's memory, if JAX is let.
    reserves = os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE") not in ("false", "False", "0")
    return reserves and sees_accelerator()


def _sections(jobs: Sequence[Job], console: Console) -> Iterator[Section]:
    """Yield the sections of each job in turn, and show the progress."""
    from ..runners.compile_cache import compilation_cache

    alone = _is_alone(jobs)
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
        if jobs[0].part not in STATE:  # one of these measures compilation
            stack.enter_context(compilation_cache())
        task = live.add_task("starting", total=None, amount="")

        shown_at = 0.0

        def show_bytes(done: int, total: int) -> None:
            nonlocal shown_at
            if (now := time.monotonic()) - shown_at < _SECONDS_BETWEEN_UPDATES:
                return
            shown_at = now
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
                            task,
                            description=f"{job.part}: {escape(shown(item))}",
                            total=None,
                            amount="",
                        )
                        continue
                    yield item
                    if second is None and not alone:  # the first section is on the screen
                        from .ahead import Ahead

                        second = stack.enter_context(closing(Ahead(jobs)))
            except FileError as error:  # nothing was compared
                if error.is_usage:
                    raise typer.BadParameter(str(error)) from error
                raise UnsoundError(str(error)) from error


# Typer carries its own copy of Click or uses the installed one, depending on its version.
ClickError: Any = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)


class UnsoundError(ClickError):
    """A file is damaged, does not hold what it should, or could not be written: exit code 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        """Print one line, without the usage."""
        print(f"Error: {readable(str(self))}", file=sys.stderr if file is None else file)


def require_packages(*packages: str, extra: str = "all", install: str = "") -> None:
    """Refuse the command if a package that it needs is missing.

    The extra installs it, or what follows `pip install`.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise typer.BadParameter(
            f"{' and '.join(missing)} cannot be imported, and this needs it: "
            + (f"pip install {install}" if install else f"pip install 'attention-parity[{extra}]'")
        )


def require_device(device: str | None) -> None:
    """Refuse the command if the device cannot be used."""
    if device == "cuda":
        from ..runners.run import missing_cuda

        if missing := missing_cuda():
            raise typer.BadParameter(f"CUDA cannot be used: {missing}")


def require_exists(*paths: Path | None) -> None:
    """Refuse the command if one of the paths does not exist."""
    for path in filter(None, paths):
        try:
            is_there = os.path.lexists(path)
        except ValueError:  # a NUL in the name
            is_there = False
        if not is_there:
            raise typer.BadParameter(f"{shown(path)}: no such file or folder")


def require_sources(paths: Sequence[Path]) -> None:
    """Refuse paths that are not sources of this project, and an installation without its tests."""
    if not (ROOT / "tests" / "conftest.py").is_file():
        raise typer.BadParameter("--mechanical runs the tests: use it in a clone of the repository")
    require_exists(*paths)
    packages = [ROOT / name for name in ("compare", "flax_impl", "torch_impl")]
    for path in paths:
        if not any(path.resolve().is_relative_to(package) for package in packages):
            raise typer.BadParameter(f"{shown(path)} is not in {', '.join(map(str, packages))}")
        if not path.is_dir() and path.suffix != ".py":
            raise typer.BadParameter(f"{shown(path)} is not a Python file; name a .py file")


def require_writable(*files: Path | None) -> None:
    """Refuse a file that could not be written before the work is done for it."""
    for file in filter(None, files):
        folder = file.absolute().parent
        if not folder.is_dir():
            raise typer.BadParameter(
                f"{shown(file)}: the folder {shown(folder)} does not exist; make it first"
            )
        try:
            with suppress(FileNotFoundError):
                if not stat.S_ISREG(file.stat().st_mode):
                    continue  # a pipe or a device
            # As long as the name of the temporary folder that it will be written in.
            prefix, suffix = f".{file.name}.", "0000.tmp"
            with tempfile.TemporaryDirectory(dir=folder, prefix=prefix, suffix=suffix):
                pass
        except OSError as error:  # also a name that is too long
            raise UnsoundError(f"{shown(file)} could not be written: {shown(error)}") from error


def _write(console: Console, path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except (OSError, FileError) as error:
        raise UnsoundError(f"{shown(path)} could not be written: {shown(error)}") from error
    console.print(f"Written to {shown(path)}", markup=False)


def _require_safe(files: Files) -> None:
    """Refuse reports that could not be written, or would change an input or another output."""
    reports = [file for file in (files.json, files.html) if file is not None]
    require_writable(*reports)
    try:
        require_distinct([*files.outputs, *reports])
        inputs = list(_all_files(files.inputs))
        for target in [*files.outputs, *reports]:
            require_apart(target, inputs)
    except FileError as error:
        raise typer.BadParameter(str(error)) from error


def _all_files(inputs: Sequence[Path]) -> Iterator[Path]:
    """Yield the inputs, and the shards that an index among them names."""
    from ..checkpoint.formats.shards import files_in

    for path in inputs:
        yield path
        with suppress(OSError):
            yield from files_in(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep warnings and log messages of libraries off the terminal: the sections say it."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
