"""Runs CMake and puts the native libraries into the package. Flags and sources are CMake's."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT))

from build_backend import find_tool, find_torch  # noqa: E402

# Environment variables that become CMake options of the same name.
SWITCHES = ("ALIGNOPS_CUDA", "ALIGNOPS_CUDA_ARCHS", "ALIGNOPS_WERROR")


class CMakeBuild(build_ext):
    """Builds and installs everything with one CMake run; `alignops._C` stands for all libraries."""

    def build_extension(self, ext: Extension) -> None:
        """Configure, build and install into the folder of the package being built."""
        import pybind11

        torch_root = find_torch()
        if torch_root is None:
            raise SystemExit(
                "alignops: torch >= 2.11 not found; install it or set ALIGNOPS_TORCH_ROOT"
            )
        cmake = find_tool("cmake") or "cmake"
        ninja = find_tool("ninja")
        build_type = os.environ.get("ALIGNOPS_BUILD_TYPE", "Release")
        self.cmake_build = ROOT / "build" / f"{sys.implementation.cache_tag}-{build_type.lower()}"
        options = {
            "CMAKE_BUILD_TYPE": build_type,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "ALIGNOPS_TORCH_ROOT": torch_root,
            **{name: os.environ[name] for name in SWITCHES if name in os.environ},
        }
        if ninja:
            options["CMAKE_MAKE_PROGRAM"] = ninja
        # --fresh: paths of an earlier, isolated build environment are gone. Compiled objects stay.
        configure = [
            cmake,
            "--fresh",
            "-S",
            ROOT,
            "-B",
            self.cmake_build,
            "-G",
            "Ninja" if ninja else "Unix Makefiles",
        ]
        subprocess.check_call([*configure, *(f"-D{key}={value}" for key, value in options.items())])
        parallel = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        subprocess.check_call([cmake, "--build", self.cmake_build, "--parallel", parallel])
        self.library_dir = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        for stale in self.library_dir.glob("_*.so"):
            stale.unlink()
        subprocess.check_call([cmake, "--install", self.cmake_build, "--prefix", self.library_dir])

    def copy_extensions_to_source(self) -> None:
        """Editable installation: every library, not only the one that setuptools knows."""
        package = ROOT / "alignops"
        (package / "_cuda.so").unlink(missing_ok=True)  # of an earlier build, with CUDA
        for library in self.library_dir.glob("_*.so"):
            (package / library.name).unlink(missing_ok=True)  # running processes keep theirs
            shutil.copy2(library, package)


setup(
    packages=[*find_packages(include=["alignops", "alignops.*"]), "alignops.triton_kernels"],
    package_dir={"alignops.triton_kernels": "triton_kernels"},
    package_data={
        "alignops": ["py.typed", "*.pyi"],
        "alignops.attention": ["texts/*.json"],
        "alignops.spans": ["report.html"],
        "alignops.triton_kernels": ["configs/*.json"],
    },
    ext_modules=[Extension("alignops._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
