"""Building and serving on a Ray cluster of this machine: pytest -m ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignops.spans import (
    DistributedIndex,
    MatchRule,
    ShardUnavailableError,
    SpanIndex,
    SpanMatcher,
    build_index,
    shard_of,
)

pytestmark = pytest.mark.ray
VOCABULARY = 30
SHARDS = 5


def document(i: int) -> list[int]:
    rng = np.random.default_rng(i)
    return rng.integers(0, 4 if i % 2 else VOCABULARY, rng.integers(0, 50)).tolist()


def of_shard(shard: int) -> list[list[int]]:
    """The documents that belong to a shard, whoever asks and how often."""
    return [document(i) for i in range(60) if shard_of(f"document {i}", SHARDS) == shard]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="needs the extra [ray]")
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=80 << 20)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def built(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], SpanIndex]:
    """Parts made by tasks, and one index of the same documents in the same order."""
    from alignops.spans import ray as on_ray

    folder = tmp_path_factory.mktemp("ray")
    parts = on_ray.build(
        of_shard,
        folder / "parts",
        shards=SHARDS,
        parts=3,
        memory=200 << 20,
        vocab_size=VOCABULARY,
        fingerprint="tests",
    )
    docs = [doc for shard in range(SHARDS) for doc in of_shard(shard)]
    build_index(docs, folder / "whole", vocab_size=VOCABULARY, fingerprint="tests")
    return parts, SpanIndex.open(folder / "whole")


@pytest.fixture(scope="module")
def served(built: tuple[list[Path], SpanIndex]) -> Iterator[DistributedIndex]:
    from alignops.spans import ray as on_ray

    with on_ray.serve(built[0], workers=2, actor_options={"num_cpus": 0.5}) as index:
        yield index


def queries(whole: SpanIndex) -> tuple[np.ndarray, np.ndarray]:
    rows = [whole.document(d).tokens[:k].tolist() for d in range(20) for k in (1, 4, 9)]
    flat = np.array([t for row in rows for t in row], np.int64)
    return flat, np.cumsum([0, *map(len, rows)])


def test_shards_go_to_parts_in_order(built: tuple[list[Path], SpanIndex]) -> None:
    parts, whole = built
    opened = [SpanIndex.open(part) for part in parts]
    assert sum(index.n_shards for index in opened) == SHARDS
    tokens = [index.document(d).tokens.tolist() for index in opened for d in range(index.n_docs)]
    assert tokens == [whole.document(d).tokens.tolist() for d in range(whole.n_docs)]


def test_building_again_keeps_what_is_there(
    built: tuple[list[Path], SpanIndex], cluster: Any
) -> None:
    from alignops.spans import ray as on_ray

    def unused(shard: int) -> Any:
        raise RuntimeError("a finished shard was built again")

    again = on_ray.build(
        unused,
        built[0][0].parent,
        shards=SHARDS,
        parts=3,
        memory=200 << 20,
        vocab_size=VOCABULARY,
        fingerprint="tests",
    )
    assert again == built[0]


def test_interrupted_build_is_continued(cluster: Any, tmp_path: Path) -> None:
    from alignops.spans import ray as on_ray

    flag = tmp_path / "repaired"

    def source(shard: int) -> Any:
        if shard == 1 and not flag.exists():
            raise ValueError("the store of documents is away")
        return of_shard(shard)

    options = {"shards": SHARDS, "memory": 200 << 20, "vocab_size": VOCABULARY}
    with pytest.raises(ValueError, match="away"):
        on_ray.build(source, tmp_path / "index", **options)
    assert not (tmp_path / "index" / "part-0").exists()
    flag.touch()
    (part,) = on_ray.build(source, tmp_path / "index", **options)
    assert SpanIndex.open(part).n_tokens == sum(len(document(i)) for i in range(60))


def test_answers(built: tuple[list[Path], SpanIndex], served: DistributedIndex) -> None:
    whole = built[1]
    flat, bounds = queries(whole)
    assert served.n_docs == whole.n_docs
    np.testing.assert_array_equal(served.count_batch(flat, bounds), whole.count_batch(flat, bounds))
    for ours, theirs in zip(
        served.matching_stats_batch(flat, bounds, counts=True),
        whole.matching_stats_batch(flat, bounds, counts=True),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)
    ours, theirs = served.locate([1], 10**6), whole.locate([1], 10**6)
    found = [set(zip(h.document.tolist(), h.offset.tolist(), strict=True)) for h in (ours, theirs)]
    assert found[0] == found[1]
    with pytest.raises(IndexError):
        served.count([VOCABULARY])


def test_matcher_survives_its_actor(
    built: tuple[list[Path], SpanIndex], served: DistributedIndex, cluster: Any
) -> None:
    whole, rule = built[1], MatchRule(tau=3.0, min_len=2)
    ours, theirs = served.matcher(batch=2, rule=rule), SpanMatcher(whole, batch=2, rule=rule)
    for step, token in enumerate(whole.document(3).tokens.tolist() * 2):
        if step == 8:
            backend = served._groups[0]._backends[0]
            cluster.kill(backend._actor, no_restart=False)
        parent = [1, 0] if step % 3 == 2 else None
        until_the_actor_is_back(ours.advance, [token, 1], parent)
        theirs.advance([token, 1], parent)
        state = until_the_actor_is_back(ours.state)
        for a, b in zip(state, theirs.state(), strict=True):
            np.testing.assert_array_equal(a, b)
        cand = np.arange(12).reshape(2, 6)
        np.testing.assert_array_equal(until_the_actor_is_back(ours.peek, cand), theirs.peek(cand))


def until_the_actor_is_back(call: Callable[..., Any], *arguments: Any) -> Any:
    for _ in range(600):
        try:
            return call(*arguments)
        except ShardUnavailableError:
            time.sleep(0.1)
    raise AssertionError("the actor did not come back")


def close(backend: Any) -> None:
    """Close, and wait until the actor is gone."""
    backend.close()
    with pytest.raises(ShardUnavailableError):  # noqa: PT012
        for _ in range(600):
            backend._call("part")
            time.sleep(0.1)


def test_replicas(built: tuple[list[Path], SpanIndex], cluster: Any) -> None:
    from alignops.spans import ray as on_ray

    parts, whole = built
    options = {"actor_options": {"num_cpus": 0.2, "max_restarts": 0}}
    with on_ray.serve(parts, workers=1, replicas=2, **options) as index:
        assert index.count([1]) == whole.count([1])
        close(index._groups[0]._backends[0])
        assert index.count([1, 2]) == whole.count([1, 2])
        close(index._groups[0]._backends[1])
        with pytest.raises(ShardUnavailableError):
            index.count([1])


def test_bad_arguments(built: tuple[list[Path], SpanIndex], tmp_path: Path) -> None:
    from alignops.spans import ray as on_ray

    with pytest.raises(ValueError, match="parts"):
        on_ray.build(of_shard, tmp_path, shards=2, parts=3, memory=1 << 20, vocab_size=4)
    with pytest.raises(ValueError, match="workers"):
        on_ray.serve(built[0], workers=4)
