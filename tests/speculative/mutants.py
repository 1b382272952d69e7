"""Known faults of speculative decoding, which `python -m tests.mutation` plants.

Source: arXiv 2510.22876 (faults of published implementations), and those that are easy to make.
"""

from __future__ import annotations

from tests.mutation import Mutant

_LAWS = "csrc/speculative/laws.cpp"
_LAYOUT = "csrc/speculative/layout.cpp"
_RULES = "csrc/speculative/chain_rules.cpp"
_CACHES = "alignops/speculative/caches.py"
_DRAFTER = "alignops/speculative/model_drafter.py"
_PLACEMENT = "alignops/speculative/placement.py"
_SESSION = "alignops/speculative/session.py"

_GENERATE = ("tests/speculative/test_generate.py",)
_MODEL = ("tests/speculative/test_model_drafter.py",)
_VERIFY = ("tests/speculative/test_verify.py", "-m", "not slow")
_POSITIONS = "positions = build_positions(committed, ids.shape[1], counts=counts)"

MUTANTS = [
    # Keys, values, positions, masks
    Mutant(
        "keys and values of one rejected draft are kept",
        _PLACEMENT,
        "return [c - 1 for c in self.lengths[:n]]",
        "return [c for c in self.lengths[:n]]",
        _GENERATE,
        fast=True,
    ),
    Mutant(
        "keys and values of one committed token are lost",
        _PLACEMENT,
        "return [c - 1 for c in self.lengths[:n]]",
        "return [max(c - 2, 0) for c in self.lengths[:n]]",
        _GENERATE,
    ),
    Mutant(
        "a realigned row loses its last keys and values",
        _PLACEMENT,
        "length = self._ints([c - 1 for c in lengths])\n            kv_shift_(",
        "length = self._ints([max(c - 2, 0) for c in lengths])\n            kv_shift_(",
        _GENERATE,
    ),
    Mutant(
        "the drafter keeps keys and values of rejected drafts",
        _DRAFTER,
        "self._read[:n] = torch.minimum(read, batch.lengths.to(device) - 1)",
        "self._read[:n] = before + (k - 1).clamp(min=0)",
        _MODEL,
        fast=True,
    ),
    Mutant(
        "the drafter always catches up by one token",
        _DRAFTER,
        "behind = max(1, int(torch.where(batch.active, gaps, 1).max()))",
        "behind = 1",
        _MODEL,
    ),
    Mutant(
        "positions are columns",
        _CACHES,
        _POSITIONS,
        "positions = starts[:, None].long() + torch.arange(ids.shape[1])",
        _GENERATE,
        fast=True,
    ),
    Mutant(
        "drafts share one position",
        _CACHES,
        _POSITIONS,
        f"{_POSITIONS}[:, :1].expand(-1, ids.shape[1]).contiguous()",
        _GENERATE,
    ),
    Mutant(
        "padding is attended to",
        _CACHES,
        "        pad=pad,",
        "        pad=None,",
        _GENERATE,
    ),
    Mutant(
        "a query sees the draft behind it",
        _LAYOUT,
        "- window + 1) : 0), first + j + 1);",
        "- window + 1) : 0), first + std::min<int64_t>(j + 2, queries.columns));",
        ("tests/speculative/test_layout.py", *_GENERATE),
    ),
    Mutant(
        "windows count one token too many",
        _LAYOUT,
        "std::max<int64_t>(0, position - window + 1) : 0;",
        "std::max<int64_t>(0, position - window) : 0;",
        ("tests/speculative/test_layout.py", *_GENERATE),
    ),
    # Decisions
    Mutant(
        "no token after a round in which all drafts stand",
        _RULES,
        "emit(token, accepted == k() ? From::kBonus : From::kCorrection);",
        "if (accepted < k()) emit(token, From::kCorrection);",
        _VERIFY,
    ),
    Mutant(
        "the token after all drafts comes from the drafter",
        _RULES,
        "if (i < k() && draft(i) == best) continue;\n    return emit_following(i, best);",
        "if (i < k() && draft(i) == best) continue;\n"
        "    return emit_following(i, i == k() && i > 0 ? draft(i - 1) : best);",
        _VERIFY,
    ),
    Mutant(
        "the correction comes from the row behind",
        _RULES,
        "if (accepts(accept_word(i), q, p)) continue;\n    const int64_t without[] = {draft(i)};",
        "if (accepts(accept_word(i), q, p)) continue;\n    read_target(i + 1);\n"
        "    const int64_t without[] = {draft(i)};",
        _VERIFY,
    ),
    Mutant(
        "what the target has beyond the drafter is not normalized",
        _LAWS,
        "uint64_t sum = 0;\n  for (int64_t t = 0; t < tiles_; ++t) sum += words_[t];\n  // word",
        "uint64_t sum = uint64_t{1} << 40;\n  // word",
        _VERIFY,
    ),
    Mutant(
        "the correction is drawn from |p - q|",
        "csrc/speculative/cpu/weights.h",
        "return beyond > 0 ? beyond : 0.0f;",
        "return beyond > 0 ? beyond : -beyond;",
        _VERIFY,
    ),
    Mutant(
        "the correction is drawn from p",
        _RULES,
        "const Density d = rest(scale);\n  return",
        "const Density d{&work_.target.law(), nullptr, scale};\n  return",
        _VERIFY,
    ),
    Mutant(
        "the ratio of the test is inverted",
        "csrc/speculative/rules.h",
        "0x1p-32 * q < static_cast<double>(p);",
        "0x1p-32 * static_cast<double>(p) < q;",
        _VERIFY,
    ),
    Mutant(
        "one random word for test and sample",
        _RULES,
        "chain_.uniforms[2 * i + 1] : random(i, Stream::kSample, 0);",
        "chain_.uniforms[2 * i + 1] : random(i, Stream::kAccept, 0);",
        _VERIFY,
    ),
    Mutant(
        "the drafter's law has no temperature",
        _RULES,
        "return noted(work_.draft.read(source, chain_.warp));",
        "return noted(work_.draft.read(source, Warp{}));",
        _VERIFY,
    ),
    Mutant(
        "an end of text counts only as the last token of a round",
        _RULES,
        "for (int64_t i = 0; i < out.count; ++i) {\n    if (!contains(eos_ids",
        "for (int64_t i = std::max<int64_t>(0, out.count - 1); i < out.count; ++i) {\n"
        "    if (!contains(eos_ids",
        _GENERATE,
    ),
    Mutant(
        "products and sums of weights are contracted",
        "cmake/core.cmake",
        "-ffp-contract=off",
        "-ffp-contract=fast",
        ("tests/test_isa.py",),  # kernels that disagree are replaced, so nothing else shows it
    ),
    # Rows
    Mutant(
        "an end of text is looked for in the prompt",
        _SESSION,
        " Row(len(prompt), limit, limit > 0, True)",
        " Row(len(prompt), limit, limit > 0 and not {*prompt.tolist()} & {*self.eos_ids}, True)",
        _GENERATE,
    ),
    Mutant(
        "rows that have ended are counted",
        "alignops/speculative/stats.py",
        "columns[:, columns[4] != 0].long()",
        "columns.long()",
        ("tests/speculative/test_stats.py",),
        fast=True,
    ),
    Mutant(
        "results come in the order of their ends",
        "alignops/speculative/generate.py",
        "texts = [job.tokens for job in jobs if job.tokens is not None]",
        "texts = [job.tokens for job in sorted(jobs, key=lambda j: len(j.tokens))]",
        _GENERATE,
    ),
]
