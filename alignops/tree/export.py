"""Trees for other programs and for the eye: JSON, Graphviz, networkx, a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from alignops._checks import check
from alignops.tree.store import TreeStore

if TYPE_CHECKING:
    import networkx
    from matplotlib.axes import Axes

FIELDS = ("depth", "flags", "fn", "n", "raw_value", "reward", "value")


def nodes(
    store: TreeStore, tree: int, max_nodes: int | None = None, min_visits: float = 0.0
) -> Iterator[dict[str, Any]]:
    """The nodes below the root, breadth first: id, parent, slot, action, prior and `FIELDS`.

    Of a root, parent, action and prior are None. Numbers that are NaN are None.

    Args:
        store: the trees.
        tree: which one.
        max_nodes: no more than so many.
        min_visits: only nodes with so many visits, and those above them.

    Raises:
        ValueError: `tree` is out of range, or `max_nodes` negative.
    """
    check(0 <= tree < len(store), f"tree must be 0 to {len(store) - 1}, got {tree}")
    check(max_nodes is None or max_nodes >= 0, f"max_nodes must be at least 0, got {max_nodes}")
    columns = {name: store.column(name)[tree].tolist() for name in FIELDS}
    root = int(store.trees().root[tree])
    queue: list[tuple[int, int | None, int, int | None, float | None]] = [
        (root, None, 0, None, None)
    ]
    for sent, (node, parent, slot, action, prior) in enumerate(queue):
        if sent == max_nodes:
            return
        row = {"id": node, "parent": parent, "slot": slot, "action": action, "prior": prior}
        for name in FIELDS:
            value = columns[name][node]
            row[name] = None if isinstance(value, float) and math.isnan(value) else value
        yield row
        edges = store.edges(tree, node)
        for i, child in enumerate(edges.child.tolist()):
            if child >= 0 and columns["n"][child] >= min_visits:
                queue.append((child, node, i, int(edges.action[i]), float(edges.prior[i])))


def to_json(store: TreeStore, tree: int, max_nodes: int | None = None) -> dict[str, Any]:
    """What `json.dumps` takes: {"root": id, "nodes": [...]}, see `nodes`."""
    return {
        "root": int(store.trees().root[tree]) if 0 <= tree < len(store) else None,
        "nodes": list(nodes(store, tree, max_nodes)),
    }


def to_dot(
    store: TreeStore,
    tree: int,
    *,
    max_nodes: int | None = None,
    min_visits: float = 0.0,
    label: Callable[[dict[str, Any]], str] | None = None,
) -> str:
    """A graph in the language of Graphviz; lines are as wide as visits are many.

    Args:
        store: the trees.
        tree: which one.
        max_nodes: no more than so many.
        min_visits: only nodes with so many visits.
        label: text of a node; default its value and visits.
    """
    lines = ["digraph tree {", "  node [shape=box, fontname=sans];"]
    for row in nodes(store, tree, max_nodes, min_visits):
        text = label(row) if label else f"{row['value']:.3g}\nn {row['n']:g}"
        quoted = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        lines.append(f'  {row["id"]} [label="{quoted}"];')
        if row["parent"] is not None:
            width = 1 + math.log1p(row["n"])
            edge = f"{row['action']} p {row['prior']:.2g}"
            lines.append(
                f'  {row["parent"]} -> {row["id"]} [label="{edge}", penwidth={width:.2f}];'
            )
    return "\n".join([*lines, "}"])


def to_networkx(store: TreeStore, tree: int, max_nodes: int | None = None) -> networkx.DiGraph:
    """A directed graph; nodes carry `FIELDS`, edges slot, action and prior.

    Raises:
        ModuleNotFoundError: networkx is not installed.
    """
    import networkx

    graph = networkx.DiGraph()
    for row in nodes(store, tree, max_nodes):
        graph.add_node(row["id"], **{name: row[name] for name in FIELDS})
        if row["parent"] is not None:
            graph.add_edge(
                row["parent"],
                row["id"],
                **{name: row[name] for name in ("slot", "action", "prior")},
            )
    return graph


def draw(
    store: TreeStore,
    tree: int,
    *,
    ax: Axes | None = None,
    max_nodes: int = 300,
    min_visits: float = 0.0,
) -> Axes:
    """A picture: depth downwards, area by visits, colour by value.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib.pyplot as plt

    rows = {row["id"]: row for row in nodes(store, tree, max_nodes, min_visits)}
    below: dict[int, list[int]] = {id: [] for id in rows}
    for row in rows.values():
        if row["parent"] is not None:
            below[row["parent"]].append(row["id"])
    # Leaves stand side by side, a node over the middle of its children.
    place: dict[int, float] = {}
    free = 0
    stack = [(next(iter(rows)), False)]
    while stack:
        node, done = stack.pop()
        if not below[node]:
            place[node] = free
            free += 1
        elif done:
            place[node] = (place[below[node][0]] + place[below[node][-1]]) / 2
        else:
            stack.append((node, True))
            stack += [(child, False) for child in reversed(below[node])]
    if ax is None:
        _, ax = plt.subplots()
    for row in rows.values():
        if row["parent"] is not None:
            above = rows[row["parent"]]
            ax.plot(
                [place[above["id"]], place[row["id"]]],
                [-above["depth"], -row["depth"]],
                color="0.7",
                linewidth=0.5 + math.log1p(row["n"]) / 2,
                zorder=1,
            )
    dots = ax.scatter(
        [place[id] for id in rows],
        [-row["depth"] for row in rows.values()],
        s=[15 + 20 * math.log1p(row["n"]) for row in rows.values()],
        c=[row["value"] for row in rows.values()],
        cmap="viridis",
        zorder=2,
    )
    ax.figure.colorbar(dots, ax=ax, label="value")
    ax.set_axis_off()
    return ax
