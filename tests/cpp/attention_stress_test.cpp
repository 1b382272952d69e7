// One writer changes blocks in all ways while readers look at them and append to blocks of their
// own. What a reader sees in a snapshot is what a plain model of the blocks says of its version,
// nothing is recycled under it, and in the end no page is lost. Sanitizers see the races.
#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "attention/errors.h"
#include "attention/workspace.h"
#include "harness.h"

namespace alignops::attention::store {
namespace {

constexpr int64_t kPageSize = 16, kPages = 1024, kShared = 4, kReaders = 8, kSteps = 10000;

// What stands for keys and values. Plain memory: whoever has reserved a slot writes it.
struct Cell {
  int64_t token = 0, rotation = 0, turns = 0;
};
using Cells = std::vector<Cell>;

Cell& cell(Cells& cells, int64_t slot) { return cells[static_cast<size_t>(slot)]; }

// A block as a list of tokens with their positions.
struct Model {
  std::vector<std::pair<int64_t, int64_t>> tokens;
  int64_t extent = 0;

  void append(int64_t token) { tokens.emplace_back(extent++, token); }
  void evict(int64_t start, int64_t stop, bool close) {
    std::erase_if(tokens, [&](const auto& t) { return t.first >= start && t.first < stop; });
    if (!close) return;
    for (auto& t : tokens) t.first -= t.first >= stop ? stop - start : 0;
    extent -= stop - start;
  }
  void take(Model& other) {
    for (const auto& t : other.tokens) tokens.emplace_back(t.first + extent, t.second);
    extent += other.extent;
    other = {};
  }
};

uint64_t mix(uint64_t hash, int64_t value) {
  return (hash ^ static_cast<uint64_t>(value)) * 0x100000001b3 + (hash >> 29);
}

uint64_t hash_of(const std::array<Model, kShared>& models) {
  uint64_t hash = 1;
  for (const Model& model : models) {
    hash = mix(hash, model.extent);
    for (const auto& [position, token] : model.tokens) hash = mix(mix(hash, position), token);
  }
  return hash;
}

struct World {
  std::shared_ptr<PagePool> pool = std::make_shared<PagePool>(kPages, kPageSize);
  Workspace ws{pool, {}};
  Cells cells = Cells(static_cast<size_t>(kPages * kPageSize));
};

// Appends and writes the cells, as the layers of a model would.
void fill(World& world, const Step& step, int64_t token) {
  for (const Write& write : step.writes) {
    if (write.copy) {
      const auto copy = step.page_copy(write, kPageSize);
      for (int64_t i = 0; i < copy.count; ++i)
        cell(world.cells, copy.dst + i) = cell(world.cells, copy.src + i);
    }
    for (int64_t t = 0; t < write.rows; ++t)
      cell(world.cells, step.slot(write, t, kPageSize)) = {token + t, write.base->extent + t, 0};
  }
}

void run_copies(World& world, const Move& move) {
  for (const Copy& copy : move.copies)
    for (int64_t i = 0; i < copy.count; ++i) {
      const Cell& from = cell(world.cells, copy.src + i);
      cell(world.cells, copy.dst + i) = {from.token, from.rotation + copy.shift, from.turns + 1};
    }
}

// Checks the cells of a block against its runs and hashes it.
uint64_t read(World& world, const Block& block, uint64_t hash, bool& ok) {
  hash = mix(hash, block.extent);
  int64_t end = 0;
  for (const Run& run : block.runs) {
    ok = ok && run.n > 0 && run.s0 >= end;
    end = run.end();
    for (int64_t i = 0; i < run.n; ++i) {
      const int64_t slot = run.slot(i, kPageSize);
      const Cell& found = cell(world.cells, slot);
      ok = ok && found.token == world.pool->token(slot) && found.rotation == run.r0 + i &&
           found.turns <= (run.rewritten ? 1 : 0);
      hash = mix(mix(hash, run.s0 + i), found.token);
    }
  }
  ok = ok && end <= block.extent;
  return hash;
}

struct Seen {
  uint64_t version, hash;
};

class Writer {
 public:
  Writer(World& world, uint32_t seed) : world_(world), random_(seed) {
    for (int64_t b = 0; b < kShared; ++b) world.ws.new_block("shared");
    note();
  }
  // Versions since which the shared blocks have had a hash.
  std::vector<Seen> history;
  bool twins_intact = true;

  void act() {
    const int64_t b = random_.below(kShared),
                  other = (b + 1 + random_.below(kShared - 1)) % kShared;
    Model& model = models_[static_cast<size_t>(b)];
    try {
      switch (random_.below(10)) {
        case 0:
          move(b, other);
          break;
        case 1: {
          const int64_t start = random_.below(model.extent + 1);
          const int64_t stop = start + random_.below(model.extent + 1 - start);
          const bool close = random_.below(2) == 0;
          world_.ws.evict(b, start, stop, close);
          model.evict(start, stop, close);
          break;
        }
        case 2: {
          const int64_t length =
              model.extent - random_.below(std::min<int64_t>(model.extent, 40) + 1);
          world_.ws.truncate(b, length);
          model.evict(length, model.extent, true);
          break;
        }
        case 3:
          fork();
          break;
        default:
          append(b);
      }
      note();
      for (int64_t i = 0; i < kShared; ++i)
        if (models_[static_cast<size_t>(i)].extent > 150) clear(i);
    } catch (const PoolExhausted&) {
      for (int64_t i = 0; i < kShared; ++i) clear(i);
    }
  }

 private:
  void note() {
    const uint64_t version = world_.ws.read([](const Layout& layout) { return layout.version; });
    history.push_back({version, hash_of(models_)});
  }
  void clear(int64_t b) {
    world_.ws.truncate(b, 0);
    models_[static_cast<size_t>(b)] = {};
    note();
  }
  void append(int64_t b) {
    const std::vector<std::vector<int64_t>> views{{b}};
    const int64_t rows = 1 + random_.below(20);
    world_.ws.begin(step_, {std::array{rows}, nullptr, &views, random_.below(2) == 0, false});
    fill(world_, step_, next_);
    if (random_.below(4) == 0) return world_.ws.abort(step_);
    std::vector<int64_t> tokens;
    for (int64_t t = 0; t < rows; ++t) {
      models_[static_cast<size_t>(b)].append(next_ + t);
      tokens.push_back(next_ + t);
    }
    next_ += rows;
    world_.ws.commit(step_, tokens);
  }
  void move(int64_t src, int64_t dst) {
    const auto mode = static_cast<MoveMode>(random_.below(3));
    const auto pending = world_.ws.begin_move(src, dst, mode, 4);
    if (pending != nullptr) {
      run_copies(world_, *pending);
      if (random_.below(4) == 0) return world_.ws.cancel_move(*pending);
      world_.ws.finish_move(*pending);
    }
    models_[static_cast<size_t>(dst)].take(models_[static_cast<size_t>(src)]);
  }
  // Another workspace over the same pages, which goes its own way and away.
  void fork() {
    if (twin_ == nullptr || random_.below(4) == 0) {
      twin_ = world_.ws.fork();
      twins_ = models_;
    }
    const int64_t b = random_.below(kShared), rows = 1 + random_.below(20);
    const std::vector<std::vector<int64_t>> views{{b}};
    Step step(world_.pool->epochs());
    twin_->begin(step, {std::array{rows}, nullptr, &views, true, false});
    fill(world_, step, next_);
    std::vector<int64_t> tokens;
    for (int64_t t = 0; t < rows; ++t) {
      twins_[static_cast<size_t>(b)].append(next_ + t);
      tokens.push_back(next_ + t);
    }
    next_ += rows;
    twin_->commit(step, tokens);
    const int64_t copy = twin_->fork_block(b);
    twin_->truncate(copy, 0);
    uint64_t hash = 1;
    twin_->read([&](const Layout& layout) {
      for (int64_t i = 0; i < kShared; ++i)
        hash = read(world_, *layout.blocks[static_cast<size_t>(i)], hash, twins_intact);
    });
    twins_intact = twins_intact && hash == hash_of(twins_);
  }

  World& world_;
  test::Random random_;
  Step step_{world_.pool->epochs()};
  std::array<Model, kShared> models_, twins_;
  std::unique_ptr<Workspace> twin_;
  int64_t next_ = 1;
};

void check_history(const std::vector<Seen>& history, const std::vector<Seen>& seen,
                   const std::string& who) {
  size_t at = 0;
  int64_t wrong = 0;
  for (const Seen& snapshot : seen) {
    if (at > 0 && snapshot.version < history[at].version) at = 0, ++wrong;  // back in time
    while (at + 1 < history.size() && history[at + 1].version <= snapshot.version) ++at;
    // The snapshot may be the first of what the writer noted a little later.
    wrong += snapshot.hash != history[at].hash &&
             !(at + 1 < history.size() && snapshot.hash == history[at + 1].hash);
  }
  test::expect(wrong == 0, who + ": " + std::to_string(wrong) + " snapshots of no version");
}

void look(World& world, int64_t own, uint32_t seed, std::vector<Seen>& seen,
          std::atomic<bool>& ok) {
  test::Random random(seed);
  Step step(world.pool->epochs());
  std::vector<std::vector<int64_t>> views{{}};
  for (int64_t b = 0; b < kShared; ++b) views[0].push_back(b);
  views[0].push_back(own);
  std::vector<int64_t> mine;
  bool good = true;
  for (int64_t i = 0; i < kSteps; ++i) {
    const int64_t rows = random.below(4) == 0 ? 1 : 0;
    try {
      world.ws.begin(step, {std::array{rows}, nullptr, &views, true, false});
    } catch (const PoolExhausted&) {
      continue;
    }
    const int64_t token = -1 - i;
    fill(world, step, token);
    uint64_t hash = 1;
    for (int64_t b = 0; b < kShared; ++b)
      hash = read(world, *step.layout->blocks[static_cast<size_t>(b)], hash, good);
    seen.push_back({step.layout->version, hash});
    // Its own block holds what it has committed.
    const Block& block = *step.layout->blocks[static_cast<size_t>(own)];
    uint64_t expected = mix(1, static_cast<int64_t>(mine.size()));
    for (size_t k = 0; k < mine.size(); ++k)
      expected = mix(mix(expected, static_cast<int64_t>(k)), mine[k]);
    good = good && read(world, block, 1, good) == expected;
    if (rows > 0 && random.below(3) > 0) {
      world.ws.commit(step, std::array{token});
      mine.push_back(token);
    } else {
      world.ws.abort(step);
    }
    if (mine.size() > 50) {
      world.ws.truncate(own, 20);
      mine.resize(20);
    }
  }
  if (!good) ok = false;
}

const test::Register stress("readers of a changing workspace see versions of it", [] {
  World world;
  std::vector<std::vector<Seen>> seen(kReaders);
  std::atomic<bool> ok{true};
  {
    Writer writer(world, 20260107);
    std::vector<std::thread> threads;
    std::atomic<int64_t> left{kReaders};
    for (int64_t r = 0; r < kReaders; ++r) {
      const int64_t own = world.ws.new_block("own");
      threads.emplace_back([&, r, own] {
        look(world, own, static_cast<uint32_t>(r), seen[static_cast<size_t>(r)], ok);
        --left;
      });
    }
    for (int64_t i = 0; i < kSteps || left > 0; ++i) writer.act();
    for (std::thread& thread : threads) thread.join();
    test::expect(writer.twins_intact, "a fork has changed with its origin");
    for (int64_t r = 0; r < kReaders; ++r)
      check_history(writer.history, seen[static_cast<size_t>(r)], "reader " + std::to_string(r));
  }
  test::expect(ok, "a key, its token or its rotation is not what the layout says");
  const auto blocks = world.ws.stats().blocks;
  for (int64_t b = 0; b < blocks; ++b) world.ws.truncate(b, 0);
  test::expect(world.pool->free_pages() == kPages, "pages are lost");
  test::expect(world.pool->waiting() == 0, "pages wait for nobody");
});

}  // namespace
}  // namespace alignops::attention::store
