"""Commands of the spans core: build an index, look into it, trace completions to it."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alignops.cli._app import app, bench, demo, run_benchmark

if TYPE_CHECKING:
    from alignops.spans.tokenizer import TextTokenizer
    from alignops.spans.trace import Sample

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
    quick: Annotated[bool, typer.Option(help="Check samples, not every block.")] = False,
) -> None:
    """Check the files of an index against their checksums."""
    from alignops.spans import SpanIndex

    with SpanIndex.open(index, verify="quick") as opened:
        opened.verify("quick" if quick else "full")
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
            "removed_documents": len(opened.removed),
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
def remove(
    index: Index,
    documents: Annotated[list[int] | None, typer.Argument(help="Numbers of documents.")] = None,
    meta: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE: all documents with these metadata.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Say what would be removed.")] = False,
) -> None:
    """Remove documents: nothing counts or finds their tokens any more."""
    from alignops.spans import SpanIndex, find_documents, remove_documents

    wanted = set(documents or ())
    with SpanIndex.open(index) as opened:
        for condition in meta or ():
            key, equals, value = condition.partition("=")
            if not equals:
                raise typer.BadParameter(f"--meta takes KEY=VALUE, got {condition!r}")
            found = set(find_documents(opened, key, value))
            if not found:
                raise typer.BadParameter(f"no document has {condition}")
            wanted |= found
        if not wanted:
            raise typer.BadParameter("nothing to remove: give numbers, or --meta")
        beyond = [d for d in wanted if not 0 <= d < opened.n_docs]
        if beyond:
            raise typer.BadParameter(f"there are {opened.n_docs} documents, none is {beyond[0]}")
        wanted -= set(opened.removed.tolist())
        if dry_run:
            tokens = sum(len(opened.document(d).tokens) for d in wanted)
            typer.echo(f"{index}: {len(wanted):,} documents of {tokens:,} tokens would be removed")
            return
    removed = remove_documents(index, sorted(wanted))
    typer.echo(
        f"{index}: removed {removed.documents:,} documents of {removed.tokens:,} tokens; "
        f"{removed.total:,} are removed in all"
    )


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


@spans.command()
def trace(
    index: Annotated[str, typer.Argument(help="Index: [NAME=]FOLDER[:SEVERITY].")],
    inputs: Annotated[
        list[Path] | None, typer.Argument(help="Text or JSON lines; - reads text from stdin.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="A completion, given here.")] = None,
    prompt: Annotated[str, typer.Option(help="The prompt of the completions of --text.")] = "",
    category: Annotated[
        list[str] | None, typer.Option(help="A further index: NAME=FOLDER[:SEVERITY].")
    ] = None,
    allow: Annotated[Path | None, typer.Option(help="Index of harmless text.")] = None,
    allow_mode: Annotated[str, typer.Option(help="exact or cover.")] = "exact",
    tokenizer: Tokenizer = None,
    field: Annotated[str, typer.Option(help="Key of the completion in JSON lines.")] = "completion",
    tau: Annotated[float, typer.Option(help="Threshold in nats.")] = 20.0,
    min_len: Annotated[int, typer.Option(help="Tokens of the shortest span.")] = 8,
    max_count: Annotated[int | None, typer.Option(help="Most occurrences of a span.")] = None,
    scope: Annotated[str, typer.Option(help="completion or prompt+completion.")] = "completion",
    words: Annotated[bool, typer.Option(help="Show spans of whole words.")] = False,
    verdict: Annotated[bool, typer.Option(help="Judge completions, or only trace them.")] = True,
    documents: Annotated[int, typer.Option(help="Documents shown per span.")] = 3,
    context: Annotated[int, typer.Option(help="Tokens of context on either side.")] = 40,
    title: Annotated[str, typer.Option(help="Title of the report.")] = "Span trace",
    html: Annotated[Path | None, typer.Option(help="File for the page.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="File for the data.")] = None,
) -> None:
    """Trace completions to the documents that hold their words; prints, and writes a page."""
    from rich.console import Console

    from alignops.spans import SpanIndex, TraceShield
    from alignops.spans.trace import trace as trace_samples

    places = [_place(spec) for spec in (index, *(category or ()))]
    chosen = _tokenizer(places[0][1], tokenizer)
    opened = {
        name: (SpanIndex.open(folder, fingerprint=chosen.fingerprint), severity)
        for name, folder, severity in places
    }
    shield = TraceShield(
        opened,
        tau=tau,
        min_len=min_len,
        max_count=max_count,
        allow=SpanIndex.open(allow, fingerprint=chosen.fingerprint) if allow else None,
        allow_mode=allow_mode,
        scope=scope,
    )
    samples = list(_samples(inputs or [], text or [], prompt, field))
    if not samples:
        raise typer.BadParameter("nothing to trace: name files, or give --text")
    report = trace_samples(
        samples,
        shield,
        chosen,
        title=title,
        documents=documents,
        context=context,
        words=words,
        verdict=verdict,
    )
    Console().print(report)
    if html is not None:
        report.save(html)
        typer.echo(f"{html} has the documents")
    if as_json is not None:
        as_json.write_text(json.dumps(dataclasses.asdict(report), indent=1), encoding="utf-8")


def _tokenizer(index: Path, name: str | None) -> TextTokenizer:
    """The named tokenizer, or the one that was kept with the index."""
    from alignops.spans import SpanIndex
    from alignops.spans.tokenizer import load_tokenizer

    SpanIndex.open(index, verify="quick").close()  # says what is wrong with the folder, if anything
    kept = index / "tokenizer.json"
    if name is None and not kept.exists():
        raise ValueError(f"{index} was built from token ids: name its tokenizer with --tokenizer")
    return load_tokenizer(name or kept)


def _place(spec: str) -> tuple[str, Path, float]:
    """Name, folder and severity of `[NAME=]FOLDER[:SEVERITY]`."""
    name, equals, rest = spec.partition("=")
    if not equals or Path(spec).exists():
        name, rest = "", spec
    folder, _, severity = rest.rpartition(":")
    try:
        weight = float(severity) if folder and not Path(rest).exists() else 1.0
    except ValueError:
        weight = 1.0
    else:
        rest = folder if folder and not Path(rest).exists() else rest
    return name or Path(rest).name, Path(rest), weight


def _samples(inputs: list[Path], texts: list[str], prompt: str, field: str) -> Iterator[Sample]:
    from alignops.spans.corpus import read_documents
    from alignops.spans.trace import Sample

    for text in texts:
        yield Sample(text, prompt)
    for path in inputs:
        if str(path) == "-":
            yield Sample(sys.stdin.read(), prompt, "standard input")
            continue
        for document in read_documents([path], field=field, meta_fields=("prompt", "title")):
            meta = document.meta
            yield Sample(document.text, str(meta.get("prompt", "")), str(meta.get("title", "")))


@demo.command("trace")
def demo_trace(
    folder: Annotated[Path, typer.Option(help="For the indexes and the report.")] = Path(
        "trace-demo"
    ),
    tokens: Annotated[int | None, typer.Option(help="Tokens to index; default 20 million.")] = None,
    quick: Annotated[bool, typer.Option(help="Less of everything.")] = False,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Trace SmolLM2-135M to the files of this machine; keep planted procedures out of its text."""
    from alignops.demo import trace

    trace.run(folder, tokens, quick, json)


@bench.command("spans")
def bench_spans(
    quick: Annotated[bool, typer.Option(help="A small corpus, three rounds.")] = False,
    only: Annotated[str, typer.Option(help="Sections, comma separated; default all.")] = "",
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
    tokens: Annotated[str, typer.Option(help="Sizes of the corpus, comma separated.")] = "",
) -> None:
    """Measure the spans core against its floors and peers; writes Markdown, JSON and a plot."""
    run_benchmark("spans", quick, only, out, ("--tokens", tokens) if tokens else ())
