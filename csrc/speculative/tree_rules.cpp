#include <algorithm>

#include "speculative/cpu/random.h"
#include "speculative/cpu/weights.h"
#include "speculative/rules.h"

namespace alignops::speculative {
namespace {

class TreeRun {
 public:
  TreeRun(Workspace& work, const Tree& tree, int32_t* path, Emitted& out)
      : work_(work), tree_(tree), path_(path), out_(out) {}

  void run(TreeRule rule);

 private:
  // The child to go on to, or -1 and the token that follows in `following_`. False: no law.
  bool greedy(int64_t node, int64_t& child);
  bool target(int64_t node, int64_t& child);
  bool rrs(int64_t node, int64_t& child);

  int64_t next_child(int64_t node, int64_t after) const {
    for (int64_t c = after + 1; c < tree_.n; ++c)
      if (tree_.parent[c] == node && tree_.tokens[c] >= 0) return c;
    return -1;
  }
  uint32_t random(Stream stream, uint32_t lane) const {
    return philox(tree_.seed,
                  static_cast<uint32_t>(tree_.position + static_cast<uint64_t>(out_.accepted)),
                  stream, lane)
        .word[0];
  }
  bool noted(RowError error) {
    out_.error = error;
    return error == RowError::kNone;
  }

  Workspace& work_;
  const Tree& tree_;
  int32_t* path_;
  Emitted& out_;
  int64_t following_ = -1;
};

bool TreeRun::greedy(int64_t node, int64_t& child) {
  if (!noted(work_.target.read_largest(tree_.target.at(node)))) return false;
  following_ = work_.target.argmax();
  child = next_child(node, node);
  while (child >= 0 && tree_.tokens[child] != following_) child = next_child(node, child);
  return true;
}

bool TreeRun::target(int64_t node, int64_t& child) {
  RowLaw& law = work_.target;
  if (!noted(law.read(tree_.target.at(node), tree_.warp))) return false;
  int64_t tried[kMaxNodes];
  size_t count = 0;
  double reached = 0;
  const double word = static_cast<double>(random(Stream::kChild, 0)) * 0x1p-32;
  for (child = next_child(node, node); child >= 0; child = next_child(node, child)) {
    const int64_t token = tree_.tokens[child];
    if (contains({tried, count}, token)) continue;
    tried[count++] = token;
    reached += static_cast<double>(law.p(token));
    if (word < reached) return true;
  }
  const Density d{&law.law(), nullptr, 1.0f};
  const std::span<const int64_t> without{tried, count};
  const uint32_t draw = random(Stream::kSample, 0);
  following_ = law.total(d, without) > 0 ? law.draw(d, draw, without) : law.sample(draw);
  return true;
}

// What is left of target and drafter after a rejection replaces both: probabilities in memory.
bool TreeRun::rrs(int64_t node, int64_t& child) {
  if (!noted(work_.target.read(tree_.target.at(node), tree_.warp)) ||
      !noted(work_.draft.read(tree_.draft.at(node), tree_.warp)))
    return false;
  RowLaw &target = work_.target, &draft = work_.draft;
  Law p = target.law(), q = draft.law();
  const auto probability = [](const Law& law, int64_t id) {
    return id < law.size ? p32_at(law, id) : 0.0f;
  };
  const auto replaced = [](const Law& law, const float* rest) {
    return Law{rest, DType::kFloat32, true, law.size, law.rate, kNoCut, 0, 1.0};
  };
  uint32_t rank = 0;
  for (child = next_child(node, node); child >= 0; child = next_child(node, child), ++rank) {
    const int64_t token = tree_.tokens[child];
    const float q_token = probability(q, token), p_token = probability(p, token);
    if (q_token == 0 && p_token > 0) ++out_.zero_q;
    if (accepts(random(Stream::kChild, rank), q_token, p_token)) return true;
    const Density beyond{&p, &q, 1.0f};
    if (const uint64_t total = target.total(beyond); total > 0) {
      target.normalize(beyond, total, work_.p.get());
      p = replaced(p, work_.p.get());
    }
    if (tree_.replacement || token >= q.size) continue;
    const Density others{&q, nullptr, 1.0f};
    const int64_t without[] = {token};
    if (const uint64_t total = draft.total(others, without); total > 0) {
      draft.normalize(others, total, work_.q.get());
      work_.q[static_cast<size_t>(token)] = 0;
      q = replaced(q, work_.q.get());
    }
  }
  const Density d{&p, nullptr, 1.0f};
  target.total(d);
  following_ = target.draw(d, random(Stream::kSample, 0));
  return true;
}

void TreeRun::run(TreeRule rule) {
  int64_t node = 0;
  path_[0] = 0;
  while (true) {
    int64_t child = -1;
    const bool fine = rule == TreeRule::kGreedy   ? greedy(node, child)
                      : rule == TreeRule::kTarget ? target(node, child)
                                                  : rrs(node, child);
    if (!fine) return;
    if (child < 0) break;
    node = child;
    out_.tokens[out_.count] = tree_.tokens[node];
    out_.sources[out_.count++] = static_cast<uint8_t>(From::kDraft);
    path_[++out_.accepted] = static_cast<int32_t>(node);
  }
  const bool leaf = next_child(node, node) < 0;
  out_.tokens[out_.count] = following_;
  out_.sources[out_.count++] = static_cast<uint8_t>(leaf ? From::kBonus : From::kCorrection);
}

bool is_tree(const Tree& tree) {
  for (int64_t c = 1; c < tree.n; ++c) {
    if (tree.tokens[c] == -1) continue;
    const int64_t parent = tree.parent[c];
    if (tree.tokens[c] < 0 || tree.tokens[c] >= tree.target.size || parent < 0 || parent >= c ||
        (parent > 0 && tree.tokens[parent] == -1))
      return false;
  }
  return true;
}

}  // namespace

void verify_tree(Workspace& work, const Tree& tree, TreeRule rule, std::span<const int64_t> eos_ids,
                 int64_t remaining, int32_t* path, Emitted& out) {
  if (!is_tree(tree)) out.error = RowError::kBadId;
  if (!tree.warp.valid()) out.error = RowError::kBadArgument;
  if (out.error != RowError::kNone) return;
  TreeRun(work, tree, path, out).run(tree.warp.temperature == 0.0f ? TreeRule::kGreedy : rule);
  if (out.error == RowError::kNone) {
    cut(out, eos_ids, remaining);
  } else {
    out.count = 0;
    out.accepted = 0;
  }
}

}  // namespace alignops::speculative
