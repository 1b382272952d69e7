# Sourced by the other scripts: enters .venv in the root of the checkout and installs torch there.
# PYTHON names the interpreter to make it from (3.10 or newer).

cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -x .venv/bin/python ]; then
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    { echo "Python 3.10 or newer is needed; name it with PYTHON=..." >&2; exit 1; }
  "${PYTHON:-python3}" -m venv .venv
fi
export VIRTUAL_ENV="$PWD/.venv" PATH="$PWD/.venv/bin:$PATH"
export PIP_DISABLE_PIP_VERSION_CHECK=1

# The CPU build, where an index or a folder of wheels that pip knows of has it: it is far smaller.
torch=2.13.0
if ! python -c "import torch; assert torch.__version__.split('+')[0] == '$torch'" 2>/dev/null; then
  pip install -q "torch==$torch+cpu" 2>/dev/null || pip install -q "torch==$torch"
fi
