"""setuptools' build backend; asks for torch, cmake and ninja only where the environment has none.

Inside pip's isolated build the packages of the target environment cannot be imported, but they are
still on disk.
"""

import importlib.util
import os
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def find_torch() -> Path | None:
    """Folder of the torch to build against.

    That is ALIGNOPS_TORCH_ROOT, else the torch that can be imported, else the one installed beside
    the interpreter.
    """
    if root := os.environ.get("ALIGNOPS_TORCH_ROOT"):
        return Path(root)
    spec = importlib.util.find_spec("torch")
    found = [Path(path) for path in spec.submodule_search_locations or []] if spec else []
    folders = [sysconfig.get_path("platlib"), *site.getsitepackages(), site.getusersitepackages()]
    candidates = [*found, *(Path(folder) / "torch" for folder in folders)]
    return next(
        (path for path in candidates if (path / "include/torch/csrc/stable").is_dir()), None
    )


def find_tool(name: str) -> str | None:
    """Path of a program that runs; a script of a package that cannot be imported does not."""
    beside = shutil.which(name, path=str(Path(sys.executable).parent))
    for tool in (shutil.which(name), beside):
        if tool and subprocess.run([tool, "--version"], capture_output=True).returncode == 0:
            return tool
    return None


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    """What the build needs beyond pyproject.toml's list."""
    requires = build_meta.get_requires_for_build_wheel(config_settings)
    requires += [] if find_torch() else ["torch>=2.11"]
    requires += [] if find_tool("cmake") else ["cmake>=3.24"]
    requires += [] if find_tool("ninja") else ["ninja"]
    return requires


get_requires_for_build_editable = get_requires_for_build_wheel
