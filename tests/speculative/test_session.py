"""Rounds under the caller's control."""

from __future__ import annotations

import itertools
import signal
from typing import Any

import pytest
import torch
from torch import Tensor

from alignops.integrations.speculative import HFAdapter
from alignops.speculative.adapter import Batch, Drafts
from alignops.speculative.drafters import FunctionDrafter, PromptLookup
from alignops.speculative.invariants import CheckedAdapter
from alignops.speculative.model_drafter import ModelDrafter
from alignops.speculative.session import SpecSession
from tests.speculative.models import VOCAB, model, oracle, prompts, texts


def _session(drafter: Any, kind: str = "rope", rows: int = 3, **options: Any) -> SpecSession:
    return SpecSession(HFAdapter(model(kind)), drafter, rows=rows, capacity=64, **options)


def _finish(session: SpecSession) -> None:
    while session.active:
        session.commit(session.verify(session.draft()))


def _round(session: SpecSession) -> list[list[int]]:
    return session.commit(session.verify(session.draft())).tokens


def test_sequences_come_and_go() -> None:
    asked = prompts([4, 7, 1, 5])
    alone = texts(model(), asked, 12)
    session = _session(FunctionDrafter(oracle(asked, alone, 0.7)), debug=True)
    first, second = session.prefill(asked[:2], [12, 5])
    assert (session.active, session.free) == ([0, 1], [2])
    _round(session)
    third = session.add(asked[2], 12)
    assert session.active == [first, second, third]
    while second in session.active:
        _round(session)
    assert session.tokens_of(second).tolist() == asked[1].tolist() + alone[1][:5]
    assert second not in session.free  # until it is removed
    session.remove(second)
    assert session.add(asked[3], 12) == second
    _finish(session)
    for row, i in ((first, 0), (third, 2), (second, 3)):
        assert session.tokens_of(row).tolist() == asked[i].tolist() + alone[i]
    with pytest.raises(RuntimeError, match="no row is active"):
        session.draft()


@pytest.mark.parametrize("layout", ["ragged", "defer", "realign"])
def test_parked_sequences_go_on_in_any_row(layout: str) -> None:
    asked = prompts([4, 9, 2])
    alone = texts(model(), asked, 15)
    drafter = ModelDrafter(HFAdapter(model()))
    session = _session(drafter, layout=layout, debug=True, num_draft_tokens=2)
    session.prefill(asked, 15)
    _round(session)
    parked = [session.park(row) for row in (0, 1)]
    assert session.free == [0, 1]
    _round(session)
    session.resume(1, parked[0])
    _round(session)
    session.resume(0, parked[1])
    _finish(session)
    got = [session.tokens_of(row).tolist() for row in (1, 0, 2)]
    assert got == [p.tolist() + t for p, t in zip(asked, alone, strict=True)]
    assert session.stats.acceptance == 1  # keys and values of the drafter came along
    with pytest.raises(ValueError, match="park: row"):
        session.park(0)


@pytest.mark.parametrize("layout", ["ragged", "defer", "realign", "rollback"])
@pytest.mark.parametrize("kind", ["rope", "mixed"])
def test_scripted_rounds_leave_the_state_of_plain_feeding(kind: str, layout: str) -> None:
    """All vectors of accepted drafts of two rows with three drafts."""
    asked = prompts([5, 3])
    net = model(kind)
    for given in itertools.product(range(4), repeat=2):
        drafts = torch.randint(VOCAB, (2, 3), generator=torch.Generator().manual_seed(1))
        session = SpecSession(
            HFAdapter(net),
            FunctionDrafter(lambda tokens, lengths, k, d=drafts: d[:, :k]),
            rows=2,
            capacity=32,
            num_draft_tokens=3,
            rule="scripted",
            params={"given": torch.tensor(given, dtype=torch.int32)},
            layout=layout,
            debug=True,
        )
        session.prefill(asked, 20)
        done = _round(session)
        counts = [min(given)] * 2 if layout == "rollback" else list(given)
        for row, text in enumerate(done):
            assert text[: counts[row]] == drafts[row, : counts[row]].tolist()
            assert len(text) == counts[row] + 1
        # Every later choice is that of the target for the text so far.
        session.params = {"given": 0}
        _round(session)
        for row in range(2):
            tokens = session.tokens_of(row)
            with torch.no_grad():
                best = net(input_ids=tokens[None, :-1], use_cache=False).logits[0, -1].argmax()
            assert tokens[-1] == best


class _Fragile(PromptLookup):
    """Fails in some calls."""

    def __init__(self, inner: Any, failing: set[int]) -> None:
        super().__init__(1)
        self.inner = inner
        self.failing = failing
        self.calls = 0

    def propose(self, batch: Batch, k: Tensor, width: int) -> Drafts:
        drafts: Drafts = self.inner.propose(batch, k, width)
        self.calls += 1
        if self.calls in self.failing:
            raise KeyboardInterrupt
        return drafts

    def __getattribute__(self, name: str) -> Any:
        if name in ("start", "add", "commit", "remove", "park", "resume"):
            return getattr(object.__getattribute__(self, "inner"), name)
        return object.__getattribute__(self, name)


@pytest.mark.parametrize("layout", ["ragged", "defer", "realign", "rollback"])
def test_interrupted_rounds_are_made_again(layout: str) -> None:
    asked = prompts([4, 9, 2])
    alone = texts(model(), asked, 12)
    drafter = _Fragile(ModelDrafter(HFAdapter(model())), {2, 3})
    session = _session(drafter, layout=layout, num_draft_tokens=2)
    forward = session.target.forward
    calls = itertools.count()

    def fragile(*args: Any, **kwargs: Any) -> Tensor:
        logits = forward(*args, **kwargs)
        if next(calls) in (1, 3):  # behind the forward, which has written to the cache
            raise KeyboardInterrupt
        return logits

    session.prefill(asked, 12)
    session.target.forward = fragile  # type: ignore[method-assign]
    interrupts = 0
    while session.active:
        try:
            _round(session)
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts == 4
    got = [session.tokens_of(row).tolist() for row in range(3)]
    assert got == [p.tolist() + t for p, t in zip(asked, alone, strict=True)]
    assert session.stats.acceptance == 1


@pytest.mark.parametrize("layout", ["ragged", "defer", "realign", "rollback"])
def test_ctrl_c_waits_for_the_end_of_a_commit(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = prompts([4, 9, 2])
    alone = texts(model(), asked, 12)
    session = _session(ModelDrafter(HFAdapter(model())), layout=layout, num_draft_tokens=2)
    session.prefill(asked, 12)
    commit = session.placement.commit

    def interrupted(emitted: Any) -> None:
        signal.raise_signal(signal.SIGINT)  # text is written, lengths are not
        commit(emitted)

    monkeypatch.setattr(session.placement, "commit", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupts = 0
    try:
        while session.active:
            try:
                _round(session)
            except KeyboardInterrupt:
                interrupts += 1
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert interrupts == session.stats.rounds > 0
    got = [session.tokens_of(row).tolist() for row in range(3)]
    assert got == [p.tolist() + t for p, t in zip(asked, alone, strict=True)]


@pytest.mark.parametrize("layout", ["ragged", "defer", "realign"])
def test_a_prompt_that_was_interrupted_leaves_nothing(layout: str) -> None:
    asked = prompts([4, 21, 2])
    alone = texts(model(), asked, 12)
    drafter = ModelDrafter(HFAdapter(model()))
    session = _session(drafter, layout=layout, num_draft_tokens=2, debug=True)
    session.prefill([asked[0]], 12)
    _round(session)
    add = drafter.add

    def fragile(row: int, tokens: Tensor) -> None:
        add(row, tokens)
        raise KeyboardInterrupt

    drafter.add = fragile  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        session.add(asked[1], 12)
    drafter.add = add  # type: ignore[method-assign]
    assert (session.active, session.free) == ([0], [1, 2])
    session.prefill(asked[1:], 12, rows=[2, 1])
    _finish(session)
    got = [session.tokens_of(row).tolist() for row in (0, 2, 1)]
    assert got == [p.tolist() + t for p, t in zip(asked, alone, strict=True)]


def test_rows_without_drafts_and_with() -> None:
    """Rows of a round may have 0 to K drafts."""
    asked = prompts([4, 9, 2])
    alone = texts(model(), asked, 12)
    right = oracle(asked, alone, 1.0)

    def some(tokens: Tensor, lengths: Tensor, k: int) -> Tensor:
        ids = right(tokens, lengths, k)
        for row in range(len(ids)):
            ids[row, row + int(lengths[row]) % 2 :] = -1
        return ids

    session = _session(FunctionDrafter(some), num_draft_tokens=3, debug=True)
    session.prefill(asked, 12)
    _finish(session)
    assert [session.tokens_of(r)[len(asked[r]) :].tolist() for r in range(3)] == alone
    assert session.stats.acceptance == 1


def test_finished_rows_are_frozen() -> None:
    asked = prompts([4, 9])
    session = _session(PromptLookup(2), rows=2)
    session.prefill(asked, [1, 12])
    done = session.commit(session.verify(session.draft()))
    assert done.finished == ["length", ""]
    before, tokens = session.tokens_of(0), session.stats.tokens
    emitted = len(_round(session)[1])
    assert torch.equal(session.tokens_of(0), before)
    assert session.stats.tokens == tokens + emitted


def test_the_last_place_of_a_model_is_usable() -> None:
    """Learned positions end at 128; columns beyond them are asked for by no one."""
    net = model("learned")
    asked = prompts([120, 3])
    expected = texts(net, asked, 8)
    session = SpecSession(
        HFAdapter(net),
        FunctionDrafter(oracle(asked, expected, 0.9)),
        rows=2,
        capacity=128,
        num_draft_tokens=7,
    )
    session.prefill(asked, 8)
    _finish(session)
    assert [session.tokens_of(r)[len(asked[r]) :].tolist() for r in range(2)] == expected


def test_errors() -> None:
    session = _session(None, rows=1)
    for prompt, count, text in (
        (torch.tensor([1]), -1, "max_new_tokens"),
        (torch.tensor([1, 2]), 63, "capacity"),
        (torch.tensor([], dtype=torch.int64), 1, "BOS"),
    ):
        with pytest.raises(ValueError, match=text):
            session.add(prompt, count)
    session.add(torch.tensor([3]), 4)
    with pytest.raises(ValueError, match="rows must be"):
        session.add(torch.tensor([3]), 4)
    with pytest.raises(ValueError, match="rollback"):
        _session(PromptLookup(2), rule="nudge", layout="rollback")
    with pytest.raises(ValueError, match="resume: row"):
        session.resume(0, None)  # type: ignore[arg-type]

    def wide(tokens: Tensor, lengths: Tensor, k: int) -> Tensor:
        return torch.zeros(1, k + 1, dtype=torch.int64)

    session = _session(FunctionDrafter(wide), rows=1)
    session.add(torch.tensor([3]), 4)
    with pytest.raises(ValueError, match="propose"):
        session.draft()


def test_a_rule_that_needs_drafts_does_not_wait_for_them() -> None:
    silent = FunctionDrafter(lambda tokens, lengths, k: torch.full((1, k), -1))
    session = _session(silent, rows=1, rule="rsd")
    session.add(torch.tensor([3]), 4)
    with pytest.raises(RuntimeError, match="rsd needs drafts"):
        _finish(session)


@pytest.mark.parametrize("fault", ["positions", "mask", "kept"])
def test_checks_find_faults(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from alignops.speculative import caches, placement

    asked = prompts([4, 9])
    session = _session(FunctionDrafter(oracle(asked, [[], []], 0.0)), rows=2, debug=True)
    assert isinstance(session.target, CheckedAdapter)
    session.prefill(asked, 12)
    build_mask, build_positions = caches.build_mask, caches.build_positions
    if fault == "positions":
        monkeypatch.setattr(
            caches, "build_positions", lambda c, q, **options: build_positions(c + 1, q, **options)
        )
    elif fault == "mask":
        monkeypatch.setattr(
            caches,
            "build_mask",
            lambda *args, **options: tuple(m * 0 for m in build_mask(*args, **options)),
        )
    else:  # a rejected draft stays
        commit = placement.Placement.commit
        monkeypatch.setattr(
            placement.Placement,
            "commit",
            lambda self, emitted: commit(self, [count + 1 for count in emitted]),
        )
    with pytest.raises((AssertionError, ValueError), match=r"I2|I3|row"):
        _finish(session)
