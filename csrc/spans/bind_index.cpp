// alignops._C.SpanIndex: the queries, over NumPy arrays. alignops/spans/index.py is its interface.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../common/check.h"
#include "../common/torch_parallel.h"
#include "bind.h"
#include "index.h"

namespace py = pybind11;

namespace alignops::spans {
namespace {

using Longs = py::array_t<int64_t, py::array::c_style>;

template <class Id>
std::span<const Id> view(const py::array& array) {
  return {static_cast<const Id*>(array.data()), static_cast<size_t>(array.size())};
}

// alignops/spans/arrays.py makes the arrays: contiguous, of one of these dtypes.
Ids ids_of(const py::array& array) {
  const auto is = [&](const char* name) { return array.dtype().equal(py::dtype(name)); };
  if (is("uint8")) return view<uint8_t>(array);
  if (is("uint16")) return view<uint16_t>(array);
  if (is("uint32")) return view<uint32_t>(array);
  if (is("int32")) return view<int32_t>(array);
  if (is("int64")) return view<int64_t>(array);
  throw py::type_error("SpanIndex: ids must be uint8, uint16, uint32, int32 or int64");
}

// Hands the memory of a vector over to NumPy.
Longs array_of(std::vector<int64_t>&& values) {
  auto* owned = new std::vector<int64_t>(std::move(values));
  const py::capsule owner(owned, [](void* p) { delete static_cast<std::vector<int64_t>*>(p); });
  return Longs(static_cast<py::ssize_t>(owned->size()), owned->data(), owner);
}

template <class Body>
auto without_gil(const Body& body) {
  const py::gil_scoped_release release;
  return body();
}

// An array of this shape that fill(data) writes.
template <class Fill>
Longs filled(std::vector<py::ssize_t> shape, const Fill& fill) {
  Longs out(std::move(shape));
  int64_t* data = out.mutable_data();
  without_gil([&] { fill(data); });
  return out;
}

std::shared_ptr<Batch> encode(const Index& self, const std::string& op, const std::string& argument,
                              const py::array& ids, const std::optional<Longs>& offsets) {
  const Ids from = ids_of(ids);
  if (!offsets) return std::make_shared<Batch>(self.encode(op.c_str(), argument.c_str(), from));
  const std::span<const int64_t> rows(offsets->data(), static_cast<size_t>(offsets->size()));
  return without_gil([&] {
    return std::make_shared<Batch>(self.encode(op.c_str(), argument.c_str(), from, rows));
  });
}

py::tuple match(const Index& self, const Batch& batch, int64_t max_match, bool counts) {
  Longs lengths(batch.size()), number(counts ? batch.size() : 0);
  int64_t *length = lengths.mutable_data(), *count = counts ? number.mutable_data() : nullptr;
  without_gil([&] { self.match(batch, max_match, length, count); });
  return py::make_tuple(lengths, number);
}

py::tuple maximal_spans(const Index& self, const std::string& op, const Batch& batch,
                        int64_t max_match, int64_t min_len, std::optional<int64_t> max_count,
                        const std::optional<py::array_t<bool, py::array::c_style>>& word_start,
                        const std::optional<py::array>& delimiters) {
  SpanFilter filter{min_len, max_count, {}, {}};
  if (word_start)
    filter.word_start = {reinterpret_cast<const uint8_t*>(word_start->data()),
                         static_cast<size_t>(word_start->size())};
  if (delimiters) filter.delimiters = ids_of(*delimiters);
  SpanList spans =
      without_gil([&] { return self.maximal_spans(op.c_str(), batch, max_match, filter); });
  return py::make_tuple(array_of(std::move(spans.start)), array_of(std::move(spans.end)),
                        array_of(std::move(spans.count)), array_of(std::move(spans.row)));
}

py::tuple tuple_of(Hits hits) {
  return py::make_tuple(array_of(std::move(hits.shard)), array_of(std::move(hits.position)),
                        array_of(std::move(hits.document)), array_of(std::move(hits.offset)),
                        array_of(std::move(hits.row)));
}

std::span<const int64_t> view(const Longs& array) {
  return {array.data(), static_cast<size_t>(array.size())};
}

py::tuple occurrences(const Index& self, const Batch& batch, const Longs& rows,
                      const Longs& numbers) {
  ALIGNOPS_CHECK(rows.size() == numbers.size(), "SpanIndex: rows and numbers must have one size, ",
                 "got ", rows.size(), " and ", numbers.size());
  return tuple_of(without_gil([&] { return self.occurrences(batch, view(rows), view(numbers)); }));
}

py::tuple hits(const Index& self, int64_t shard, const Longs& ranks) {
  Hits hits = without_gil([&] { return self.hits(shard, view(ranks)); });
  return py::make_tuple(array_of(std::move(hits.shard)), array_of(std::move(hits.position)),
                        array_of(std::move(hits.document)), array_of(std::move(hits.offset)));
}

py::tuple next_dist(const Index& self, const Batch& context) {
  Next next = without_gil([&] { return self.next_dist(context); });
  return py::make_tuple(array_of(std::move(next.ids)), array_of(std::move(next.counts)));
}

}  // namespace

void bind_spans_index(py::module_& m) {
  py::class_<Batch, std::shared_ptr<Batch>>(m, "SpanBatch", "Checked token ids of one index.");
  py::class_<Index, std::shared_ptr<Index>>(
      m, "SpanIndex",
      "Queries over all shards of a SpanStore. Every method may be called from any thread.")
      .def(py::init([](const std::shared_ptr<Store>& store) {
             return std::make_shared<Index>(store, torch_parallel_for());
           }),
           py::arg("store"))
      .def("encode", &encode, py::arg("op"), py::arg("argument"), py::arg("ids"),
           py::arg("offsets") = py::none(),
           "Check ids and, with offsets, rows; the names are those of the call in messages.")
      .def(
          "count",
          [](const Index& self, const Batch& batch) {
            return filled({batch.rows()}, [&](int64_t* out) { self.count(batch, out); });
          },
          py::arg("batch"), "Occurrences of each row, (rows,).")
      .def(
          "find",
          [](const Index& self, const Batch& batch) {
            return filled({batch.rows(), self.num_shards(), 2},
                          [&](int64_t* out) { self.find(batch, out); });
          },
          py::arg("batch"), "Ranks [lo, hi) of each row in each shard, (rows, shards, 2).")
      .def(
          "occurrences", &occurrences, py::arg("batch"), py::arg("rows"), py::arg("numbers"),
          "Shard, position, document, offset and row of these occurrences of rows, numbered in the "
          "order of the ranks.")
      .def("hits", &hits, py::arg("shard"), py::arg("ranks"),
           "Shard, position, document and offset of the suffixes at some ranks.")
      .def("match", &match, py::arg("batch"), py::arg("max_match"), py::arg("counts"),
           "Matching statistics and the counts of these matches, or an empty array.")
      .def(
          "longest_prefix",
          [](const Index& self, const Batch& batch, int64_t max_match) {
            return filled({batch.rows()},
                          [&](int64_t* out) { self.longest_prefix(batch, max_match, out); });
          },
          py::arg("batch"), py::arg("max_match"), "Length of the longest prefix that occurs.")
      .def(
          "longest_suffix",
          [](const Index& self, const Batch& batch, int64_t max_match) {
            return filled({batch.rows()},
                          [&](int64_t* out) { self.longest_suffix(batch, max_match, out); });
          },
          py::arg("batch"), py::arg("max_match"), "Length of the longest suffix that occurs.")
      .def("maximal_spans", &maximal_spans, py::arg("op"), py::arg("batch"), py::arg("max_match"),
           py::arg("min_len"), py::arg("max_count"), py::arg("word_start"), py::arg("delimiters"),
           "Start, end, count and row of the maximal spans.")
      .def(
          "next_counts",
          [](const Index& self, const Batch& context, const Batch& candidates) {
            return filled({candidates.size()},
                          [&](int64_t* out) { self.next_counts(context, candidates, out); });
          },
          py::arg("context"), py::arg("candidates"), "Occurrences of context + each candidate.")
      .def("next_dist", &next_dist, py::arg("context"),
           "Tokens that follow the context, and their counts.")
      .def(
          "next_tokens",
          [](const Index& self, const Batch& context, const Longs& numbers) {
            return filled({numbers.size()},
                          [&](int64_t* out) { self.next_tokens(context, view(numbers), out); });
          },
          py::arg("context"), py::arg("numbers"),
          "The token that follows each of these occurrences, -1 at the end of a document.")
      .def(
          "eos_count",
          [](const Index& self, const Batch& context) {
            return without_gil([&] { return self.eos_count(context); });
          },
          py::arg("context"), "How often the context ends a document.");
}

}  // namespace alignops::spans
