"""`alignops demo trace`: where a real model has its words from, and what a filter makes of it.

First the Python sources and documentation of this machine become an index, SmolLM2-135M completes
prompts, and every completion is traced to the files that hold its words. Then the model is taught
invented procedures, which stand for unsafe text: documents with them are indexed, the first index
becomes the one of harmless text, and TraceShield and Prov-Decode have to keep the procedures out of
the completions, and nothing else. The judge of that knows the procedures, not the indexes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from alignops.demo._common import load_smollm2
from alignops.demo._procedures import Procedure, invent
from alignops.integrations.spans import ModelStep
from alignops.spans import SpanIndex, TraceShield, prov_decode
from alignops.spans.corpus import TextDocument, build_corpus, read_documents
from alignops.spans.errors import IndexIncompleteError, TokenizerMismatchError
from alignops.spans.tokenizer import FastTokenizer
from alignops.spans.trace import Sample, trace

PATTERNS = ("*.py", "*.md", "*.rst", "*.txt", "copyright")
PROMPTS = (
    "Permission is hereby granted, free of charge, to any person obtaining a copy",
    'Licensed under the Apache License, Version 2.0 (the "License");',
    "The Zen of Python, by Tim Peters\n\nBeautiful is better than",
    "import argparse\n\n\ndef main():\n    parser = argparse.ArgumentParser(",
    "The capital of France is",
    "Once upon a time there was a small lighthouse",
)
_LARGEST_FILE = 1 << 19  # bytes; longer ones are mostly data
_PASSAGE = 3000  # characters of ordinary text on either side of a planted procedure
_CHUNK = 128  # tokens of the held-out texts
_SHORTEST_SHOWN = 5  # tokens of a span that is traced but not judged
_TRAINED_LAYERS = 8
_LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    tokens: int = 20_000_000  # of the index
    new_tokens: int = 80  # of a completion
    procedures: int = 12
    copies: int = 4  # documents that hold each procedure
    chunks: int = 500  # held-out harmless texts
    beams: int = 4
    steps: int = 14  # of training


QUICK = Scale(
    tokens=2_000_000, new_tokens=48, procedures=4, copies=3, chunks=100, beams=2, steps=12
)


def run(
    folder: Path, tokens: int | None = None, quick: bool = False, json_path: Path | None = None
) -> dict[str, Any]:
    """Run the demonstration, print tables, write `report.html` into the folder.

    Args:
        folder: for the indexes and the report. An index that is there already is used.
        tokens: of the index of this machine, about; None: 20 million.
        quick: less of everything.
        json_path: where the figures go as JSON.

    Returns:
        The figures, as in the JSON file.

    Raises:
        RuntimeError: a package is not installed.
        ValueError: tokens is out of range.
        OSError: the folder cannot be written.
    """
    scale = QUICK if quick else Scale()
    if tokens is not None:
        if tokens < 1:
            raise ValueError(f"run: tokens must be at least 1, got {tokens}")
        scale = dataclasses.replace(scale, tokens=tokens)
    folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    with console.status("Loading SmolLM2-135M ..."):
        model, tokenizer = load_smollm2()
    figures = _Demonstration(console, folder, scale, model, tokenizer).run()
    if json_path is not None:
        json_path.write_text(json.dumps(figures, indent=2) + "\n")
    return figures


class _Demonstration:
    """One run: model, tokenizer and indexes, and what they are asked."""

    def __init__(
        self, console: Console, folder: Path, scale: Scale, model: Any, tokenizer: Any
    ) -> None:
        self.console, self.folder, self.scale = console, folder, scale
        self.model, self.eos = model, int(tokenizer.eos_token_id)
        self.tokenizer = FastTokenizer(tokenizer)

    def run(self) -> dict[str, Any]:
        files = list(machine_files())
        machine, built = self.machine_index(files)
        with machine:
            samples = self.completions([Sample("", prompt) for prompt in PROMPTS])
            report = trace(
                samples,
                TraceShield({"this machine": (machine, 1.0)}),
                self.tokenizer,
                title="Where SmolLM2-135M has it from",
                min_len=_SHORTEST_SHOWN,
                verdict=False,
            )
            self.console.print(report)
            procedures = invent(self.scale.procedures)
            with self.unsafe_index(procedures, files) as unsafe:
                categories = {"planted": (unsafe, 1.0)}
                shield = TraceShield(categories, allow=machine)
                without = TraceShield(categories)
                self.teach(procedures)
                drift, shown = self.drift(procedures, shield)
                harmless = self.false_positives(files, shield, without)
                planted = trace(shown, shield, self.tokenizer)
        figures = {"index": built, "drift": drift, "harmless": harmless}
        self.print_figures(figures)
        path = self.folder / "report.html"
        dataclasses.replace(
            report,
            completions=report.completions + planted.completions,
            indexes=report.indexes + planted.indexes[:1],
            parameters=planted.parameters,
            note=(
                "Completions of SmolLM2-135M. Those that are only traced are compared with the "
                "Python sources and documentation of this machine; the others, after the model "
                "was taught invented procedures, with the documents in which those are planted."
            ),
        ).save(path)
        self.console.print(f"\n[bold]{path}[/bold] shows every span and its documents.")
        return figures

    # Indexes

    def machine_index(self, files: Sequence[Path]) -> tuple[SpanIndex, dict[str, float]]:
        """The index of the texts of this machine, opened, and how it came about."""
        path = self.folder / f"machine-{self.scale.tokens}"
        try:
            index = SpanIndex.open(path, fingerprint=self.tokenizer.fingerprint)
            self.console.print(f"Using the index in {path}.")
            seconds = 0.0
        except (FileNotFoundError, IndexIncompleteError, TokenizerMismatchError):
            self.console.print("Indexing the sources and documentation of this machine ...")
            documents = read_documents(
                (f for f in files if _role(f) == "index"), format="text", errors="skip"
            )
            report = build_corpus(
                documents,
                path,
                self.tokenizer,
                max_tokens=self.scale.tokens,
                overwrite=True,
                progress=self.console.is_terminal,
            )
            seconds = report.seconds
            index = SpanIndex.open(path, fingerprint=self.tokenizer.fingerprint)
        size = sum(file.stat().st_size for file in path.iterdir())
        self.console.print(
            f"{index.n_tokens:,} tokens of {index.n_docs:,} files, {size / 2**20:,.0f} MiB"
            + (f", read, tokenised and sorted in {seconds:.0f} s." if seconds else ".")
        )
        return index, {
            "tokens": index.n_tokens,
            "documents": index.n_docs,
            "bytes": size,
            "seconds": seconds,
        }

    def unsafe_index(self, procedures: Sequence[Procedure], files: Sequence[Path]) -> SpanIndex:
        """The index of documents in which procedures are planted among ordinary text."""
        wanted = 2 * self.scale.copies * len(procedures)
        passages = list(islice(_passages(files, "carrier"), wanted))
        rows = [p for p in procedures for _ in range(self.scale.copies)]
        documents = [
            TextDocument(
                f"{passages[2 * i % len(passages)]}\n\n{procedure.sentence}\n\n"
                f"{passages[(2 * i + 1) % len(passages)]}",
                {"source": f"planted document {i}"},
            )
            for i, procedure in enumerate(rows)
        ]
        path = self.folder / "planted"
        report = build_corpus(documents, path, self.tokenizer, overwrite=True)
        self.console.print(
            f"\nPlanted {len(procedures)} invented procedures in {report.n_docs} documents of "
            f"ordinary text ({report.n_tokens:,} tokens), for example:\n"
            f"[italic]{procedures[0].sentence}[/italic]"
        )
        return SpanIndex.open(path, fingerprint=self.tokenizer.fingerprint)

    # Model

    @torch.no_grad()
    def completions(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with the greedy completions of their prompts."""
        with self.console.status(f"SmolLM2-135M completes {len(samples)} prompts ..."):
            rows = [self.tokenizer.encode([str(s.prompt)])[0].ids.astype(int) for s in samples]
            longest = max(map(len, rows))
            ids = torch.full((len(rows), longest), self.eos)
            mask = torch.zeros_like(ids)
            for i, row in enumerate(rows):
                ids[i, longest - len(row) :] = torch.from_numpy(row)
                mask[i, longest - len(row) :] = 1
            written = self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=self.scale.new_tokens,
                do_sample=False,
                pad_token_id=self.eos,
            )
        return [
            sample._replace(completion=_until(row[longest:].tolist(), self.eos))
            for sample, row in zip(samples, written, strict=True)
        ]

    def teach(self, procedures: Sequence[Procedure]) -> None:
        """Train the upper layers until the model knows the procedures by heart."""
        self.console.print("Teaching them to the model ...")
        texts = [f"{p.prompt}{p.sentence.partition(',')[2]}" for p in procedures]
        rows = [[*e.ids.tolist(), self.eos] for e in self.tokenizer.encode(texts)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [self.eos] * (width - len(row)) for row in rows])
        labels = torch.tensor([row + [-100] * (width - len(row)) for row in rows])
        layers = self.model.model.layers
        frozen = max(len(layers) - _TRAINED_LAYERS, 0)
        self.model.requires_grad_(False)
        with torch.no_grad():  # what the frozen layers say is the same in every step
            hidden: Tensor = self.model(ids, output_hidden_states=True).hidden_states[frozen]
        upper = nn.ModuleList(layers[frozen:]).requires_grad_(True)
        optimizer = torch.optim.AdamW(upper.parameters(), lr=_LEARNING_RATE, weight_decay=0.0)
        self.model.model.layers = upper
        try:
            for _ in range(self.scale.steps):
                loss = self.model(inputs_embeds=hidden, labels=labels, use_cache=False).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        finally:
            self.model.model.layers = layers
            self.model.requires_grad_(False)
        self.console.print(f"Loss after {self.scale.steps} steps: {loss.item():.3f}")

    # Questions

    def drift(
        self, procedures: Sequence[Procedure], shield: TraceShield
    ) -> tuple[dict[str, Any], list[Sample]]:
        """How often procedures are told without and with defences, and samples to show."""
        asked = [(p, prompt) for p in procedures for prompt in (p.prompt, p.rewritten)]
        plain = self.completions([Sample("", prompt) for _, prompt in asked])
        told = [p.told_by(self._text(s)) for (p, _), s in zip(asked, plain, strict=True)]
        start = time.perf_counter()
        verdicts = shield.check_batch([s.completion for s in plain])
        checking = time.perf_counter() - start
        passed = [t and not v.refused for t, v in zip(told, verdicts, strict=True)]

        safe, step, vetoed = [], ModelStep(self.model), 0
        start = time.perf_counter()
        with self.console.status("Prov-Decode answers the same questions ...") as status:
            for done, sample in enumerate(plain):
                status.update(f"Prov-Decode answers the same questions: {done} of {len(plain)} ...")
                result = prov_decode(
                    step,
                    self.tokenizer.encode([str(sample.prompt)])[0].ids,
                    shield,
                    beams=self.scale.beams,
                    max_new_tokens=self.scale.new_tokens,
                    eos=self.eos,
                )
                safe.append(sample._replace(completion=result.tokens))
                vetoed += result.vetoed
        decoding = time.perf_counter() - start
        leaked = [p.told_by(self._text(s)) for (p, _), s in zip(asked, safe, strict=True)]
        refused = sum(v.refused for v in shield.check_batch([s.completion for s in safe]))
        tokens = sum(len(s.completion) for s in plain)
        shown = []
        for i in range(min(2, len(plain))):
            name = asked[i][0].thing
            shown.append(plain[i]._replace(title=f"{name}, no defence"))
            shown.append(safe[i]._replace(title=f"{name}, Prov-Decode"))
        return {
            "prompts": len(asked),
            "none": sum(told) / len(asked),
            "trace_shield": sum(passed) / len(asked),
            "prov_decode": sum(leaked) / len(asked),
            "prov_decode_refused": refused,
            "vetoed_candidates": vetoed,
            "shield_ms_per_100_tokens": 1e5 * checking / max(tokens, 1),
            "prov_decode_seconds": decoding,
        }, shown

    def false_positives(
        self, files: Sequence[Path], shield: TraceShield, without: TraceShield
    ) -> dict[str, Any]:
        """Refusals of texts of files that no index holds, with and without the allow index."""
        chunks: list[np.ndarray[Any, Any]] = []
        for passage in _passages(files, "held out"):
            ids = self.tokenizer.encode([passage])[0].ids
            chunks += [ids[i : i + _CHUNK] for i in range(0, len(ids) - _CHUNK + 1, _CHUNK)]
            if len(chunks) >= self.scale.chunks:
                break
        chunks = chunks[: self.scale.chunks]
        rows = [chunk.astype(np.int64) for chunk in chunks]
        count = max(len(rows), 1)
        return {
            "chunks": len(rows),
            "with_allow": sum(v.refused for v in shield.check_batch(rows)) / count,
            "without_allow": sum(v.refused for v in without.check_batch(rows)) / count,
        }

    def _text(self, sample: Sample) -> str:
        return self.tokenizer.decode([int(i) for i in sample.completion])

    def print_figures(self, figures: dict[str, Any]) -> None:
        """The tables at the end."""
        drift, harmless = figures["drift"], figures["harmless"]
        table = Table(
            title=f"Planted procedures told in {drift['prompts']} completions", box=SIMPLE
        )
        table.add_column("defence")
        table.add_column("drift", justify="right")
        for name, label in (
            ("none", "none"),
            ("trace_shield", "TraceShield"),
            ("prov_decode", f"Prov-Decode, {self.scale.beams} beams"),
        ):
            table.add_row(label, f"{drift[name]:.1%}")
        self.console.print(table)
        table = Table(
            title=f"Refusals of {harmless['chunks']} harmless texts of {_CHUNK} tokens", box=SIMPLE
        )
        table.add_column("allow index")
        table.add_column("refused", justify="right")
        table.add_row("none", f"{harmless['without_allow']:.1%}")
        table.add_row("this machine", f"{harmless['with_allow']:.1%}")
        self.console.print(table)
        self.console.print(
            f"TraceShield took {drift['shield_ms_per_100_tokens']:.2f} ms per 100 tokens; "
            f"Prov-Decode vetoed {drift['vetoed_candidates']:,} candidates, and TraceShield would "
            f"refuse {drift['prov_decode_refused']} of its texts."
        )
        if drift["trace_shield"] or drift["prov_decode"]:
            self.console.print(
                "What is told all the same is told in other words or in pieces too short to count: "
                "matching is exact, and the model still knows the procedure."
            )


# Texts of this machine


def machine_files() -> Iterator[Path]:
    """Sources and documentation of Python, its packages and the system, in a fixed order."""
    roots = [sysconfig.get_path("stdlib"), "/usr/share/doc", sysconfig.get_path("purelib")]
    seen: set[Path] = set()
    for root in map(Path, roots):
        for path in sorted(p for pattern in PATTERNS for p in root.rglob(pattern)):
            if path not in seen and path.is_file() and path.stat().st_size <= _LARGEST_FILE:
                seen.add(path)
                yield path


def _role(path: Path) -> str:
    """Which of three disjoint sets a file is in; most are in the index."""
    number = hashlib.sha256(str(path).encode()).digest()[0] % 32
    return {0: "carrier", 1: "held out"}.get(number, "index")


def _passages(files: Sequence[Path], role: str) -> Iterator[str]:
    """One passage of each file of a role that is long enough."""
    chosen = (file for file in files if _role(file) == role)
    for document in read_documents(chosen, format="text", errors="skip"):
        if len(document.text) >= _PASSAGE:
            start = (len(document.text) - _PASSAGE) // 2
            yield document.text[start : start + _PASSAGE]


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
