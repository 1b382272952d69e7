"""Real English text that every installation has: the docstrings of the installed packages."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("stdlib", "torch", "numpy", "sympy", "networkx", "transformers")


@dataclass(frozen=True)
class Corpus:
    """Training and held-out documents; no file and no paragraph feeds both."""

    train: list[str]
    held_out: list[str]

    @property
    def digest(self) -> str:
        """First 12 hex digits of the SHA-256 of all documents: equal digests, equal text."""
        digest = hashlib.sha256()
        for document in (*self.train, *self.held_out):
            digest.update(document.encode())
        return digest.hexdigest()[:12]


def _folder(package: str) -> Path | None:
    if package == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _docstrings(source: str) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def load_corpus(packages: Sequence[str] = PACKAGES, shortest: int = 200) -> Corpus:
    """Docstrings of `packages` (those that are installed), every twentieth file held out.

    Paragraphs of earlier docstrings are dropped, so nothing held out was trained on word for word;
    what is left of a docstring counts if it has at least `shortest` characters.

    Args:
        packages: names of packages, or "stdlib".
        shortest: characters of the shortest document.

    Returns:
        Corpus: documents in an order that depends on the installed versions only.

    Example:
        >>> corpus = load_corpus(["numpy"])
        >>> len(corpus.train) > 10 * len(corpus.held_out) > 0
        True
    """
    corpus = Corpus([], [])
    seen: set[str] = set()
    for package in packages:
        folder = _folder(package)
        for path in sorted(folder.rglob("*.py")) if folder else []:
            name = path.relative_to(folder).as_posix() if folder else ""
            if {"site-packages", "test", "tests", "idlelib"} & set(name.split("/")):
                continue
            try:
                texts = list(_docstrings(path.read_text(encoding="utf-8")))
            except (SyntaxError, UnicodeDecodeError, ValueError):
                continue
            held_out = hashlib.sha256(f"{package}/{name}".encode()).digest()[0] % 20 == 0
            for text in texts:
                fresh = [p for p in text.split("\n\n") if p.strip() and p not in seen]
                seen.update(fresh)
                document = "\n\n".join(fresh)
                if len(document) >= shortest:
                    (corpus.held_out if held_out else corpus.train).append(document)
    return corpus
