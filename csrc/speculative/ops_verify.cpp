// Ops of verification: acceptance of drafted chains, and one draft step. Schemas and CPU
// implementations.
#include "ops_verify.h"

#include <algorithm>
#include <cstring>
#include <tuple>

namespace alignops::speculative {
namespace {

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

bool needs_seeds(Rule rule, bool uniforms) {
  if (rule == Rule::kCoupled || rule == Rule::kRsd) return true;
  return !uniforms && (rule == Rule::kLossless || rule == Rule::kBlock || rule == Rule::kThreshold);
}

// First rows of the sequences of packed logits, null where they are not packed.
const int32_t* as_offsets(const std::optional<Tensor>& cu, int64_t b, int64_t rows,
                          const char* op) {
  const auto* offsets = data_or_null<int32_t>(cu, {b + 1}, op, "cu");
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
  const auto* stats = data_or_null<int64_t>(draft_stats, {b, k, kLawStats}, op, "draft_stats");
  const auto* lens = data_or_null<int32_t>(draft_lens, {b}, op, "draft_lens");
  const int32_t* offsets = as_offsets(cu, b, packed ? target.size(0) : 0, op);
  Parameters parameters = as_parameters(rule, params, op);
  ALIGNOPS_CHECK(word_start.has_value() || rule != Rule::kNudge, op,
                 ": word_start must be given for the rule nudge");
  parameters.word_start = data_or_null<bool>(word_start, {size}, op, "word_start");
  ALIGNOPS_CHECK(given.has_value() || rule != Rule::kScripted, op,
                 ": given must be given for the rule scripted");
  const auto* script = data_or_null<int32_t>(given, {b}, op, "given");
  const auto* words = data_or_null<uint32_t>(uniforms, {b, k + 1, 2}, op, "uniforms");
  const Seeds random(seeds, positions, b, needs_seeds(rule, words != nullptr), op);
  const Warps warps = as_warps(temperature, top_k, top_p, min_p, b, is_probs, op);
  check_eos(eos_ids, op);
  parameters.eos_ids = eos_ids;
  const auto* left = data_or_null<int32_t>(remaining, {b}, op, "remaining");
  const auto* states = data_or_null<uint8_t>(state, {b}, op, "state");
  const auto* live = data_or_null<bool>(active, {b}, op, "active");

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
                        static_cast<uint64_t>(value_or(random.positions, row, int64_t{0})),
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
}

STABLE_TORCH_LIBRARY_IMPL(alignops, CPU, m) {
  m.impl("speculative_verify", TORCH_BOX(&alignops::speculative::verify));
  m.impl("speculative_propose", TORCH_BOX(&alignops::speculative::propose_rows));
}
