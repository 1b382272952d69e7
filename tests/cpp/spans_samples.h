// Indexes of the C++ tests: folders, documents, shards on disk.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "common/parallel.h"
#include "harness.h"
#include "spans/writer.h"

namespace alignops::spans {

// A folder that goes away with its content.
class Folder {
 public:
  Folder() {
    std::string name = (std::filesystem::temp_directory_path() / "alignops-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) std::abort();
    path_ = name;
    descriptor_ = ::open(path_.c_str(), O_RDONLY | O_DIRECTORY);
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  ~Folder() {
    ::close(descriptor_);
    std::filesystem::remove_all(path_);
  }
  const std::string& path() const { return path_; }
  int descriptor() const { return descriptor_; }

 private:
  std::string path_;
  int descriptor_;
};

// One document after the other, ids below `vocab`.
inline std::vector<std::vector<int64_t>> random_documents(test::Random& random, int64_t vocab,
                                                          int64_t count, int64_t longest) {
  std::vector<std::vector<int64_t>> documents;
  for (int64_t i = 0; i < count; ++i) {
    std::vector<int64_t> document(static_cast<size_t>(random.below(longest + 1)));
    for (int64_t& token : document) token = random.below(vocab);
    documents.push_back(document);
  }
  return documents;
}

inline IndexInfo write_shard(const std::string& folder, const ShardLayout& layout,
                             const std::vector<std::vector<int64_t>>& documents) {
  ShardWriter writer(folder, 0, Uuid{1, 2, 3}, layout);
  for (size_t d = 0; d < documents.size(); ++d) {
    const auto& document = documents[d];
    const auto size = static_cast<int64_t>(document.size());
    const std::vector<uint32_t> offsets(document.size(), static_cast<uint32_t>(d));
    const auto label = static_cast<uint16_t>(d);
    const std::string meta = std::to_string(d);
    const auto meta_end = static_cast<int64_t>(meta.size());
    Run run{};
    run.tokens = {document.data(), 8, true};
    run.size = size;
    run.ends = {&size, 1};
    run.byte_offsets = offsets.data();
    run.labels = &label;
    run.meta = meta.data();
    run.meta_ends = {&meta_end, 1};
    run.document = d;
    writer.add(run);
  }
  writer.end_text(false);
  Progress progress;
  writer.sort(Builder::kSais, 0, 1000, serial_for(), progress);
  return {Uuid{1, 2, 3}, layout.vocab_size, layout.token_bytes, {writer.info()}};
}

}  // namespace alignops::spans
