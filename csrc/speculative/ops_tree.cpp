// Op of verification: acceptance of drafted trees. Schema and CPU implementation.
#include <algorithm>
#include <tuple>

#include "ops_verify.h"

namespace alignops::speculative {
namespace {

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
  const auto* left = data_or_null<int32_t>(remaining, {b}, op, "remaining");
  const auto* live = data_or_null<bool>(active, {b}, op, "active");

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
                               static_cast<uint64_t>(value_or(random.positions, row, int64_t{0})),
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
  m.impl("speculative_verify_tree", TORCH_BOX(&alignops::speculative::verify_trees));
}
