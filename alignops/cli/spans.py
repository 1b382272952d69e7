"""Commands of the spans core: build an index, look into it, trace completions to it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alignops.cli._app import app, bench, run_benchmark

if TYPE_CHECKING:
    from alignops.spans.tokenizer import TextTokenizer

spans = typer.Typer(no_args_is_help=True, help="Index a corpus; count and trace spans of text.")
app.add_typer(spans, name="spans")

Index = Annotated[Path, typer.Argument(help="Folder of the index.")]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="tokenizer.json, model folder or name, or bytes. Default: the index's."),
]


@spans.command()
def build(
    sources: Annotated[list[str], typer.Argument(help="Files, folders and patterns.")],
    out: Annotated[Path, typer.Option(help="Folder of the new index.")],
    tokenizer: Annotated[str, typer.Option(help="tokenizer.json, model folder or name, or bytes.")],
    format: Annotated[str, typer.Option(help="text, jsonl, parquet; auto: by suffix.")] = "auto",
    field: Annotated[str, typer.Option(help="Key or column of the text.")] = "text",
    meta: Annotated[list[str] | None, typer.Option(help="Keys or columns to keep.")] = None,
    glob: Annotated[
        list[str] | None, typer.Option(help="File names that count in folders.")
    ] = None,
    split: Annotated[str, typer.Option(help="Document of text: file, paragraph, line.")] = "file",
    errors: Annotated[str, typer.Option(help="Not UTF-8: strict, skip or replace.")] = "strict",
    byte_offsets: Annotated[bool, typer.Option(help="Keep the byte of every token.")] = False,
    builder: Annotated[str, typer.Option(help="auto, sais or radix.")] = "auto",
    token_bits: Annotated[str, typer.Option(help="auto, 8, 16 or 32.")] = "auto",
    shard_tokens: Annotated[int, typer.Option(help="Tokens per shard, at most.")] = 2**30,
    memory: Annotated[float | None, typer.Option(help="GiB that building may take.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing index.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted build.")] = False,
    split_long_docs: Annotated[bool, typer.Option(help="Cut documents that fit no shard.")] = False,
    allow_empty: Annotated[bool, typer.Option(help="An index of no text is no error.")] = False,
    progress: Annotated[bool, typer.Option(help="Show progress bars.")] = True,
) -> None:
    """Build an index of text, JSON lines or Parquet files."""
    from alignops.spans import corpus
    from alignops.spans.tokenizer import load_tokenizer

    documents = corpus.read_documents(
        corpus.find_files(sources, glob),
        format=format,
        field=field,
        meta_fields=meta or (),
        split=split,
        errors=errors,
    )
    report = corpus.build_corpus(
        documents,
        out,
        load_tokenizer(tokenizer),
        byte_offsets=byte_offsets,
        builder=builder,
        token_bits=token_bits if token_bits == "auto" else int(token_bits),
        shard_tokens=shard_tokens,
        mem_bytes=None if memory is None else int(memory * 2**30),
        overwrite=overwrite,
        resume=resume,
        split_long_docs=split_long_docs,
        allow_empty=allow_empty,
        progress=progress and sys.stderr.isatty(),
    )
    typer.echo(
        f"{out}: {report.n_tokens:,} tokens, {report.n_docs:,} documents, {report.n_shards} "
        f"shard{'s' * (report.n_shards != 1)}, {report.disk_bytes / 2**20:,.1f} MiB, "
        f"{report.seconds:.1f} s"
    )
    if report.split_docs:
        typer.echo(f"{report.split_docs} documents were cut; no match crosses a cut")


@spans.command()
def verify(
    index: Index,
    level: Annotated[str, typer.Option(help="full: every block; quick: samples.")] = "full",
) -> None:
    """Check the files of an index against their checksums."""
    from alignops.spans import SpanIndex

    with SpanIndex.open(index, verify="quick") as opened:
        opened.verify(level)
        typer.echo(f"{index}: intact, {opened.n_tokens:,} tokens, UUID {opened.uuid}")


@spans.command()
def info(
    index: Index,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what an index holds."""
    from alignops.spans import SpanIndex

    with SpanIndex.open(index) as opened:
        facts: dict[str, Any] = {
            "path": str(index),
            "uuid": opened.uuid,
            "tokens": opened.n_tokens,
            "documents": opened.n_docs,
            "shards": opened.n_shards,
            "vocab_size": opened.vocab_size,
            "token_bits": opened.token_bits,
            "fingerprint": opened.fingerprint,
            "distinct_tokens": int((opened.counts > 0).sum()),
            "bytes": sum(file.stat().st_size for file in index.iterdir()),
        }
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        shown = f"{value:,}" if isinstance(value, int) else value or "none"
        typer.echo(f"{name.replace('_', ' '):18}{shown}")


@spans.command()
def count(
    index: Index,
    texts: Annotated[list[str], typer.Argument(help="Texts to count.")],
    tokenizer: Tokenizer = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count how often texts occur, token for token, and how unlikely that is by chance."""
    import numpy as np

    from alignops.spans import SpanIndex, bci

    chosen = _tokenizer(index, tokenizer)
    with SpanIndex.open(index, fingerprint=chosen.fingerprint) as opened:
        rows = [encoded.ids.astype(np.int64) for encoded in chosen.encode(texts)]
        ids = np.concatenate(rows)
        offsets = np.cumsum([0, *map(len, rows)])
        found = opened.count_batch(ids, offsets).tolist()
        nats = bci(ids, offsets, opened.unigram).tolist()
        longest = [opened.longest_prefix(row).length for row in rows]
    entries = [
        {"text": text, "tokens": len(row), "count": m, "bci": score, "longest_prefix": prefix}
        for text, row, m, score, prefix in zip(texts, rows, found, nats, longest, strict=True)
    ]
    if as_json:
        typer.echo(json.dumps(entries, indent=2))
        return
    for entry in entries:
        line = f"{entry['count']:>12,}  {entry['tokens']} tokens, BCI {entry['bci']:.1f} nats"
        if not entry["count"]:
            line += f"; the first {entry['longest_prefix']} occur"
        typer.echo(f"{line}  {entry['text']!r}")


def _tokenizer(index: Path, name: str | None) -> TextTokenizer:
    """The named tokenizer, or the one that was kept with the index."""
    from alignops.spans import SpanIndex
    from alignops.spans.tokenizer import load_tokenizer

    SpanIndex.open(index, verify="quick").close()  # says what is wrong with the folder, if anything
    kept = index / "tokenizer.json"
    if name is None and not kept.exists():
        raise ValueError(f"{index} was built from token ids: name its tokenizer with --tokenizer")
    return load_tokenizer(name or kept)


@bench.command("spans")
def bench_spans(
    quick: Annotated[bool, typer.Option(help="A small corpus, three rounds.")] = False,
    only: Annotated[str, typer.Option(help="Sections, comma separated; default all.")] = "",
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
    tokens: Annotated[str, typer.Option(help="Sizes of the corpus, comma separated.")] = "",
) -> None:
    """Measure the spans core against its floors and peers; writes Markdown, JSON and a plot."""
    run_benchmark("spans", quick, only, out, ("--tokens", tokens) if tokens else ())
