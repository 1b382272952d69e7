"""The command itself and its groups, to which the modules of the cores add theirs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="The `alignops` command: thin commands over demos, benchmarks, conversion and indexes.",
)
demo = typer.Typer(no_args_is_help=True, help="Run a core on a real model.")
bench = typer.Typer(no_args_is_help=True, help="Measure a core (in a checkout).")
app.add_typer(demo, name="demo")
app.add_typer(bench, name="bench")


@app.command()
def info() -> None:
    """Print versions, build, instruction set, devices and environment variables."""
    from alignops.__main__ import report

    typer.echo(report())


def run_benchmark(
    core: str, quick: bool, only: str, out: Path | None, more: Sequence[str] = ()
) -> None:
    """Run the benchmarks of a core, which only a checkout has."""
    root = Path(__file__).parents[2]
    if not (root / "benchmarks").is_dir():
        sys.exit("alignops bench: benchmarks are not part of the package; run it in a checkout")
    sys.path.insert(0, str(root))
    report = importlib.import_module("benchmarks.report")
    arguments = ["--core", core, *more]
    arguments += ["--quick"] if quick else []
    arguments += ["--only", only] if only else []
    arguments += ["--out", str(out)] if out else []
    report.main(arguments)
