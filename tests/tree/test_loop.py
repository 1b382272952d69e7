"""The search loop against the plain search; budgets, mistakes of callbacks, interruptions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignops import tree
from alignops.reference.tree import search as plain
from alignops.tree import Actions, Budget, Context, Searcher
from tests.tree.worlds import World

WORLDS = [World(seed, 4, depth=5) for seed in range(3)]


def propose(context: Context) -> Actions:
    ids, lengths = context.tokens(pad=-1)
    rows = [
        world.evaluate(tuple(ids[i, : lengths[i]].tolist()))
        for i, world in enumerate(context.states)
    ]
    return Actions(
        actions=torch.arange(4).expand(len(context), 4),
        priors=torch.tensor([row.prior or [0.25] * 4 for row in rows]),
        terminal=torch.tensor([not row.prior for row in rows]),
        values=torch.tensor([row.value for row in rows]),
    )


def test_one_leaf_at_a_time_is_the_plain_search() -> None:
    result = tree.search(
        WORLDS, propose, policy=tree.muzero(), batch_leaves=1, budget=Budget(sims=70)
    )
    assert result.status == "sims"
    assert result.counts["sims"] == 70
    for t, world in enumerate(WORLDS):
        root, _ = plain.search(world.evaluate, 70, plain.score_muzero)
        visits = root.edges()[1]
        assert result.distribution[t].tolist() == pytest.approx((visits / visits.sum()).tolist())
        assert float(result.value[t]) == pytest.approx(root.value, abs=1e-6)
        assert visits[int(result.slot[t])] == visits.max()
        assert result.action[t] == result.slot[t]


def test_a_net_apart_for_values_and_logits_in_rows() -> None:
    def evaluate(context: Context) -> torch.Tensor:
        context.spend(tokens=3, nfe=2)
        values = propose(context).values
        assert values is not None
        return values

    def ragged(context: Context) -> Actions:
        actions = propose(context)
        assert actions.priors is not None
        return Actions(
            actions=actions.actions.reshape(-1),
            logits=actions.priors.log().reshape(-1) + 7,
            ptr=torch.arange(len(context) + 1) * 4,
            terminal=actions.terminal,
        )

    arguments = {"policy": tree.lightzero(), "budget": Budget(sims=40), "batch_leaves": 3}
    one = tree.search(WORLDS, propose, **arguments)
    two = tree.search(WORLDS, ragged, evaluate, **arguments)
    for a, b in zip(one.distribution, two.distribution, strict=True):
        assert torch.equal(a, b)
    assert two.counts["tokens"] == 3 * (two.counts["tokens"] // 3) > 0
    assert two.counts["nfe"] > 0


@pytest.mark.parametrize(
    ("budget", "status"),
    [
        (Budget(sims=10, seconds=1e9), "sims"),
        (Budget(seconds=0.0), "seconds"),
        (Budget(evals=20), "evals"),
        (Budget(nodes=30), "nodes"),
        (Budget(sims=0), "sims"),
    ],
)
def test_the_first_bound_ends_the_search(budget: Budget, status: str) -> None:
    result = tree.search(WORLDS, propose, budget=budget, batch_leaves=2)
    assert result.status == status
    result.store.validate()


def test_a_world_that_is_known_is_exhausted() -> None:
    def dead(context: Context) -> Actions:
        empty = torch.empty(len(context), 0)
        return Actions(empty.long(), empty, values=torch.full((len(context),), 0.5))

    result = tree.search(["a", "b"], dead, budget=Budget(sims=100))
    assert result.status == "exhausted"
    assert result.action.tolist() == result.slot.tolist() == [-1, -1]
    assert result.value.tolist() == [0.5, 0.5]
    assert tree.search([], propose, budget=Budget(sims=5)).status == "exhausted"


def test_before_the_first_visit_priors_are_the_answer() -> None:
    searcher = Searcher(WORLDS, propose)
    assert [len(x) for x in searcher.result().distribution] == [0, 0, 0]
    searcher.step()
    for t, world in enumerate(WORLDS):
        prior = world.evaluate(()).prior
        assert searcher.result().distribution[t].tolist() == pytest.approx(prior)
        assert int(searcher.result().slot[t]) == max(range(4), key=prior.__getitem__)


def test_a_store_goes_on() -> None:
    options = {"policy": tree.muzero(), "batch_leaves": 2}
    whole = tree.search(WORLDS, propose, budget=Budget(sims=60), **options)
    half = tree.search(WORLDS, propose, budget=Budget(sims=30), **options)
    rest = tree.search(WORLDS, propose, budget=Budget(sims=30), store=half.store, batch_leaves=2)
    for a, b in zip(whole.distribution, rest.distribution, strict=True):
        assert torch.equal(a, b)


def test_mistakes_of_callbacks_leave_the_trees_usable() -> None:
    searcher = Searcher(WORLDS, propose, batch_leaves=3)
    searcher.step(4)
    before = searcher.store.column("fn")[:, 0].clone()

    def answer(**changes: Any) -> Any:
        return lambda context: propose(context)._replace(**changes)

    def fail(context: Context) -> Actions:
        raise KeyError("no such net")

    cases = [
        (fail, tree.CallbackError, r"propose raised KeyError\('no such net'\)"),
        (answer(values=torch.ones(2, 2)), tree.CallbackError, "values must be a tensor of shape"),
        (answer(values=[1.0]), tree.CallbackError, "got list"),
        (answer(priors=None), tree.CallbackError, "must return priors or logits"),
        (answer(priors=torch.ones(1)), tree.CallbackError, "priors must be a tensor of shape"),
        (answer(terminal=torch.ones(99).bool()), tree.CallbackError, "terminal must be a tensor"),
    ]
    for callback, error, text in cases:
        searcher._propose = callback
        with pytest.raises(error, match=text) as caught:
            searcher.step()
        assert caught.value.nodes
        searcher.store.validate()
        assert int(searcher.store.column("pending").abs().sum()) == 0
        assert torch.equal(searcher.store.column("fn")[:, 0], before)
    searcher._propose = lambda context: propose(context)._replace(
        values=torch.full((len(context),), torch.nan)
    )
    with pytest.raises(tree.InvalidValueError, match="values must not be NaN, got one for node"):
        searcher.step()
    searcher._propose = propose
    searcher.step(3)
    searcher.store.validate()
    with pytest.raises(ValueError, match="evaluate must be given"):
        tree.search(WORLDS, lambda c: propose(c)._replace(values=None), budget=Budget(sims=3))


def test_ctrl_c_returns_what_was_found() -> None:
    calls = 0

    def interrupt(context: Context) -> Actions:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return propose(context)

    result = tree.search(WORLDS, interrupt, budget=Budget(sims=1000))
    assert result.status == "cancelled"
    assert result.counts["iterations"] == 5
    result.store.validate()
    assert int(result.store.column("pending").abs().sum()) == 0


def test_events_and_a_full_tree() -> None:
    events: list[dict[str, Any]] = []
    result = tree.search(
        WORLDS, propose, budget=Budget(sims=1000), capacity=20, on_event=events.append
    )
    assert result.status == "nodes"
    assert {"sims", "nodes", "depth_max", "root_value", "sims_per_s", "bytes"} <= events[0].keys()


def test_paths_padded_on_either_side() -> None:
    seen: list[tuple[list[list[int]], list[list[int]]]] = []

    def look(context: Context) -> Actions:
        seen.append((context.tokens(-9)[0].tolist(), context.tokens(-9, "left")[0].tolist()))
        return propose(context)

    tree.search(WORLDS, look, budget=Budget(sims=30), batch_leaves=2)
    for right, left in seen:
        for a, b in zip(right, left, strict=True):
            path = [x for x in a if x != -9]
            assert a == path + [-9] * (len(a) - len(path))
            assert b == [-9] * (len(a) - len(path)) + path


def test_budgets_out_of_range() -> None:
    with pytest.raises(ValueError, match="at least one bound"):
        Budget()
    with pytest.raises(ValueError, match="sims must be at least 0, got -1"):
        Budget(sims=-1)
    with pytest.raises(ValueError, match="batch_leaves must be at least 1, got 0"):
        Searcher(WORLDS, propose, batch_leaves=0)
    with pytest.raises(ValueError, match="store must have 3 trees"):
        Searcher(WORLDS, propose, store=tree.TreeStore(2))
