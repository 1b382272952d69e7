"""What the adapters of serving engines share: probes of the engine, and cases to test them with."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignops.reference import speculative as reference

SELF_TEST_CASES = 64


def find(place: str) -> Any:
    """The object "module:name.name"."""
    module, _, path = place.partition(":")
    value: Any = importlib.import_module(module)
    for name in path.split("."):
        value = getattr(value, name)
    return value


def check_signature(place: str, expected: Sequence[str]) -> None:
    """RuntimeError unless a function of the engine has these parameters, then only optional ones.

    Args:
        place: "module:name.name".
        expected: names of the parameters.
    """
    package = importlib.import_module(place.partition(".")[0])
    version = getattr(package, "__version__", "of unknown version")
    parameters = inspect.signature(find(place)).parameters
    names = list(parameters)
    optional = all(
        parameters[n].default is not inspect.Parameter.empty for n in names[len(expected) :]
    )
    if names[: len(expected)] != list(expected) or not optional:
        raise RuntimeError(
            f"alignops: {package.__name__} {version}: {place} must have the parameters "
            f"({', '.join(expected)}), got ({', '.join(names)}); this version is not supported"
        )


@dataclass(frozen=True)
class Case:
    """Random rows of a few requests, and what the definition says of each request.

    Attributes:
        target: (N, V) packed logits.
        counts: (R,) drafts of each request.
        drafts: (R, K), -1 where there is none.
        draft: (R, K, V) logits.
        seeds, positions: (R,).
        temperature: (R,), 0 or 1.
        tokens: what each request emits.
    """

    target: Tensor
    counts: Tensor
    drafts: Tensor
    draft: Tensor
    seeds: Tensor
    positions: Tensor
    temperature: Tensor
    tokens: list[list[int]]


def self_test_cases(rule: str, number: int = SELF_TEST_CASES) -> Iterator[Case]:
    """Cases with one to four requests, zero to four drafts, and drafts that are often accepted."""
    for case in range(number):
        random = np.random.default_rng(case)
        requests, width, size = (int(random.integers(1, n)) for n in (5, 5, 40))
        counts = random.integers(0, width + 1, requests)
        target = random.standard_normal((int(counts.sum()) + requests, size)).astype(np.float32) * 3
        draft = random.standard_normal((requests, width, size)).astype(np.float32)
        drafts = np.full((requests, width), -1)
        seeds = random.integers(-(2**63), 2**63, requests)
        positions = random.integers(1, 1000, requests)
        temperature = random.integers(0, 2, requests).astype(np.float32)
        tokens, begin = [], 0
        for r, count in enumerate(counts):
            rows = target[begin : begin + count + 1]
            begin += count + 1
            draft[r, :count] += rows[:count]
            laws = [reference.law(row) for row in rows]
            proposals = [reference.law(row) for row in draft[r, :count]]
            drafts[r, :count] = [int(random.choice(size, p=q.p / q.p.sum())) for q in proposals]
            seed = int(seeds[r]) & (2**64 - 1)
            row = reference.Row(
                laws, drafts[r, :count].tolist(), proposals, seed, int(positions[r])
            )
            tokens.append(reference.verify(row, rule if temperature[r] else "greedy").tokens)
        numbers = {"seeds": seeds, "positions": positions, "temperature": temperature}
        numbers |= {"target": target, "counts": counts, "drafts": drafts, "draft": draft}
        yield Case(tokens=tokens, **{name: torch.from_numpy(a) for name, a in numbers.items()})


@dataclass(frozen=True)
class TreeCase:
    """Random trees of a few requests, and what the definition says of each request.

    Attributes:
        parent: int32 (R, n), -1 for the root.
        tokens: int64 (R, n).
        target, draft: float32 (R, n, V), probabilities.
        seeds, positions: (R,).
        expected: accepted nodes, the root first, and the ids that follow each of them.
    """

    parent: Tensor
    tokens: Tensor
    target: Tensor
    draft: Tensor
    seeds: Tensor
    positions: Tensor
    expected: list[tuple[list[int], list[int]]]


def self_test_trees(rule: str, number: int = SELF_TEST_CASES) -> Iterator[TreeCase]:
    """Cases with one to three requests and trees of one to twelve nodes.

    Args:
        rule: "tree_greedy", "tree_target" or "tree_rrs".
        number: of cases.
    """
    for case in range(number):
        random = np.random.default_rng(case)
        requests, size, ids = (int(random.integers(1, n)) for n in (4, 13, 12))
        parent = np.full((requests, size), -1, np.int32)
        for n in range(1, size):
            parent[:, n] = random.integers(0, n, requests)
        tokens = random.integers(0, ids, (requests, size))
        logits = random.standard_normal((2, requests, size, ids)).astype(np.float32) * 2
        laws = [[[reference.law(row) for row in tree] for tree in part] for part in logits]
        seeds = random.integers(-(2**63), 2**63, requests)
        positions = random.integers(1, 1000, requests)
        expected = []
        for r in range(requests):
            tree = reference.Tree(
                parent[r].tolist(),
                tokens[r].tolist(),
                laws[0][r],
                laws[1][r],
                int(seeds[r]) & (2**64 - 1),
                int(positions[r]),
            )
            path = getattr(reference.rules, rule)(tree)
            following = [int(tokens[r, n]) for n in path.nodes[1:]]
            expected.append((path.nodes, [*following, path.following]))
        probabilities = np.array([[[law.p for law in tree] for tree in part] for part in laws])
        numbers = {"parent": parent, "tokens": tokens, "seeds": seeds, "positions": positions}
        numbers |= dict(zip(("target", "draft"), probabilities, strict=True))
        yield TreeCase(
            expected=expected, **{name: torch.from_numpy(a) for name, a in numbers.items()}
        )


def self_test_failed(engine: str, case: int, expected: object, got: object) -> RuntimeError:
    """The error of a self-test."""
    return RuntimeError(
        f"alignops: {engine}: case {case} of the self-test must give {expected}, got {got}; the "
        "engine's own functions stay in place"
    )
