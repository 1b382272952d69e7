// alignops._C.AttentionPool and AttentionWorkspace with their steps and moves: bookkeeping of the
// shared cache, over NumPy arrays. alignops/attention/workspace.py is its interface.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../common/check.h"
#include "bind.h"
#include "errors.h"
#include "workspace.h"

namespace py = pybind11;

namespace alignops::attention::store {
namespace {

using Longs = py::array_t<int64_t, py::array::c_style>;
using Numbers = std::vector<int64_t>;

void raise_python(const char* name, const std::exception& error) {
  const py::object type = py::module_::import("alignops.attention.errors").attr(name);
  PyErr_SetString(type.ptr(), error.what());
}

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const LayoutError& error) {
    raise_python("LayoutError", error);
  } catch (const BlockBusy& error) {
    raise_python("BlockBusy", error);
  } catch (const StalePlan& error) {
    raise_python("StalePlan", error);
  } catch (const PoolExhausted& error) {
    raise_python("PoolExhausted", error);
  }
}

Longs array_of(const Numbers& values) {
  Longs out(static_cast<py::ssize_t>(values.size()));
  std::copy(values.begin(), values.end(), out.mutable_data());
  return out;
}

py::tuple tuple_of(const Numbers& values) {
  py::tuple out(values.size());
  for (size_t i = 0; i < values.size(); ++i) out[i] = values[i];
  return out;
}

// (copies, 4): source slot, destination slot, tokens, positions that keys turn by.
Longs array_of(const std::vector<Copy>& copies) {
  Longs out({static_cast<py::ssize_t>(copies.size()), py::ssize_t{4}});
  int64_t* row = out.mutable_data();
  for (const Copy& copy : copies)
    for (const int64_t number : {copy.src, copy.dst, copy.count, copy.shift}) *row++ = number;
  return out;
}

// A step of a workspace that returns what it has reserved when Python lets go of it.
class OwnedStep {
 public:
  explicit OwnedStep(std::shared_ptr<Workspace> workspace)
      : workspace_(std::move(workspace)), step_(workspace_->pool().epochs()) {}
  ~OwnedStep() {
    if (step_.open) workspace_->abort(step_);
  }
  OwnedStep(const OwnedStep&) = delete;
  OwnedStep& operator=(const OwnedStep&) = delete;

  void begin(const Numbers& counts, const std::optional<Numbers>& workers,
             const std::optional<std::vector<Numbers>>& views, bool lagged, bool implicit_self) {
    require(!step_.open, "begin: the step must be closed");
    const py::gil_scoped_release release;
    workspace_->begin(step_, {counts, workers ? &*workers : nullptr, views ? &*views : nullptr,
                              lagged, implicit_self});
  }
  void fill(Longs& out) const {
    open_step();
    ALIGNOPS_CHECK(out.size() >= step_.words(), "fill: the plan needs ", step_.words(),
                   " words, got ", out.size());
    int64_t* words = out.mutable_data();
    const py::gil_scoped_release release;
    step_.fill(workspace_->form(), workspace_->pool().page_size(), words);
  }
  Longs copies() const {
    open_step();
    std::vector<Copy> copies;
    for (const Write& write : step_.writes) {
      if (!write.copy) continue;
      const auto copy = step_.page_copy(write, workspace_->pool().page_size());
      copies.push_back({copy.src, copy.dst, copy.count, 0});
    }
    return array_of(copies);
  }
  void commit(const std::optional<Longs>& tokens) {
    open_step();
    std::optional<std::span<const int64_t>> ids;
    if (tokens) ids.emplace(tokens->data(), static_cast<size_t>(tokens->size()));
    const py::gil_scoped_release release;
    workspace_->commit(step_, ids);
  }
  void abort() {
    if (!step_.open) return;
    const py::gil_scoped_release release;
    workspace_->abort(step_);
  }
  bool fresh() const { return step_.open && workspace_->fresh(step_); }
  const Step& step() const { return step_; }
  const Step& open_step() const {
    require(step_.open, "the step must be open, got one that has ended");
    return step_;
  }

 private:
  static void require(bool ok, const char* what) {
    if (!ok) throw StalePlan(what);
  }

  std::shared_ptr<Workspace> workspace_;
  Step step_;
};

// A move that is cancelled unless it is finished.
class OwnedMove {
 public:
  OwnedMove(std::shared_ptr<Workspace> workspace, std::unique_ptr<Move> move)
      : workspace_(std::move(workspace)), move_(std::move(move)) {}
  ~OwnedMove() { cancel(); }
  OwnedMove(const OwnedMove&) = delete;
  OwnedMove& operator=(const OwnedMove&) = delete;

  Longs copies() const { return move_ ? array_of(move_->copies) : array_of(std::vector<Copy>()); }
  void finish() {
    if (!move_) return;
    workspace_->finish_move(*move_);
    move_.reset();
  }
  void cancel() {
    if (!move_) return;
    workspace_->cancel_move(*move_);
    move_.reset();
  }

 private:
  std::shared_ptr<Workspace> workspace_;
  std::unique_ptr<Move> move_;
};

const Block& block_of(const Layout& layout, int64_t block) {
  if (block < 0 || block >= static_cast<int64_t>(layout.blocks.size()))
    throw std::out_of_range(message("block must be below ", layout.blocks.size(), ", got ", block));
  return *layout.blocks[static_cast<size_t>(block)];
}

const Worker& worker_at(const Layout& layout, int64_t worker) {
  if (worker < 0 || worker >= static_cast<int64_t>(layout.workers.size()))
    throw std::out_of_range(
        message("worker must be below ", layout.workers.size(), ", got ", worker));
  return *layout.workers[static_cast<size_t>(worker)];
}

Longs tokens_of(const Workspace& workspace, int64_t block) {
  const int64_t page_size = workspace.pool().page_size();
  Numbers tokens;
  workspace.read([&](const Layout& layout) {
    for (const Run& run : block_of(layout, block).runs)
      for (int64_t i = 0; i < run.n; ++i)
        tokens.push_back(workspace.pool().token(run.slot(i, page_size)));
  });
  return array_of(tokens);
}

// Of each segment: keys, first slot, position and rotation of its first key, whether its keys have
// been rewritten; and all entries of their page lists.
py::tuple segments_of(const Workspace& workspace, int64_t block) {
  Numbers rows, pages;
  workspace.read([&](const Layout& layout) {
    const Block& version = block_of(layout, block);
    version.append_pages(workspace.pool().page_size(), pages);
    for (const Run& run : version.runs)
      for (const int64_t number :
           {run.n, run.first, run.s0, run.r0, static_cast<int64_t>(run.rewritten)})
        rows.push_back(number);
  });
  return py::make_tuple(array_of(rows).reshape({py::ssize_t{-1}, py::ssize_t{5}}), array_of(pages));
}

py::dict stats_of(const Workspace& workspace) {
  const WorkspaceStats stats = workspace.stats();
  const PagePool::Usage usage = workspace.pool().usage();
  py::dict out;
  out["blocks"] = stats.blocks;
  out["workers"] = stats.workers;
  out["segments"] = stats.segments;
  out["tokens"] = stats.tokens;
  out["pages"] = stats.pages;
  out["partial_pages"] = stats.partial_pages;
  out["pages_used"] = usage.used;
  out["pages_shared"] = usage.shared;
  return out;
}

// Blocks of a file, into an empty workspace. Segments are rows as `segments_of` makes them, but
// with the places of pages in the file for page numbers; tokens and `filled` slots are of those
// pages. Returns the pages that they got.
Longs restore(Workspace& workspace, const std::vector<std::string>& names, const Numbers& extents,
              const std::vector<Longs>& segments, const std::vector<Numbers>& entries,
              const Numbers& tokens, const Numbers& filled) {
  PagePool& pool = workspace.pool();
  const int64_t page_size = pool.page_size(), count = static_cast<int64_t>(filled.size());
  const auto require = [](bool ok, const char* what) {
    ALIGNOPS_CHECK(ok, "load: the file must have ", what);
  };
  require(names.size() == extents.size() && names.size() == segments.size() &&
              names.size() == entries.size(),
          "all parts of each block");
  require(static_cast<int64_t>(tokens.size()) == count * page_size, "a token for each slot");
  for (const int64_t used : filled) require(used > 0 && used <= page_size, "pages that are in use");
  for (size_t b = 0; b < names.size(); ++b) {
    int64_t end = 0, place = 0;
    require(segments[b].ndim() == 2 && segments[b].shape(1) == 5, "segments of five numbers");
    for (py::ssize_t i = 0; i < segments[b].shape(0); ++i) {
      const int64_t* row = segments[b].data(i, 0);
      require(row[0] > 0 && row[0] <= pool.pages() * page_size && row[1] >= 0 &&
                  row[1] < page_size && row[2] >= end && row[2] <= extents[b] - row[0],
              "segments one behind the other");
      end = row[2] + row[0];
      const int64_t used = (row[1] + row[0] + page_size - 1) / page_size;
      require(place + used <= static_cast<int64_t>(entries[b].size()), "pages for all segments");
      for (int64_t k = 0; k < used; ++k) {
        const int64_t page = entries[b][static_cast<size_t>(place + k)];
        require(page >= 0 && page < count, "pages below their number");
        require(std::min(page_size, row[1] + row[0] - k * page_size) <=
                    filled[static_cast<size_t>(page)],
                "segments within what pages hold");
      }
      place += used;
    }
    require(place == static_cast<int64_t>(entries[b].size()), "no pages without segments");
  }
  Numbers pages;
  pool.take(count, pages, "load");
  for (int64_t i = 0; i < count; ++i) {
    const int64_t page = pages[static_cast<size_t>(i)];
    pool.claim(page, 0, filled[static_cast<size_t>(i)]);
    for (int64_t k = 0; k < page_size; ++k)
      pool.token(page * page_size + k) = tokens[static_cast<size_t>(i * page_size + k)];
  }
  for (size_t b = 0; b < names.size(); ++b) {
    Block block{std::make_shared<const std::string>(names[b]), {}, extents[b]};
    Numbers mine;
    for (const int64_t entry : entries[b]) mine.push_back(pages[static_cast<size_t>(entry)]);
    const auto list = std::make_shared<PageList>(mine, kListRoom);
    int64_t place = 0;
    for (py::ssize_t i = 0; i < segments[b].shape(0); ++i) {
      const int64_t* row = segments[b].data(i, 0);
      block.runs.push_back({list, place, row[1], row[0], row[2], row[3], row[4] != 0});
      place += (row[1] + row[0] + page_size - 1) / page_size;
    }
    pool.retain(mine);
    workspace.restore_block(block);
  }
  pool.release(pages);  // blocks hold them now
  return array_of(pages);
}

MoveMode mode_of(const std::string& mode) {
  if (mode == "auto") return MoveMode::kAuto;
  if (mode == "splice") return MoveMode::kSplice;
  ALIGNOPS_CHECK(mode == "rewrite", "move: mode must be one of auto, splice, rewrite, got '", mode,
                 "'");
  return MoveMode::kRewrite;
}

std::unique_ptr<OwnedMove> begin_move(const std::shared_ptr<Workspace>& self, int64_t src,
                                      int64_t dst, const std::string& mode, int64_t max_segments) {
  auto move = self->begin_move(src, dst, mode_of(mode), max_segments);
  return move == nullptr ? nullptr : std::make_unique<OwnedMove>(self, std::move(move));
}

void bind_pool(py::module_& m) {
  py::class_<PagePool, std::shared_ptr<PagePool>>(
      m, "AttentionPool", "Pages and their references. Safe to use from several threads.")
      .def(py::init<int64_t, int64_t>(), py::arg("pages"), py::arg("page_size"))
      .def_property_readonly("pages", &PagePool::pages)
      .def_property_readonly("page_size", &PagePool::page_size)
      .def_property_readonly("free_pages", &PagePool::free_pages)
      .def(
          "slot_tokens",
          [](PagePool& self, const Numbers& pages) {
            Numbers tokens;
            for (const int64_t page : pages) {
              if (page < 0 || page >= self.pages())
                throw std::out_of_range(
                    message("slot_tokens: pages must be below ", self.pages(), ", got ", page));
              for (int64_t i = 0; i < self.page_size(); ++i)
                tokens.push_back(self.token(page * self.page_size() + i));
            }
            return array_of(tokens);
          },
          py::arg("pages"))
      .def("references", [](PagePool& self) { return array_of(self.references()); })
      .def_property_readonly("waiting", &PagePool::waiting);
}

void bind_step(py::module_& m) {
  py::class_<OwnedStep>(m, "AttentionStep", "A step, for one thread at a time.")
      .def("begin", &OwnedStep::begin, py::arg("counts"), py::arg("workers"), py::arg("views"),
           py::arg("lagged"), py::arg("implicit_self"))
      .def("fill", &OwnedStep::fill, py::arg("out").noconvert())
      .def("copies", &OwnedStep::copies)
      .def("commit", &OwnedStep::commit, py::arg("tokens"))
      .def("abort", &OwnedStep::abort)
      .def_property_readonly("fresh", &OwnedStep::fresh)
      .def_property_readonly("open", [](const OwnedStep& self) { return self.step().open; })
      .def_property_readonly("words", [](const OwnedStep& self) { return self.step().words(); })
      .def_property_readonly("rows", [](const OwnedStep& self) { return self.step().rows(); })
      .def_property_readonly("blocks",
                             [](const OwnedStep& self) { return tuple_of(self.step().blocks); })
      .def_property_readonly("row_ptr",
                             [](const OwnedStep& self) {
                               Numbers rows{0};
                               for (const Entry& entry : self.step().entries)
                                 rows.push_back(entry.row + entry.rows);
                               return tuple_of(rows);
                             })
      .def_property_readonly(
          "positions",
          [](const OwnedStep& self) {
            Numbers positions;
            for (size_t e = 0; e < self.step().entries.size(); ++e)
              positions.push_back(self.step().position(e));
            return tuple_of(positions);
          },
          "Position of the first new token of each entry.");
  py::class_<OwnedMove>(m, "AttentionMove", "A move that waits for copies.")
      .def_property_readonly("copies", &OwnedMove::copies)
      .def("finish", &OwnedMove::finish)
      .def("cancel", &OwnedMove::cancel);
}

}  // namespace

}  // namespace alignops::attention::store

namespace alignops::attention {

void bind_attention_workspace(py::module_& m) {
  using namespace store;  // NOLINT: one function
  py::register_exception_translator(&translate);
  bind_pool(m);
  bind_step(m);
  py::class_<Workspace, std::shared_ptr<Workspace>>(
      m, "AttentionWorkspace", "Blocks and workers over a pool. Safe to use from several threads.")
      .def(py::init([](std::shared_ptr<PagePool> pool, bool local,
                       std::vector<std::vector<double>> omegas) {
             return std::make_shared<Workspace>(std::move(pool), Form{local, std::move(omegas)});
           }),
           py::arg("pool"), py::arg("local"), py::arg("omegas"))
      .def("step",
           [](const std::shared_ptr<Workspace>& self) { return std::make_unique<OwnedStep>(self); })
      .def("new_block", &Workspace::new_block, py::arg("name"))
      .def(
          "add_worker",
          [](Workspace& self, std::string name, const Numbers& view,
             std::optional<int64_t> at_index) {
            return self.add_worker(std::move(name), view, at_index);
          },
          py::arg("name"), py::arg("view"), py::arg("at_index"))
      .def(
          "set_view",
          [](Workspace& self, int64_t worker, const Numbers& view) { self.set_view(worker, view); },
          py::arg("worker"), py::arg("view"))
      .def(
          "set_weight",
          [](Workspace& self, int64_t worker, int64_t block, float bias, float gain) {
            self.set_knob(worker, {block, bias, gain});
          },
          py::arg("worker"), py::arg("block"), py::arg("bias"), py::arg("gain"))
      .def_property_readonly(
          "workers",
          [](const Workspace& self) {
            return tuple_of(self.read([](const Layout& layout) { return layout.order; }));
          })
      .def(
          "view",
          [](const Workspace& self, int64_t worker) {
            return tuple_of(
                self.read([&](const Layout& layout) { return worker_at(layout, worker).view; }));
          },
          py::arg("worker"))
      .def(
          "worker_name",
          [](const Workspace& self, int64_t worker) {
            return self.read([&](const Layout& layout) { return worker_at(layout, worker).name; });
          },
          py::arg("worker"))
      .def(
          "length",
          [](const Workspace& self, int64_t block) {
            return self.read([&](const Layout& layout) { return block_of(layout, block).extent; });
          },
          py::arg("block"))
      .def("tokens", &tokens_of, py::arg("block"))
      .def("segments", &segments_of, py::arg("block"))
      .def(
          "weights",
          [](const Workspace& self, int64_t worker) {
            py::list out;
            for (const Knob& knob :
                 self.read([&](const Layout& layout) { return worker_at(layout, worker).knobs; }))
              out.append(py::make_tuple(knob.block, knob.bias, knob.gain));
            return out;
          },
          py::arg("worker"), "Of a worker: (block, bias, gain) that are not (0, 1).")
      .def_property_readonly(
          "num_workers",
          [](const Workspace& self) {
            return self.read([](const Layout& layout) { return layout.workers.size(); });
          })
      .def("restore", &restore, py::arg("names"), py::arg("extents"), py::arg("segments"),
           py::arg("entries"), py::arg("tokens"), py::arg("filled"))
      .def("fork_block", &Workspace::fork_block, py::arg("block"))
      .def("fork_worker", &Workspace::fork_worker, py::arg("worker"), py::arg("name"))
      .def("fork", [](Workspace& self) { return std::shared_ptr<Workspace>(self.fork()); })
      .def("retire_worker", &Workspace::retire_worker, py::arg("worker"))
      .def("evict", &Workspace::evict, py::arg("block"), py::arg("start"), py::arg("stop"),
           py::arg("close_gap"))
      .def("truncate", &Workspace::truncate, py::arg("block"), py::arg("length"))
      .def("begin_move", &begin_move, py::arg("src"), py::arg("dst"), py::arg("mode"),
           py::arg("max_segments"))
      .def("stats", &stats_of);
}

}  // namespace alignops::attention
