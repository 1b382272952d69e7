"""Files of an index read and checked by a second, slow implementation of docs/spans-format.md."""

import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PAYLOAD = 4096
BLOCK = 1 << 16
HEADER = struct.Struct("<8sI2H4s2BH16s2I3Q2IQ32s2I")
DTYPES = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return table


_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


@dataclass
class File:
    kind: str
    token_bytes: int
    pointer_bytes: int
    flags: int
    uuid: bytes
    shard: int
    shards: int
    elements: int
    vocab_size: int
    payload: bytes


def read_file(path: Path) -> File:
    """Every field and checksum as documented."""
    data = path.read_bytes()
    fields = HEADER.unpack(data[: HEADER.size])
    (magic, endian, major, minor, kind, token_bytes, pointer_bytes, flags, uuid, shard, shards) = (
        fields[:11]
    )
    size, elements, vocab_size, log_block, blocks, table, zeros, crc, zero = fields[11:]
    assert (magic, endian, major, minor) == (b"ALNSPAN\x1a", 0x0A0B0C0D, 1, 0)
    assert (log_block, zeros, zero) == (16, bytes(32), 0)
    assert crc == crc32c(data[:120])
    assert data[HEADER.size : PAYLOAD] == bytes(PAYLOAD - HEADER.size)
    payload = data[PAYLOAD : PAYLOAD + size]
    assert table == PAYLOAD + -(-size // 8) * 8
    assert not any(data[PAYLOAD + size : table])
    assert blocks == -(-size // BLOCK)
    crcs = struct.unpack(f"<{blocks}I", data[table : table + 4 * blocks])
    assert list(crcs) == [crc32c(payload[BLOCK * i : BLOCK * (i + 1)]) for i in range(blocks)]
    tail = data[table + 4 * blocks :]
    assert tail == struct.pack("<I", crc32c(data[table : table + 4 * blocks])) + b"ALNEND\x1a\n"
    return File(
        kind.decode(),
        token_bytes,
        pointer_bytes,
        flags,
        uuid,
        shard,
        shards,
        elements,
        vocab_size,
        payload,
    )


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def manifest_of(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "index.json").read_bytes())
    return result


def shard_files(folder: Path, shard: int) -> dict[str, File]:
    names = manifest_of(folder)["shards"][shard]["files"]
    return {name: read_file(folder / entry["name"]) for name, entry in names.items()}


def naive_shard(docs: Sequence[Sequence[int]], token_bytes: int) -> dict[str, Any]:
    """Text, suffixes and document offsets of one shard, by sorting."""
    sep = (1 << 8 * token_bytes) - 1
    text = [token for doc in docs for token in (*doc, sep)]
    starts = [0]
    for doc in docs:
        starts.append(starts[-1] + len(doc) + 1)
    suf = sorted((p for p in range(len(text)) if text[p] != sep), key=lambda p: text[p:])
    return {"tok": text, "suf": suf, "doc": starts}


def check_shard(files: dict[str, File], docs: Sequence[Sequence[int]]) -> None:
    """The files hold exactly these documents."""
    width = files["tok"].token_bytes
    expected = naive_shard(docs, width)
    np.testing.assert_array_equal(
        np.frombuffer(files["tok"].payload, DTYPES[width]), np.array(expected["tok"], np.int64)
    )
    for name, dtype in (("suf", np.uint32), ("doc", np.uint64)):
        np.testing.assert_array_equal(
            np.frombuffer(files[name].payload, dtype), np.array(expected[name], np.int64)
        )
    ids, counts = np.unique([t for doc in docs for t in doc], return_counts=True)
    words = np.frombuffer(files["uni"].payload, np.uint64)
    if files["uni"].flags & 1:
        np.testing.assert_array_equal(words.reshape(-1, 2), np.stack([ids, counts], 1))
    else:
        dense = np.zeros(files["uni"].vocab_size, np.int64)
        dense[ids.astype(np.int64)] = counts
        np.testing.assert_array_equal(words, dense)
    tokens = sum(map(len, docs))
    assert {name: file.elements for name, file in files.items() if name in expected} == {
        "tok": tokens + len(docs),
        "suf": tokens,
        "doc": len(docs) + 1,
    }
    if "dir" in files:
        padded = np.array([*expected["tok"], *[(1 << 8 * width) - 1] * 8], np.int64)
        entries = [padded[p : p + 8] for p in expected["suf"][::256]]
        np.testing.assert_array_equal(
            np.frombuffer(files["dir"].payload, DTYPES[width]).reshape(-1, 8), np.stack(entries)
        )


def random_docs(
    rng: np.random.Generator, alphabet: int, documents: int, longest: int
) -> list[list[int]]:
    """Documents with repeats: some are copies or have copied runs, some are empty."""
    docs: list[list[int]] = []
    for _ in range(documents):
        doc = rng.integers(0, alphabet, rng.integers(0, longest + 1)).tolist()
        if docs and rng.random() < 0.3:
            doc += docs[int(rng.integers(len(docs)))][: longest // 2]
        docs.append(doc)
    return docs


def flat_of(docs: Iterable[Sequence[int]], dtype: Any = np.int64) -> tuple[Any, Any]:
    """The pair (flat, offsets)."""
    docs = list(docs)
    flat = np.array([token for doc in docs for token in doc], dtype)
    return flat, np.cumsum([0, *map(len, docs)])
