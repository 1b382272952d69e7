"""The functions that stand in for those of SGLang, on tensors as the engine makes them."""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alignops.integrations import sglang
from alignops.integrations._engines import self_test_trees
from alignops.reference import speculative as reference
from tests.speculative.engine_signatures import RECORDED, modules, stand_in

PLACES = [place for place in RECORDED if place.startswith("sglang")]


# Tables, by plain loops


def beam(seed: int, rows: int, topk: int, steps: int, size: int) -> dict[str, Any]:
    """What the engine's drafter hands to the tree builder: candidates of a beam, selected."""
    random = np.random.default_rng(seed)
    parents, selected = [], []
    for _ in range(rows):
        # The first level has topk candidates, each further one topk for each of topk survivors.
        line, candidates = [-1], list(range(topk))
        survivors = list(range(topk))
        for step in range(1, steps):
            line += survivors
            begin = topk + (step - 1) * topk * topk
            level = list(range(begin, begin + topk * topk))
            candidates += level
            survivors = sorted(random.choice(level, topk, replace=False).tolist())
        chosen: list[int] = []
        while len(chosen) < size - 1:  # parents are chosen before their children
            options = [c for c in candidates if c not in chosen]
            options = [c for c in options if c < topk or line[c // topk] in chosen]
            chosen.append(int(random.choice(options)))
        parents.append(line)
        selected.append(sorted(chosen))
    lengths = random.integers(1, 9, rows)
    return {
        "bonus_tokens": torch.from_numpy(random.integers(0, 50, rows)),
        "parent_list": torch.tensor(parents)[:, : 1 if steps == 1 else None],
        "top_scores_index": torch.tensor(selected),
        "draft_tokens": torch.from_numpy(random.integers(0, 50, (rows, size - 1))),
        "seq_lens": torch.from_numpy(lengths),
        "seq_lens_sum": int(lengths.sum()),
        "topk": topk,
        "spec_steps": steps,
        "num_verify_tokens": size,
    }


def parents_of(args: dict[str, Any], row: int) -> list[int]:
    selected = args["top_scores_index"][row].tolist()
    line, topk = args["parent_list"][row].tolist(), args["topk"]
    out = [-1]
    for candidate in selected:
        group = candidate // topk
        known = group > 0 and line[group] in selected
        out.append(selected.index(line[group]) + 1 if known else 0)
    return out


def path_of(parents: list[int], node: int) -> list[int]:
    return [] if node < 0 else [*path_of(parents, parents[node]), node]


BEAMS = [
    (s, rows, topk, steps, size)
    for s, (rows, topk, steps, size) in enumerate(
        [
            (1, 1, 1, 2),
            (2, 1, 4, 5),
            (3, 4, 3, 9),
            (2, 8, 4, 32),
            (2, 3, 2, 8),
            (1, 8, 5, 64),
            (2, 2, 1, 3),
        ]
    )
]


@pytest.mark.parametrize("case", BEAMS)
@pytest.mark.parametrize("mode", range(3))
@pytest.mark.parametrize("given", [False, True])
def test_tree_tables(case: tuple[int, ...], mode: int, given: bool) -> None:
    args = beam(*case)
    rows, size = case[1], case[4]
    if mode == 2 and size > 32:
        pytest.skip("a word has 32 bits")
    counts = {0: size * (args["seq_lens_sum"] + rows * size), 1: rows * size * size, 2: rows * size}
    dtype = (
        torch.bool
        if mode < 2
        else {1: torch.uint8, 2: torch.uint16}.get((size + 7) // 8, torch.uint32)
    )
    buffer = torch.zeros(counts[mode], dtype=dtype) if given else None
    mask, positions, index, first, sibling, ids = sglang.build_tree_kernel_efficient(
        **args, tree_mask_mode=mode, tree_mask_buf=buffer
    )
    assert buffer is None or mask is buffer
    assert mask.dtype == dtype
    assert mask.shape == (counts[mode],)
    assert torch.equal(index, torch.arange(rows * size).view(rows, size))
    lines: list[list[int]] = []
    for row in range(rows):
        parents, length = parents_of(args, row), int(args["seq_lens"][row])
        for node in range(size):
            path = path_of(parents, node)
            assert positions[row * size + node] == length + len(path) - 1
            children = [c for c in range(size) if parents[c] == node]
            assert first[row, node] == (children[0] if children else -1)
            siblings = [c for c in range(node + 1, size) if parents[c] == parents[node]]
            assert sibling[row, node] == (siblings[0] if siblings and node else -1)
            block = [int(i in path) for i in range(size)]
            word = [sum(bit << i for i, bit in enumerate(block))]
            lines.append([[1] * length + block, block, word][mode])
        expected = [int(args["bonus_tokens"][row]), *args["draft_tokens"][row].tolist()]
        assert ids[row * size : (row + 1) * size].tolist() == expected
    assert mask.to(torch.int64).tolist() == [entry for line in lines for entry in line]
    # The lists name the same parents.
    found = sglang.tree_parents(first, sibling)
    assert found.tolist() == [parents_of(args, row) for row in range(rows)]


def test_a_prefix_that_is_not_filled_stays() -> None:
    args = beam(*BEAMS[2])
    count = 9 * (args["seq_lens_sum"] + 3 * 9)
    buffer = torch.zeros(count, dtype=torch.bool)
    mask, *_ = sglang.build_tree_kernel_efficient(
        **args, tree_mask_buf=buffer, fill_prefix_mask=False
    )
    filled, *_ = sglang.build_tree_kernel_efficient(**args)
    assert int(filled.sum() - mask.sum()) == 9 * args["seq_lens_sum"]


def test_a_node_without_its_parent_becomes_a_child_of_the_root() -> None:
    args = beam(*BEAMS[2])
    args["top_scores_index"][0, -1] = 15  # in group 5, whose parent is not selected
    line = args["parent_list"][0]
    line[15 // 4] = 999
    *_, first, sibling, _ = sglang.build_tree_kernel_efficient(**args)
    assert sglang.tree_parents(first, sibling)[0, -1] == 0


@pytest.mark.parametrize(("name", "value"), [("num_verify_tokens", 65), ("tree_mask_mode", 3)])
def test_tables_that_cannot_be(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"build_tree: {name} must be"):
        sglang.build_tree_kernel_efficient(**beam(*BEAMS[2]) | {name: value})


# Verification


class Tree:
    """Tensors of a verification, with numbers of nodes that are not those of the columns."""

    def __init__(self, parent: Tensor, tokens: Tensor, longest: int) -> None:
        from alignops.speculative import build_tree

        rows, size = parent.shape
        tables = build_tree(parent.int())
        self.index = torch.arange(rows * size).flip(0).view(rows, size)
        self.lists = (self.index, tables.first_child.long(), tables.next_sibling.long())
        self.tokens, self.rows, self.size = tokens, rows, size
        self.predicts = torch.full((rows * size,), -7, dtype=torch.int32)
        self.accepted = torch.full((rows, longest), -1, dtype=torch.int32)
        self.number = torch.full((rows,), -7, dtype=torch.int32)

    def run(self, function: Callable[..., None], *laws: Any, **kwargs: Any) -> None:
        function(
            self.predicts, self.accepted, self.number, self.tokens, *self.lists, *laws, **kwargs
        )

    def check(self, row: int, nodes: list[int], following: list[int]) -> None:
        places = [int(self.index[row, n]) for n in nodes]
        assert self.number[row] == len(nodes) - 1
        rest = self.accepted.shape[1] - len(nodes)
        assert self.accepted[row].tolist() == [*places, *[-1] * rest]
        own = set(self.index[row].tolist())
        written = {p: int(self.predicts[p]) for p in own if self.predicts[p] != -7}
        assert written == dict(zip(places, following, strict=True))


@pytest.mark.parametrize("longest", [1, 2, 4, 12])
def test_greedy(longest: int) -> None:
    for case in self_test_trees("tree_greedy", 30):
        tree = Tree(case.parent, case.tokens, longest)
        best = case.target.argmax(-1)
        tree.run(sglang.verify_tree_greedy, best)
        for row, (nodes, following) in enumerate(case.expected):
            tree.check(row, nodes[:longest], following[:longest])
        again = Tree(case.parent, case.tokens, longest)
        names = ("retrieve_index", "retrieve_next_token", "retrieve_next_sibling")
        out = sglang.verify_tree_greedy_func(
            again.predicts,
            again.accepted,
            again.number,
            again.tokens,
            **dict(zip(names, again.lists, strict=True)),
            target_predict=best,
            topk=2,
        )
        assert all(
            torch.equal(a, b)
            for a, b in zip(out, (tree.predicts, tree.accepted, tree.number), strict=True)
        )


@pytest.mark.parametrize("longest", [1, 3, 12])
@pytest.mark.parametrize("rule", ["tree_target", "tree_rrs"])
def test_trees(rule: str, longest: int) -> None:
    function = {
        "tree_target": sglang.tree_speculative_sampling_target_only,
        "tree_rrs": sglang.tree_speculative_sampling_rrs,
    }[rule]
    for case in self_test_trees(rule, 30):
        tree = Tree(case.parent, case.tokens, longest)
        coins, draft = torch.rand(tree.rows, tree.size), case.draft.clone()
        tree.run(
            function,
            coins,
            coins[:, 0],
            case.target,
            draft,
            seeds=case.seeds,
            positions=case.positions,
        )
        assert torch.equal(draft, case.draft)
        for row, (nodes, following) in enumerate(case.expected):
            tree.check(row, nodes[:longest], following[:longest])


@pytest.mark.parametrize("rule", ["lossless", "block"])
@pytest.mark.parametrize("rows_of_draft", [0, 1])
def test_chains(rule: str, rows_of_draft: int) -> None:
    function = {
        "lossless": sglang.chain_speculative_sampling,
        "block": sglang.chain_block_speculative_sampling,
    }[rule]
    for seed in range(30):
        random = np.random.default_rng(seed)
        size, ids = int(random.integers(1, 6)), 9
        logits = random.standard_normal((2, 2, size, ids)).astype(np.float32)
        logits[1] += logits[0]
        laws = [[[reference.law(row) for row in chain] for chain in part] for part in logits]
        target, draft = (
            torch.tensor(np.array([[law.p for law in chain] for chain in part])) for part in laws
        )
        tokens = torch.from_numpy(random.integers(0, ids, (2, size)))
        seeds, positions = torch.tensor([seed, -seed - 1]), torch.tensor([3, 40])
        tree = Tree(torch.arange(-1, size - 1).expand(2, size), tokens, size)
        coins = torch.rand(2, size)
        tree.run(
            function,
            coins,
            coins[:, 0],
            target,
            draft[:, : size - 1 + rows_of_draft],
            seeds=seeds,
            positions=positions,
        )
        for row in range(2):
            drafts = tokens[row, 1:].tolist()
            out = reference.verify(
                reference.Row(
                    laws[0][row],
                    drafts,
                    laws[1][row][: size - 1],
                    int(seeds[row]) & (2**64 - 1),
                    int(positions[row]),
                ),
                rule,
            )
            tree.check(row, list(range(out.accepted + 1)), out.tokens)


def sample(coins: Tensor, final: Tensor, **kwargs: Any) -> list[int]:
    parent = torch.tensor([[-1, 0, 0, 1]]).expand(len(coins), 4)
    tokens = torch.tensor([[9, 1, 2, 3]]).expand(len(coins), 4).contiguous()
    tree = Tree(parent, tokens, 3)
    laws = torch.full((len(coins), 4, 6), 1 / 6)
    tree.run(sglang.tree_speculative_sampling_target_only, coins, final, laws, **kwargs)
    return tree.predicts.tolist()


def test_random_words_follow_from_the_coins() -> None:
    coins, final = torch.rand(50, 4), torch.rand(50)
    assert sample(coins, final) == sample(coins, final)
    assert sample(coins, final) != sample(coins, torch.rand(50))
    assert sample(coins, final) != sample(torch.rand(50, 4), final)


def test_what_is_emitted_follows_the_target() -> None:
    """Chi-square of the first token, whatever was drafted; 0.9999 quantile of 5 degrees: 25.7."""
    torch.manual_seed(5)
    n = 20000
    parent = torch.tensor([[-1, 0, 0, 1]]).expand(n, 4)
    tokens = torch.tensor([[9, 1, 2, 3]]).expand(n, 4).contiguous()
    tree = Tree(parent, tokens, 3)
    law = torch.tensor([0.05, 0.4, 0.1, 0.2, 0.05, 0.2])
    laws = law.expand(n, 4, 6).contiguous()
    tree.run(sglang.tree_speculative_sampling_target_only, torch.rand(n, 4), torch.rand(n), laws)
    first = tree.predicts.view(-1)[tree.index[:, 0]].long()
    seen = torch.bincount(first, minlength=6).double()
    assert float(((seen - n * law) ** 2 / (n * law)).sum()) < 25.7


def test_nodes_that_no_list_names_are_never_reached() -> None:
    tree = Tree(torch.tensor([[-1, 0, 0]]), torch.tensor([[9, 1, 2]]), 2)
    tree.lists[2].fill_(-1)  # node 2 is cut off
    law = torch.tensor([0.0, 0.0, 1.0]).expand(1, 3, 3).contiguous()
    tree.run(sglang.tree_speculative_sampling_target_only, torch.rand(1, 3), torch.rand(1), law)
    tree.check(0, [0], [2])


def test_bad_probabilities_are_an_error_of_the_next_call() -> None:
    coins = torch.rand(2, 4)
    tree = Tree(torch.tensor([[-1, 0, 0, 1]] * 2), torch.tensor([[9, 1, 2, 3]] * 2), 3)
    laws = torch.full((2, 4, 6), 1 / 6)
    laws[1, 0, 3] = float("nan")
    tree.run(sglang.tree_speculative_sampling_target_only, coins, coins[:, 0], laws)
    assert tree.number[1] == 0
    assert tree.predicts[tree.index[1, 0]] == 0
    with pytest.raises(ValueError, match="row 1: logits hold NaN"):
        sample(coins, coins[:, 0])
    sample(coins, coins[:, 0])


@pytest.mark.parametrize("name", ["threshold_single", "threshold_acc"])
def test_thresholds_that_change_the_law_are_refused(name: str) -> None:
    coins = torch.rand(1, 4)
    with pytest.raises(ValueError, match=f"sglang: {name} must be 1, got 0.5"):
        sample(coins, coins[:, 0], **{name: 0.5})


# Installation


def engine(monkeypatch: pytest.MonkeyPatch, extra: dict[str, str] | None = None) -> Any:
    found = modules(*(place.partition(":")[0] for place in PLACES))
    for place in PLACES:
        module, _, name = place.partition(":")
        setattr(found[module], name, stand_in(place, extra=(extra or {}).get(name, "")))
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    return found


def test_signatures_are_those_recorded() -> None:
    assert set(sglang.SIGNATURES) == set(PLACES)
    for place, names in sglang.SIGNATURES.items():
        recorded = [n.rstrip("=") for n in RECORDED[place][2].split()]
        assert recorded[: len(names)] == list(names)


def test_ours_take_what_the_engine_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = engine(monkeypatch)
    assert sglang.install() == PLACES
    for place in PLACES:
        module, _, name = place.partition(":")
        parameters = inspect.signature(getattr(found[module], name)).parameters
        assert [n.rstrip("=") for n in RECORDED[place][2].split()] == [
            n for n in parameters if parameters[n].kind is not inspect.Parameter.KEYWORD_ONLY
        ]
    sampling = found["sglang.kernels.ops.speculative.sampling"]
    assert sampling.tree_speculative_sampling_target_only.keywords == {"rule": "tree_target"}


@pytest.mark.parametrize(
    ("extra", "message"),
    [("* another", "must have the parameters"), ("another=", None)],
)
def test_an_unknown_version_is_refused(
    monkeypatch: pytest.MonkeyPatch, extra: str, message: str | None
) -> None:
    found = engine(monkeypatch, {"build_tree_kernel_efficient": extra})
    utils = found["sglang.srt.speculative.eagle_utils"]
    before = utils.build_tree_kernel_efficient
    if message is None:
        sglang.install()
        assert utils.build_tree_kernel_efficient is not before
        return
    with pytest.raises(RuntimeError, match=message):
        sglang.install()
    assert utils.build_tree_kernel_efficient is before


def test_nothing_is_replaced_if_the_self_test_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    found = engine(monkeypatch)
    before = found["sglang.srt.speculative.eagle_utils"].verify_tree_greedy_func
    honest = sglang.verify_tree

    def wrong(*args: Any, **kwargs: Any) -> Any:
        return honest(*args, **kwargs | {"seeds": kwargs["seeds"] + 1})

    monkeypatch.setattr(sglang, "verify_tree", wrong)
    with pytest.raises(RuntimeError, match=r"sglang: case \d+ of the self-test must give"):
        sglang.install()
    assert found["sglang.srt.speculative.eagle_utils"].verify_tree_greedy_func is before


def test_unknown_rules_and_a_missing_engine() -> None:
    with pytest.raises(ValueError, match="sglang: tree must be one of"):
        sglang.install(tree="best")
    with pytest.raises(ValueError, match="sglang: chain must be one of"):
        sglang.install(chain="best")
    with pytest.raises(ImportError):
        sglang.install()
