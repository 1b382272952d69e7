"""Acceptance of trees: every decision is the one of the definition, bit for bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from alignops.speculative import TreeOut, verify_tree
from alignops.speculative.verify import TREE_RULES
from tests.speculative.oracle import assert_rows, expected_trees
from tests.speculative.samples_verify import SIZES, SMALL, generator, make_tree_case


def call(case: dict[str, Any]) -> TreeOut:
    return verify_tree(
        case["target"], case["tokens"], case["parent"], **{k: case[k] for k in list(case)[3:]}
    )


def check(case: dict[str, Any], note: object = "") -> None:
    assert_rows(call(case), expected_trees(case), note)


@pytest.mark.parametrize("rule", TREE_RULES)
def test_decisions_equal_the_definition(isa: str, rule: str) -> None:
    for seed in range(60):
        check(make_tree_case(generator(seed, TREE_RULES[rule]), rule, SMALL), seed)


@pytest.mark.parametrize("rule", TREE_RULES)
def test_sizes_around_tiles(isa: str, rule: str) -> None:
    for seed, size in enumerate(SIZES[6:]):
        check(make_tree_case(generator(seed, 10 + TREE_RULES[rule]), rule, (size,)), size)


@pytest.mark.slow
@pytest.mark.parametrize("rule", TREE_RULES)
def test_three_thousand_trees_of_each_rule_equal_the_definition(rule: str) -> None:
    for seed in range(1500):
        check(make_tree_case(generator(seed, 20 + TREE_RULES[rule]), rule, SMALL), seed)


@pytest.mark.parametrize("rule", TREE_RULES)
def test_widest_trees(isa: str, rule: str) -> None:
    """64 nodes: a chain, and all children of the root."""
    for parent in (torch.arange(64) - 1, torch.zeros(64, dtype=torch.int64)):
        target = torch.randn(1, 64, 90)
        tokens = torch.randperm(90)[:64]
        if parent[2] == 1:
            tokens[1:] = target[0].argmax(-1)[:63]
        case: dict[str, Any] = {
            "target": target,
            "tokens": tokens[None],
            "parent": parent[None],
            "rule": rule,
            "seeds": torch.tensor([3]),
            "positions": torch.tensor([17]),
        }
        if rule == "tree_rrs":
            case["draft"] = torch.randn(1, 64, 90)
        check(case)


@pytest.mark.parametrize("rule", ["tree_target", "tree_rrs"])
def test_every_child_has_its_share(isa: str, rule: str) -> None:
    """Five equal ids, four children and one of them twice: all outcomes occur."""
    b = 200
    case: dict[str, Any] = {
        "target": torch.zeros(b, 6, 5),
        "tokens": torch.tensor([9, 3, 0, 3, 4, 1]).repeat(b, 1),
        "parent": torch.tensor([-1, 0, 0, 0, 0, 0]).repeat(b, 1),
        "rule": rule,
        "seeds": torch.arange(b),
        "positions": torch.arange(b),
    }
    if rule == "tree_rrs":
        case["draft"] = torch.randn(b, 6, 5)
    check(case)
    if rule == "tree_target":
        assert call(case).path[:, 1].unique().tolist() == [-1, 1, 2, 4, 5]


@pytest.mark.parametrize("rule", TREE_RULES)
@pytest.mark.parametrize("fault", ["nan", "inf", "-inf"])
def test_rows_without_a_law_emit_nothing(rule: str, fault: str) -> None:
    for seed in range(12):
        case = make_tree_case(generator(seed, 30 + TREE_RULES[rule]), rule, (5, 37))
        case["is_probs"] = False
        for name in ("target", "draft"):
            if name in case:
                t = case[name].float().nan_to_num(neginf=-3.0)
                t[generator(seed, 31).random(t.shape[:2]) < 0.3] = float(fault)
                case[name] = t
        check(case, seed)


def test_what_is_no_tree_is_a_row_error() -> None:
    parent = torch.tensor([-1, 0, 1, 1]).repeat(8, 1)
    tokens = torch.tensor([99, 1, 2, 3]).repeat(8, 1)
    parent[0, 2], parent[1, 2], parent[2, 1] = 2, -1, 2**40
    tokens[3, 1], tokens[4, 2], tokens[5, 3] = 5, -2, 2**33
    tokens[6, 1] = -1  # it has children
    out = verify_tree(torch.randn(8, 4, 5), tokens, parent)
    assert out.row_error.tolist() == [3] * 7 + [0]
    assert (out.path[:7] == -1).all()
    with pytest.raises(ValueError, match=r"row 0: .* the nodes are not a tree"):
        out.raise_errors()


def test_threads_change_nothing() -> None:
    before = torch.get_num_threads()
    try:
        for rule in TREE_RULES:
            case = make_tree_case(generator(1, 40), rule, (40_000,))
            results = []
            for threads in (1, 2, 16):
                torch.set_num_threads(threads)
                results.append(call(case))
            for field in dataclasses.fields(TreeOut):
                for other in results[1:]:
                    assert torch.equal(getattr(other, field.name), getattr(results[0], field.name))
    finally:
        torch.set_num_threads(before)


def test_compiles_as_one_graph() -> None:
    case = make_tree_case(generator(1, 50), "tree_rrs", (37,))

    def step(target: torch.Tensor) -> TreeOut:
        return call(case | {"target": target})

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(case["target"])
    assert torch.equal(compiled.path, step(case["target"]).path)
    assert torch.equal(compiled.tokens, step(case["target"]).tokens)


def test_wrong_arguments() -> None:
    target, tokens = torch.randn(1, 2, 5), torch.zeros(1, 2).long()
    with pytest.raises(TypeError, match="verify_tree: parent must be a Tensor, got list"):
        verify_tree(target, tokens, [[0, 0]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rule must be one of greedy, tree_target, tree_rrs, got"):
        verify_tree(target, tokens, tokens, rule="lossless")
    with pytest.raises(ValueError, match="draft must be given for the rule tree_rrs"):
        verify_tree(
            target, tokens, tokens, rule="tree_rrs", seeds=tokens[0, :1], positions=tokens[0, :1]
        )
