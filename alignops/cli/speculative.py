"""Commands of the speculative core."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignops.cli._app import bench, demo, run_benchmark


@demo.command("speculative")
def demo_speculative(
    batch: Annotated[int, typer.Option(help="Rows that are decoded together.")] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens to generate per row, at most.")] = 48,
    drafts: Annotated[int, typer.Option(help="Tokens drafted per round.")] = 5,
    exit_layer: Annotated[int, typer.Option(help="Layers of the early-exit drafter.")] = 10,
    threads: Annotated[int | None, typer.Option(help="Default: torch's.")] = None,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Decode a batch with SmolLM2-135M by drafts; compare every token with plain decoding."""
    from alignops.demo import speculative

    speculative.run(batch, tokens, drafts, exit_layer, threads, json)


@bench.command("speculative")
def bench_speculative(
    quick: Annotated[bool, typer.Option(help="Few cases, three rounds.")] = False,
    only: Annotated[str, typer.Option(help="Sections, comma separated; default all.")] = "",
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
) -> None:
    """Measure the speculative core against its floors and eager PyTorch."""
    run_benchmark("speculative", quick, only, out)
