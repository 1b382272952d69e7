// Queries to an opened index without Python, from several threads at once.
#include "spans/index.h"

#include <atomic>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

#include "harness.h"
#include "spans/store.h"
#include "spans_samples.h"

namespace alignops::spans {
namespace {

using test::expect;

struct Answers {
  std::vector<int64_t> count, interval, length, matches, next, distribution, position, spans,
      suffix;
  int64_t ends = 0;
  bool operator==(const Answers&) const = default;
};

template <class T>
Ids ids_of(const std::vector<T>& ids) {
  return std::span<const T>(ids);
}

Answers ask(const Index& index, const std::vector<int64_t>& ids,
            const std::vector<int64_t>& offsets) {
  const Batch batch = index.encode("test", "ids", ids_of(ids), offsets);
  const auto rows = static_cast<size_t>(batch.rows());
  Answers out;
  out.count.resize(rows);
  out.interval.resize(2 * rows);
  out.suffix.resize(rows);
  out.length.resize(ids.size());
  out.matches.resize(ids.size());
  index.count(batch, out.count.data());
  index.find(batch, out.interval.data());
  index.longest_suffix(batch, 4096, out.suffix.data());
  index.match(batch, 4096, out.length.data(), out.matches.data());
  out.spans = index.maximal_spans("test", batch, 4096, {2, 3, {}, {}}).end;
  std::vector<int64_t> row(rows), number(rows);
  std::iota(row.begin(), row.end(), 0);
  std::erase_if(row, [&](int64_t r) { return out.count[static_cast<size_t>(r)] == 0; });
  number.resize(row.size());
  out.position = index.occurrences(batch, row, number).position;
  const std::vector<int64_t> first(ids.begin(), ids.begin() + 1);
  const Batch context = index.encode("test", "ctx", ids_of(first));
  out.next.resize(ids.size());
  index.next_counts(context, batch, out.next.data());
  out.distribution = index.next_dist(context).counts;
  out.ends = index.eos_count(context);
  return out;
}

const test::Register shared("one index answers several threads at once", [] {
  test::Random random(11);
  const auto documents = random_documents(random, 40, 300, 500);
  const Folder folder;
  const IndexInfo info = write_shard(folder.path(), {40, 2, false, false, false}, documents);
  std::vector<int64_t> ids, offsets{0};
  for (int i = 0; i < 200; ++i) {
    for (int64_t j = random.below(6); j >= 0; --j) ids.push_back(random.below(40));
    offsets.push_back(static_cast<int64_t>(ids.size()));
  }
  const auto open = [&] {
    return Store::open(folder.descriptor(), folder.path(), info, Mode::kMmap, Verify::kLazy,
                       serial_for());
  };
  const Answers expected = ask(Index(open(), serial_for()), ids, offsets);
  const Index index(open(), threads_for(3));  // no block is verified yet
  std::vector<Answers> got(4);
  std::vector<std::thread> threads;
  for (Answers& mine : got)
    threads.emplace_back([&index, &ids, &offsets, &mine] { mine = ask(index, ids, offsets); });
  for (std::thread& thread : threads) thread.join();
  for (const Answers& answers : got) expect(answers == expected, "answers");
});

// Documents that are removed, and the same where they are empty from the beginning.
const test::Register removed("removed documents are as empty ones", [] {
  test::Random random(13);
  for (int round = 0; round < 20; ++round) {
    auto documents = random_documents(random, 6, 20, 60);
    documents.push_back(documents[3]);
    const Folder with, without;
    IndexInfo info = write_shard(with.path(), {6, 2, false, false, false}, documents);
    std::vector<uint64_t> gone;
    for (uint64_t d = 0; d < documents.size(); ++d)
      if (random.below(2) == 0 || d == 0) gone.push_back(d);
    const auto open = [](const Folder& folder, const IndexInfo& what) {
      return Store::open(folder.descriptor(), folder.path(), what, Mode::kMmap, Verify::kFull,
                         serial_for());
    };
    info.shards[0].files[kDel] = open(with, info)->write_removal(0, gone, with.path());
    for (const uint64_t d : gone) documents[d].clear();
    const Index ours(open(with, info), threads_for(2));
    const Index theirs(
        open(without, write_shard(without.path(), {6, 2, false, false, false}, documents)),
        serial_for());
    expect(std::ranges::equal(ours.store().removed(), gone), "removed");
    expect(std::ranges::equal(ours.store().counts(), theirs.store().counts()), "counts");
    std::vector<int64_t> ids, offsets{0};
    for (int i = 0; i < 60; ++i) {
      for (int64_t j = random.below(9); j >= 0; --j) ids.push_back(random.below(6));
      offsets.push_back(static_cast<int64_t>(ids.size()));
    }
    Answers got = ask(ours, ids, offsets), want = ask(theirs, ids, offsets);
    got.position.clear();  // texts differ
    want.position.clear();
    expect(got == want, "answers, round " + std::to_string(round));
  }
});

const test::Register ids("ids are checked", [] {
  test::Random random(12);
  const Folder folder;
  const IndexInfo info =
      write_shard(folder.path(), {40, 1, false, false, false}, random_documents(random, 40, 3, 50));
  const Index index(Store::open(folder.descriptor(), folder.path(), info, Mode::kRam, Verify::kFull,
                                serial_for()),
                    serial_for());
  const auto refuses = [&](const Ids& bad) {
    try {
      index.encode("count", "q", bad);
    } catch (const std::out_of_range&) {
      return true;
    }
    return false;
  };
  expect(refuses(ids_of<int64_t>({1, -1})), "negative");
  expect(refuses(ids_of<int32_t>({-256})), "negative, zero in the width of the text");
  expect(refuses(ids_of<uint32_t>({0xFFFFFF00u})), "large");
  expect(refuses(ids_of<uint8_t>({255})), "separator");
  expect(refuses(ids_of<uint16_t>({40})), "vocabulary");
  expect(!refuses(ids_of<uint16_t>({39, 0})), "legal");
});

}  // namespace
}  // namespace alignops::spans
