"""Building and serving an index on a Ray cluster: `pip install 'alignops[ray]'`.

Nothing else imports Ray. Shards are built by tasks and joined to parts, which actors serve:

    parts = build(source, "/shared/index", shards=64, parts=8, vocab_size=49152, memory=24 << 30)
    index = serve(parts, replicas=2)
    index.count([1, 2, 3])

`source` says which documents a shard has. What decides that should depend on the document alone, as
`shard_of` does, so that a task can be run again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alignops.spans.build import build_shard, merge_manifest
from alignops.spans.distributed import DistributedIndex
from alignops.spans.errors import ShardUnavailableError
from alignops.spans.workers import RemoteBackend, Worker

try:
    import ray
except ImportError as error:
    raise ImportError("alignops.spans.ray needs Ray: pip install 'alignops[ray]'") from error

__all__ = ["RayBackend", "build", "serve"]

#: Of a task that dies, for example with its machine.
MAX_RETRIES = 3


def build(
    source: Callable[[int], Any],
    out: str | os.PathLike[str],
    *,
    shards: int,
    parts: int = 1,
    memory: int,
    fingerprint: str | None = None,
    task_options: dict[str, Any] | None = None,
    **options: Any,
) -> list[Path]:
    """Build shards as Ray tasks and join them to indexes, the parts.

    A build that was interrupted is continued by the same call: finished parts and shards are kept.

    Args:
        source: called in a task with the number of a shard; returns its documents in a form that
            `build_shard` takes. Ray pickles it.
        out: folder of the parts, on a file system that all machines share.
        shards: number of tasks.
        parts: number of indexes; part p gets shards in a row.
        memory: bytes that a task may use, which Ray reserves for it: about 11 for each token of the
            largest shard.
        fingerprint: of the tokenizer, see `build_index`.
        task_options: for Ray, for example num_cpus or resources.
        options: for `build_shard`: vocab_size, token_bits, builder and others.

    Returns:
        The folders of the parts, in order, for `serve` or `SpanIndex.open`.

    Raises:
        ValueError: not 1 <= parts <= shards.
        What `build_shard` and `merge_manifest` raise.
    """
    if not 1 <= parts <= shards:
        raise ValueError(f"build: parts must lie in [1, {shards}] for {shards} shards, got {parts}")
    out = Path(out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    first = [p * shards // parts for p in range(parts + 1)]
    targets = [out / f"part-{p}" for p in range(parts)]
    wanted = {"num_cpus": 1, "max_retries": MAX_RETRIES, **(task_options or {})}
    task = ray.remote(_build_one).options(memory=memory, **wanted)
    running = {
        p: [
            task.remote(
                source, s, _building(targets[p]), s - first[p], {**options, "mem_bytes": memory}
            )
            for s in range(first[p], first[p + 1])
        ]
        for p in range(parts)
        if not targets[p].exists()
    }
    try:
        for p, tasks in running.items():
            _get(tasks, None)
            merge_manifest(
                _building(targets[p]),
                targets[p],
                shards=len(tasks),
                fingerprint=fingerprint,
                allow_empty=True,
            )
    except BaseException:
        _stop([task for tasks in running.values() for task in tasks])
        raise
    return targets


def _stop(tasks: list[Any]) -> None:
    """Cancel tasks and wait for them: one that goes on would hold the lock of its shard."""
    for one in tasks:
        ray.cancel(one)
    ray.wait(tasks, num_returns=len(tasks))


def _building(target: Path) -> Path:
    return target.with_name(target.name + ".shards")


def _build_one(
    source: Callable[[int], Any], shard: int, folder: Path, number: int, options: dict[str, Any]
) -> None:
    build_shard(source(shard), folder, number, **options)


def serve(
    parts: Sequence[str | os.PathLike[str]],
    *,
    workers: int | None = None,
    replicas: int = 1,
    **options: Any,
) -> DistributedIndex:
    """Serve parts from actors.

    Args:
        parts: folders of indexes, on a file system that all machines share.
        workers: actors per replica, which hold parts in a row; None: one per part.
        replicas: actors that hold the same parts.
        options: for `RayBackend`.

    Raises:
        ValueError: not 1 <= workers <= number of parts, or no replica.
        What `SpanIndex.open` raises in the actors.
    """
    workers = len(parts) if workers is None else workers
    if not 1 <= workers <= len(parts) or replicas < 1:
        raise ValueError(
            f"serve: workers must lie in [1, {len(parts)}] and replicas be at least 1, got "
            f"{workers} and {replicas}"
        )
    first = [w * len(parts) // workers for w in range(workers + 1)]
    return DistributedIndex(
        [
            [RayBackend(parts[first[w] : first[w + 1]], **options) for _ in range(replicas)]
            for w in range(workers)
        ]
    )


class RayBackend(RemoteBackend):
    """Parts in a Ray actor.

    Ray starts an actor that died again, by default; until then calls raise ShardUnavailableError,
    and matchers are given their text again.

    Args:
        indexes: folders of indexes.
        timeout: seconds after which a call raises ShardUnavailableError.
        start_timeout: the same for the first call, which waits for a place for the actor.
        idle_seconds: see `LocalBackend`.
        threads: of the actor, and the CPUs that it reserves.
        actor_options: for Ray, for example memory or resources.

    Raises:
        What `SpanIndex.open` raises in the actor.
    """

    def __init__(
        self,
        indexes: Sequence[str | os.PathLike[str]],
        *,
        timeout: float = 30.0,
        start_timeout: float = 300.0,
        idle_seconds: float = 600.0,
        threads: int = 1,
        actor_options: dict[str, Any] | None = None,
    ) -> None:
        wanted = {"num_cpus": threads, "max_restarts": -1, "scheduling_strategy": "SPREAD"}
        actor = ray.remote(Worker).options(**{**wanted, **(actor_options or {})})
        folders = [str(Path(i).absolute()) for i in indexes]
        self._name = f"RayBackend {', '.join(folders)}"
        self._actor: Any = actor.remote(folders, idle_seconds, threads)
        self.timeout = start_timeout
        self._call("part")
        self.timeout = timeout

    def close(self) -> None:
        ray.kill(self._actor)

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return _get(getattr(self._actor, method).remote(*arguments), self.timeout)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError) as error:
            raise ShardUnavailableError(f"{self._name}: no answer to {method}: {error}") from error


def _get(references: Any, timeout: float | None) -> Any:
    """`ray.get`, with the exceptions of tasks as they were raised there."""
    try:
        return ray.get(references, timeout=timeout)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
