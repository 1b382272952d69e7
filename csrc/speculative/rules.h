// Acceptance rules of speculative decoding, one sequence at a time, over the kernel table. What
// they decide is defined, bit for bit, by alignops/reference/speculative/rules.py.
//
// Letters: k drafts of the row, V ids, n nodes of a tree.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "speculative/laws.h"

namespace alignops::speculative {

enum class Rule : int32_t {
  kGreedy = 0,
  kLossless = 1,
  kBlock = 2,
  kCoupled = 3,
  kTypical = 4,
  kRelaxed = 5,
  kThreshold = 6,
  kRsd = 7,
  kNudge = 8,
  kScripted = 9,
};
inline constexpr int64_t kNumRules = 10;

enum class TreeRule : int32_t { kGreedy = 0, kTarget = 1, kRrs = 2 };
inline constexpr int64_t kNumTreeRules = 3;
inline constexpr int64_t kMaxNodes = 64;

enum class Retry : int32_t { kResample = 0, kDescend = 1, kNone = 2 };

// Where an emitted token comes from.
enum class From : uint8_t {
  kDraft = 0,
  kCorrection = 1,
  kBonus = 2,
  kTeacherRetry = 3,
  kStudent = 4,
  kNudge = 5,
  kBase = 6,
};

enum class Finished : uint8_t { kRunning = 0, kEndOfText = 1, kLength = 2 };

// States of the rule nudge.
inline constexpr uint8_t kStateBase = 0, kStateNudge = 1;

struct Parameters {
  double eps = 0.09, delta = 0.3;       // typical
  int64_t m = 3;                        // relaxed
  float r = 0.5f, below_best = -1.0f;   // relaxed; below_best < 0: r counts
  float t_single = 1.0f, t_acc = 1.0f;  // threshold
  float p_th = 0.01f;                   // rsd
  int64_t top_n = 20, trials = 5;       // rsd; 1 <= trials <= kMaxTrials
  Retry retry = Retry::kResample;       // rsd
  bool warped = false;                  // rsd: the student's test uses the warped law
  float gamma = 0.4f;                   // nudge
  int64_t eos_lookahead = 16;           // nudge
  const bool* word_start = nullptr;     // nudge: of V ids
  std::span<const int64_t> eos_ids;
};
inline constexpr int64_t kMaxTrials = 64;

// The rows of one sequence: row i begins `stride` elements behind row i - 1.
struct Rows {
  const void* data = nullptr;  // null: there are none
  DType dtype = DType::kFloat32;
  bool probabilities = false;
  int64_t stride = 0;
  int64_t size = 0;

  Source at(int64_t i) const;
};

struct Chain {
  Rows target;            // k + 1 rows of V ids
  Rows draft;             // k rows of at most V ids; none: drafts are certain
  const int64_t* stats;   // (k, 6), LawStats of the draft rows, or null
  const int64_t* drafts;  // k ids
  int64_t k;
  Warp warp;
  uint64_t seed;
  uint64_t position;         // of the token that row 0 decides
  const uint32_t* uniforms;  // (k + 1, 2), or null
  uint8_t state;
  int64_t given;  // scripted
};

// What a row emits. `tokens` and `sources` have room for k + 1 (a tree: n) entries.
struct Emitted {
  int64_t* tokens;
  uint8_t* sources;
  int64_t count = 0;
  int64_t accepted = 0;
  Finished finished = Finished::kRunning;
  RowError error = RowError::kNone;
  uint8_t state = kStateBase;
  int32_t zero_q = 0;  // tested drafts that the drafter could not have drawn but the target could
};

// Scratch memory of one thread: laws of a row of the target and of the drafter, and, for the rule
// tree_rrs, what is left of both.
struct Workspace {
  RowLaw target, draft;
  std::unique_ptr<float[]> p, q;

  Workspace(const Kernels& table, const ParallelFor& parallel, int64_t target_size,
            int64_t draft_size, bool rests);
  const Kernels& kernels;
};

// The rule, then the cut behind the first end of text, then that to `remaining` tokens (< 0: no
// limit). Rows are read in order and only as far as the rule needs them. A row with an error emits
// nothing.
void verify_chain(Workspace& work, const Chain& chain, Rule rule, const Parameters& parameters,
                  int64_t remaining, Emitted& out);

struct Tree {
  Rows target;            // n rows of V ids
  Rows draft;             // n rows, or none
  const int64_t* tokens;  // n ids; -1: no node
  const int64_t* parent;  // n nodes; parent[0] is not read
  int64_t n;
  Warp warp;
  uint64_t seed;
  uint64_t position;  // of the token that row 0 decides
  bool replacement;   // tree_rrs: children were drawn with replacement
};

// As verify_chain. `path` has room for n nodes; path[0] = 0 is the root, and out.accepted + 1 nodes
// are written.
void verify_tree(Workspace& work, const Tree& tree, TreeRule rule, std::span<const int64_t> eos_ids,
                 int64_t remaining, int32_t* path, Emitted& out);

// One draft step, or one step of plain decoding without drafts: an id of the law by a word of the
// stream `propose`, or by the race that the rule `coupled` runs; temperature 0: the largest logit.
struct Proposal {
  int64_t id = -1;
  LawStats stats{};
  RowError error = RowError::kNone;
};
Proposal propose(Workspace& work, const Source& row, const Warp& warp, uint64_t seed,
                 int64_t position, bool race);

// Cuts what a rule emitted; drafts that are cut do not count as accepted.
void cut(Emitted& out, std::span<const int64_t> eos_ids, int64_t remaining);

// The test u q < p, strict: what p says is impossible is rejected at u = 0, too.
inline bool accepts(uint32_t word, double q, float p) {
  return static_cast<double>(word) * 0x1p-32 * q < static_cast<double>(p);
}

inline bool contains(std::span<const int64_t> ids, int64_t id) {
  for (const int64_t other : ids)
    if (other == id) return true;
  return false;
}

}  // namespace alignops::speculative
