"""Workspaces in files: what comes back, and what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from alignops.attention import KVPool, PoolExhausted, RopeSpec, Workspace
from tests.attention.test_workspace import idle, keys, make_pool, values, write


@pytest.fixture
def ws() -> Workspace:
    ws = Workspace(make_pool())
    common, a, b = (ws.new_block(name) for name in ("common", "a", "b"))
    write(ws, common, list(range(20)))
    write(ws, a, [50, 51, 52])
    ws.move(a, common, mode="splice")
    write(ws, a, [60])
    twin = ws.fork_block(common)
    ws.evict(common, 3, 6, close_gap=False)
    eve = ws.add_worker("Eve", [common, twin])
    ann = ws.add_worker("Ann", [common, b, a], at_index=0)
    ws.add_worker("Bob", [common, a, b], at_index=1)
    ws.set_weight(ann, common, bias=-2.0, gain=0.5)
    ws.finish_worker(eve, keep="frozen")
    return ws


def test_a_workspace_comes_back(ws: Workspace, tmp_path: Path) -> None:
    ws.save(tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    for pool in (None, make_pool()):
        back = Workspace.load(tmp_path / "x.safetensors", pool)
        assert back.workers == ws.workers
        assert [back.worker_name(w) for w in back.workers] == ["Ann", "Bob"]
        for one, two in zip(ws.blocks, back.blocks, strict=True):
            assert (one.name, one.tokens, one.length) == (two.name, two.tokens, two.length)
            assert one.segments.tolist() == two.segments.tolist()
            assert values(ws, one) == values(back, two)
            assert all(map(torch.equal, keys(ws, one, 1), keys(back, two, 1)))
        assert [b.id for b in back.view(1)] == [b.id for b in ws.view(1)]
        assert back.native.weights(1) == [(0, -2.0, 0.5)]
        assert idle(back)
        plan, other = ws.plan([1, 2]), back.plan([1, 2])
        for name in ("n", "first", "s0", "r0"):
            ours, theirs = plan.decode()["segment"][name], other.decode()["segment"][name]
            assert ours.tolist() == theirs.tolist()
        assert plan.decode()["pair"].tolist() == other.decode()["pair"].tolist()
        assert plan.decode()["weight"].tolist() == other.decode()["weight"].tolist()
        ws.abort(plan)
        back.abort(other)


def test_an_empty_workspace(tmp_path: Path) -> None:
    Workspace(make_pool()).save(tmp_path / "x")
    assert Workspace.load(tmp_path / "x").blocks == ()


def test_damaged_and_foreign_files_are_refused(ws: Workspace, tmp_path: Path) -> None:
    path = tmp_path / "x"
    ws.save(path)
    whole = path.read_bytes()
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    for cut in (0, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=str(path)):
            Workspace.load(path)
    path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    with pytest.raises(ValueError, match="checksum"):
        Workspace.load(path)
    changes = [
        ({"format": "else"}, "format"),
        ({"version": "2"}, "version"),
        ({"layout": header["layout"].replace("Ann", "Eva")}, "checksum"),
    ]
    for change, text in changes:
        save_file(tensors, path, {**header, **change})
        with pytest.raises(ValueError, match=text):
            Workspace.load(path)
    del tensors["v.1"]
    save_file(tensors, path, header)
    with pytest.raises(ValueError, match=r"v\.1"):
        Workspace.load(path)
    with pytest.raises(OSError, match="nowhere"):
        Workspace.load(tmp_path / "nowhere")


def test_pools_that_do_not_fit(ws: Workspace, tmp_path: Path) -> None:
    ws.save(tmp_path / "x")
    with pytest.raises(PoolExhausted, match="load"):
        Workspace.load(tmp_path / "x", make_pool(pages=2))
    with pytest.raises(ValueError, match="fit the pool"):
        Workspace.load(tmp_path / "x", make_pool(page_size=32))
    pool = KVPool(2, 1, 8, dtype=torch.float32, page_size=16, num_pages=9, rope=RopeSpec.default(8))
    with pytest.raises(ValueError, match="rope types"):
        Workspace.load(tmp_path / "x", pool)
    assert pool.free_pages == 9
