"""Commands of the ternary core."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignops.cli._app import app, bench, demo, run_benchmark


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="Folder or name of a transformers model.")],
    target: Annotated[Path, typer.Argument(help="Folder for the converted model.")],
    include: Annotated[list[str] | None, typer.Option(help="Patterns of layers.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Patterns to leave alone.")] = None,
    group: Annotated[int | None, typer.Option(help="Columns per scale; default a row.")] = None,
    head: Annotated[str | None, typer.Option(help='"int8": the output layer in int8.')] = None,
    fuse: Annotated[bool, typer.Option(help="Compute q/k/v and gate/up in one call.")] = False,
) -> None:
    """Convert a language model to 1.25-bit weights and save it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from alignops.integrations import hf

    lm = AutoModelForCausalLM.from_pretrained(model)
    chosen = {"exclude": exclude} if exclude else {}
    report = hf.convert(lm, include=include, group=group, head=head, fuse=fuse, **chosen)
    typer.echo(report)
    lm.save_pretrained(target)
    AutoTokenizer.from_pretrained(model).save_pretrained(target)


@demo.command("ternary")
def demo_ternary(
    threads: Annotated[list[int] | None, typer.Option(help="Default: 1 and 2.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to generate per measurement.")] = 32,
    compile: Annotated[str, typer.Option(help="Compiled decoder: best, all or none.")] = "best",
    text_tokens: Annotated[int, typer.Option(help="Tokens to measure perplexity on.")] = 2048,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Convert SmolLM2-135M to 1.25 bits; print sizes, speeds and what it does to quality."""
    from alignops.demo import ternary

    ternary.run(threads, tokens, compile, text_tokens, json)


@demo.command("arenas")
def demo_arenas(
    minutes: Annotated[float, typer.Option(help="How long to train, about.")] = 8.0,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead.")] = None,
    checkpoint: Annotated[Path, typer.Option(help="Where the state is kept.")] = Path(
        "arenas-smollm2.pt"
    ),
    resume: Annotated[bool, typer.Option(help="Continue from the checkpoint.")] = False,
    direct: Annotated[bool, typer.Option(help="Without the residual, to compare.")] = False,
    ablation: Annotated[
        bool, typer.Option(help="Compare dense, ternary and binary on a small model instead.")
    ] = False,
) -> None:
    """Train SmolLM2-135M towards 1.25-bit weights, with itself as the teacher."""
    from alignops.demo import arenas

    if ablation:
        arenas.ablate(steps)
    else:
        arenas.run(minutes, steps, checkpoint, resume, arenas.Setting(residual=not direct))


@bench.command("ternary")
def bench_ternary(
    quick: Annotated[bool, typer.Option(help="One matrix, three rounds.")] = False,
    only: Annotated[str, typer.Option(help="Sections, comma separated; default all.")] = "",
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
) -> None:
    """Measure the ternary core against its floors and peers; writes Markdown, JSON and a plot."""
    run_benchmark("ternary", quick, only, out)
