// Checksums, checksummed files, and a shard written and opened again, without Python: the cases
// that need a sanitizer or threads.
#include "spans/store.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "common/crc32c.h"
#include "common/isa.h"
#include "harness.h"
#include "spans/writer.h"
#include "spans_samples.h"

namespace alignops::spans {
namespace {

using test::expect;
using test::Random;

template <class Error, class Call>
std::string text_of(Call call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

void change_byte(const std::string& path, uint64_t offset) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekg(static_cast<std::streamoff>(offset));
  const int byte = file.get();
  file.seekp(static_cast<std::streamoff>(offset));
  file.put(static_cast<char>(byte ^ 0x10));
}

const test::Register crc("CRC32C: known vectors, all implementations, continued", [] {
  expect(crc32c_scalar("123456789", 9, 0) == 0xE3069283u, "check value");
  const std::vector<unsigned char> zeros(32), ones(32, 0xFF);
  expect(crc32c(zeros.data(), 32) == 0x8A9136AAu, "32 zeros");
  expect(crc32c(ones.data(), 32) == 0x62A8AB43u, "32 ones");
  Random random(1);
  std::vector<unsigned char> bytes(60000);
  for (auto& byte : bytes) byte = static_cast<unsigned char>(random.below(256));
  for (const size_t size : {0, 1, 7, 8, 9, 767, 768, 769, 1535, 24575, 24576, 24577, 50000}) {
    const std::vector<unsigned char> exact(bytes.begin() + 3,
                                           bytes.begin() + 3 + static_cast<int64_t>(size));
    const uint32_t expected = crc32c_scalar(exact.data(), size, 5);
    expect(crc32c(exact.data(), size, 5) == expected, "size " + std::to_string(size));
    const size_t half = size / 3;
    expect(crc32c(exact.data() + half, size - half, crc32c(exact.data(), half, 5)) == expected,
           "continued after " + std::to_string(half));
  }
});

const test::Register round_trip("files: what is written is read, in any pieces", [] {
  const Folder folder;
  Random random(2);
  int number = 0;
  for (const size_t size :
       {size_t{0}, size_t{1}, size_t{65535}, size_t{65536}, size_t{65537}, size_t{3'000'000}}) {
    std::vector<unsigned char> bytes(size);
    for (auto& byte : bytes) byte = static_cast<unsigned char>(random.below(256));
    const std::string name = "file" + std::to_string(number++), path = folder.path() + "/" + name;
    FileWriter writer(path), dry("");
    writer.reserve(size / 2);
    for (size_t done = 0; done < size;) {
      const size_t part = std::min(
          size - done, static_cast<size_t>(random.below(random.below(4) == 0 ? 3'000'000 : 5000)));
      writer.append(bytes.data() + done, part);
      dry.append(bytes.data() + done, part);
      done += part;
    }
    FileHeader header;
    header.kind = {'T', 'E', 'S', 'T'};
    header.elements = size;
    const FileSummary summary = writer.finish(kFormat, header);
    const FileSummary same = dry.finish(kFormat, header);
    expect(summary.bytes == file_bytes(size) && summary.bytes == std::filesystem::file_size(path),
           "size");
    expect(same.bytes == summary.bytes && same.table_crc == summary.table_crc, "dry run");
    for (const FileMode mode : {FileMode::kMmap, FileMode::kRam}) {
      const FileReader reader(folder.descriptor(), name, path, kFormat, mode, threads_for(3));
      expect(reader.size() == size && reader.header().elements == size &&
                 std::equal(bytes.begin(), bytes.end(), reader.data()),
             "content");
      expect(reader.summary().table_crc == summary.table_crc, "table");
      reader.verify_all(threads_for(3));
      reader.check_size();
    }
    expect(!text_of<FileError>([&] { FileWriter again(path); }).empty(), "O_EXCL");
  }
});

const test::Register damage("files: every changed byte and every length is noticed", [] {
  const Folder folder;
  const std::string path = folder.path() + "/f";
  FileWriter writer(path);
  const std::string payload(1001, 'x');
  writer.append(payload.data(), payload.size());
  const uint64_t size = writer.finish(kFormat, {}).bytes;
  const auto read = [&] {
    const FileReader reader(folder.descriptor(), "f", path, kFormat, FileMode::kMmap, serial_for());
    reader.verify_all(serial_for());
  };
  const auto refused = [&] {
    try {
      read();
    } catch (const CorruptError&) {
      return true;
    } catch (const FormatError&) {
      return true;
    } catch (const VersionError&) {
      return true;
    }
    return false;
  };
  for (uint64_t offset = 0; offset < size; ++offset) {
    change_byte(path, offset);
    expect(refused(), "byte " + std::to_string(offset));
    change_byte(path, offset);
  }
  read();
  for (uint64_t length = size; length-- > 0;) {
    if (length > 300 && length < 4000) continue;
    std::filesystem::resize_file(path, length);
    expect(!text_of<CorruptError>(read).empty(), "length " + std::to_string(length));
  }
});

const test::Register restamp("files: a header is stamped again", [] {
  const Folder folder;
  const std::string path = folder.path() + "/f";
  FileWriter writer(path);
  writer.append("abc", 3);
  FileHeader header;
  header.elements = 3;
  const FileSummary summary = writer.finish(kFormat, header);
  restamp_file(path, kFormat, Uuid{9}, 4, 7);
  const FileReader reader(AT_FDCWD, path, path, kFormat, FileMode::kMmap, serial_for());
  expect(reader.header().uuid == Uuid{9} && reader.header().shard == 4 &&
             reader.header().shards == 7 && reader.header().elements == 3 &&
             reader.summary().table_crc == summary.table_crc,
         "fields");
});

const test::Register opened("store: views, documents and tables of a written shard", [] {
  Random random(3);
  for (const int32_t width : {1, 2, 4})
    for (const int64_t vocab : {int64_t{5}, int64_t{200}, int64_t{1} << 23}) {
      if (vocab > static_cast<int64_t>(separator(width))) continue;
      const Folder folder;
      const auto documents = random_documents(random, vocab, 60, 80);
      const IndexInfo info = write_shard(
          folder.path(), {static_cast<uint64_t>(vocab), width, true, true, true}, documents);
      for (const Mode mode : {Mode::kMmap, Mode::kRam})
        for (const Verify verify : {Verify::kQuick, Verify::kLazy, Verify::kFull}) {
          const auto store =
              Store::open(folder.descriptor(), folder.path(), info, mode, verify, threads_for(2));
          store->check_sizes();
          const Shard& shard = store->shard(0);
          expect(shard.directory_size == (info.shards[0].tokens + 255) / 256, "directory");
          uint64_t position = 0, tokens = 0;
          for (uint64_t d = 0; d < documents.size(); ++d) {
            const Extent extent = store->document(d);
            expect(extent.begin == position && extent.end - extent.begin == documents[d].size(),
                   "extent");
            const Place place = store->place(0, extent.end);
            expect(place.document == d && place.offset == documents[d].size(), "place");
            expect(store->label(d) == d && store->meta(d) == std::to_string(d), "tables");
            for (const uint32_t offset : store->byte_offsets(d)) expect(offset == d, "offsets");
            position = extent.end + 1;
            tokens += documents[d].size();
          }
          expect(store->tokens() == tokens && store->documents() == documents.size(), "totals");
          uint64_t counted = 0;
          for (const uint64_t count : store->counts()) counted += count;
          expect(counted == tokens && shard.first[shard.buckets] == tokens, "counts");
        }
    }
});

const test::Register lazily(
    "store: threads verify the same blocks, damage is found when touched", [] {
      const Folder folder;
      Random random(4);
      const auto documents = random_documents(random, 1000, 300, 4000);
      const IndexInfo info = write_shard(folder.path(), {1000, 2, false, false, false}, documents);
      {
        const auto store = Store::open(folder.descriptor(), folder.path(), info, Mode::kMmap,
                                       Verify::kLazy, serial_for());
        const Guard guard = store->shard(0).suf_guard;
        const uint64_t blocks = (store->shard(0).suf_size * 4 + 65535) / 65536;
        std::vector<std::thread> threads;
        for (int t = 0; t < 4; ++t)
          threads.emplace_back([&] {
            for (uint64_t block = 0; block < blocks; ++block)
              if ((__atomic_load_n(&guard.verified[block / 64], __ATOMIC_ACQUIRE) >> (block % 64) &
                   1) == 0)
                expect(guard.verify(guard.context, block), "intact");
          });
        for (auto& thread : threads) thread.join();
      }
      const uint64_t block = 5;
      change_byte(folder.path() + "/suf.0", kPayloadOffset + (block << 16) + 7);
      const auto store = Store::open(folder.descriptor(), folder.path(), info, Mode::kMmap,
                                     Verify::kLazy, serial_for());
      const Guard guard = store->shard(0).suf_guard;
      expect(guard.verify(guard.context, block - 1) && !guard.verify(guard.context, block),
             "block");
      const std::string text = text_of<IndexCorruptError>(
          [&] { store->raise(0, Fault{Status::kCorrupt, Array::kSuf, block}); });
      expect(text.find("suf.0: block 5 (bytes 331776 to 397311)") != std::string::npos, text);
      for (const auto& [mode, verify] :
           {std::pair{Mode::kMmap, Verify::kFull}, std::pair{Mode::kRam, Verify::kQuick}})
        expect(!text_of<IndexCorruptError>([&] {
                  Store::open(folder.descriptor(), folder.path(), info, mode, verify,
                              threads_for(3));
                }).empty(),
               "opened");
    });

const test::Register shrunk("store: a file that shrinks while open is an error", [] {
  const Folder folder;
  Random random(5);
  const IndexInfo info = write_shard(folder.path(), {50, 1, false, false, false},
                                     random_documents(random, 50, 100, 900));
  const auto store = Store::open(folder.descriptor(), folder.path(), info, Mode::kMmap,
                                 Verify::kQuick, serial_for());
  store->check_sizes();
  std::filesystem::resize_file(folder.path() + "/suf.0", 8192);
  expect(text_of<IndexCorruptError>([&] { store->check_sizes(); }).find("8192 bytes") !=
             std::string::npos,
         "suf");
  std::filesystem::resize_file(folder.path() + "/doc.0", 100);
  expect(!text_of<IndexCorruptError>([&] { store->document(0); }).empty(), "doc");
});

const test::Register stops("writer: ids out of range, long texts and cancelling", [] {
  const Folder folder;
  ShardWriter writer(folder.path(), 0, Uuid{}, {10, 1, false, false, false});
  const std::vector<int16_t> tokens = {1, 2, 3, 4, 5, -1};
  const std::vector<int64_t> ends = {2, 2};
  Run run{};
  run.tokens = {tokens.data(), 2, true};
  run.size = 6;
  run.ends = ends;
  run.document = 7;
  run.offset = 100;
  expect(text_of<std::out_of_range>([&] {
           writer.add(run);
         }).find("got -1 at offset 3 of document 9") != std::string::npos,
         "offset in its document");
  const Folder other;
  ShardWriter cancelled(other.path(), 0, Uuid{}, {10, 1, false, false, false});
  run.size = 5;
  cancelled.add(run);
  cancelled.end_text(false);
  Progress progress;
  progress.cancel = true;
  expect(!text_of<Cancelled>([&] {
            cancelled.sort(Builder::kSais, 0, 1, serial_for(), progress);
          }).empty(),
         "cancelled");
});

}  // namespace
}  // namespace alignops::spans
