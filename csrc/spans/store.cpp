#include "store.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "../common/check.h"
#include "removed.h"

namespace alignops::spans {
namespace {

constexpr int kSampledPairs = 256;
// Neighbours that agree in so many tokens are taken to be in order.
constexpr uint64_t kSampledTokens = 4096;

uint64_t token_at(const void* text, int32_t token_bytes, uint64_t i) {
  switch (token_bytes) {
    case 1:
      return static_cast<const uint8_t*>(text)[i];
    case 2:
      return static_cast<const uint16_t*>(text)[i];
    default:
      return static_cast<const uint32_t*>(text)[i];
  }
}

uint64_t pointer_at(const void* suf, int32_t pointer_bytes, uint64_t i) {
  uint64_t value = 0;
  std::memcpy(&value, static_cast<const char*>(suf) + i * static_cast<uint64_t>(pointer_bytes),
              static_cast<size_t>(pointer_bytes));
  return value;
}

// One shard: its files, the table of buckets, and what the kernels see of them.
class OpenShard {
 public:
  OpenShard(int folder, const std::string& path, const IndexInfo& info, uint32_t number, Mode mode,
            Verify verify, const ParallelFor& parallel)
      : info_(info), shard_(info.shards[number]), lazy_(verify != Verify::kQuick) {
    const auto shards = static_cast<uint32_t>(info.shards.size());
    for (int32_t kind = 0; kind < kNumKinds; ++kind) {
      if (shard_.files[kind].bytes == 0) continue;
      // Both tables are small, read by every search and not guarded block by block.
      const bool table = kind == kUni || kind == kDir || kind == kDel;
      const std::string name = kind == kDel ? removal_name(number, shard_.files[kind].table_crc)
                                            : file_name(kind, number);
      files_[kind] = open_file(folder, path, name, table ? Mode::kRam : mode, parallel);
      const FileReader& file = *files_[kind];
      const FileHeader& header = file.header();
      expect(file, header.kind == kCodes[kind], "is of another kind");
      expect(file, header.uuid == info.uuid, "belongs to another index (UUID)");
      expect(file, header.shard == number && header.shards == shards,
             "belongs to another shard or number of shards");
      expect(file, header.vocab_size == info.vocab_size, "has another vocabulary size");
      expect(file,
             file.summary().bytes == shard_.files[kind].bytes &&
                 file.summary().table_crc == shard_.files[kind].table_crc,
             "does not have the size and checksum of the manifest");
    }
    for (const Kind kind : {kTok, kDoc, kUni, kSuf})
      if (files_[kind] == nullptr)
        throw IndexCorruptError(
            message(path, ": the manifest lacks the file ", file_name(kind, number)));
    view_.token_bytes = info.token_bytes;
    view_.text_size = shard_.tokens + shard_.documents;
    view_.suf_size = shard_.tokens;
    view_.vocab = info.vocab_size;
    check_elements();
    read_counts();
    make_view();
    if (file(kDel) != nullptr) read_removal();
    check(verify, parallel);
  }

  const Shard& view() const { return view_; }
  const ShardInfo& info() const { return shard_; }
  const FileReader* file(Kind kind) const { return files_[kind].get(); }
  std::span<const uint32_t> ids() const { return ids_; }
  std::span<const uint64_t> first() const { return first_; }
  std::span<const uint64_t> removed() const { return removed_; }  // documents

  void check_sizes() const {
    file(kTok)->check_size();
    file(kSuf)->check_size();
  }

  void check(Verify level, const ParallelFor& parallel) const {
    for (const auto& file : files_) {
      if (file == nullptr) continue;
      file->check_size();
      if (level == Verify::kFull) {
        file->verify_all(parallel);
      } else if (file->blocks() > 0) {
        for (const uint64_t block : {uint64_t{0}, file->blocks() - 1})
          if (!file->verify_block(block)) file->raise_block(block);
      }
    }
    const uint64_t size = view_.text_size;
    expect(*file(kTok), size == 0 || token(size - 1) == separator(info_.token_bytes),
           "does not end with a separator");
    const auto* starts = offsets(kDoc);
    expect(*file(kDoc), starts[0] == 0 && starts[shard_.documents] == size,
           "does not cover the text");
    check_order();
    if (level == Verify::kFull && file(kDel) != nullptr) check_removal();
  }

  // Of a table with one element more than documents: what belongs to document d.
  std::pair<uint64_t, uint64_t> range(Kind kind, uint64_t d, uint64_t limit) const {
    const FileReader& table = *file(kind);
    require(table, 8 * d, 8 * d + 16);
    const uint64_t begin = offsets(kind)[d], end = offsets(kind)[d + 1];
    expect(table, begin <= end && end <= limit, "is not increasing");
    return {begin, end};
  }

  // The document that holds a position of the text.
  uint64_t document_of(uint64_t position) const {
    const FileReader& table = *file(kDoc);
    table.check_size();
    uint64_t low = 0, high = shard_.documents;  // starts[low] <= position < starts[high]
    while (high - low > 1) {
      const uint64_t middle = low + (high - low) / 2;
      require(table, 8 * middle, 8 * middle + 8);
      (offsets(kDoc)[middle] <= position ? low : high) = middle;
    }
    return low;
  }

  void require(const FileReader& file, uint64_t begin, uint64_t end) const {
    if (lazy_) file.require(begin, end);
  }

  static void expect(const FileReader& file, bool condition, const char* what) {
    if (!condition) throw IndexCorruptError(message(file.path(), ": the file ", what));
  }

 private:
  static std::unique_ptr<const FileReader> open_file(int folder, const std::string& path,
                                                     const std::string& name, Mode mode,
                                                     const ParallelFor& parallel) {
    const std::string whole = path + "/" + name;
    try {
      return std::make_unique<const FileReader>(
          folder, name, whole, kFormat, mode == Mode::kRam ? FileMode::kRam : FileMode::kMmap,
          parallel);
    } catch (const FileError& error) {
      if (error.code != ENOENT) throw;
      throw IndexCorruptError(whole + ": the file is missing");
    }
  }

  const uint64_t* offsets(Kind kind) const {
    return reinterpret_cast<const uint64_t*>(file(kind)->data());
  }

  uint64_t token(uint64_t i) const { return token_at(view_.text, view_.token_bytes, i); }

  void check_elements() {
    const uint64_t documents = shard_.documents, text = view_.text_size, tokens = shard_.tokens;
    const auto width = static_cast<uint64_t>(info_.token_bytes);
    const uint64_t directory = (tokens + kDirectoryStride - 1) / kDirectoryStride;
    const bool sparse = info_.vocab_size > kDenseVocab;
    view_.pointer_bytes = file(kSuf)->header().pointer_bytes;
    expect(*file(kSuf), view_.pointer_bytes == 4 || view_.pointer_bytes == 5,
           "has pointers of another width than 4 or 5 bytes");
    const auto check_one = [&](Kind kind, uint64_t elements, uint64_t bytes) {
      if (file(kind) == nullptr) return;
      expect(*file(kind), file(kind)->header().elements == elements,
             "has another number of elements than the manifest says");
      expect(*file(kind), file(kind)->size() == elements * bytes,
             "has another size than its elements need");
      expect(*file(kind), file(kind)->header().token_bytes == info_.token_bytes,
             "has tokens of another width");
    };
    check_one(kTok, text, width);
    check_one(kSuf, tokens, static_cast<uint64_t>(view_.pointer_bytes));
    check_one(kDoc, documents + 1, 8);
    check_one(kUni, sparse ? file(kUni)->header().elements : info_.vocab_size, sparse ? 16 : 8);
    check_one(kLab, documents, 2);
    check_one(kMoff, documents + 1, 8);
    check_one(kBoff, text, 4);
    check_one(kDir, directory, width * kDirectoryTokens);
    if (file(kDel) != nullptr) check_one(kDel, file(kDel)->header().elements, 8);
    if (file(kMeta) != nullptr) check_one(kMeta, file(kMeta)->header().elements, 1);
    expect(*file(kUni), ((file(kUni)->header().flags & kSparse) != 0) == sparse,
           "has another layout than the vocabulary needs");
    if ((file(kMeta) == nullptr) != (file(kMoff) == nullptr))
      throw IndexCorruptError(message(file(kTok)->path(), ": the shard has only one of the files '",
                                      kNames[kMeta], "' and '", kNames[kMoff], "'"));
  }

  void read_counts() {
    const FileReader& uni = *file(kUni);
    const auto* words = reinterpret_cast<const uint64_t*>(uni.data());
    const uint64_t elements = uni.header().elements;
    const bool sparse = info_.vocab_size > kDenseVocab;
    first_.reserve(elements + 1);
    first_.push_back(0);
    if (sparse) ids_.reserve(elements);
    for (uint64_t i = 0; i < elements; ++i) {
      const uint64_t count = words[sparse ? 2 * i + 1 : i];
      if (sparse) {
        const uint64_t id = words[2 * i];
        expect(uni, id < info_.vocab_size && (i == 0 || id > ids_.back()),
               "has tokens out of order");
        ids_.push_back(static_cast<uint32_t>(id));
      }
      expect(uni, count <= shard_.tokens - first_.back(), "counts more tokens than there are");
      first_.push_back(first_.back() + count);
    }
    expect(uni, first_.back() == shard_.tokens, "counts fewer tokens than there are");
  }

  // How many are removed, their numbers, and the ranks of their suffixes.
  void read_removal() {
    const FileReader& del = *file(kDel);
    const auto* words = reinterpret_cast<const uint64_t*>(del.data());
    const uint64_t size = del.header().elements;
    expect(del, size > 0 && words[0] > 0 && words[0] <= shard_.documents && words[0] < size,
           "has another number of documents than there can be");
    removed_ = {words + 1, words[0]};
    view_.removed = words + 1 + removed_.size();
    view_.removed_size = size - 1 - removed_.size();
    const auto ascend = [](const uint64_t* begin, uint64_t count, uint64_t limit) {
      for (uint64_t i = 0; i < count; ++i)
        if (begin[i] >= limit || (i > 0 && begin[i] <= begin[i - 1])) return false;
      return true;
    };
    expect(del, ascend(removed_.data(), removed_.size(), shard_.documents),
           "has documents out of order");
    expect(del, ascend(view_.removed, view_.removed_size, shard_.tokens), "has ranks out of order");
    uint64_t tokens = 0;
    for (const uint64_t d : removed_) {
      const auto [begin, end] = range(kDoc, d, view_.text_size);
      expect(*file(kDoc), begin < end, "is not increasing");
      tokens += end - begin - 1;
    }
    expect(del, tokens == view_.removed_size, "has more or fewer ranks than its documents tokens");
  }

  void check_removal() const {
    for (uint64_t i = 0; i < view_.removed_size; ++i) {
      const uint64_t position = pointer_at(view_.suf, view_.pointer_bytes, view_.removed[i]);
      expect(*file(kSuf), position < view_.text_size, "points beyond the text");
      expect(*file(kDel),
             std::binary_search(removed_.begin(), removed_.end(), document_of(position)),
             "has ranks of other documents");
    }
  }

  void make_view() {
    view_.text = file(kTok)->data();
    view_.suf = file(kSuf)->data();
    view_.text_guard = guard(*file(kTok));
    view_.suf_guard = guard(*file(kSuf));
    view_.ids = info_.vocab_size > kDenseVocab ? ids_.data() : nullptr;
    view_.first = first_.data();
    view_.buckets = first_.size() - 1;
    view_.directory = file(kDir) == nullptr ? nullptr : file(kDir)->data();
    view_.directory_size = file(kDir) == nullptr ? 0 : file(kDir)->header().elements;
  }

  Guard guard(const FileReader& file) const {
    static_assert(kBlockShift == kFileBlockShift);
    if (!lazy_) return {nullptr, nullptr, nullptr};
    return {file.verified(),
            [](void* reader, uint64_t block) noexcept {
              return static_cast<const FileReader*>(reader)->verify_block(block);
            },
            const_cast<FileReader*>(&file)};
  }

  // Random neighbours among the suffixes are in range, in order and in the bucket of their token.
  // The places depend on the UUID only.
  void check_order() const {
    if (shard_.tokens == 0) return;
    const FileReader& suf = *file(kSuf);
    std::seed_seq seed(info_.uuid.begin(), info_.uuid.end());
    std::mt19937_64 random(seed);
    for (int i = 0; i < kSampledPairs; ++i) {
      const uint64_t rank = random() % shard_.tokens;
      const uint64_t at = pointer_at(view_.suf, view_.pointer_bytes, rank);
      expect(suf, at < view_.text_size, "points beyond the text");
      expect(suf, in_bucket(rank, token(at)), "has suffixes in the place of another token");
      if (rank + 1 == shard_.tokens) continue;
      const uint64_t next = pointer_at(view_.suf, view_.pointer_bytes, rank + 1);
      expect(suf, next < view_.text_size, "points beyond the text");
      expect(suf, ordered(at, next), "is not in order");
    }
  }

  bool in_bucket(uint64_t rank, uint64_t id) const {
    uint64_t bucket = id;
    if (view_.ids != nullptr) {
      const auto found = std::lower_bound(ids_.begin(), ids_.end(), id);
      if (found == ids_.end() || *found != id) return false;
      bucket = static_cast<uint64_t>(found - ids_.begin());
    }
    return bucket < view_.buckets && first_[bucket] <= rank && rank < first_[bucket + 1];
  }

  bool ordered(uint64_t a, uint64_t b) const {
    if (a == b) return false;
    const uint64_t room = view_.text_size - std::max(a, b);
    for (uint64_t i = 0; i < std::min(room, kSampledTokens); ++i)
      if (token(a + i) != token(b + i)) return token(a + i) < token(b + i);
    return room > kSampledTokens || a > b;
  }

  IndexInfo info_;
  ShardInfo shard_;
  bool lazy_;
  std::array<std::unique_ptr<const FileReader>, kNumKinds> files_;
  std::vector<uint32_t> ids_;
  std::vector<uint64_t> first_;
  std::span<const uint64_t> removed_;
  Shard view_{};
};

}  // namespace

struct Store::Impl {
  IndexInfo info;
  std::vector<std::unique_ptr<const OpenShard>> shards;
  std::vector<uint64_t> first_document;
  uint64_t tokens = 0;
  std::vector<uint64_t> removed;
  std::vector<uint32_t> ids;
  std::vector<uint64_t> counts;

  // Suffixes that remain in bucket i of a shard.
  static uint64_t in_bucket(const OpenShard& shard, size_t i) {
    return static_cast<uint64_t>(live(shard.view(), static_cast<int64_t>(shard.first()[i]),
                                      static_cast<int64_t>(shard.first()[i + 1])));
  }

  void add_counts() {
    if (info.vocab_size > kDenseVocab) {
      std::vector<std::pair<uint32_t, uint64_t>> all;
      for (const auto& shard : shards)
        for (size_t i = 0; i < shard->ids().size(); ++i)
          all.emplace_back(shard->ids()[i], in_bucket(*shard, i));
      std::sort(all.begin(), all.end());
      for (const auto& [id, count] : all) {
        if (ids.empty() || ids.back() != id) {
          ids.push_back(id);
          counts.push_back(0);
        }
        counts.back() += count;
      }
      return;
    }
    counts.resize(info.vocab_size);
    for (const auto& shard : shards)
      for (size_t i = 0; i < counts.size(); ++i) counts[i] += in_bucket(*shard, i);
  }

  // The shard of a document, counted over all.
  std::pair<int32_t, uint64_t> locate(uint64_t d) const {
    if (d >= first_document.back())
      throw std::out_of_range(
          message("document ", d, " does not exist: the index has ", first_document.back()));
    const auto after = std::upper_bound(first_document.begin(), first_document.end(), d);
    const auto s = static_cast<int32_t>(after - first_document.begin()) - 1;
    return {s, d - first_document[static_cast<size_t>(s)]};
  }

  const OpenShard& at(int32_t s) const {
    if (s < 0 || static_cast<size_t>(s) >= shards.size())
      throw std::out_of_range(
          message("shard ", s, " does not exist: the index has ", shards.size()));
    return *shards[static_cast<size_t>(s)];
  }

  // An optional file of a shard.
  const FileReader& optional(const OpenShard& shard, Kind kind) const {
    if (shard.file(kind) == nullptr)
      throw std::invalid_argument(
          message("the index was built without the file '", kNames[kind], "'"));
    shard.file(kind)->check_size();
    return *shard.file(kind);
  }
};

std::shared_ptr<const Store> Store::open(int folder, const std::string& path, const IndexInfo& info,
                                         Mode mode, Verify verify, const ParallelFor& parallel) {
  auto impl = std::make_unique<Impl>();
  impl->info = info;
  impl->first_document.push_back(0);
  for (uint32_t s = 0; s < info.shards.size(); ++s) {
    impl->shards.push_back(
        std::make_unique<OpenShard>(folder, path, info, s, mode, verify, parallel));
    const OpenShard& shard = *impl->shards.back();
    for (const uint64_t d : shard.removed())
      impl->removed.push_back(impl->first_document.back() + d);
    impl->first_document.push_back(impl->first_document.back() + info.shards[s].documents);
    impl->tokens += static_cast<uint64_t>(live_size(shard.view()));
  }
  impl->add_counts();
  return std::shared_ptr<const Store>(new Store(std::move(impl)));
}

Store::Store(std::unique_ptr<const Impl> impl) : impl_(std::move(impl)) {}
Store::~Store() = default;

const IndexInfo& Store::info() const { return impl_->info; }
int32_t Store::num_shards() const { return static_cast<int32_t>(impl_->shards.size()); }
uint64_t Store::tokens() const { return impl_->tokens; }
uint64_t Store::documents() const { return impl_->first_document.back(); }
std::span<const uint64_t> Store::removed() const { return impl_->removed; }

void Store::check_sizes() const {
  for (const auto& shard : impl_->shards) shard->check_sizes();
}

const Shard& Store::shard(int32_t s) const { return impl_->at(s).view(); }

void Store::raise(int32_t s, const Fault& fault) const {
  const OpenShard& shard = impl_->at(s);
  const FileReader& file = *shard.file(fault.array == Array::kText ? kTok : kSuf);
  if (fault.status == Status::kCorrupt) file.raise_block(fault.index);
  throw IndexCorruptError(message(file.path(), ": entry ", fault.index,
                                  " points beyond the text of ", shard.view().text_size,
                                  " tokens"));
}

std::span<const uint32_t> Store::ids() const { return impl_->ids; }
std::span<const uint64_t> Store::counts() const { return impl_->counts; }

uint64_t Store::first_document(int32_t s) const {
  if (s < 0 || s > num_shards())
    throw std::out_of_range(message("shard ", s, " does not exist: the index has ", num_shards()));
  return impl_->first_document[static_cast<size_t>(s)];
}

Extent Store::document(uint64_t d) const {
  const auto [s, local] = impl_->locate(d);
  const OpenShard& shard = impl_->at(s);
  shard.file(kDoc)->check_size();
  const auto [begin, end] = shard.range(kDoc, local, shard.view().text_size);
  OpenShard::expect(*shard.file(kDoc), begin < end, "is not increasing");
  return {s, begin, end - 1};
}

Place Store::place(int32_t s, uint64_t position) const {
  const OpenShard& shard = impl_->at(s);
  if (position >= shard.view().text_size)
    throw std::out_of_range(message("position ", position, " does not exist: the text of shard ", s,
                                    " has ", shard.view().text_size, " tokens"));
  const uint64_t local = shard.document_of(position);
  const auto [begin, end] = shard.range(kDoc, local, shard.view().text_size);
  OpenShard::expect(*shard.file(kDoc), begin <= position && position < end, "is not increasing");
  return {first_document(s) + local, position - begin};
}

const void* Store::text(const Extent& extent) const {
  const OpenShard& shard = impl_->at(extent.shard);
  if (extent.begin > extent.end || extent.end > shard.view().text_size)
    throw std::out_of_range(message("tokens ", extent.begin, " to ", extent.end,
                                    " do not exist: the text of shard ", extent.shard, " has ",
                                    shard.view().text_size));
  const FileReader& file = *shard.file(kTok);
  file.check_size();
  const auto width = static_cast<uint64_t>(shard.view().token_bytes);
  shard.require(file, extent.begin * width, extent.end * width);
  return file.data() + extent.begin * width;
}

bool Store::has(Kind kind) const {
  return std::all_of(impl_->shards.begin(), impl_->shards.end(),
                     [kind](const auto& shard) { return shard->file(kind) != nullptr; });
}

uint16_t Store::label(uint64_t d) const {
  const auto [s, local] = impl_->locate(d);
  const OpenShard& shard = impl_->at(s);
  const FileReader& file = impl_->optional(shard, kLab);
  shard.require(file, 2 * local, 2 * local + 2);
  return reinterpret_cast<const uint16_t*>(file.data())[local];
}

std::string_view Store::meta(uint64_t d) const {
  const auto [s, local] = impl_->locate(d);
  const OpenShard& shard = impl_->at(s);
  const FileReader& file = impl_->optional(shard, kMeta);
  impl_->optional(shard, kMoff);
  const auto [begin, end] = shard.range(kMoff, local, file.size());
  shard.require(file, begin, end);
  return {reinterpret_cast<const char*>(file.data()) + begin, end - begin};
}

std::span<const uint32_t> Store::byte_offsets(uint64_t d) const {
  const Extent extent = document(d);
  const OpenShard& shard = impl_->at(extent.shard);
  const FileReader& file = impl_->optional(shard, kBoff);
  shard.require(file, 4 * extent.begin, 4 * extent.end);
  return {reinterpret_cast<const uint32_t*>(file.data()) + extent.begin, extent.end - extent.begin};
}

void Store::verify(Verify level, const ParallelFor& parallel) const {
  for (const auto& shard : impl_->shards) shard->check(level, parallel);
}

FileSummary Store::write_removal(int32_t s, std::span<const uint64_t> documents,
                                 const std::string& folder) const {
  const OpenShard& shard = impl_->at(s);
  const Shard& view = shard.view();
  const FileReader& suf = *shard.file(kSuf);
  suf.check_size();
  suf.require(0, suf.size());
  std::vector<bool> gone(view.text_size);
  for (const uint64_t d : documents) {
    const auto [begin, end] = shard.range(kDoc, d, view.text_size);
    std::fill(gone.begin() + static_cast<int64_t>(begin), gone.begin() + static_cast<int64_t>(end),
              true);
  }
  std::vector<uint64_t> words{documents.size()};
  words.insert(words.end(), documents.begin(), documents.end());
  for (uint64_t rank = 0; rank < view.suf_size; ++rank) {
    const uint64_t position = pointer_at(view.suf, view.pointer_bytes, rank);
    OpenShard::expect(suf, position < view.text_size, "points beyond the text");
    if (gone[position]) words.push_back(rank);
  }
  FileHeader header;
  header.kind = kCodes[kDel];
  header.token_bytes = static_cast<uint8_t>(view.token_bytes);
  header.pointer_bytes = static_cast<uint8_t>(view.pointer_bytes);
  header.uuid = impl_->info.uuid;
  header.shard = static_cast<uint32_t>(s);
  header.shards = static_cast<uint32_t>(num_shards());
  header.elements = words.size();
  header.vocab_size = view.vocab;
  // Under another name first: a list of the same name may be left of a removal that was killed.
  const std::string temporary = folder + "/" + file_name(kDel, header.shard) + ".tmp";
  static_cast<void>(std::remove(temporary.c_str()));  // there may be none
  FileWriter file(temporary);
  file.append(words.data(), 8 * words.size());
  const FileSummary summary = file.finish(kFormat, header);
  const std::string name = folder + "/" + removal_name(header.shard, summary.table_crc);
  if (std::rename(temporary.c_str(), name.c_str()) != 0)
    throw FileError(std::strerror(errno), errno, name);
  return summary;
}

}  // namespace alignops::spans
