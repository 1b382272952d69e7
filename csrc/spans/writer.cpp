#include "writer.h"

#include <fcntl.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "../common/check.h"
#include "../common/huge_vector.h"
#include "kernels.h"

namespace alignops::spans {
namespace {

// Tokens that are checked, narrowed and counted at a time: they stay in the first-level cache.
constexpr int64_t kPart = 4096;
// Suffixes that are written between two looks at Progress::cancel: 4 MiB.
constexpr uint64_t kWriteStep = uint64_t{1} << 20;

// Takes suffixes in order, writes them and remembers those of the directory.
class SuffixOutput {
 public:
  SuffixOutput(FileWriter& file, bool directory, Progress& progress)
      : file_(file), directory_(directory), progress_(progress) {}

  void add(const uint32_t* positions, uint64_t count) {
    for (uint64_t done = 0; done < count;) {
      if (progress_.cancel) throw Cancelled();
      const uint64_t part = std::min(kWriteStep, count - done);
      file_.append(positions + done, 4 * part);
      if (directory_) {
        const uint64_t next = (rank_ + kDirectoryStride - 1) / kDirectoryStride * kDirectoryStride;
        for (uint64_t rank = next; rank < rank_ + part; rank += kDirectoryStride)
          sample_.push_back(positions[done + rank - rank_]);
      }
      done += part;
      rank_ += part;
      if (progress_.phase == kWritePhase) progress_.done = rank_;
    }
  }

  uint64_t size() const { return rank_; }
  const std::vector<uint32_t>& sample() const { return sample_; }

 private:
  FileWriter& file_;
  bool directory_;
  Progress& progress_;
  uint64_t rank_ = 0;
  std::vector<uint32_t> sample_;
};

// The first tokens of the suffixes at `positions`; beyond the text, separators.
template <class Token>
void write_directory(FileWriter& file, const void* data, uint64_t text_size,
                     const std::vector<uint32_t>& positions) {
  const auto* text = static_cast<const Token*>(data);
  Token entry[kDirectoryTokens];
  for (const uint64_t position : positions) {
    for (uint64_t i = 0; i < kDirectoryTokens; ++i)
      entry[i] = position + i < text_size ? text[position + i]
                                          : static_cast<Token>(separator(sizeof(Token)));
    file.append(entry, sizeof(entry));
  }
}

}  // namespace

ShardWriter::ShardWriter(std::string folder, uint32_t shard, const Uuid& uuid,
                         const ShardLayout& layout)
    : folder_(std::move(folder)), shard_(shard), uuid_(uuid), layout_(layout) {
  ALIGNOPS_CHECK(layout.token_bytes == 1 || layout.token_bytes == 2 || layout.token_bytes == 4,
                 "ShardWriter: token_bytes must be 1, 2 or 4, got ", layout.token_bytes);
  ALIGNOPS_CHECK(layout.vocab_size > 0 && layout.vocab_size <= separator(layout.token_bytes),
                 "ShardWriter: vocab_size must be in [1, ", separator(layout.token_bytes),
                 "] for tokens of ", layout.token_bytes, " bytes, got ", layout.vocab_size);
  if (layout.vocab_size <= kDenseVocab) dense_counts_.resize(layout.vocab_size);
  files_[kTok] = create(kTok);
  files_[kSuf] = create(kSuf);
  files_[kDoc] = create(kDoc);
  if (layout.labels) files_[kLab] = create(kLab);
  if (layout.meta) files_[kMeta] = create(kMeta);
  if (layout.meta) files_[kMoff] = create(kMoff);
  if (layout.byte_offsets) files_[kBoff] = create(kBoff);
  const uint64_t zero = 0;
  files_[kDoc]->append(&zero, 8);
  if (layout.meta) files_[kMoff]->append(&zero, 8);
}

std::unique_ptr<FileWriter> ShardWriter::create(Kind kind) const {
  return std::make_unique<FileWriter>(folder_.empty() ? ""
                                                      : folder_ + "/" + file_name(kind, shard_));
}

void ShardWriter::finish(Kind kind, FileWriter& file, uint64_t elements, uint16_t flags) {
  FileHeader header;
  header.kind = kCodes[kind];
  header.token_bytes = static_cast<uint8_t>(layout_.token_bytes);
  header.pointer_bytes = sizeof(uint32_t);
  header.flags = flags;
  header.uuid = uuid_;
  header.shard = shard_;
  header.shards = shard_ + 1;  // right for the last one; the others are stamped again in the end
  header.elements = elements;
  header.vocab_size = layout_.vocab_size;
  info_.files[kind] = file.finish(kFormat, header);
}

// -------------------------------------------------------------------------------------------------
// Documents

void ShardWriter::reserve(uint64_t text_size, uint64_t documents) {
  files_[kTok]->reserve(text_size * static_cast<uint64_t>(layout_.token_bytes));
  files_[kSuf]->reserve(4 * (text_size - documents));
  files_[kDoc]->reserve(8 * (documents + 1));
  if (layout_.byte_offsets) files_[kBoff]->reserve(4 * text_size);
}

void ShardWriter::add(const Run& run) {
  const uint64_t text = info_.tokens + info_.documents + static_cast<uint64_t>(run.size) +
                        static_cast<uint64_t>(run.ends.size());
  ALIGNOPS_CHECK(text <= kMaxShardText, "ShardWriter: a shard must have at most ", kMaxShardText,
                 " tokens and separators, got ", text);
  switch (layout_.token_bytes) {
    case 1:
      return add_width<uint8_t>(run);
    case 2:
      return add_width<uint16_t>(run);
    default:
      return add_width<uint32_t>(run);
  }
}

template <class Token>
void ShardWriter::add_width(const Run& run) {
  const bool is_signed = run.tokens.is_signed;
  switch (run.tokens.bytes) {
    case 1:
      return is_signed ? add_run<int8_t, Token>(run) : add_run<uint8_t, Token>(run);
    case 2:
      return is_signed ? add_run<int16_t, Token>(run) : add_run<uint16_t, Token>(run);
    case 4:
      return is_signed ? add_run<int32_t, Token>(run) : add_run<uint32_t, Token>(run);
    default:
      return is_signed ? add_run<int64_t, Token>(run) : add_run<uint64_t, Token>(run);
  }
}

template <class Source, class Token>
void ShardWriter::add_run(const Run& run) {
  constexpr auto kSeparator = static_cast<Token>(separator(sizeof(Token)));
  constexpr uint32_t kNoOffset = 0;
  Token out[kPart];
  int64_t begin = 0;
  for (size_t i = 0; i <= run.ends.size(); ++i) {
    const int64_t end = i < run.ends.size() ? run.ends[i] : run.size;
    if (layout_.byte_offsets)
      files_[kBoff]->append(run.byte_offsets + begin, 4 * static_cast<size_t>(end - begin));
    for (; begin < end; begin += kPart)
      add_part<Source, Token>(run, begin, std::min(begin + kPart, end), out);
    begin = end;
    if (i == run.ends.size()) break;
    files_[kTok]->append(&kSeparator, sizeof(kSeparator));
    if (layout_.byte_offsets) files_[kBoff]->append(&kNoOffset, 4);
  }
  end_documents(run);
}

template <class Source, class Token>
void ShardWriter::add_part(const Run& run, int64_t begin, int64_t end, Token* out) {
  const auto* tokens = static_cast<const Source*>(run.tokens.data) + begin;
  const int64_t size = end - begin;
  // Negative ones become large ones.
  const auto wide = [tokens](int64_t i) {
    return static_cast<uint64_t>(static_cast<int64_t>(tokens[i]));
  };
  bool bad = false;
  for (int64_t i = 0; i < size; ++i) {
    bad |= wide(i) >= layout_.vocab_size;
    out[i] = static_cast<Token>(tokens[i]);
  }
  if (bad) {
    int64_t i = 0;
    while (wide(i) < layout_.vocab_size) ++i;
    const auto ended = std::upper_bound(run.ends.begin(), run.ends.end(), begin + i);
    const bool first = ended == run.ends.begin();
    const uint64_t offset = static_cast<uint64_t>(begin + i) +
                            (first ? run.offset : static_cast<uint64_t>(-*(ended - 1)));
    const uint64_t document = run.document + static_cast<uint64_t>(ended - run.ends.begin());
    const uint64_t sep = separator(layout_.token_bytes);
    throw std::out_of_range(message(
        "build_index: docs: ids must be in [0, vocab_size=", layout_.vocab_size, "), got ",
        std::to_string(tokens[i]), wide(i) == sep ? " (the separator between documents)" : "",
        " at offset ", offset, " of document ", document));
  }
  count(out, static_cast<size_t>(size));
  files_[kTok]->append(out, static_cast<size_t>(size) * sizeof(Token));
}

template <class Token>
void ShardWriter::count(const Token* tokens, size_t size) {
  info_.tokens += size;
  if (dense_counts_.empty()) {
    for (size_t i = 0; i < size; ++i) ++sparse_counts_[tokens[i]];
  } else {
    for (size_t i = 0; i < size; ++i) ++dense_counts_[tokens[i]];
  }
}

void ShardWriter::end_documents(const Run& run) {
  const size_t ended = run.ends.size();
  // Tokens and separators before the run.
  const uint64_t before = info_.tokens - static_cast<uint64_t>(run.size) + info_.documents;
  std::vector<uint64_t> table(ended);
  for (size_t i = 0; i < ended; ++i) table[i] = before + static_cast<uint64_t>(run.ends[i]) + i + 1;
  files_[kDoc]->append(table.data(), 8 * ended);
  if (layout_.labels) files_[kLab]->append(run.labels, 2 * ended);
  if (layout_.meta) {
    const uint64_t meta_before = files_[kMeta]->size();
    for (size_t i = 0; i < ended; ++i)
      table[i] = meta_before + static_cast<uint64_t>(run.meta_ends[i]);
    files_[kMoff]->append(table.data(), 8 * ended);
    if (ended > 0) files_[kMeta]->append(run.meta, static_cast<size_t>(run.meta_ends.back()));
  }
  info_.documents += ended;
  files_[kSuf]->reserve_ahead(4 * info_.tokens);
}

void ShardWriter::end_text(bool continued) {
  info_.continued = continued;
  const uint64_t text = info_.tokens + info_.documents;
  finish(kTok, *files_[kTok], text);
  finish(kDoc, *files_[kDoc], info_.documents + 1, continued ? kContinued : uint16_t{0});
  write_counts();
  if (layout_.labels) finish(kLab, *files_[kLab], info_.documents);
  if (layout_.meta) finish(kMeta, *files_[kMeta], files_[kMeta]->size());
  if (layout_.meta) finish(kMoff, *files_[kMoff], info_.documents + 1);
  if (layout_.byte_offsets) finish(kBoff, *files_[kBoff], text);
  for (int32_t kind = 0; kind < kNumKinds; ++kind)
    if (kind != kSuf) files_[kind].reset();
}

void ShardWriter::write_counts() {
  const auto file = create(kUni);
  if (!dense_counts_.empty()) {
    file->append(dense_counts_.data(), 8 * dense_counts_.size());
    return finish(kUni, *file, dense_counts_.size());
  }
  std::vector<std::array<uint64_t, 2>> pairs;
  pairs.reserve(sparse_counts_.size());
  for (const auto& [id, occurrences] : sparse_counts_) pairs.push_back({id, occurrences});
  std::sort(pairs.begin(), pairs.end());
  file->append(pairs.data(), 16 * pairs.size());
  finish(kUni, *file, pairs.size(), kSparse);
}

// -------------------------------------------------------------------------------------------------
// Suffixes

void ShardWriter::sort(Builder builder, uint64_t mem_bytes, uint64_t directory_tokens,
                       const ParallelFor& parallel, Progress& progress) {
  const uint64_t tokens = info_.tokens, text_size = tokens + info_.documents;
  const bool directory = tokens > 0 && tokens >= directory_tokens;
  // Space is taken before the long work.
  const auto suf = std::move(files_[kSuf]);
  suf->reserve(4 * tokens);
  std::unique_ptr<FileWriter> dir;
  if (directory) {
    dir = create(kDir);
    dir->reserve((tokens / kDirectoryStride + 1) * kDirectoryTokens *
                 static_cast<uint64_t>(layout_.token_bytes));
  }
  const FileReader text(AT_FDCWD, folder_ + "/" + file_name(kTok, shard_),
                        folder_ + "/" + file_name(kTok, shard_), kFormat, FileMode::kMmap,
                        parallel);
  SuffixOutput output(*suf, directory, progress);
  if (tokens > 0) {
    SuffixJob job{text.data(), layout_.token_bytes,
                  text_size,   layout_.vocab_size,
                  nullptr,     parallel,
                  progress,    mem_bytes};
    if (builder == Builder::kRadixStream) {
      build_radix_stream(
          job, [&](const uint32_t* positions, uint64_t count) { output.add(positions, count); });
    } else {
      HugeVector<uint32_t> suffixes(text_size);
      job.out = suffixes.data();
      const uint64_t sorted = builder == Builder::kSais ? build_sais(job) : build_radix(job);
      progress.done = 0;
      progress.total = tokens;
      progress.phase = kWritePhase;
      output.add(job.out, sorted);
    }
  }
  if (output.size() != tokens)
    throw std::logic_error(
        message("build_index: ", tokens, " suffixes expected, the builder gave ", output.size()));
  progress.phase = kWritePhase;
  finish(kSuf, *suf, tokens);
  if (!directory) return;
  switch (layout_.token_bytes) {
    case 1:
      write_directory<uint8_t>(*dir, text.data(), text_size, output.sample());
      break;
    case 2:
      write_directory<uint16_t>(*dir, text.data(), text_size, output.sample());
      break;
    default:
      write_directory<uint32_t>(*dir, text.data(), text_size, output.sample());
  }
  finish(kDir, *dir, output.sample().size());
}

}  // namespace alignops::spans
