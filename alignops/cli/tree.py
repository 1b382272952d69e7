"""Commands of the tree core."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignops.cli._app import bench, run_benchmark


@bench.command("tree")
def bench_tree(
    quick: Annotated[bool, typer.Option(help="Few cases, three rounds.")] = False,
    only: Annotated[str, typer.Option(help="Sections, comma separated; default all.")] = "",
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
) -> None:
    """Measure the bookkeeping of searches, against mctx where it is installed."""
    run_benchmark("tree", quick, only, out)
