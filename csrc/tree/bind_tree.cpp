// alignops._C.TreeStore: trees and one search over them, over NumPy arrays. alignops/tree/store.py
// is its interface.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <atomic>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "../common/check.h"
#include "../common/torch_parallel.h"
#include "bind.h"
#include "columns.h"
#include "search.h"
#include "store.h"

namespace py = pybind11;

namespace alignops::tree {
namespace {

using Ints = py::array_t<int32_t, py::array::c_style>;
using Longs = py::array_t<int64_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;

template <class T>
std::span<const T> view(const py::array_t<T, py::array::c_style>& array) {
  return {array.data(), static_cast<size_t>(array.size())};
}

void raise_python(const char* name, const std::exception& error) {
  const py::object type = py::module_::import("alignops.tree.errors").attr(name);
  PyErr_SetString(type.ptr(), error.what());
}

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const CapacityError& error) {
    raise_python("CapacityError", error);
  } catch (const StateError& error) {
    raise_python("StateError", error);
  } catch (const InvalidValueError& error) {
    raise_python("InvalidValueError", error);
  } catch (const InvalidPriorError& error) {
    raise_python("InvalidPriorError", error);
  } catch (const FormatError& error) {
    raise_python("TreeFormatError", error);
  } catch (const NodeIndexError& error) {
    raise_python("NodeIndexError", error);
  }
}

template <class Choice>
Choice choose(const py::dict& options, const char* name,
              std::initializer_list<const char*> choices) {
  const auto value = options[name].cast<std::string>();
  std::string list;
  int32_t i = 0;
  for (const char* choice : choices) {
    if (value == choice) return static_cast<Choice>(i);
    list += (i++ > 0 ? ", " : "") + std::string(choice);
  }
  throw std::invalid_argument(
      message("TreeStore: ", name, " must be one of ", list, ", got '", value, "'"));
}

double number(const py::dict& options, const char* name) { return options[name].cast<double>(); }

Policy policy_of(const py::dict& o) {
  Policy p;
  p.rule = choose<Rule>(o, "rule", {"puct", "puct_rain", "uct", "boltzmann", "greedy"});
  p.norm = choose<Norm>(o, "norm", {"none", "tree", "siblings", "fixed"});
  p.fpu = choose<Fpu>(o, "fpu", {"zero", "low", "parent", "mean_visited", "inf"});
  p.total = choose<Total>(o, "total", {"parent", "children"});
  p.in_flight = choose<InFlight>(o, "in_flight", {"none", "wu_uct", "virtual_loss"});
  p.collision = choose<Collision>(o, "on_collision", {"share", "skip"});
  p.c = number(o, "c");
  p.c1 = number(o, "c1");
  p.c2 = number(o, "c2");
  p.rate = number(o, "rate");
  p.low = number(o, "low");
  p.high = number(o, "high");
  p.floor = number(o, "floor");
  p.widen = number(o, "widen");
  p.clip = o["clip"].cast<bool>();
  p.loss_weight = number(o, "loss_weight");
  p.loss = number(o, "loss");
  p.width = number(o, "width");
  p.growth = number(o, "growth");
  p.first_visits = number(o, "first_visits");
  return p;
}

Backup backup_of(const py::dict& o) {
  Backup b;
  b.rule = choose<Backing>(o, "backup", {"mean", "max", "soft", "subtree_mean"});
  b.discount = number(o, "discount");
  b.rate = number(o, "backup_rate");
  return b;
}

// Trees that notice when two threads use them at once.
class Trees : public std::enable_shared_from_this<Trees> {
 public:
  Trees(int64_t trees, int64_t nodes, int64_t lanes, const py::dict& options, uint64_t seed)
      : store_({trees, nodes, lanes}),
        search_(store_, policy_of(options), backup_of(options), seed),
        parallel_(torch_parallel_for()) {
    if (options.contains("range")) {
      const auto range = options["range"].cast<std::pair<float, float>>();
      for (int64_t t = 0; t < trees; ++t) {
        store_.tree(t).low = range.first;
        store_.tree(t).high = range.second;
      }
    }
  }

  py::tuple select(int64_t k) {
    std::vector<Leaf>& leaves = leaves_;
    const Turn turn(busy_);
    int64_t count = 0;
    {
      const py::gil_scoped_release release;
      leaves.resize(static_cast<size_t>(std::max<int64_t>(k, 0) * store_.size()));
      count = search_.select(k, leaves, parallel_);
    }
    return arrays({leaves.data(), static_cast<size_t>(count)});
  }

  py::tuple descend(const Longs& tickets) {
    std::vector<Leaf> leaves(static_cast<size_t>(tickets.size()));
    run([&] { search_.descend(view(tickets), leaves, parallel_); });
    return arrays(leaves);
  }

  py::tuple visit(const Ints& tree, const Ints& node, const Ints& slot) {
    ALIGNOPS_CHECK(tree.size() == node.size() && tree.size() == slot.size(),
                   "TreeStore.visit: node and slot must have ", tree.size(),
                   " elements, as tree has, got ", node.size(), " and ", slot.size());
    std::vector<Leaf> leaves(static_cast<size_t>(tree.size()));
    run([&] { search_.visit(view(tree), view(node), view(slot), leaves); });
    return arrays(leaves);
  }

  py::tuple grow(const Longs& tickets, const Ints& actions, bool merge) {
    ALIGNOPS_CHECK(tickets.size() == actions.size(), "TreeStore.grow: actions must have ",
                   tickets.size(), " elements, as tickets has, got ", actions.size());
    std::vector<Leaf> leaves(static_cast<size_t>(tickets.size()));
    run([&] { search_.grow(view(tickets), view(actions), merge, leaves, parallel_); });
    return arrays(leaves);
  }

  void expand(const Ints& tree, const Ints& node, const py::object& ptr, int64_t width,
              const Ints& actions, const Floats& priors, bool normalize) {
    const char* op = "TreeStore.expand";
    ALIGNOPS_CHECK(node.size() == tree.size(), op, ": node must have ", tree.size(),
                   " elements, as tree has, got ", node.size());
    ALIGNOPS_CHECK(actions.size() == priors.size(), op,
                   ": actions and priors must be as long, got ", actions.size(), " and ",
                   priors.size());
    Longs bounds;
    if (!ptr.is_none()) {
      bounds = ptr.cast<Longs>();
      ALIGNOPS_CHECK(bounds.size() == tree.size() + 1, op, ": ptr must have ", tree.size() + 1,
                     " elements, got ", bounds.size());
      const int64_t* p = bounds.data();
      for (py::ssize_t i = 0; i < tree.size(); ++i)
        ALIGNOPS_CHECK(p[i] <= p[i + 1], op, ": ptr must not fall, got ", p[i], " before ",
                       p[i + 1]);
      ALIGNOPS_CHECK(p[0] == 0 && p[tree.size()] == actions.size(), op, ": ptr must run from 0 to ",
                     actions.size(), ", got ", p[0], " to ", p[tree.size()]);
    } else {
      ALIGNOPS_CHECK(width >= 0 && tree.size() * width == actions.size(), op,
                     ": actions must have ", tree.size(), " rows of ", width, ", got ",
                     actions.size(), " elements");
    }
    const Proposals rows{view(tree), view(node),     ptr.is_none() ? nullptr : bounds.data(),
                         width,      actions.data(), priors.data(),
                         normalize};
    run([&] { search_.expand(rows, parallel_); });
  }

  void backup(const Longs& tickets, const Floats& values) {
    ALIGNOPS_CHECK(tickets.size() == values.size(), "TreeStore.backup: values must have ",
                   tickets.size(), " elements, as tickets has, got ", values.size());
    run([&] { search_.backup(view(tickets), view(values), parallel_); });
  }

  void cancel(const Longs& tickets) {
    run([&] { search_.cancel(view(tickets), parallel_); });
  }

  void end(const Ints& tree, const Ints& node) {
    ALIGNOPS_CHECK(tree.size() == node.size(), "TreeStore.end: node must have ", tree.size(),
                   " elements, as tree has, got ", node.size());
    run([&] { search_.end(view(tree), view(node)); });
  }

  void set_rewards(const Ints& tree, const Ints& node, const Floats& rewards) {
    ALIGNOPS_CHECK(tree.size() == node.size() && tree.size() == rewards.size(),
                   "TreeStore.set_rewards: node and rewards must have ", tree.size(),
                   " elements, as tree has, got ", node.size(), " and ", rewards.size());
    run([&] { search_.reward(view(tree), view(node), view(rewards)); });
  }

  void reroot(const Ints& tree, const Longs& slot) {
    ALIGNOPS_CHECK(tree.size() == slot.size(), "TreeStore.reroot: edges must have ", tree.size(),
                   " elements, as trees has, got ", slot.size());
    run([&] {
      for (py::ssize_t i = 0; i < tree.size(); ++i)
        store_.check_node("TreeStore.reroot", tree.data()[i], 0);
      for (py::ssize_t i = 0; i < tree.size(); ++i) store_.reroot(tree.data()[i], slot.data()[i]);
    });
  }

  // New ids: (trees, nodes of the largest tree before).
  Ints compact() {
    int64_t most = 0;
    for (int64_t t = 0; t < store_.size(); ++t)
      most = std::max<int64_t>(most, store_.tree(t).nodes);
    Ints moved({store_.size(), most});
    int32_t* rows = moved.mutable_data();
    run([&] {
      std::fill_n(rows, store_.size() * most, kNowhere);
      for (int64_t t = 0; t < store_.size(); ++t)
        if (!store_.tree(t).open.empty()) store_.compact(t, {});
      parallel_(0, store_.size(), 8, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
          store_.compact(t, {rows + t * most, static_cast<size_t>(store_.tree(t).nodes)});
      });
    });
    return moved;
  }

  int64_t prune(int64_t top, bool by_value, float visits, float value) {
    int64_t cut = 0;
    run([&] {
      for (int64_t t = 0; t < store_.size(); ++t)
        cut += store_.prune(t, {top, by_value, visits, value});
    });
    return cut;
  }

  std::shared_ptr<Snapshot> mark() {
    std::shared_ptr<Snapshot> out;
    run([&] { out = std::make_shared<Snapshot>(store_.mark()); });
    return out;
  }

  void restore(const std::shared_ptr<Snapshot>& snapshot) {
    run([&] { store_.restore(*snapshot); });
  }

  py::dict columns() {
    Columns all;
    run([&] { all = store_.columns(); });
    py::dict out;
    Columns::each(all, [&](const char* name, const auto& column) {
      using T = typename std::decay_t<decltype(column)>::value_type;
      out[name] = py::array_t<T>(static_cast<py::ssize_t>(column.size()), column.data());
    });
    return out;
  }

  void load(const py::dict& columns) {
    Columns all;
    Columns::each(all, [&](const char* name, auto& column) {
      using T = typename std::decay_t<decltype(column)>::value_type;
      const auto array = columns[name].cast<py::array_t<T, py::array::c_style>>();
      column.assign(array.data(), array.data() + array.size());
    });
    run([&] { store_.load(all); });
  }

  void validate() {
    run([&] { store_.validate(); });
  }

  // A field of all nodes: (trees, capacity), a read-only view; nodes that were not made yet hold
  // zeros.
  template <class T>
  py::array column(size_t offset) {
    const std::vector<py::ssize_t> shape{store_.size(), store_.limits().nodes};
    const std::vector<py::ssize_t> strides{
        static_cast<py::ssize_t>(store_.node_stride() * static_cast<int64_t>(sizeof(Node))),
        static_cast<py::ssize_t>(sizeof(Node))};
    auto* first = reinterpret_cast<std::byte*>(store_.nodes(0)) + offset;
    py::array_t<T> out(shape, strides, reinterpret_cast<const T*>(first),
                       py::cast(shared_from_this()));
    out.attr("flags").attr("writeable") = false;
    return out;
  }

  py::array field(const std::string& name) {
    if (name == "parent") return column<int32_t>(offsetof(Node, parent));
    if (name == "parent_slot") return column<int32_t>(offsetof(Node, parent_slot));
    if (name == "n_edges") return column<uint32_t>(offsetof(Node, n_edges));
    if (name == "depth") return column<uint16_t>(offsetof(Node, depth));
    if (name == "flags") return column<uint16_t>(offsetof(Node, flags));
    if (name == "value_sum") return column<double>(offsetof(Node, value_sum));
    if (name == "n") return column<float>(offsetof(Node, n));
    if (name == "fn") return column<int32_t>(offsetof(Node, fn));
    if (name == "pending") return column<int32_t>(offsetof(Node, pending));
    if (name == "value") return column<float>(offsetof(Node, value));
    if (name == "raw_value") return column<float>(offsetof(Node, raw_value));
    if (name == "reward") return column<float>(offsetof(Node, reward));
    if (name == "payload") return column<int32_t>(offsetof(Node, payload));
    throw std::invalid_argument(message("TreeStore.column: no column is named '", name, "'"));
  }

  // What lies between roots and nodes: ptr [M + 1] into (nodes, actions of the edges into them).
  py::tuple paths(const Ints& tree, const Ints& node) {
    const char* op = "TreeStore.paths";
    ALIGNOPS_CHECK(tree.size() == node.size(), op, ": node must have ", tree.size(),
                   " elements, as tree has, got ", node.size());
    const Turn turn(busy_);
    Longs ptr(tree.size() + 1);
    int64_t* begin = ptr.mutable_data();
    begin[0] = 0;
    for (py::ssize_t i = 0; i < tree.size(); ++i) {
      at(tree.data()[i], node.data()[i], op);
      const int64_t steps = store_.steps_to(tree.data()[i], node.data()[i]);
      if (steps < 0)
        throw NodeIndexError(message(op, ": node ", node.data()[i], " of tree ", tree.data()[i],
                                     " is not below the root"));
      begin[i + 1] = begin[i] + steps;
    }
    Ints nodes(begin[tree.size()]), actions(begin[tree.size()]);
    for (py::ssize_t i = 0; i < tree.size(); ++i) {
      const int64_t t = tree.data()[i];
      int32_t id = node.data()[i];
      for (int64_t j = begin[i + 1] - 1; j >= begin[i]; --j) {
        const Node& below = store_.nodes(t)[id];
        put(nodes, j, id);
        put(actions, j, store_.actions(t, store_.nodes(t)[below.parent])[below.parent_slot]);
        id = below.parent;
      }
      if (id != store_.tree(t).root)
        throw NodeIndexError(
            message(op, ": node ", node.data()[i], " of tree ", t, " is not below the root"));
    }
    return py::make_tuple(ptr, nodes, actions);
  }

  void set_payloads(const Ints& tree, const Ints& node, const Ints& payload) {
    ALIGNOPS_CHECK(tree.size() == node.size() && tree.size() == payload.size(),
                   "TreeStore.set_payloads: node and payloads must have ", tree.size(),
                   " elements, as tree has, got ", node.size(), " and ", payload.size());
    const Turn turn(busy_);
    for (py::ssize_t i = 0; i < tree.size(); ++i)
      at(tree.data()[i], node.data()[i], "TreeStore.set_payloads");
    for (py::ssize_t i = 0; i < tree.size(); ++i)
      store_.nodes(tree.data()[i])[node.data()[i]].payload = payload.data()[i];
  }

  Ints descents(int64_t t, int64_t count, double rate, uint64_t seed) {
    const char* op = "TreeStore.sample";
    ALIGNOPS_CHECK(count >= 0, op, ": n must be at least 0, got ", count);
    store_.check_node(op, t, 0);
    Ints out(count);
    int32_t* ids = out.mutable_data();
    run([&] { search_.descents(t, rate, seed, {ids, static_cast<size_t>(count)}); });
    return out;
  }

  // (action, prior, q, visits, child) of the edges of a node: copies.
  py::tuple edges(int64_t t, int64_t id) {
    const Turn turn(busy_);
    const Node& node = at(t, id, "TreeStore.edges");
    const int64_t count = node.edge_base == kNoEdges ? 0 : node.n_edges;
    const Ints action(count), child(count);
    const Floats prior(count), q(count), visits(count);
    if (count > 0) {
      const Edges e = store_.edges(t, node);
      const int32_t* actions = store_.actions(t, node);
      for (int64_t i = 0; i < count; ++i) {
        put(action, i, actions[i]);
        put(prior, i, e.prior[i]);
        put(q, i, e.q[i]);
        put(visits, i, e.visits[i]);
        put(child, i, e.child[i]);
      }
    }
    return py::make_tuple(action, prior, q, visits, child);
  }

  // Per tree: root, nodes in use, smallest and largest value.
  py::tuple trees() {
    const Turn turn(busy_);
    const int64_t count = store_.size();
    const Ints root(count), nodes(count);
    const Floats low(count), high(count);
    for (int64_t t = 0; t < count; ++t) {
      put(root, t, store_.tree(t).root);
      put(nodes, t, store_.tree(t).nodes);
      put(low, t, store_.tree(t).low);
      put(high, t, store_.tree(t).high);
    }
    return py::make_tuple(root, nodes, low, high);
  }

  int64_t bytes() {
    const Turn turn(busy_);
    return store_.bytes();
  }

 private:
  struct Turn {
    explicit Turn(std::atomic_flag& flag) : busy(flag) {
      if (busy.test_and_set(std::memory_order_acquire))
        throw StateError("TreeStore: is used by another thread");
    }
    ~Turn() { busy.clear(std::memory_order_release); }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;
    std::atomic_flag& busy;
  };

  static py::tuple arrays(std::span<const Leaf> leaves) {
    const auto count = static_cast<py::ssize_t>(leaves.size());
    const Ints tree(count), node(count), parent(count), slot(count), depth(count);
    const py::array_t<bool> collision(count), evaluated(count);
    const Longs ticket(count);
    for (py::ssize_t i = 0; i < count; ++i) {
      const Leaf& leaf = leaves[static_cast<size_t>(i)];
      put(tree, i, leaf.tree);
      put(node, i, leaf.node);
      put(parent, i, leaf.parent);
      put(slot, i, leaf.slot);
      put(depth, i, leaf.depth);
      put(collision, i, leaf.collision);
      put(evaluated, i, leaf.evaluated);
      put(ticket, i, leaf.ticket);
    }
    return py::make_tuple(tree, node, parent, slot, depth, collision, evaluated, ticket);
  }

  template <class Array, class T>
  static void put(const Array& array, int64_t i, T value) {
    const_cast<Array&>(array).mutable_data()[i] = value;
  }

  template <class Body>
  void run(const Body& body) {
    const Turn turn(busy_);
    const py::gil_scoped_release release;
    body();
  }

  const Node& at(int64_t t, int64_t id, const char* op) const {
    store_.check_node(op, t, id);
    return store_.nodes(t)[id];
  }

  Store store_;
  Search search_;
  ParallelFor parallel_;
  std::vector<Leaf> leaves_;
  std::atomic_flag busy_;
};

}  // namespace

void bind_tree(py::module_& m) {
  py::register_exception_translator(&translate);
  py::class_<Snapshot, std::shared_ptr<Snapshot>>(m, "TreeMark", "What a TreeStore was.");
  py::class_<Trees, std::shared_ptr<Trees>>(
      m, "TreeStore", "Search trees and one search over them; not for two threads at once.")
      .def(py::init<int64_t, int64_t, int64_t, const py::dict&, uint64_t>(), py::arg("trees"),
           py::arg("nodes"), py::arg("lanes"), py::arg("options"), py::arg("seed"))
      .def("select", &Trees::select, py::arg("k"))
      .def("descend", &Trees::descend, py::arg("tickets"))
      .def("visit", &Trees::visit, py::arg("tree"), py::arg("node"), py::arg("slot"))
      .def("grow", &Trees::grow, py::arg("tickets"), py::arg("actions"), py::arg("merge"))
      .def("expand", &Trees::expand, py::arg("tree"), py::arg("node"), py::arg("ptr"),
           py::arg("width"), py::arg("actions"), py::arg("priors"), py::arg("normalize"))
      .def("backup", &Trees::backup, py::arg("tickets"), py::arg("values"))
      .def("cancel", &Trees::cancel, py::arg("tickets"))
      .def("end", &Trees::end, py::arg("tree"), py::arg("node"))
      .def("set_rewards", &Trees::set_rewards, py::arg("tree"), py::arg("node"), py::arg("rewards"))
      .def("reroot", &Trees::reroot, py::arg("trees"), py::arg("edges"))
      .def("compact", &Trees::compact)
      .def("prune", &Trees::prune, py::arg("top"), py::arg("by_value"), py::arg("visits"),
           py::arg("value"))
      .def("mark", &Trees::mark)
      .def("restore", &Trees::restore, py::arg("mark"))
      .def("columns", &Trees::columns)
      .def("load", &Trees::load, py::arg("columns"))
      .def("validate", &Trees::validate)
      .def("column", &Trees::field, py::arg("name"))
      .def("edges", &Trees::edges, py::arg("tree"), py::arg("node"))
      .def("paths", &Trees::paths, py::arg("tree"), py::arg("node"))
      .def("set_payloads", &Trees::set_payloads, py::arg("tree"), py::arg("node"),
           py::arg("payloads"))
      .def("descents", &Trees::descents, py::arg("tree"), py::arg("count"), py::arg("rate"),
           py::arg("seed"))
      .def("trees", &Trees::trees)
      .def("bytes", &Trees::bytes);
}

}  // namespace alignops::tree
