// Ops of verification: acceptance of drafted chains and trees, and one draft step. Schemas and CPU
// implementations.
#include <atomic>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/ops_common.h"
#include "../common/torch_parallel.h"
#include "rules.h"

namespace alignops::speculative {
namespace {

constexpr size_t kMaxEos = 8;

// Checked pointers to optional tensors of B rows; null where there is none.
struct Optional {
  const char* op;

  template <class T>
  const T* operator()(const std::optional<Tensor>& t, ScalarType dtype,
                      std::initializer_list<int64_t> shape, const char* argument) const {
    if (!t.has_value()) return nullptr;
    check_layout(*t, dtype, shape, op, argument);
    return static_cast<const T*>(t->const_data_ptr());
  }
};

template <class T>
T value_or(const T* values, int64_t i, T otherwise) {
  return values != nullptr ? values[i] : otherwise;
}

void check_unit_stride(const Tensor& t, const char* op, const char* argument) {
  const int64_t last = t.dim() - 1;
  ALIGNOPS_CHECK(t.size(last) <= 1 || t.stride(last) == 1, op, ": ", argument,
                 " must have stride 1 in the last dimension, got strides ",
                 shape_string(t.strides()));
}

// (b, n, size) with any outer strides.
struct Batch {
  Rows rows;  // of the first sequence
  int64_t stride = 0;

  Rows of(int64_t b) const {
    Rows out = rows;
    if (out.data != nullptr)
      out.data = static_cast<const char*>(rows.data) + b * stride * dtype_bytes(rows.dtype);
    return out;
  }
};

Batch as_batch(const Tensor& t, bool probabilities, const char* op, const char* argument) {
  check_device(t, kCpu, op, argument);
  const DType dtype = float_dtype(t.scalar_type(), op, argument);
  check_unit_stride(t, op, argument);
  const int64_t last = t.dim() - 1, size = t.size(last);
  ALIGNOPS_CHECK(size > 0 && size <= INT32_MAX, op, ": ", argument,
                 " must have 1 to 2^31 - 1 ids in the last dimension, got shape ",
                 shape_string(t.sizes()));
  const Rows rows{t.const_data_ptr(), dtype, probabilities, t.stride(last - 1), size};
  return {rows, last == 2 ? t.stride(0) : 0};
}

// Logits of the drafter, (b, n, size) with size at most that of the target.
Batch as_draft(const std::optional<Tensor>& t, int64_t b, int64_t n, int64_t size,
               bool probabilities, const char* op) {
  if (!t.has_value()) return {};
  ALIGNOPS_CHECK(t->dim() == 3 && t->size(0) == b && t->size(1) == n, op,
                 ": draft must have shape (", b, ", ", n, ", ids), got ", shape_string(t->sizes()));
  const Batch batch = as_batch(*t, probabilities, op, "draft");
  ALIGNOPS_CHECK(batch.rows.size <= size, op, ": draft must have at most the ", size,
                 " ids of target, got ", batch.rows.size);
  return batch;
}

struct Warps {
  const float* temperature;
  const int32_t* top_k;
  const float* top_p;
  const float* min_p;

  Warp of(int64_t b) const {
    return {value_or(temperature, b, 1.0f), value_or(top_k, b, 0), value_or(top_p, b, 1.0f),
            value_or(min_p, b, 0.0f)};
  }
};

Warps as_warps(const std::optional<Tensor>& temperature, const std::optional<Tensor>& top_k,
               const std::optional<Tensor>& top_p, const std::optional<Tensor>& min_p, int64_t b,
               bool probabilities, const char* op) {
  const Optional get{op};
  const Warps warps{get.operator()<float>(temperature, ScalarType::Float, {b}, "temperature"),
                    get.operator()<int32_t>(top_k, ScalarType::Int, {b}, "top_k"),
                    get.operator()<float>(top_p, ScalarType::Float, {b}, "top_p"),
                    get.operator()<float>(min_p, ScalarType::Float, {b}, "min_p")};
  for (const auto& [given, argument] :
       {std::pair{warps.top_k != nullptr, "top_k"}, std::pair{warps.top_p != nullptr, "top_p"},
        std::pair{warps.min_p != nullptr, "min_p"}})
    ALIGNOPS_CHECK(!probabilities || !given, op, ": ", argument,
                   " must not be given for probabilities, got a tensor");
  return warps;
}

void check_eos(const std::vector<int64_t>& eos_ids, const char* op) {
  ALIGNOPS_CHECK(eos_ids.size() <= kMaxEos, op, ": eos_ids must be at most ", kMaxEos, " ids, got ",
                 eos_ids.size());
}

// Calls body(workspace, row) for all rows. Threads take rows as they become free, because a row
// ends at the first draft that is not accepted; where rows are few, they share the tiles of each.
template <class Body>
void for_rows(int64_t rows, int64_t size, int64_t draft_size, bool rests, const Body& body) {
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const bool share_tiles = 2 * rows <= threads;
  const ParallelFor pool = torch_parallel_for(), serial = serial_for();
  const int64_t workers = share_tiles ? 1 : std::min(rows, threads);
  const Kernels& table = kernels();
  std::vector<Workspace> workspaces;
  workspaces.reserve(static_cast<size_t>(workers));
  for (int64_t i = 0; i < workers; ++i)
    workspaces.emplace_back(table, share_tiles ? pool : serial, size, draft_size, rests);
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t b = next++; b < rows; b = next++) body(workspaces[static_cast<size_t>(i)], b);
  };
  if (workers == 1) {
    work(0, 1);
  } else {
    pool(0, workers, 1, work);
  }
}

// What verification returns: rows of `width` emitted tokens, at first empty.
struct Results {
  int64_t rows, width;
  Tensor accept_len, next_token, num_emitted, tokens, cu_emitted, flat, source, finished, row_error,
      state, zero_q;

  Results(const Tensor& like, int64_t b, int64_t n)
      : rows(b),
        width(n),
        accept_len(make(like, {b}, ScalarType::Int)),
        next_token(make(like, {b}, ScalarType::Long)),
        num_emitted(make(like, {b}, ScalarType::Int)),
        tokens(make(like, {b, n}, ScalarType::Long)),
        cu_emitted(make(like, {b + 1}, ScalarType::Int)),
        flat(make(like, {b * n}, ScalarType::Long)),
        source(make(like, {b, n}, ScalarType::Byte)),
        finished(make(like, {b}, ScalarType::Byte)),
        row_error(make(like, {b}, ScalarType::Byte)),
        state(make(like, {b}, ScalarType::Byte)),
        zero_q(make(like, {b}, ScalarType::Int)) {}

  Emitted begin(int64_t b, uint8_t state_of_row) const {
    Emitted out{tokens.mutable_data_ptr<int64_t>() + b * width,
                source.mutable_data_ptr<uint8_t>() + b * width};
    out.state = state_of_row;
    return out;
  }

  void end(int64_t b, const Emitted& out) const {
    for (int64_t i = out.count; i < width; ++i) {
      out.tokens[i] = -1;
      out.sources[i] = 0;
    }
    accept_len.mutable_data_ptr<int32_t>()[b] = static_cast<int32_t>(out.accepted);
    next_token.mutable_data_ptr<int64_t>()[b] =
        out.count > out.accepted ? out.tokens[out.accepted] : -1;
    num_emitted.mutable_data_ptr<int32_t>()[b] = static_cast<int32_t>(out.count);
    finished.mutable_data_ptr<uint8_t>()[b] = static_cast<uint8_t>(out.finished);
    row_error.mutable_data_ptr<uint8_t>()[b] = static_cast<uint8_t>(out.error);
    state.mutable_data_ptr<uint8_t>()[b] = out.state;
    zero_q.mutable_data_ptr<int32_t>()[b] = out.error == RowError::kNone ? out.zero_q : 0;
  }

  // After all rows have ended.
  void flatten() const {
    const auto* count = num_emitted.const_data_ptr<int32_t>();
    const auto* from = tokens.const_data_ptr<int64_t>();
    auto* cu = cu_emitted.mutable_data_ptr<int32_t>();
    auto* to = flat.mutable_data_ptr<int64_t>();
    std::fill_n(to, rows * width, int64_t{-1});
    cu[0] = 0;
    for (int64_t b = 0; b < rows; ++b) {
      cu[b + 1] = cu[b] + count[b];
      std::copy_n(from + b * width, count[b], to + cu[b]);
    }
  }

 private:
  static Tensor make(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
    return torch::stable::new_empty(like, std::vector<int64_t>(shape), dtype);
  }
};

// `params` of each rule, in the order of the schema's comment.
Parameters as_parameters(Rule rule, const std::vector<double>& params, const char* op) {
  constexpr size_t kCounts[kNumRules] = {0, 0, 0, 0, 2, 3, 2, 5, 2, 0};
  const size_t count = kCounts[static_cast<int>(rule)];
  ALIGNOPS_CHECK(params.size() == count, op, ": params must be ", count,
                 " numbers for this rule, got ", params.size());
  const auto in = [&](size_t i, const char* name, double least, double most) {
    ALIGNOPS_CHECK(params[i] >= least && params[i] <= most, op, ": params must have ", name,
                   " in [", least, ", ", most, "], got ", params[i]);
    return params[i];
  };
  constexpr double kMany = 1 << 30;
  Parameters out;
  if (rule == Rule::kTypical) {
    out.eps = in(0, "eps", 0, 1);
    out.delta = in(1, "delta", 0, 1e9);
  } else if (rule == Rule::kRelaxed) {
    out.m = static_cast<int64_t>(in(0, "m", 1, kMany));
    out.r = static_cast<float>(in(1, "r", 0, 1));
    out.below_best = static_cast<float>(in(2, "delta", -1, 1));
  } else if (rule == Rule::kThreshold) {
    out.t_single = static_cast<float>(in(0, "t_single", 0, 1e9));
    out.t_acc = static_cast<float>(in(1, "t_acc", 0, 1e9));
  } else if (rule == Rule::kRsd) {
    out.p_th = static_cast<float>(in(0, "p_th", 0, 1));
    out.top_n = static_cast<int64_t>(in(1, "top_n", 0, kMany));
    out.trials = static_cast<int64_t>(in(2, "trials", 1, kMaxTrials));
    out.retry = static_cast<Retry>(static_cast<int32_t>(in(3, "retry", 0, 2)));
    out.warped = in(4, "student_probs", 0, 1) != 0;
  } else if (rule == Rule::kNudge) {
    out.gamma = static_cast<float>(in(0, "gamma", 0, 1));
    out.eos_lookahead = static_cast<int64_t>(in(1, "eos_lookahead", 0, kMany));
  }
  return out;
}

// Seeds and positions of the generator: both or none.
struct Seeds {
  const int64_t* seeds;
  const int64_t* positions;

  Seeds(const std::optional<Tensor>& seed, const std::optional<Tensor>& position, int64_t b,
        bool needed, const char* op) {
    const Optional get{op};
    ALIGNOPS_CHECK(seed.has_value() || !needed, op, ": seeds must be given for this rule");
    ALIGNOPS_CHECK(seed.has_value() == position.has_value(), op,
                   ": positions must be given with seeds, and only then");
    seeds = get.operator()<int64_t>(seed, ScalarType::Long, {b}, "seeds");
    positions = get.operator()<int64_t>(position, ScalarType::Long, {b}, "positions");
  }
};

bool needs_seeds(Rule rule, bool uniforms) {
  if (rule == Rule::kCoupled || rule == Rule::kRsd) return true;
  return !uniforms && (rule == Rule::kLossless || rule == Rule::kBlock || rule == Rule::kThreshold);
}

// First rows of the sequences of packed logits, null where they are not packed.
const int32_t* as_offsets(const std::optional<Tensor>& cu, int64_t b, int64_t rows,
                          const char* op) {
  const Optional get{op};
  const auto* offsets = get.operator()<int32_t>(cu, ScalarType::Int, {b + 1}, "cu");
  if (offsets == nullptr) return nullptr;
  for (int64_t i = 0; i < b; ++i)
    ALIGNOPS_CHECK(offsets[i] >= 0 && offsets[i] <= offsets[i + 1], op,
                   ": cu must rise from 0, got ", offsets[i], " before ", offsets[i + 1]);
  ALIGNOPS_CHECK(offsets[0] == 0 && offsets[b] == rows, op, ": cu must go from 0 to the ", rows,
                 " rows of target, got ", offsets[0], " to ", offsets[b]);
  return offsets;
}

using VerifyResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                Tensor, Tensor, Tensor>;

VerifyResult verify(const Tensor& target, const Tensor& draft_ids,
                    const std::optional<Tensor>& draft, const std::optional<Tensor>& draft_stats,
                    const std::optional<Tensor>& draft_lens, const std::optional<Tensor>& cu,
                    int64_t rule_code, const std::vector<double>& params,
                    const std::optional<Tensor>& word_start, const std::optional<Tensor>& given,
                    const std::optional<Tensor>& seeds, const std::optional<Tensor>& positions,
                    const std::optional<Tensor>& uniforms, const std::optional<Tensor>& temperature,
                    const std::optional<Tensor>& top_k, const std::optional<Tensor>& top_p,
                    const std::optional<Tensor>& min_p, const std::vector<int64_t>& eos_ids,
                    const std::optional<Tensor>& remaining, const std::optional<Tensor>& state,
                    const std::optional<Tensor>& active, bool is_probs) {
  const char* op = "speculative_verify";
  ALIGNOPS_CHECK(draft_ids.dim() == 2, op, ": draft_ids must have shape (b, k), got ",
                 shape_string(draft_ids.sizes()));
  const int64_t b = draft_ids.size(0), k = draft_ids.size(1);
  check_layout(draft_ids, ScalarType::Long, {b, k}, op, "draft_ids");
  ALIGNOPS_CHECK(rule_code >= 0 && rule_code < kNumRules, op, ": rule must be 0 to ", kNumRules - 1,
                 ", got ", rule_code);
  const auto rule = static_cast<Rule>(rule_code);
  const bool packed = cu.has_value();
  ALIGNOPS_CHECK(packed ? target.dim() == 2
                        : target.dim() == 3 && target.size(0) == b && target.size(1) == k + 1,
                 op, ": target must have shape ",
                 packed ? message("(rows, ids)") : message("(", b, ", ", k + 1, ", ids)"), ", got ",
                 shape_string(target.sizes()));
  const Batch rows = as_batch(target, is_probs, op, "target");
  const int64_t size = rows.rows.size;
  const Batch draft_rows = as_draft(draft, b, k, size, is_probs, op);
  ALIGNOPS_CHECK(draft.has_value() || !draft_stats.has_value(), op,
                 ": draft_stats must be given with draft only");
  const Optional get{op};
  const auto* stats =
      get.operator()<int64_t>(draft_stats, ScalarType::Long, {b, k, kLawStats}, "draft_stats");
  const auto* lens = get.operator()<int32_t>(draft_lens, ScalarType::Int, {b}, "draft_lens");
  const int32_t* offsets = as_offsets(cu, b, packed ? target.size(0) : 0, op);
  Parameters parameters = as_parameters(rule, params, op);
  ALIGNOPS_CHECK(word_start.has_value() || rule != Rule::kNudge, op,
                 ": word_start must be given for the rule nudge");
  parameters.word_start = get.operator()<bool>(word_start, ScalarType::Bool, {size}, "word_start");
  ALIGNOPS_CHECK(given.has_value() || rule != Rule::kScripted, op,
                 ": given must be given for the rule scripted");
  const auto* script = get.operator()<int32_t>(given, ScalarType::Int, {b}, "given");
  const auto* words =
      get.operator()<uint32_t>(uniforms, ScalarType::UInt32, {b, k + 1, 2}, "uniforms");
  const Seeds random(seeds, positions, b, needs_seeds(rule, words != nullptr), op);
  const Warps warps = as_warps(temperature, top_k, top_p, min_p, b, is_probs, op);
  check_eos(eos_ids, op);
  parameters.eos_ids = eos_ids;
  const auto* left = get.operator()<int32_t>(remaining, ScalarType::Int, {b}, "remaining");
  const auto* states = get.operator()<uint8_t>(state, ScalarType::Byte, {b}, "state");
  const auto* live = get.operator()<bool>(active, ScalarType::Bool, {b}, "active");

  const Results results(target, b, k + 1);
  const auto* ids = draft_ids.const_data_ptr<int64_t>();
  for_rows(b, size, draft_rows.rows.size, false, [&](Workspace& work, int64_t row) {
    Emitted out = results.begin(row, value_or(states, row, kStateBase));
    int64_t count = k;
    Rows own = rows.of(row);
    if (offsets != nullptr) {
      count = std::min<int64_t>(count, offsets[row + 1] - offsets[row] - 1);
      own.data = own.at(offsets[row]).data;
    }
    if (value_or(live, row, true) && count >= 0) {
      if (lens != nullptr) count = std::clamp<int64_t>(lens[row], 0, count);
      const int64_t* drafts = ids + row * k;
      count = std::find(drafts, drafts + count, -1) - drafts;
      const Chain chain{own,
                        draft_rows.of(row),
                        stats != nullptr ? stats + row * k * kLawStats : nullptr,
                        drafts,
                        count,
                        warps.of(row),
                        static_cast<uint64_t>(value_or(random.seeds, row, int64_t{0})),
                        value_or(random.positions, row, int64_t{0}),
                        words != nullptr ? words + row * (k + 1) * 2 : nullptr,
                        out.state,
                        value_or(script, row, 0)};
      const int64_t limit = left != nullptr ? std::max(left[row], 0) : -1;
      verify_chain(work, chain, rule, parameters, limit, out);
    }
    results.end(row, out);
  });
  results.flatten();
  return {results.accept_len, results.next_token, results.num_emitted, results.tokens,
          results.cu_emitted, results.flat,       results.source,      results.finished,
          results.row_error,  results.state,      results.zero_q};
}

std::tuple<Tensor, Tensor, Tensor> propose_rows(const Tensor& logits, const Tensor& seeds,
                                                const Tensor& positions,
                                                const std::optional<Tensor>& temperature,
                                                const std::optional<Tensor>& top_k,
                                                const std::optional<Tensor>& top_p,
                                                const std::optional<Tensor>& min_p, bool race) {
  const char* op = "speculative_propose";
  ALIGNOPS_CHECK(logits.dim() == 2, op, ": logits must have shape (b, ids), got ",
                 shape_string(logits.sizes()));
  const int64_t b = logits.size(0);
  const Batch rows = as_batch(logits, false, op, "logits");
  const Seeds random(seeds, positions, b, true, op);
  const Warps warps = as_warps(temperature, top_k, top_p, min_p, b, false, op);

  Tensor ids = torch::stable::new_empty(logits, {b}, ScalarType::Long);
  Tensor stats = torch::stable::new_empty(logits, {b, kLawStats}, ScalarType::Long);
  Tensor errors = torch::stable::new_empty(logits, {b}, ScalarType::Byte);
  auto* id = ids.mutable_data_ptr<int64_t>();
  auto* known = stats.mutable_data_ptr<int64_t>();
  auto* error = errors.mutable_data_ptr<uint8_t>();
  for_rows(b, rows.rows.size, 0, false, [&](Workspace& work, int64_t row) {
    const Proposal out =
        propose(work, rows.rows.at(row), warps.of(row), static_cast<uint64_t>(random.seeds[row]),
                random.positions[row], race);
    id[row] = out.id;
    std::memcpy(known + row * kLawStats, &out.stats, sizeof out.stats);
    error[row] = static_cast<uint8_t>(out.error);
  });
  return {ids, stats, errors};
}

using TreeResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                              Tensor, Tensor, Tensor>;

TreeResult verify_trees(const Tensor& target, const Tensor& tokens, const Tensor& parent,
                        int64_t rule_code, const std::optional<Tensor>& draft, bool replacement,
                        const std::optional<Tensor>& seeds, const std::optional<Tensor>& positions,
                        const std::optional<Tensor>& temperature,
                        const std::optional<Tensor>& top_k, const std::optional<Tensor>& top_p,
                        const std::optional<Tensor>& min_p, const std::vector<int64_t>& eos_ids,
                        const std::optional<Tensor>& remaining, const std::optional<Tensor>& active,
                        bool is_probs) {
  const char* op = "speculative_verify_tree";
  ALIGNOPS_CHECK(tokens.dim() == 2 && tokens.size(1) >= 1 && tokens.size(1) <= kMaxNodes, op,
                 ": tokens must have shape (b, n), n from 1 to ", kMaxNodes, ", got ",
                 shape_string(tokens.sizes()));
  const int64_t b = tokens.size(0), n = tokens.size(1);
  check_layout(tokens, ScalarType::Long, {b, n}, op, "tokens");
  check_layout(parent, ScalarType::Long, {b, n}, op, "parent");
  ALIGNOPS_CHECK(rule_code >= 0 && rule_code < kNumTreeRules, op, ": rule must be 0 to ",
                 kNumTreeRules - 1, ", got ", rule_code);
  const auto rule = static_cast<TreeRule>(rule_code);
  ALIGNOPS_CHECK(target.dim() == 3 && target.size(0) == b && target.size(1) == n, op,
                 ": target must have shape (", b, ", ", n, ", ids), got ",
                 shape_string(target.sizes()));
  const Batch rows = as_batch(target, is_probs, op, "target");
  ALIGNOPS_CHECK(draft.has_value() == (rule == TreeRule::kRrs), op,
                 ": draft must be given for the rule tree_rrs, and only then");
  const Batch draft_rows = as_draft(draft, b, n, rows.rows.size, is_probs, op);
  const Seeds random(seeds, positions, b, rule != TreeRule::kGreedy, op);
  const Warps warps = as_warps(temperature, top_k, top_p, min_p, b, is_probs, op);
  check_eos(eos_ids, op);
  const Optional get{op};
  const auto* left = get.operator()<int32_t>(remaining, ScalarType::Int, {b}, "remaining");
  const auto* live = get.operator()<bool>(active, ScalarType::Bool, {b}, "active");

  const Results results(target, b, n);
  Tensor paths = torch::stable::new_empty(target, {b, n}, ScalarType::Int);
  const auto* ids = tokens.const_data_ptr<int64_t>();
  const auto* parents = parent.const_data_ptr<int64_t>();
  auto* path = paths.mutable_data_ptr<int32_t>();
  for_rows(b, rows.rows.size, draft_rows.rows.size, rule == TreeRule::kRrs,
           [&](Workspace& work, int64_t row) {
             Emitted out = results.begin(row, kStateBase);
             int32_t* nodes = path + row * n;
             const bool reads = value_or(live, row, true);
             if (reads) {
               const Tree tree{rows.of(row),
                               draft_rows.of(row),
                               ids + row * n,
                               parents + row * n,
                               n,
                               warps.of(row),
                               static_cast<uint64_t>(value_or(random.seeds, row, int64_t{0})),
                               value_or(random.positions, row, int64_t{0}),
                               replacement};
               verify_tree(work, tree, rule, eos_ids, left != nullptr ? std::max(left[row], 0) : -1,
                           nodes, out);
             }
             const bool fine = reads && out.error == RowError::kNone;
             std::fill(nodes + (fine ? out.accepted + 1 : 0), nodes + n, -1);
             results.end(row, out);
           });
  results.flatten();
  return {paths,
          results.accept_len,
          results.next_token,
          results.num_emitted,
          results.tokens,
          results.cu_emitted,
          results.flat,
          results.source,
          results.finished,
          results.row_error,
          results.zero_q};
}

}  // namespace
}  // namespace alignops::speculative

STABLE_TORCH_LIBRARY_FRAGMENT(alignops, m) {
  // rule and its params: 0 greedy, 1 lossless, 2 block, 3 coupled, 4 typical (eps, delta), 5
  // relaxed (m, r, delta or -1), 6 threshold (t_single, t_acc), 7 rsd (p_th, top_n, trials, retry:
  // 0 resample, 1 descend, 2 none, student_probs: 0 raw, 1 warped), 8 nudge (gamma, eos_lookahead),
  // 9 scripted.
  m.def(
      "speculative_verify(Tensor target, Tensor draft_ids, Tensor? draft, Tensor? draft_stats, "
      "Tensor? draft_lens, Tensor? cu, int rule, float[] params, Tensor? word_start, Tensor? "
      "given, Tensor? seeds, Tensor? positions, Tensor? uniforms, Tensor? temperature, Tensor? "
      "top_k, Tensor? top_p, Tensor? min_p, int[] eos_ids, Tensor? remaining, Tensor? state, "
      "Tensor? active, bool is_probs) -> (Tensor accept_len, Tensor next_token, Tensor "
      "num_emitted, Tensor tokens, Tensor cu_emitted, Tensor flat, Tensor source, Tensor finished, "
      "Tensor row_error, Tensor state_out, Tensor zero_q)");
  m.def(
      "speculative_propose(Tensor logits, Tensor seeds, Tensor positions, Tensor? temperature, "
      "Tensor? top_k, Tensor? top_p, Tensor? min_p, bool race) -> (Tensor ids, Tensor stats, "
      "Tensor row_error)");
  // rule: 0 greedy, 1 tree_target, 2 tree_rrs.
  m.def(
      "speculative_verify_tree(Tensor target, Tensor tokens, Tensor parent, int rule, Tensor? "
      "draft, bool replacement, Tensor? seeds, Tensor? positions, Tensor? temperature, Tensor? "
      "top_k, Tensor? top_p, Tensor? min_p, int[] eos_ids, Tensor? remaining, Tensor? active, bool "
      "is_probs) -> (Tensor path, Tensor accept_len, Tensor next_token, Tensor num_emitted, Tensor "
      "tokens_out, Tensor cu_emitted, Tensor flat, Tensor source, Tensor finished, Tensor "
      "row_error, Tensor zero_q)");
}

STABLE_TORCH_LIBRARY_IMPL(alignops, CPU, m) {
  m.impl("speculative_verify", TORCH_BOX(&alignops::speculative::verify));
  m.impl("speculative_propose", TORCH_BOX(&alignops::speculative::propose_rows));
  m.impl("speculative_verify_tree", TORCH_BOX(&alignops::speculative::verify_trees));
}
