// alignops._C: writing the shards of an index, opening one, and the errors of both.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstring>
#include <map>
#include <optional>
#include <utility>

#include "../common/check.h"
#include "../common/torch_parallel.h"
#include "bind.h"
#include "store.h"
#include "writer.h"

namespace py = pybind11;

namespace alignops::spans {
namespace {

using FileEntries = std::map<std::string, std::pair<uint64_t, uint32_t>>;  // bytes, table CRC

// -------------------------------------------------------------------------------------------------
// Errors

void raise_python(const char* name, const std::exception& error) {
  const py::object type = py::module_::import("alignops.spans.errors").attr(name);
  PyErr_SetString(type.ptr(), error.what());
}

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const FileError& error) {
    const py::tuple arguments = py::make_tuple(error.code, error.what(), error.path);
    PyErr_SetObject(PyExc_OSError, arguments.ptr());
  } catch (const NotAnIndexError& error) {
    raise_python("NotAnIndexError", error);
  } catch (const IndexVersionError& error) {
    raise_python("IndexVersionError", error);
  } catch (const IndexCorruptError& error) {
    raise_python("IndexCorruptError", error);
  } catch (const IndexIncompleteError& error) {
    raise_python("IndexIncompleteError", error);
  } catch (const TokenizerMismatchError& error) {
    raise_python("TokenizerMismatchError", error);
  }
}

// -------------------------------------------------------------------------------------------------
// Values

Uuid to_uuid(const py::bytes& bytes) {
  const std::string_view view = bytes;
  Uuid uuid{};
  ALIGNOPS_CHECK(view.size() == uuid.size(), "uuid must have 16 bytes, got ", view.size());
  std::memcpy(uuid.data(), view.data(), uuid.size());
  return uuid;
}

int32_t kind_of(const std::string& name) {
  for (int32_t kind = 0; kind < kNumKinds; ++kind)
    if (name == kNames[kind]) return kind;
  return -1;
}

template <class T>
std::span<const T> view(const std::optional<py::array_t<T, py::array::c_style>>& array,
                        const char* name, int64_t size) {
  if (!array) return {};
  ALIGNOPS_CHECK(array->ndim() == 1 && array->size() == size, "SpanShardWriter.add: ", name,
                 " must have shape (", size, ",)");
  return {array->data(), static_cast<size_t>(size)};
}

// -------------------------------------------------------------------------------------------------
// Writing

// Text and vocabulary together are smaller than this for the sais builder.
constexpr uint64_t kSaisLimit = uint64_t{1} << 31;

void add_run(ShardWriter& writer, const py::array& tokens,
             const py::array_t<int64_t, py::array::c_style>& ends,
             const std::optional<py::array_t<uint32_t, py::array::c_style>>& byte_offsets,
             const std::optional<py::array_t<uint16_t, py::array::c_style>>& labels,
             const py::bytes& meta,
             const std::optional<py::array_t<int64_t, py::array::c_style>>& meta_ends,
             uint64_t document, uint64_t offset) {
  const char kind = tokens.dtype().kind();
  ALIGNOPS_CHECK(tokens.ndim() == 1 && (tokens.flags() & py::array::c_style) != 0 &&
                     (kind == 'i' || kind == 'u'),
                 "SpanShardWriter.add: tokens must be a contiguous vector of integers");
  const std::string_view meta_bytes = meta;
  Run run{};
  run.tokens = {tokens.data(), static_cast<int32_t>(tokens.itemsize()), kind == 'i'};
  run.size = tokens.size();
  run.ends = {ends.data(), static_cast<size_t>(ends.size())};
  run.byte_offsets = view(byte_offsets, "byte_offsets", run.size).data();
  run.labels = view(labels, "labels", ends.size()).data();
  run.meta = meta_bytes.data();
  run.meta_ends = view(meta_ends, "meta_ends", ends.size());
  run.document = document;
  run.offset = offset;
  int64_t last = 0;
  for (const int64_t end : run.ends) {
    ALIGNOPS_CHECK(end >= last && end <= run.size,
                   "SpanShardWriter.add: ends must increase up to the number of tokens");
    last = end;
  }
  const py::gil_scoped_release release;
  writer.add(run);
}

py::dict shard_dict(const ShardWriter& writer) {
  const ShardInfo& info = writer.info();
  FileEntries files;
  for (int32_t kind = 0; kind < kNumKinds; ++kind)
    if (info.files[kind].bytes > 0)
      files[kNames[kind]] = {info.files[kind].bytes, info.files[kind].table_crc};
  py::dict result;
  result["tokens"] = info.tokens;
  result["documents"] = info.documents;
  result["continued"] = info.continued;
  result["files"] = files;
  return result;
}

Builder builder_of(const std::string& name) {
  if (name == "sais") return Builder::kSais;
  if (name == "radix") return Builder::kRadix;
  ALIGNOPS_CHECK(name == "radix-stream", "builder must be sais, radix or radix-stream, got '", name,
                 "'");
  return Builder::kRadixStream;
}

uint64_t builder_bytes(const std::string& name, uint64_t text_size, int32_t token_bytes,
                       uint64_t vocab_size) {
  switch (builder_of(name)) {
    case Builder::kSais:
      return text_size + vocab_size < kSaisLimit ? sais_bytes(text_size, token_bytes, vocab_size)
                                                 : UINT64_MAX;
    case Builder::kRadix:
      return radix_bytes(text_size, token_bytes, vocab_size);
    case Builder::kRadixStream:
      break;
  }
  return radix_stream_bytes(text_size, token_bytes, vocab_size);
}

void bind_writer(py::module_& m) {
  py::class_<Progress>(m, "SpanProgress", "Shared with the thread that watches a build.")
      .def(py::init<>())
      .def_property_readonly("done", [](const Progress& p) { return p.done.load(); })
      .def_property_readonly("total", [](const Progress& p) { return p.total.load(); })
      .def_property_readonly(
          "writing", [](const Progress& p) { return p.phase == kWritePhase; },
          "Whether suffixes are sorted and are being written.")
      .def("cancel", [](Progress& p) { p.cancel = true; }, "Make the running call end soon.");

  py::class_<ShardWriter>(m, "SpanShardWriter",
                          "Writes one shard. An empty folder: only computes its checksums. Calls "
                          "release the GIL; one object must not be used by two threads at once.")
      .def(py::init([](std::string folder, uint32_t shard, const py::bytes& uuid,
                       uint64_t vocab_size, int32_t token_bytes, bool labels, bool meta,
                       bool byte_offsets) {
             return std::make_unique<ShardWriter>(
                 std::move(folder), shard, to_uuid(uuid),
                 ShardLayout{vocab_size, token_bytes, labels, meta, byte_offsets});
           }),
           py::arg("folder"), py::arg("shard"), py::arg("uuid"), py::arg("vocab_size"),
           py::arg("token_bytes"), py::arg("labels"), py::arg("meta"), py::arg("byte_offsets"))
      .def("reserve", &ShardWriter::reserve, py::arg("text_size"), py::arg("documents"),
           py::call_guard<py::gil_scoped_release>(), "Take disk space for this much text now.")
      .def("add", &add_run, py::arg("tokens"), py::arg("ends"), py::arg("byte_offsets"),
           py::arg("labels"), py::arg("meta"), py::arg("meta_ends"), py::arg("document"),
           py::arg("offset"), "Append tokens and end documents after `ends` of them.")
      .def("end_text", &ShardWriter::end_text, py::arg("continued"),
           py::call_guard<py::gil_scoped_release>(), "Complete all files but the suffixes.")
      .def(
          "sort",
          [](ShardWriter& writer, const std::string& builder, uint64_t mem_bytes,
             uint64_t directory_tokens, Progress& progress) {
            const Builder code = builder_of(builder);
            const py::gil_scoped_release release;
            writer.sort(code, mem_bytes, directory_tokens, torch_parallel_for(), progress);
          },
          py::arg("builder"), py::arg("mem_bytes"), py::arg("directory_tokens"),
          py::arg("progress"), "Sort and write the suffixes.")
      .def("info", &shard_dict, "What the manifest says of the shard.");

  m.def("spans_builder_bytes", &builder_bytes, py::arg("builder"), py::arg("text_size"),
        py::arg("token_bytes"), py::arg("vocab_size"),
        "Peak memory of sorting a text; 2^64 - 1 if the builder cannot.");
  m.def(
      "spans_restamp",
      [](const std::string& path, const py::bytes& uuid, uint32_t shard, uint32_t shards) {
        const Uuid id = to_uuid(uuid);
        const py::gil_scoped_release release;
        restamp_file(path, kFormat, id, shard, shards);
      },
      py::arg("path"), py::arg("uuid"), py::arg("shard"), py::arg("shards"),
      "Give a finished file another UUID, shard and number of shards.");
  m.def("spans_removal_name", &removal_name, py::arg("shard"), py::arg("table_crc32c"),
        "Name of the list of removed documents of a shard.");
  m.def("spans_sync_folder", &sync_directory, py::arg("path"),
        py::call_guard<py::gil_scoped_release>(), "Make names in a folder durable.");
  m.def("spans_exchange", &exchange_paths, py::arg("a"), py::arg("b"),
        py::call_guard<py::gil_scoped_release>(),
        "Exchange two paths in one step; False where the file system cannot.");
}

// -------------------------------------------------------------------------------------------------
// Reading

using ShardEntry = std::tuple<uint64_t, uint64_t, bool, FileEntries>;

Verify verify_of(const std::string& name) {
  if (name == "quick") return Verify::kQuick;
  if (name == "lazy") return Verify::kLazy;
  ALIGNOPS_CHECK(name == "full", "verify must be quick, lazy or full, got '", name, "'");
  return Verify::kFull;
}

Mode mode_of(const std::string& name) {
  if (name == "mmap") return Mode::kMmap;
  ALIGNOPS_CHECK(name == "ram", "mode must be mmap or ram, got '", name, "'");
  return Mode::kRam;
}

std::shared_ptr<Store> open_store(int folder, const std::string& path, const py::bytes& uuid,
                                  uint64_t vocab_size, int32_t token_bytes,
                                  const std::vector<ShardEntry>& shards, const std::string& mode,
                                  const std::string& verify) {
  IndexInfo info{to_uuid(uuid), vocab_size, token_bytes, {}};
  for (const auto& [tokens, documents, continued, files] : shards) {
    ShardInfo shard{tokens, documents, continued, {}};
    for (const auto& [name, entry] : files)
      if (const int32_t kind = kind_of(name); kind >= 0)
        shard.files[static_cast<size_t>(kind)] = {entry.first, entry.second};
    info.shards.push_back(shard);
  }
  const Mode mode_code = mode_of(mode);
  const Verify verify_code = verify_of(verify);
  const py::gil_scoped_release release;
  return std::const_pointer_cast<Store>(
      Store::open(folder, path, info, mode_code, verify_code, torch_parallel_for()));
}

template <class T>
py::array copy(const void* data, uint64_t size) {
  return py::array_t<T>(static_cast<py::ssize_t>(size), static_cast<const T*>(data));
}

py::array document_tokens(const Store& store, uint64_t d) {
  const Extent extent = store.document(d);
  const void* text = store.text(extent);
  const uint64_t size = extent.end - extent.begin;
  switch (store.info().token_bytes) {
    case 1:
      return copy<uint8_t>(text, size);
    case 2:
      return copy<uint16_t>(text, size);
    default:
      return copy<uint32_t>(text, size);
  }
}

// Text and SUF of a shard, copied: what the operators on tensors take.
py::tuple shard_arrays(const Store& store, int32_t s) {
  if (s < 0 || s >= store.num_shards())
    throw std::out_of_range(
        message("SpanStore: shard must lie in [0, ", store.num_shards(), "), got ", s));
  const Shard& shard = store.shard(s);
  const auto size = static_cast<py::ssize_t>(shard.suf_size);
  const bool packed = shard.pointer_bytes == 5;
  const py::array text(py::dtype(message("u", shard.token_bytes)),
                       static_cast<py::ssize_t>(shard.text_size));
  const py::array suf = packed ? py::array(py::dtype("u1"), std::vector<py::ssize_t>{size, 5})
                               : py::array(py::dtype("u4"), size);
  store.check_sizes();
  void *to_text = const_cast<void*>(text.data()), *to_suf = const_cast<void*>(suf.data());
  const auto text_bytes = static_cast<size_t>(text.nbytes()),
             suf_bytes = static_cast<size_t>(suf.nbytes());
  {
    const py::gil_scoped_release release;
    std::memcpy(to_text, shard.text, text_bytes);
    std::memcpy(to_suf, shard.suf, suf_bytes);
  }
  return py::make_tuple(text, suf);
}

void bind_reader(py::module_& m) {
  py::class_<Store, std::shared_ptr<Store>>(
      m, "SpanStore", "An opened index. Immutable; all calls may come from any thread.")
      .def(py::init(&open_store), py::arg("folder"), py::arg("path"), py::arg("uuid"),
           py::arg("vocab_size"), py::arg("token_bytes"), py::arg("shards"), py::arg("mode"),
           py::arg("verify"))
      .def_property_readonly("tokens", &Store::tokens)
      .def_property_readonly("documents", &Store::documents)
      .def_property_readonly("shards", &Store::num_shards)
      .def_property_readonly(
          "removed",
          [](const Store& store) {
            return copy<int64_t>(store.removed().data(), store.removed().size());
          },
          "Numbers of the removed documents, ascending, int64.")
      .def(
          "write_removal",
          [](const Store& store, int32_t shard,
             const py::array_t<uint64_t, py::array::c_style>& documents,
             const std::string& folder) {
            const std::span<const uint64_t> numbers(documents.data(),
                                                    static_cast<size_t>(documents.size()));
            const py::gil_scoped_release release;
            const FileSummary written = store.write_removal(shard, numbers, folder);
            return std::pair(written.bytes, written.table_crc);
          },
          py::arg("shard"), py::arg("documents"), py::arg("folder"),
          "Write the list of all removed documents of a shard, counted within it, ascending; bytes "
          "and checksum for the manifest.")
      .def("check_sizes", &Store::check_sizes, "IndexCorruptError if a file shrank or grew.")
      .def(
          "counts",
          [](const Store& store) {
            return py::make_tuple(
                store.ids().empty() && store.info().vocab_size <= kDenseVocab
                    ? py::object(py::none())
                    : py::object(copy<uint32_t>(store.ids().data(), store.ids().size())),
                copy<int64_t>(store.counts().data(), store.counts().size()));
          },
          "(None, int64 (V,)) or, for large vocabularies, (ids uint32 (k,), int64 (k,)).")
      .def("first_document", &Store::first_document, py::arg("shard"))
      .def("document_tokens", &document_tokens, py::arg("document"), "A copy, in stored width.")
      .def("arrays", &shard_arrays, py::arg("shard"),
           "Copies of the text and of SUF, uint32 (n,) or uint8 (n, 5); nothing is verified.")
      .def(
          "place",
          [](const Store& store, int32_t shard, uint64_t position) {
            const Place place = store.place(shard, position);
            return std::pair(place.document, place.offset);
          },
          py::arg("shard"), py::arg("position"), "(document, offset) of a position of a text.")
      .def(
          "has",
          [](const Store& store, const std::string& name) {
            const int32_t kind = kind_of(name);
            return kind >= 0 && store.has(static_cast<Kind>(kind));
          },
          py::arg("file"), "Whether all shards have this optional file.")
      .def("label", &Store::label, py::arg("document"))
      .def(
          "meta",
          [](const Store& store, uint64_t d) {
            const std::string_view text = store.meta(d);
            return py::bytes(text.data(), text.size());
          },
          py::arg("document"), "JSON text.")
      .def(
          "byte_offsets",
          [](const Store& store, uint64_t d) {
            const auto offsets = store.byte_offsets(d);
            return copy<uint32_t>(offsets.data(), offsets.size());
          },
          py::arg("document"), "uint32, one per token.")
      .def(
          "verify",
          [](const Store& store, const std::string& level) {
            const Verify code = verify_of(level);
            const py::gil_scoped_release release;
            store.verify(code, torch_parallel_for());
          },
          py::arg("level"), "Check again, as when opening at this level.");
}

}  // namespace

void bind_spans_store(py::module_& m) {
  py::register_exception_translator(&translate);
  bind_writer(m);
  bind_reader(m);
}

}  // namespace alignops::spans
