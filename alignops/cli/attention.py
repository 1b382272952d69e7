"""Commands of the attention core."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignops.cli._app import bench, demo, run_benchmark


@demo.command("hogwild")
def demo_hogwild(
    workers: Annotated[str, typer.Option(help="Numbers of workers, comma separated.")] = "1,2,4",
    forwards: Annotated[int, typer.Option(help="Of each run; one token per worker each.")] = 96,
    rounds: Annotated[int, typer.Option(help="Of the comparison of times.")] = 3,
    layout: Annotated[str, typer.Option(help="combined, interleaved or contiguous.")] = "combined",
    problem: Annotated[str, typer.Option(help="Task. Default: six ways to save water.")] = "",
    seed: Annotated[int, typer.Option(help="Of the first worker.")] = 0,
    threads: Annotated[int | None, typer.Option(help="Default: torch's.")] = None,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Let SmolLM2-135M work as several workers over one cache; watch, compare, measure."""
    from alignops.demo import hogwild

    numbers = [int(count) for count in workers.split(",")]
    task = problem or hogwild.PROBLEM
    hogwild.run(numbers, forwards, rounds, layout, task, seed, threads, json)


@bench.command("attention")
def bench_attention(
    quick: Annotated[bool, typer.Option(help="Few cases, three rounds.")] = False,
    only: Annotated[str, typer.Option(help="Sections, comma separated; default all.")] = "",
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
) -> None:
    """Measure the attention core against its floors and compositions of PyTorch's operators."""
    run_benchmark("attention", quick, only, out)
