#include <algorithm>
#include <cmath>
#include <cstring>

#include "speculative/cpu/random.h"
#include "speculative/cpu/weights.h"
#include "speculative/rules.h"

namespace alignops::speculative {
namespace {

// One row of the batch under a rule. Functions that read a row return false where it has no law;
// then the error is in `out`.
class ChainRun {
 public:
  ChainRun(Workspace& work, const Chain& chain, const Parameters& parameters, Emitted& out)
      : work_(work), chain_(chain), parameters_(parameters), out_(out) {}

  void greedy();
  void lossless();
  void block();
  void coupled();
  void typical();
  void relaxed();
  void threshold();
  void rsd();
  void nudge();
  void scripted();

 private:
  bool read_largest(int64_t i) { return noted(work_.target.read_largest(chain_.target.at(i))); }
  bool read_target(int64_t i) { return noted(work_.target.read(chain_.target.at(i), chain_.warp)); }
  bool read_draft(int64_t i);
  bool draft_probability(int64_t i, float& q);
  bool noted(RowError error) {
    out_.error = error;
    return error == RowError::kNone;
  }
  LawStats known(int64_t i) const {
    LawStats stats;
    std::memcpy(&stats, chain_.stats + i * kLawStats, sizeof stats);
    return stats;
  }

  uint32_t accept_word(int64_t i, Stream stream = Stream::kAccept) const {
    return chain_.uniforms != nullptr ? chain_.uniforms[2 * i] : random(i, stream, 0);
  }
  uint32_t sample_word(int64_t i) const {
    return chain_.uniforms != nullptr ? chain_.uniforms[2 * i + 1] : random(i, Stream::kSample, 0);
  }
  uint32_t random(int64_t i, Stream stream, uint32_t lane) const {
    return philox(chain_.seed, position(i), stream, lane).word[0];
  }

  // The generator counts positions modulo 2^32.
  uint32_t position(int64_t i) const {
    return static_cast<uint32_t>(chain_.position + static_cast<uint64_t>(i));
  }

  bool certain() const { return chain_.draft.data == nullptr; }
  // Whether something can be said of q before all of its row is summed up.
  bool bounded() const {
    return !certain() && chain_.stats == nullptr && !chain_.draft.probabilities &&
           !chain_.warp.filters(chain_.draft.size);
  }
  int64_t k() const { return chain_.k; }
  int64_t draft(int64_t i) const { return chain_.drafts[i]; }

  // A token of the row that was read, or of what it has beyond the row of the drafter.
  int64_t draw(int64_t i) { return work_.target.sample(sample_word(i)); }
  int64_t draw_rest(int64_t i, float scale, std::span<const int64_t> without);
  Density rest(float scale) const {
    return {&work_.target.law(), certain() ? nullptr : &work_.draft.law(), scale};
  }

  void emit(int64_t token, From from) {
    out_.tokens[out_.count] = token;
    out_.sources[out_.count++] = static_cast<uint8_t>(from);
  }
  void emit_drafts(int64_t count) {
    for (int64_t i = 0; i < count; ++i) emit(draft(i), From::kDraft);
    out_.accepted = count;
  }
  void emit_following(int64_t accepted, int64_t token) {
    emit_drafts(accepted);
    emit(token, accepted == k() ? From::kBonus : From::kCorrection);
  }
  template <class Accept>
  void accept_or_argmax(const Accept& accept);

  bool passes(RowLaw& student, int64_t token);
  int64_t teacher_retry(int64_t i, RowLaw& student, bool& failed);

  Workspace& work_;
  const Chain& chain_;
  const Parameters& parameters_;
  Emitted& out_;
};

bool ChainRun::read_draft(int64_t i) {
  const Source source = chain_.draft.at(i);
  if (chain_.stats != nullptr) return noted(work_.draft.restore(source, chain_.warp, known(i)));
  return noted(work_.draft.read(source, chain_.warp));
}

// q of draft i; the row is read only if nothing is known of it.
bool ChainRun::draft_probability(int64_t i, float& q) {
  if (certain()) {
    q = 1.0f;
    return true;
  }
  if (!read_draft(i)) return false;
  if (chain_.stats == nullptr || chain_.draft.probabilities) {
    q = work_.draft.p(draft(i));
  } else {
    const LawStats stats = known(i);
    q = p32_of({static_cast<uint32_t>(stats.mantissa), static_cast<int32_t>(stats.exponent)},
               work_.draft.law().top, work_.draft.law().inverse);
  }
  return true;
}

int64_t ChainRun::draw_rest(int64_t i, float scale, std::span<const int64_t> without) {
  const Density d = rest(scale);
  return work_.target.total(d, without) > 0 ? work_.target.draw(d, sample_word(i), without)
                                            : draw(i);
}

void ChainRun::greedy() {
  for (int64_t i = 0; i <= k(); ++i) {
    if (!read_largest(i)) return;
    const int64_t best = work_.target.argmax();
    if (i < k() && draft(i) == best) continue;
    return emit_following(i, best);
  }
}

void ChainRun::scripted() {
  const int64_t accepted = std::clamp<int64_t>(chain_.given, 0, k());
  if (read_largest(accepted)) emit_following(accepted, work_.target.argmax());
}

void ChainRun::lossless() {
  for (int64_t i = 0; i < k(); ++i) {
    if (!read_target(i)) return;
    const float p = work_.target.p(draft(i));
    if (bounded()) {
      // Most drafts that stand do so for any q that the largest logit of the drafter allows.
      double most = 0;
      if (!noted(work_.draft.read_bound(chain_.draft.at(i), chain_.warp, draft(i), most))) return;
      if (most == 0 && p > 0) ++out_.zero_q;
      if (accepts(accept_word(i), most, p)) continue;
    }
    float q = 0;
    if (!draft_probability(i, q)) return;
    if (q == 0 && p > 0) ++out_.zero_q;
    if (accepts(accept_word(i), q, p)) continue;
    const int64_t without[] = {draft(i)};
    return emit_following(i,
                          draw_rest(i, 1.0f, std::span<const int64_t>(without, certain() ? 1 : 0)));
  }
  if (read_target(k())) emit_following(k(), draw(k()));
}

void ChainRun::block() {
  double ratio = 1.0;  // of the prefix before the draft at hand
  double accepted_ratio = 1.0;
  int64_t accepted = 0;
  for (int64_t i = 0; i < k(); ++i) {
    float q = 0;
    if (!read_target(i) || !draft_probability(i, q)) return;
    if (i > 0) {
      const int64_t without[] = {draft(i)};
      const Density d = rest(static_cast<float>(ratio));
      const uint64_t total =
          work_.target.total(d, std::span<const int64_t>(without, certain() ? 1 : 0));
      const double z = static_cast<double>(total) * 0x1p-40;
      const double either = z + 1.0 - ratio;
      const double h = either > 0 ? z / either : 1.0;
      if (static_cast<double>(accept_word(i - 1, Stream::kBlock)) * 0x1p-32 < h) {
        accepted = i;
        accepted_ratio = ratio;
      }
    }
    const float p = work_.target.p(draft(i));
    if (q == 0 && p > 0) ++out_.zero_q;
    const double reached = ratio * static_cast<double>(p);
    ratio = q > 0 ? std::min(1.0, reached / static_cast<double>(q)) : reached > 0 ? 1.0 : 0.0;
  }
  if (k() > 0 && static_cast<double>(accept_word(k() - 1, Stream::kBlock)) * 0x1p-32 < ratio)
    accepted = k();
  if (accepted == k()) {
    if (read_target(k())) emit_following(k(), draw(k()));
    return;
  }
  if (!read_target(accepted) || (!certain() && !read_draft(accepted))) return;
  const int64_t without[] = {draft(accepted)};
  emit_following(accepted, draw_rest(accepted, static_cast<float>(accepted_ratio),
                                     std::span<const int64_t>(without, certain() ? 1 : 0)));
}

void ChainRun::coupled() {
  for (int64_t i = 0; i <= k(); ++i) {
    int64_t winner = -1;
    if (!noted(
            work_.target.race(chain_.target.at(i), chain_.warp, chain_.seed, position(i), winner)))
      return;
    if (i < k() && draft(i) == winner) continue;
    return emit_following(i, winner);
  }
}

template <class Accept>
void ChainRun::accept_or_argmax(const Accept& accept) {
  for (int64_t i = 0; i < k(); ++i) {
    if (!read_target(i)) return;
    const float p = work_.target.p(draft(i));
    if (p > 0 && accept(draft(i), p)) continue;
    return emit_following(i, work_.target.argmax());
  }
  if (read_largest(k())) emit_following(k(), work_.target.argmax());
}

void ChainRun::typical() {
  accept_or_argmax([&](int64_t, float p) {
    const double typical_p = parameters_.delta * std::exp(-work_.target.entropy());
    return static_cast<double>(p) > std::min(parameters_.eps, typical_p);
  });
}

void ChainRun::relaxed() {
  accept_or_argmax([&](int64_t token, float p) {
    const float best = work_.target.largest_p();
    const float bound =
        parameters_.below_best < 0 ? parameters_.r * best : best - parameters_.below_best;
    return p >= bound && work_.target.rank(token) < parameters_.m;
  });
}

void ChainRun::threshold() {
  for (int64_t i = 0; i < k(); ++i) {
    if (!read_target(i)) return;
    const float p = work_.target.p(draft(i));
    if (p > 0 && (p >= parameters_.t_single || accepts(accept_word(i), parameters_.t_acc, p)))
      continue;
    const int64_t without[] = {draft(i)};
    const Density d{&work_.target.law(), nullptr, 1.0f};
    const bool some = work_.target.total(d, without) > 0;
    return emit_following(i, some ? work_.target.draw(d, sample_word(i), without) : draw(i));
  }
  if (read_target(k())) emit_following(k(), draw(k()));
}

bool ChainRun::passes(RowLaw& student, int64_t token) {
  const float p = student.p(token);
  return p > 0 && p >= parameters_.p_th &&
         (parameters_.top_n == 0 || student.rank(token) < parameters_.top_n);
}

// The first further token of the teacher that passes, or -1.
int64_t ChainRun::teacher_retry(int64_t i, RowLaw& student, bool& failed) {
  failed = false;
  if (certain() || parameters_.retry == Retry::kNone || parameters_.trials < 2) return -1;
  if (!read_draft(i)) {
    failed = true;
    return -1;
  }
  const int64_t more = parameters_.trials - 1;
  if (parameters_.retry == Retry::kDescend) {
    int64_t ids[kMaxTrials];
    const int64_t found = work_.draft.best(parameters_.trials, ids);
    for (int64_t n = 0, tried = 0; n < found && tried < more; ++n) {
      if (ids[n] == draft(i)) continue;
      ++tried;
      if (passes(student, ids[n])) return ids[n];
    }
    return -1;
  }
  const Density d{&work_.draft.law(), nullptr, 1.0f};
  work_.draft.total(d);
  for (int64_t trial = 0; trial < more; ++trial) {
    const int64_t id = work_.draft.draw(d, random(i, Stream::kRetry, static_cast<uint32_t>(trial)));
    if (passes(student, id)) return id;
  }
  return -1;
}

void ChainRun::rsd() {
  const Warp test = parameters_.warped ? chain_.warp : Warp{};
  for (int64_t i = 0; i < k(); ++i) {
    if (!noted(work_.target.read(chain_.target.at(i), test))) return;
    if (passes(work_.target, draft(i))) continue;
    bool failed = false;
    const int64_t retry = teacher_retry(i, work_.target, failed);
    if (failed) return;
    if (retry < 0 && !parameters_.warped && !read_target(i)) return;
    emit_drafts(i);
    return retry >= 0 ? emit(retry, From::kTeacherRetry) : emit(draw(i), From::kStudent);
  }
  emit_drafts(k());
}

void ChainRun::nudge() {
  const auto ends = [&](int64_t token) { return contains(parameters_.eos_ids, token); };
  out_.state = chain_.state;
  int64_t accepted = 0;
  for (int64_t i = 0; i <= k(); ++i) {
    if (i == k() && out_.state != kStateBase) break;
    if (!read_target(i)) return;
    const int64_t best = work_.target.argmax();
    const bool sure = work_.target.p(best) >= parameters_.gamma && !ends(best);
    if (i == k()) {
      if (sure) emit(best, From::kBase);
      break;
    }
    const int64_t d = draft(i);
    int64_t emitted = best;
    if (out_.state == kStateBase && !sure) {
      out_.state = kStateNudge;
      const int64_t stop = std::min(k(), i + parameters_.eos_lookahead);
      for (int64_t j = i; j < stop; ++j) {
        if (!ends(draft(j))) continue;
        for (int64_t w = i; w <= j; ++w) emit(draft(w), From::kNudge);
        out_.accepted = accepted + j + 1 - i;
        out_.finished = Finished::kEndOfText;
        return;
      }
      emitted = d;
    } else if (out_.state == kStateNudge) {
      const bool back = parameters_.word_start[d] && (sure || (best == d && !ends(best)));
      out_.state = back ? kStateBase : kStateNudge;
      emitted = back ? best : d;
    }
    emit(emitted, out_.state == kStateNudge ? From::kNudge : From::kBase);
    if (emitted != d) break;
    ++accepted;
  }
  out_.accepted = accepted;
}

}  // namespace

Source Rows::at(int64_t i) const {
  const int64_t bytes = dtype == DType::kFloat32 ? 4 : 2;
  return {static_cast<const char*>(data) + i * stride * bytes, dtype, probabilities, size};
}

Workspace::Workspace(const Kernels& table, const ParallelFor& parallel, int64_t target_size,
                     int64_t draft_size, bool rests)
    : target(table, parallel, target_size),
      draft(table, parallel, draft_size),
      p(rests ? std::make_unique_for_overwrite<float[]>(static_cast<size_t>(target_size))
              : nullptr),
      q(rests ? std::make_unique_for_overwrite<float[]>(static_cast<size_t>(draft_size)) : nullptr),
      kernels(table) {}

void cut(Emitted& out, std::span<const int64_t> eos_ids, int64_t remaining) {
  for (int64_t i = 0; i < out.count; ++i) {
    if (!contains(eos_ids, out.tokens[i])) continue;
    out.count = i + 1;
    out.finished = Finished::kEndOfText;
    break;
  }
  if (remaining >= 0 && out.count >= remaining) {
    if (out.count > remaining || out.finished == Finished::kRunning)
      out.finished = Finished::kLength;
    out.count = remaining;
  }
  out.accepted = std::min(out.accepted, out.count);
}

void verify_chain(Workspace& work, const Chain& chain, Rule rule, const Parameters& parameters,
                  int64_t remaining, Emitted& out) {
  out.state = chain.state;
  for (int64_t i = 0; i < chain.k; ++i)
    if (chain.drafts[i] < 0 || chain.drafts[i] >= chain.target.size) out.error = RowError::kBadId;
  if (!chain.warp.valid() || chain.state > kStateNudge) out.error = RowError::kBadArgument;
  if (out.error != RowError::kNone) return;

  ChainRun run(work, chain, parameters, out);
  if (rule == Rule::kScripted) {
    run.scripted();
  } else if (rule == Rule::kGreedy || chain.warp.temperature == 0.0f) {
    run.greedy();
  } else if (rule == Rule::kLossless) {
    run.lossless();
  } else if (rule == Rule::kBlock) {
    run.block();
  } else if (rule == Rule::kCoupled) {
    run.coupled();
  } else if (rule == Rule::kTypical) {
    run.typical();
  } else if (rule == Rule::kRelaxed) {
    run.relaxed();
  } else if (rule == Rule::kThreshold) {
    run.threshold();
  } else if (rule == Rule::kRsd) {
    run.rsd();
  } else {
    run.nudge();
  }
  if (out.error == RowError::kNone) {
    cut(out, parameters.eos_ids, remaining);
  } else {
    out.count = 0;
    out.accepted = 0;
    out.state = chain.state;
  }
}

Proposal propose(Workspace& work, const Source& row, const Warp& warp, uint64_t seed,
                 int64_t position, bool race) {
  Proposal out;
  RowLaw& law = work.target;
  if (!warp.valid()) {
    out.error = RowError::kBadArgument;
  } else if (warp.temperature == 0.0f) {
    out.error = law.read_largest(row);
    if (out.error == RowError::kNone) out.id = law.argmax();
  } else if (race) {
    out.error = law.race(row, warp, seed, position, out.id);
  } else {
    out.error = law.read(row, warp);
    if (out.error == RowError::kNone) {
      out.id =
          law.sample(philox(seed, static_cast<uint32_t>(position), Stream::kPropose, 0).word[0]);
      out.stats = law.stats_of(out.id);
    }
  }
  return out;
}

}  // namespace alignops::speculative
