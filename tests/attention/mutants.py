"""Known faults of attention over shared blocks, which `python -m tests.mutation` plants.

Source: arXiv 2504.06261 (what its rotations and masks must be), and faults that are easy to make.
"""

from __future__ import annotations

from tests.mutation import Mutant

_BLOCKS = "csrc/attention/blocks.cpp"
_PLANNER = "csrc/attention/planner.cpp"
_PROBE = "alignops/integrations/attention_probe.py"
_REDUCE = "csrc/attention/cpu/reduce.h"
_REFERENCE = "alignops/reference/attention/operator.py"
_ROPE = "alignops/attention/rope.py"
_ROWS = "csrc/attention/cpu/rows.h"
_WRITE = "csrc/attention/cpu/write.h"

# The first of the random layouts; the scalar kernels are enough for what all levels share.
_ORACLE = tuple(
    f"tests/attention/test_properties.py::test_layouts_equal_the_oracle[scalar-{chunk}]"
    for chunk in range(2)
)
_MODELS = ("tests/attention/test_probe.py",)
_DEFINITION = ("tests/attention/test_reference.py",)
_SPECS = ("tests/attention/test_rope.py",)
_DELTA = "(local ? own_origins_[at(e)] : query) - place0 + keys.r0};"

MUTANTS = [
    # Positions
    Mutant(
        "queries are turned by one position too many",
        _PLANNER,
        _DELTA,
        "(local ? own_origins_[at(e)] : query) - place0 + keys.r0 + (own ? 0 : 1)};",
        _ORACLE,
    ),
    Mutant(
        "the rotation that a segment's keys begin with is dropped",
        _PLANNER,
        _DELTA,
        "(local ? own_origins_[at(e)] : query) - place0};",
        _ORACLE,
    ),
    Mutant(
        "a block begins where it began before the step",
        _PLANNER,
        "(writer >= 0 && !lagged ? entries[at(writer)].rows : 0);",
        "(writer >= 0 && lagged ? entries[at(writer)].rows : 0);",
        _ORACLE,
    ),
    Mutant(
        "a row sees the token behind it",
        _PLANNER,
        "const int64_t rising = entry.n0 + 1 - keys.s0;",
        "const int64_t rising = entry.n0 + 2 - keys.s0;",
        _ORACLE,
    ),
    Mutant(
        "a row does not see itself",
        _PLANNER,
        "const int64_t rising = entry.n0 + 1 - keys.s0;",
        "const int64_t rising = entry.n0 - keys.s0;",
        _ORACLE,
    ),
    Mutant(
        "lagged steps see others' new tokens",
        _PLANNER,
        "const int64_t n = own || !lagged ? keys.n : keys.old;",
        "const int64_t n = keys.n;",
        _ORACLE,
    ),
    Mutant(
        "all rows of a worker are turned like its first one",
        _ROWS,
        "if (h.step == 0 || row.t == 0) {",
        "if (h.step == 0 || row.t >= 0) {",
        _ORACLE,
    ),
    Mutant(
        "windows are one position wider",
        _ROWS,
        "pair.distance0 + row.t - a.window + 1)",
        "pair.distance0 + row.t - a.window)",
        _ORACLE,
    ),
    # Rotations
    Mutant(
        "the two orders of pairs are exchanged",
        _ROWS,
        "if (rotary.interleaved) {",
        "if (!rotary.interleaved) {",
        _ORACLE,
    ),
    Mutant(
        "rotations turn the other way in one half",
        _ROWS,
        "x[i + pairs] = b * cos[i] + a * sin[i];",
        "x[i + pairs] = b * cos[i] - a * sin[i];",
        _ORACLE,
    ),
    Mutant(
        "keys are not rotated when they are written",
        _WRITE,
        "turned ? cos : nullptr, sin);",
        "nullptr, sin);",
        _ORACLE,
    ),
    Mutant(
        "the attention factor is applied twice",
        _ROPE,
        "return self.scale(turn(wide, table, self)).to(x.dtype)",
        "return self.scale(self.scale(turn(wide, table, self))).to(x.dtype)",
        (*_SPECS, "tests/attention/test_properties.py::test_rotated_by_the_model_or_by_the_kernel"),
        fast=True,
    ),
    Mutant(
        "YaRN's ramp runs the other way",
        _ROPE,
        "kept = 1 - ramp.clamp(0, 1)",
        "kept = ramp.clamp(0, 1)",
        _SPECS,
        fast=True,
    ),
    # Softmax
    Mutant(
        "lse is to base 2",
        _REDUCE,
        "(top + __builtin_log2(static_cast<double>(l))) * kLn2);",
        "(top + __builtin_log2(static_cast<double>(l))));",
        _ORACLE,
    ),
    Mutant(
        "sinks are left out of the sum",
        _REDUCE,
        "float l = a.sinks != nullptr ? __builtin_exp2f(sink - base) : 0;",
        "float l = 0;",
        _ORACLE,
    ),
    Mutant(
        "parts are added without their maxima",
        _REDUCE,
        "const float weight = __builtin_exp2f(state.m[m] - base);",
        "const float weight = state.m[m] == kMinusInfinity ? 0.0f : 1.0f;",
        _ORACLE,
    ),
    Mutant(
        "gains are ignored",
        _ROWS,
        "const float unit = weight.gain * a.scale;",
        "const float unit = a.scale;",
        _ORACLE,
    ),
    Mutant(
        "biases are taken for powers of two",
        _ROWS,
        "weight.bias * kLog2e,",
        "weight.bias,",
        _ORACLE,
    ),
    # Blocks
    Mutant(
        "a spliced paragraph stands where it stood before",
        _BLOCKS,
        "to.runs.back().s0 += to.extent;",
        "to.runs.back().s0 += 0;",
        _ORACLE,
    ),
    Mutant(
        "a part of a segment is rotated like its beginning",
        _BLOCKS,
        "out.r0 += from;",
        "out.r0 += 0;",
        _ORACLE,
    ),
    Mutant(
        "later tokens keep their places when a gap is closed",
        _BLOCKS,
        "if (run.end() > stop && close_gap) left.back().s0 -= stop - start;",
        "if (run.end() > stop && close_gap) left.back().s0 -= 0;",
        _ORACLE,
    ),
    # The definition, and the probe
    Mutant(
        "the definition leaves a position free between blocks",
        _REFERENCE,
        "before += seen.end - seen.start",
        "before += seen.end - seen.start + 1",
        _DEFINITION,
    ),
    Mutant(
        "the definition forgets r0",
        _REFERENCE,
        "delta = position - o - segment.s0 + segment.r0",
        "delta = position - o - segment.s0",
        _DEFINITION,
        fast=True,
    ),
    Mutant(
        "the probe accepts any fit",
        _PROBE,
        "        if error <= tolerance:\n            return specs",
        "        if error <= 1.0:\n            return specs",
        _MODELS,
    ),
    Mutant(
        "the probe does not look at other tokens",
        _PROBE,
        "        _check_alone(name, layer, after.calls[layer], before.calls[layer])\n",
        "",
        (*_MODELS, "-k", "named"),
        fast=True,
    ),
    Mutant(
        "the probe does not look at values",
        _PROBE,
        "            _check_values(name, layer, call, near)\n",
        "",
        (*_MODELS, "-k", "refused or named"),
    ),
]
