#!/usr/bin/env bash
# Everything that needs a GPU: builds alignops with CUDA beside the torch that is installed (nothing is downloaded),
# runs the GPU tests and the tests of the cores, compute-sanitizer on a few cases, and the GPU benchmarks. Arguments
# (ternary, spans, speculative, attention) limit it to these cores, for a call of under eight minutes. Logs and the
# JSON of the benchmarks go to ${OUT:-benchmarks/results}; a short table comes last, and the exit status is 0 only if
# every stage passed. PYTHON names the interpreter that has torch.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results}
mkdir -p "$out"
command -v nvidia-smi >/dev/null || { echo "gpu_check: no GPU here (nvidia-smi is missing)" >&2; exit 1; }
PATH="$PATH:/usr/local/cuda/bin"
base=$(command -v "${PYTHON:-python3}")
PATH="$(dirname "$base"):$PATH"

cores=" ${*:-ternary spans speculative attention} "
wanted() { # wanted CORE
  [[ $cores == *" $1 "* ]]
}

rows=()
status=0
stage() { # stage NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS code result=passed
  shift 2
  echo "== $name"
  timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1
  code=$?
  if [ $code != 0 ]; then
    result="FAILED ($code)"
    status=1
    tail -25 "$out/$name.log"
  fi
  rows+=("$(printf '%-14s %4d s  %-12s %s' "$name" $((SECONDS - start)) "$result" "$(tail -1 "$out/$name.log" | cut -c1-90)")")
}

# A virtual environment that sees the packages of `base`, itself perhaps one; alignops goes into it.
venv=$PWD/build/gpu-venv
"$base" -m venv "$venv" --without-pip
"$base" -c 'import site; print("\n".join(site.getsitepackages()))' \
  >"$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')/base.pth"
python=$venv/bin/python

capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d '. ')
export ALIGNOPS_CUDA=1 ALIGNOPS_CUDA_ARCHS="$capability" CMAKE_BUILD_PARALLEL_LEVEL="$(nproc)"
build() {
  "$python" -m pip install --no-build-isolation --no-deps -e . && "$python" -m alignops
}
export -f build
export python
stage build 180 bash -c build
[ $status = 0 ] || exit 1

export PYTHONUNBUFFERED=1
quick=(-q -p no:cacheprovider --maxfail=20)
"$python" -c "import xdist" 2>/dev/null && workers=1 || workers=0
gpu_tests=()
wanted ternary && gpu_tests+=(tests/ternary/test_cuda.py tests/ternary/test_triton.py)
wanted spans && gpu_tests+=(tests/spans/test_cuda.py)
wanted speculative && gpu_tests+=(tests/speculative/test_cuda.py)
verify_tests=(tests/speculative/test_verify_cuda.py tests/speculative/test_triton.py
  tests/speculative/test_triton_trees.py)
attention_tests=(tests/attention/test_cuda.py tests/attention/test_triton.py)
[ $workers = 1 ] && quick+=(-n 8) # most of the time goes into compiling Triton kernels
[ ${#gpu_tests[@]} = 0 ] || stage gpu-tests 170 "$python" -m pytest "${quick[@]}" "${gpu_tests[@]}"
wanted speculative && stage verify-tests 150 "$python" -m pytest "${quick[@]}" "${verify_tests[@]}"
wanted attention && stage attention-tests 150 "$python" -m pytest "${quick[@]}" "${attention_tests[@]}"

sanitized='
import torch, alignops
from alignops import ternary
for m, n, k, group, stride in ((1, 33, 100, None, 1), (8, 64, 576, 128, 1), (3, 40, 320, 64, 16), (9, 32, 2304, None, 1)):
    w = torch.randn(n, k, device="cuda")
    weight = ternary.quantize(w, group, stride)
    weight.dequantize()
    packed, scale, *rest, layout = weight.ready()
    torch.ops.alignops.ternary_unpack(packed, n, k, layout)
    q, q_scale = ternary.int8_quantize(w)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(m, k + 1, device="cuda").to(dtype)
        for act in (0, 1, 2):
            for view in (x[:, :k], x[:, 1:], x[:, :k].contiguous()):
                torch.ops.alignops.ternary_linear(view, packed, scale, None, *rest, act, layout)
                torch.ops.alignops.ternary_int8_linear(view, q, q_scale, None, act)
from tests.spans import samples
for name in ("spans_find", "spans_next_counts", "spans_peek"):
    for args in samples.VALID[name]():
        on_gpu = [a.cuda() if isinstance(a, torch.Tensor) else a for a in args]
        getattr(torch.ops.alignops, name)(*on_gpu)
from torch.utils import _pytree as pytree
from tests.speculative.samples import VALID
from tests.attention.samples import VALID as ATTENTION
names = ("attention_concurrent_", "attention_append_", "attention_rewrite_")
for name, cases in {**VALID, **{name: ATTENTION[name] for name in names}}.items():
    for args in cases():
        on_gpu = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().cuda(), args)
        getattr(torch.ops.alignops, name)(*on_gpu)
torch.cuda.synchronize()
print("sanitized")
'
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$tool" 75 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" -c "$sanitized"
  done
fi

# Tile sizes that the search finds go to $out, too.
export ALIGNOPS_AUTOTUNE=1 ALIGNOPS_CACHE_DIR=$out
wanted ternary && stage benchmark 190 "$python" -m benchmarks.bench_ternary_cuda --out "$out" --seconds 120
unset ALIGNOPS_AUTOTUNE ALIGNOPS_CACHE_DIR
wanted speculative && stage verify-bench 60 "$python" -m benchmarks.bench_verify_cuda --out "$out" --seconds 40
wanted attention && stage attention-bench 75 "$python" -m benchmarks.bench_attention_cuda --out "$out" --seconds 50
left=$((465 - SECONDS))
if [ "$left" -gt 20 ]; then
  cpu_tests=(tests/ternary tests/spans/test_ops.py tests/spans/test_matcher.py tests/test_opcheck.py -m "not gpu" --ignore tests/ternary/test_triton.py)
  stage tests "$left" env OMP_NUM_THREADS=1 "$python" -m pytest "${quick[@]}" "${cpu_tests[@]}"
fi

wanted ternary && tail -60 "$out/benchmark.log"
wanted speculative && tail -30 "$out/verify-bench.log"
wanted attention && tail -60 "$out/attention-bench.log"
printf '%s\n' "${rows[@]}"
exit $status
