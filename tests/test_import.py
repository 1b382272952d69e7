"""What importing alignops does and does not do, and what it says when it fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import alignops

PACKAGE = Path(alignops.__file__).parent
# An editable installation of the package would fill the gaps of a copy.
NOT_EDITABLE = (
    "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in str(f)]\n"
)


def python(
    code: str, folder: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        cwd=folder,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "module", ["alignops", "alignops.testing", "alignops.spans", "alignops.triton_kernels"]
)
def test_import_loads_no_optional_package(module: str) -> None:
    optional = ["triton", "transformers", "gguf", "typer", "rich", "tqdm", "matplotlib", "psutil"]
    optional += ["tokenizers", "pyarrow"]
    # What torch itself imports is not our doing.
    code = f"import sys, torch; before = set(sys.modules); import {module}\n"
    code += f"print(*sorted((set(sys.modules) - before) & set({optional})))"
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_import_needs_no_progress_bars() -> None:
    """Torch imports tqdm where it is installed, so the test above cannot see it."""
    result = python("import sys; sys.modules['tqdm'] = None; import alignops")
    assert result.returncode == 0, result.stderr


def test_every_public_name_exists_and_is_documented() -> None:
    for name in alignops.__all__:
        value = getattr(alignops, name)
        if name != "__version__":
            assert value.__doc__, name


@pytest.fixture
def without_library(tmp_path: Path) -> Path:
    """A folder with the Python part of the package only."""
    shutil.copytree(PACKAGE, tmp_path / "alignops", ignore=shutil.ignore_patterns("*.so"))
    return tmp_path


def test_missing_library_is_an_import_error_with_the_build_command(without_library: Path) -> None:
    result = python(NOT_EDITABLE + "import alignops", without_library)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: alignops: the native library does not load")
    assert 'pip install --no-build-isolation -e ".[dev]"' in last


def test_reference_needs_no_library(without_library: Path) -> None:
    code = (
        NOT_EDITABLE
        + "import torch, alignops, alignops.reference.ternary as r; print(r.__file__)\n"
    )
    code += "print(r.quantize(torch.ones(2, 8)))"
    result = python(code, without_library, ALIGNOPS_REFERENCE_ONLY="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0].startswith(str(without_library))


def test_failed_self_test_is_a_warning() -> None:
    code = """
import warnings, alignops
from alignops import _native
class Library:
    self_test_failure = staticmethod(lambda: "ternary linear")
    cpu_layout = staticmethod(lambda: 0)
_native.library = Library
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    _native._choose_isa()
print(caught[0].category.__name__, caught[0].message)
"""
    result = python(code)
    assert result.stdout.startswith("RuntimeWarning alignops: the ternary linear kernels"), result


def test_module_prints_a_report() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "alignops"], capture_output=True, text=True, check=True
    )
    for word in ("alignops", "torch", "instruction set", "CUDA", "Triton", "ALIGNOPS_CPU_ISA"):
        assert word in result.stdout
