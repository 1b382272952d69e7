"""From sdist to wheel to a fresh environment, where an operator runs; and the wheel's contents."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import alignops

ROOT = Path(alignops.__file__).parent.parent
pytestmark = pytest.mark.slow


def run(*command: str | Path, **options: object) -> str:
    result = subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert result.returncode == 0, result.stdout + result.stderr
    return str(result.stdout)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    code = f"import build_backend; print(build_backend.build_sdist({str(folder)!r}))"
    return folder / run(sys.executable, "-c", code, cwd=ROOT).splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist as on a machine without network."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation"]
    run(*pip, "-w", folder, sdist, cwd=folder, env=os.environ | {"ALIGNOPS_CUDA": "0"})
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interpreter of a fresh environment with the wheel; torch comes from this environment."""
    venv = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    (site,) = venv.glob("lib/python*/site-packages")
    folders = [path for path in sys.path if path.endswith("site-packages")]
    (site / "here.pth").write_text("\n".join(folders))
    interpreter = venv / "bin" / "python"
    install = ["install", "--no-index", "--no-deps", "--ignore-installed", wheel]
    run(sys.executable, "-m", "pip", "--python", interpreter, *install)
    return interpreter


def test_sdist_contains_what_the_build_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = run("git", "ls-files", "alignops", "cmake", "csrc", "triton_kernels", cwd=ROOT)
    top = {
        "CMakeLists.txt",
        "LICENSE",
        "README.md",
        "build_backend.py",
        "pyproject.toml",
        "setup.py",
    }
    assert top | set(tracked.split()) <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_wheel_contains_the_package_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = next(name for name in names if name.endswith("METADATA"))
        text = archive.read(metadata).decode()
    folders = {name.partition("/")[0] for name in names}
    assert folders == {"alignops", f"alignops-{alignops.__version__}.dist-info"}
    assert {"alignops/py.typed", "alignops/_C.pyi", "alignops/triton_kernels/__init__.py"} <= set(
        names
    )
    assert [name for name in names if name.startswith("alignops/_C.cpython")]
    assert "License-Expression: Apache-2.0" in text
    required = [line for line in text.splitlines() if line.startswith("Requires-Dist:")]
    assert [line for line in required if "extra ==" not in line] == [
        "Requires-Dist: torch>=2.11",
        "Requires-Dist: numpy",
    ]


def test_wheel_works_in_a_fresh_environment(python: Path, tmp_path: Path) -> None:
    code = """
import alignops, torch
from alignops import ternary, triton_kernels
weight = ternary.quantize(torch.tensor([[1.0, -2.0, 3.0, -4.0, 5.0, -6.0]]))
print(alignops.__file__)
print(alignops.ternary_linear(torch.ones(6), weight, act="none").item())
"""
    path, y = run(python, "-c", code, cwd=tmp_path).split()
    assert Path(path).is_relative_to(python.parent.parent)
    assert float(y) == -4.0  # alpha 4, codes (0 - + -)(+ -)


def test_console_command_without_its_extra_says_what_to_install(
    python: Path, tmp_path: Path
) -> None:
    block = (
        "import sys; sys.modules['typer'] = None; from alignops.__main__ import command; command()"
    )
    result = subprocess.run([python, "-c", block], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert "pip install 'alignops[demo]'" in result.stderr


def test_build_for_cuda_without_a_compiler_fails_with_the_reason(tmp_path: Path) -> None:
    command = ["cmake", "-S", ROOT, "-B", tmp_path, "-DALIGNOPS_CUDA=1"]
    torch_root = Path(sys.modules["torch"].__file__ or "").parent
    command += [
        f"-DALIGNOPS_TORCH_ROOT={torch_root}",
        "-DCMAKE_CUDA_COMPILER=CMAKE_CUDA_COMPILER-NOTFOUND",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    assert "no CUDA compiler was found" in result.stderr
