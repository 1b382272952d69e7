"""Acceptance over divided vocabularies: every rank decides as `verify` does of whole rows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alignops.speculative import VerifyOut, all_reduce, verify, verify_sharded
from alignops.speculative.sharded import RULES_OF_SHARDS
from tests.speculative.oracle import assert_rows, expected_rows
from tests.speculative.samples_verify import SIZES, SMALL, generator, make_case

KEPT = (
    *("draft_ids", "draft", "draft_lens", "rule", "seeds", "positions", "temperature"),
    *("eos_ids", "remaining", "active"),
)


class Ranks:
    """Threads that meet in every reduction."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count, timeout=60)
        self.tensors: list[Tensor | None] = [None] * count

    def reduce(self, rank: int) -> Callable[[Tensor, str], Tensor]:
        def meet(t: Tensor, op: str) -> Tensor:
            self.tensors[rank] = t
            self.barrier.wait()
            every = torch.stack([x for x in self.tensors if x is not None])
            found = every.amax(0) if op == "max" else every.sum(0)
            self.barrier.wait()
            return found

        return meet


def run(case: dict[str, Any], splits: list[int]) -> list[VerifyOut]:
    """Results of all ranks; rank i has the ids splits[i] .. splits[i + 1] - 1."""
    ranks = Ranks(len(splits) - 1)
    out: list[Any] = [None] * (len(splits) - 1)

    def work(rank: int) -> None:
        ids = slice(splits[rank], splits[rank + 1])
        arguments = {name: case[name] for name in KEPT if case.get(name) is not None}
        if "draft" in arguments:
            arguments["draft"] = case["draft"][..., ids]
        try:
            out[rank] = verify_sharded(
                case["target"][..., ids],
                offset=splits[rank],
                vocab_size=splits[-1],
                reduce=ranks.reduce(rank),
                **arguments,
            )
        except BaseException:
            ranks.barrier.abort()
            raise

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(out))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(x is not None for x in out)
    return out


def sharded_case(rng: np.random.Generator, rule: str, sizes: tuple[int, ...]) -> dict[str, Any]:
    """A case of `verify` without what shards do not know."""
    while True:
        case = make_case(rng, rule, sizes)
        if not case["is_probs"]:
            break
    for name in ("top_k", "top_p", "min_p", "uniforms", "state"):
        case.pop(name, None)
    draft, size = case["draft"], case["target"].shape[-1]
    if draft is not None and draft.shape[-1] < size:
        missing = size - draft.shape[-1]
        case["draft"] = torch.nn.functional.pad(draft, (0, missing), value=-torch.inf)
    return case


def split(rng: np.random.Generator, size: int) -> list[int]:
    count = min(size, int(rng.integers(1, 5)))
    inner = rng.choice(np.arange(1, size), count - 1, replace=False) if count > 1 else []
    return [0, *sorted(int(i) for i in inner), size]


def equal(found: VerifyOut, expected: VerifyOut) -> bool:
    return all(
        torch.equal(getattr(found, f.name), getattr(expected, f.name)) for f in fields(found)
    )


@pytest.mark.parametrize("rule", RULES_OF_SHARDS)
def test_any_split_decides_as_whole_rows(rule: str) -> None:
    for seed in range(40):
        rng = generator(seed, 700 + RULES_OF_SHARDS.index(rule))
        case = sharded_case(rng, rule, SMALL[1:])
        expected = verify(case["target"], **{k: v for k, v in case.items() if k != "target"})
        assert_rows(expected, expected_rows(case), seed)
        splits = split(rng, case["target"].shape[-1])
        for found in run(case, splits):
            assert equal(found, expected), (seed, splits)


@pytest.mark.parametrize("rule", RULES_OF_SHARDS)
@pytest.mark.parametrize("size", SIZES[6:])
def test_splits_inside_tiles(rule: str, size: int) -> None:
    """A tile that two ranks share is summed in units of its largest weight, wherever that is."""
    rng = generator(size, 800 + RULES_OF_SHARDS.index(rule))
    case = sharded_case(rng, rule, (size,))
    expected = verify(case["target"], **{k: v for k, v in case.items() if k != "target"})
    for splits in ([0, size], [0, 1, size], [0, size // 3, size // 2, size]):
        for found in run(case, splits):
            assert equal(found, expected), splits


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES_OF_SHARDS)
def test_many_splits(rule: str) -> None:
    check_splits(rule, 1000)


def check_splits(rule: str, rows: int) -> None:
    """At least so many random rows, each split at random; 33,334 per rule take ten minutes."""
    cases = 0
    for seed in range(1_000_000):
        rng = generator(seed, 900 + RULES_OF_SHARDS.index(rule))
        case = sharded_case(rng, rule, SIZES[1:])
        expected = verify(case["target"], **{k: v for k, v in case.items() if k != "target"})
        splits = split(rng, case["target"].shape[-1])
        assert equal(run(case, splits)[0], expected), (seed, splits)
        cases += len(case["draft_ids"])
        if cases >= rows:
            return


def test_bad_logits_count_where_they_are_read() -> None:
    for bad in (torch.nan, torch.inf):
        for i in range(3):
            target = torch.zeros(1, 3, 9)
            target[0, :, 4] = 1
            target[0, i, 7] = bad
            case = {"target": target, "draft_ids": torch.tensor([[4, 5]]), "rule": "lossless"}
            case |= {"seeds": torch.tensor([3]), "positions": torch.tensor([5]), "draft": None}
            expected = verify(target, case["draft_ids"], **{k: case[k] for k in list(case)[2:]})
            assert equal(run(case, [0, 4, 9])[1], expected)
    assert run({"target": torch.full((1, 1, 4), -torch.inf), "draft_ids": torch.zeros(1, 0).long(),
                "rule": "greedy"}, [0, 2, 4])[0].row_error.tolist() == [2]  # fmt: skip


def test_reduction_of_a_process_group(tmp_path: Path) -> None:
    import torch.distributed as dist

    case = sharded_case(generator(4), "lossless", (37,))
    expected = verify(case["target"], **{k: v for k, v in case.items() if k != "target"})
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        arguments = {name: case[name] for name in KEPT if case.get(name) is not None}
        found = verify_sharded(
            case["target"], offset=0, vocab_size=37, reduce=all_reduce(), **arguments
        )
    finally:
        dist.destroy_process_group()
    assert equal(found, expected)


VALID = {"offset": 0, "vocab_size": 7, "reduce": lambda t, op: t}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rule": "block"}, "rule must be one of greedy, lossless, coupled, got 'block'"),
        ({"target": torch.zeros(2, 4, 7)}, r"target must be logits \(2, 3, ids\)"),
        ({"target": [1.0]}, "target must be a Tensor, got list"),
        ({"draft_ids": torch.zeros(2, 2)}, "draft_ids must be integers"),
        ({"offset": 1}, "offset must be such that ids 1 to 7 are below vocab_size, got 7"),
        ({"offset": -1}, "offset"),
        ({"draft": torch.zeros(2, 2, 6)}, r"draft must be logits \(2, 2, 7\), got \(2, 2, 6\)"),
        ({"rule": "lossless"}, "seeds and positions must be given where rule is lossless"),
        ({"temperature": -1.0}, "temperature"),
        ({"active": torch.ones(3, dtype=torch.bool)}, r"active must have shape \(2,\), got \(3,\)"),
        ({"eos_ids": list(range(9))}, "eos_ids must be at most 8, got 9"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_arguments(changes: dict[str, Any], text: str) -> None:
    arguments = {"target": torch.zeros(2, 3, 7), "draft_ids": torch.ones(2, 2).long(), **VALID}
    with pytest.raises((TypeError, ValueError), match=f"verify_sharded: {text}"):
        verify_sharded(**(arguments | changes))
