"""STQ1_0: the golden block, GGUF files there and back, and every way a file can be broken."""

import itertools
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from alignops.reference import ternary as reference
from alignops.ternary.stq import decode_stq1_0, encode_stq1_0, read_stq1_0, write_stq1_0
from alignops.ternary.weight import TernaryWeight, quantize

GOLDEN = bytes.fromhex(
    "0f3ac7722feac073c0722ffac0732cf72ffaa00e2cf7a20fa00e2cf7a20f3ac74b5bb5a5dbdaad2d9037"
)
ALIGNMENT = 32


def golden_weight() -> torch.Tensor:
    return torch.tensor([[((37 * i + 11) % 101 - 50) / 64 for i in range(256)]])


def random_weight(n: int, k: int, group: int | None = 256) -> TernaryWeight:
    """Scales that float16 holds."""
    return quantize(torch.randn(n, k), group, stride=16, scale_dtype=torch.float16)


def same(a: TernaryWeight, b: TernaryWeight) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return all(torch.equal(mine[key].double(), theirs[key].double()) for key in mine)


def files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


# A GGUF writer of our own, so that tests can write what write_stq1_0 refuses.


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf(
    tensors: list[tuple[str, tuple[int, ...], int, bytes]],
    metadata: list[bytes] | None = None,
    alignment: int = ALIGNMENT,
    version: int = 3,
) -> bytes:
    """A file of (name, dims innermost first, type id, data)."""
    metadata = metadata or []
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata)) + b"".join(metadata)
    offset, data = 0, b""
    for name, dims, type_id, content in tensors:
        head += string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_id, offset)
        data += content + bytes(-len(content) % alignment)
        offset = len(data)
    return head + bytes(-len(head) % alignment) + data


def alignment_entry(value: int) -> bytes:
    return string("general.alignment") + struct.pack("<II", 4, value)


def array_entry(key: str, kind: int, count: int, content: bytes) -> bytes:
    return string(key) + struct.pack("<IIQ", 9, kind, count) + content


SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
RICH_METADATA = [
    string("general.architecture") + struct.pack("<I", 8) + string("llama"),
    *(
        string(f"scalar.{kind}") + struct.pack("<I", kind) + bytes(size)
        for kind, size in SCALAR_BYTES.items()
    ),
    array_entry("tokens", 8, 3, string("a") + string("") + string("long token")),
    array_entry("scores", 6, 5, bytes(20)),
    array_entry("nothing", 8, 0, b""),
]


@pytest.fixture
def file(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        path = tmp_path / "weights.gguf"
        path.write_bytes(content)
        return path

    return write


# Blocks


@pytest.mark.parametrize("group", [256, None])
def test_golden_block(group: int | None) -> None:
    blocks = encode_stq1_0(quantize(golden_weight(), group, stride=16))
    assert blocks.numpy().tobytes() == GOLDEN


def test_golden_block_decodes_to_the_reference() -> None:
    weight = decode_stq1_0(torch.tensor(list(GOLDEN), dtype=torch.uint8)[None])
    lanes, scale = reference.quantize(golden_weight(), 256, 16)
    expected = reference.from_blocks(lanes.float(), 256, 16) * scale
    assert scale.item() == 0.47265625
    assert torch.equal(weight.dequantize(), expected)


@pytest.mark.parametrize(("n", "k"), [(1, 256), (3, 512), (7, 2048)])
def test_any_block_is_kept_byte_for_byte(n: int, k: int) -> None:
    blocks = torch.randint(0, 256, (n, k // 256, 42), dtype=torch.uint8)
    blocks[..., 41] %= 0x7C  # a finite scale >= 0
    blocks = blocks.view(n, -1)
    assert torch.equal(encode_stq1_0(decode_stq1_0(blocks)), blocks)


@pytest.mark.parametrize(("group", "blocks"), [(None, 6), (512, 2), (768, 3), (1280, 5)])
def test_scale_is_repeated_in_the_blocks_of_its_group(group: int | None, blocks: int) -> None:
    weight = random_weight(3, 1536, group)
    scale = encode_stq1_0(weight).view(3, 6, 42)[..., 40:].contiguous().view(torch.float16)[..., 0]
    for block in range(6):
        assert torch.equal(scale[:, block], weight.scale[:, block // blocks])


def test_released_planes_are_written() -> None:
    weight = random_weight(4, 512)
    blocks = encode_stq1_0(weight)
    weight.prepack(release=True)
    assert torch.equal(encode_stq1_0(weight), blocks)


@pytest.mark.parametrize(
    ("weight", "text"),
    [
        (lambda: quantize(torch.randn(2, 576)), "K % 256 == 0, got K=576"),
        (lambda: quantize(torch.randn(2, 512)), "stride 16, got stride 1"),
        (lambda: random_weight(2, 512, 128), "got group 128"),
        (lambda: random_weight(2, 768, 320), "got group 320"),
        (lambda: quantize(torch.randn(2, 2, 256), stride=16), r"shape \(N, K\), got \(2, 2, 256\)"),
    ],
)
def test_encode_refuses(weight: Callable[[], TernaryWeight], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        encode_stq1_0(weight())


def with_scale(value: float) -> TernaryWeight:
    weight = quantize(torch.randn(2, 512), 256, stride=16)
    weight.scale.fill_(0.5)
    weight.scale[1, 1] = value
    return weight


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("round_scale", [False, True])
def test_encode_refuses_bad_scales(value: float, round_scale: bool) -> None:
    with pytest.raises(ValueError, match=r"finite scales >= 0, got .* = \(1, 1\), 1 such"):
        encode_stq1_0(with_scale(value), round_scale)


@pytest.mark.parametrize("value", [70000.0, 1e-9])
@pytest.mark.parametrize("round_scale", [False, True])
def test_encode_refuses_scales_beyond_float16(value: float, round_scale: bool) -> None:
    with pytest.raises(ValueError, match=r"float16 can hold, got .* = \(1, 1\), 1 such"):
        encode_stq1_0(with_scale(value), round_scale)


def test_inexact_scales_need_permission() -> None:
    weight = with_scale(0.1)
    with pytest.raises(ValueError, match=r"got 0.100000001 .*round_scale=True"):
        encode_stq1_0(weight)
    rounded = decode_stq1_0(encode_stq1_0(weight, round_scale=True))
    assert rounded.scale[1, 1] == torch.tensor(0.1).half()


def test_zero_scale_is_kept() -> None:
    weight = quantize(torch.zeros(2, 256), stride=16)
    assert torch.equal(decode_stq1_0(encode_stq1_0(weight)).dequantize(), torch.zeros(2, 256))


@pytest.mark.parametrize(
    "blocks",
    [
        torch.zeros(2, 41, dtype=torch.uint8),
        torch.zeros(84, dtype=torch.uint8),
        torch.zeros(0, 42, dtype=torch.uint8),
        torch.zeros(2, 0, dtype=torch.uint8),
        torch.zeros(2, 42, dtype=torch.int8),
    ],
)
def test_decode_refuses_shapes(blocks: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="blocks must be uint8 of shape"):
        decode_stq1_0(blocks)


@pytest.mark.parametrize("high", [0x7E, 0x7C, 0xFC, 0xBC])  # NaN, inf, -inf, -1
def test_decode_refuses_bad_scales(high: int) -> None:
    blocks = torch.zeros(2, 84, dtype=torch.uint8)
    blocks[1, 83] = high
    with pytest.raises(ValueError, match=r"finite scales >= 0, got .* = \(1, 1\)"):
        decode_stq1_0(blocks)


# Files


def test_write_then_read(tmp_path: Path) -> None:
    weights = {"blk.0.ffn_up.weight": random_weight(7, 512), "ünter": random_weight(1, 256, None)}
    path = tmp_path / "weights.gguf"
    write_stq1_0(path, weights)
    found = read_stq1_0(path)
    assert list(found) == list(weights)
    assert same(found["blk.0.ffn_up.weight"], weights["blk.0.ffn_up.weight"])
    assert torch.equal(found["ünter"].dequantize(), weights["ünter"].dequantize())
    assert files(tmp_path) == ["weights.gguf"]


def test_read_then_write_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    write_stq1_0(first, {"a": random_weight(5, 768), "b": random_weight(3, 256)})
    write_stq1_0(str(second), read_stq1_0(str(first)))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 32, 64])
def test_reads_a_file_of_another_writer(
    file: Callable[[bytes], Path], version: int, alignment: int
) -> None:
    tensors = [
        ("norm", (300,), 0, bytes(1200)),
        ("gate", (256, 2), 43, GOLDEN * 2),
        ("embedding", (256, 3), 1, bytes(1536)),
        ("up", (512, 1), 43, GOLDEN * 2),
    ]
    path = file(gguf(tensors, [*RICH_METADATA, alignment_entry(alignment)], alignment, version))
    found = read_stq1_0(path)
    assert {name: tuple(w.shape) for name, w in found.items()} == {"gate": (2, 256), "up": (1, 512)}
    assert list(read_stq1_0(path, ["up"])) == ["up"]
    for weight in found.values():
        assert encode_stq1_0(weight).numpy().tobytes() == GOLDEN * 2


def test_last_tensor_may_lack_padding(file: Callable[[bytes], Path]) -> None:
    content = gguf([("w", (256, 1), 43, GOLDEN)])
    path = file(content[: len(content) - (-42 % ALIGNMENT)])
    assert len(read_stq1_0(path)) == 1


def test_tensors_in_any_order(file: Callable[[bytes], Path]) -> None:
    head = b"GGUF" + struct.pack("<IQQ", 3, 2, 0)
    head += string("second") + struct.pack("<I2QIQ", 2, 256, 1, 43, 64)
    head += string("first") + struct.pack("<I2QIQ", 2, 256, 1, 43, 0)
    head += bytes(-len(head) % ALIGNMENT)
    other = bytes(40) + b"\x00\x3c"
    found = read_stq1_0(file(head + GOLDEN + bytes(22) + other))
    assert encode_stq1_0(found["first"]).numpy().tobytes() == GOLDEN
    assert encode_stq1_0(found["second"]).numpy().tobytes() == other


def test_type_ids(file: Callable[[bytes], Path]) -> None:
    for type_id in (42, 43):
        assert len(read_stq1_0(file(gguf([("w", (256, 1), type_id, GOLDEN)])))) == 1
    path = file(gguf([("w", (256, 1), 40, GOLDEN)]))
    with pytest.raises(ValueError, match=r"'w' must be of type STQ1_0 .*, got type id 40"):
        read_stq1_0(path, ["w"])
    with pytest.raises(ValueError, match=r"must hold a tensor of type STQ1_0 .* got types: id 40"):
        read_stq1_0(path)
    assert len(read_stq1_0(path, type_id=40)) == 1
    assert len(read_stq1_0(path, ["w"], type_id=40)) == 1


def test_older_type_id_is_written(tmp_path: Path) -> None:
    path = tmp_path / "weights.gguf"
    write_stq1_0(path, {"w": random_weight(1, 256)}, type_id=42)
    assert len(read_stq1_0(path, type_id=42)) == 1
    with pytest.raises(ValueError, match="got types: id 42"):
        read_stq1_0(path, type_id=43)


def test_other_types_and_missing_names_are_refused_by_name(file: Callable[[bytes], Path]) -> None:
    path = file(gguf([("norm", (8,), 0, bytes(32)), ("w", (256, 1), 43, GOLDEN)]))
    with pytest.raises(ValueError, match=r"tensor 'norm' must be of type STQ1_0 .*, got type F32"):
        read_stq1_0(path, ["norm"])
    with pytest.raises(ValueError, match="must hold a tensor 'gone', got 2 others"):
        read_stq1_0(path, ["w", "gone"])
    with pytest.raises(ValueError, match="got types: F32"):
        read_stq1_0(file(gguf([("norm", (8,), 0, bytes(32))])))
    with pytest.raises(ValueError, match="got types: none"):
        read_stq1_0(file(gguf([])))


@pytest.mark.parametrize(
    ("dims", "data"),
    [
        ((256,), GOLDEN),
        ((256, 1, 1), GOLDEN),
        ((576, 1), bytes(95)),
        ((0, 1), b""),
        ((256, 0), b""),
        ((2**60, 2**60), GOLDEN),
    ],
)
def test_dimensions_that_stq1_0_cannot_have(
    file: Callable[[bytes], Path], dims: tuple[int, ...], data: bytes
) -> None:
    with pytest.raises(ValueError, match=r"tensor 'w' must (have dimensions|take)"):
        read_stq1_0(file(gguf([("w", dims, 43, data)])))


@pytest.mark.parametrize("size", [66, 75, 105, 42 + ALIGNMENT])
def test_tensors_of_another_size_are_another_type(file: Callable[[bytes], Path], size: int) -> None:
    tensors = [("w", (256, 1), 43, bytes(size)), ("next", (8,), 0, bytes(32))]
    with pytest.raises(ValueError, match=r"'w' must take 42 bytes .* got room for"):
        read_stq1_0(file(gguf(tensors)))


def test_bad_scale_in_a_file_names_the_tensor(file: Callable[[bytes], Path]) -> None:
    path = file(gguf([("w", (256, 1), 43, GOLDEN[:40] + b"\x00\x7e")]))
    with pytest.raises(ValueError, match=r"tensor 'w': .*finite scales >= 0, got nan"):
        read_stq1_0(path)


VALID = gguf([("w", (256, 1), 43, GOLDEN), ("v", (512, 1), 43, GOLDEN * 2)], RICH_METADATA)
DATA_START = len(VALID) - 64 - 96  # two tensors, each padded


def test_truncation_anywhere_is_refused(file: Callable[[bytes], Path]) -> None:
    enough = len(VALID) - (-84 % ALIGNMENT)
    for size in range(enough):
        with pytest.raises(ValueError, match=r"weights.gguf: (truncated|must be|tensor)"):
            read_stq1_0(file(VALID[:size]))
    assert len(read_stq1_0(file(VALID[:enough]))) == 2


def test_flipped_bytes_never_crash(file: Callable[[bytes], Path]) -> None:
    refused = 0
    for at, flip in itertools.product(range(DATA_START), (0x01, 0x80, 0xFF)):
        broken = bytearray(VALID)
        broken[at] ^= flip
        try:
            read_stq1_0(file(bytes(broken)))
        except ValueError as error:
            refused += "weights.gguf: " in str(error)
    assert refused > DATA_START  # what remains is in names and unused values


def set_field(offset: int, form: str, value: int) -> bytes:
    broken = bytearray(VALID)
    struct.pack_into(form, broken, offset, value)
    return bytes(broken)


def descriptions() -> int:
    return VALID.index(string("w") + struct.pack("<I", 2))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "must be a GGUF file, got b''"),
        (b"GG", "must be a GGUF file, got b'GG'"),
        (b"PK\x03\x04" + VALID[4:], "must be a GGUF file, got b'PK"),
        (set_field(4, "<I", 1), "version 2 or 3, got version 1"),
        (set_field(4, "<I", 4), "version 2 or 3, got version 4"),
        (set_field(4, ">I", 3), "got a big-endian file of version 3"),
        (set_field(8, "<Q", 2**63), "truncated: .* tensor descriptions"),
        (set_field(8, "<Q", 3), "truncated|must"),
        (set_field(16, "<Q", 2**64 - 1), "truncated: .* metadata entries"),
        (set_field(24, "<Q", 2**62), "truncated: a metadata key"),
        (set_field(descriptions(), "<Q", 2**40), "truncated: a tensor's name"),
        (set_field(descriptions() + 9, "<I", 0), "'w' must have 1 to 4 dimensions, got 0"),
        (set_field(descriptions() + 9, "<I", 2**31), "1 to 4 dimensions, got 2147483648"),
        (set_field(descriptions() + 33, "<Q", 8), "'w' must start at a multiple of 32"),
        (set_field(descriptions() + 33, "<Q", 2**63), "'w' must start .* inside the file"),
        (set_field(descriptions() + 33, "<Q", 64), "tensor .* must take"),
    ],
)
def test_broken_fields(file: Callable[[bytes], Path], content: bytes, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        read_stq1_0(file(content))


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ([array_entry("a", 4, 2**62, b"")], "truncated: the value of 'a'"),
        ([array_entry("a", 8, 2**61, b"")], "truncated: the value of 'a'"),
        ([array_entry("a", 9, 1, bytes(64))], "'a' must be a scalar, .* got type 9"),
        ([string("a") + struct.pack("<I", 13) + bytes(8)], "'a' must be a scalar, .* got type 13"),
        ([string("a") + struct.pack("<IQ", 8, 2**50)], "truncated: the value of 'a'"),
        ([struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<IB", 0, 0)], "must be UTF-8"),
        ([alignment_entry(0)], "general.alignment must be .*, got 0"),
        ([alignment_entry(12)], "general.alignment must be .*, got 12"),
        (
            [string("general.alignment") + struct.pack("<If", 6, 32.0)],
            r"general.alignment must be .* \(type 6\)",
        ),
        ([string("a") + struct.pack("<IB", 0, 0)] * 2, "metadata keys must differ, got 'a' twice"),
    ],
)
def test_broken_metadata(file: Callable[[bytes], Path], metadata: list[bytes], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        read_stq1_0(file(gguf([("w", (256, 1), 43, GOLDEN)], metadata)))


def test_tensor_names_must_differ(file: Callable[[bytes], Path]) -> None:
    with pytest.raises(ValueError, match="tensor names must differ, got 'w' twice"):
        read_stq1_0(file(gguf([("w", (256, 1), 43, GOLDEN)] * 2)))


def test_random_bytes_after_the_magic_number(file: Callable[[bytes], Path]) -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        noise = b"GGUF" + struct.pack("<I", 3) + random.bytes(int(random.integers(0, 300)))
        with pytest.raises(ValueError, match=r"weights.gguf: "):
            read_stq1_0(file(noise))


def test_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_stq1_0(tmp_path / "gone.gguf")


# Writing


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        (lambda: {}, "at least one tensor, got none"),
        (lambda: {"": random_weight(1, 256)}, "1 to 63 bytes, got 0"),
        (lambda: {"ü" * 32: random_weight(1, 256)}, "1 to 63 bytes, got 64"),
        (lambda: {"a": quantize(torch.randn(1, 256))}, "tensor 'a': .* stride 16"),
    ],
)
def test_write_refuses(
    tmp_path: Path, weights: Callable[[], dict[str, TernaryWeight]], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        write_stq1_0(tmp_path / "weights.gguf", weights())
    assert files(tmp_path) == []


def test_write_refuses_other_type_ids(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="type_id must be 42 or 43, got 40"):
        write_stq1_0(tmp_path / "weights.gguf", {"a": random_weight(1, 256)}, type_id=40)


def test_write_rounds_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "weights.gguf"
    weight = with_scale(0.1)
    with pytest.raises(ValueError, match=r"tensor 'w': .*round_scale=True"):
        write_stq1_0(path, {"w": weight})
    write_stq1_0(path, {"w": weight}, round_scale=True)
    assert torch.equal(read_stq1_0(path)["w"].scale, weight.scale.half())


@pytest.fixture
def _failing_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, target: Path) -> None:
        raise OSError("disk trouble")

    monkeypatch.setattr(Path, "replace", fail)


@pytest.mark.usefixtures("_failing_rename")
def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.gguf"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="disk trouble"):
        write_stq1_0(path, {"w": random_weight(1, 256)})
    assert path.read_bytes() == b"old"
    assert files(tmp_path) == ["weights.gguf"]
