"""Compiles the few C++ sources of this folder with the system compiler and loads them with ctypes.

They are measuring instruments (probes of the machine, a baseline kernel), not part of the package.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent / "native"
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-shared", "-pthread")


@functools.cache
def load(name: str) -> ctypes.CDLL:
    """Returns `native/<name>.cpp` as a library, compiled anew if its text or the flags changed.

    Raises:
        RuntimeError: no C++ compiler, or the source does not compile.
    """
    source = HERE / f"{name}.cpp"
    compiler = os.environ.get("CXX", "c++")
    digest = hashlib.sha256(source.read_bytes() + repr((compiler, FLAGS)).encode()).hexdigest()[:16]
    folder = Path(__file__).parents[1] / "build" / "benchmarks"
    target = folder / f"{name}-{digest}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            built = Path(temporary) / "out.so"
            command = [compiler, *FLAGS, str(source), "-o", str(built)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False)
            except FileNotFoundError as error:
                raise RuntimeError(
                    f"benchmarks need a C++ compiler, found no {compiler}"
                ) from error
            if done.returncode:
                raise RuntimeError(f"{source.name} does not compile:\n{done.stderr}")
            built.replace(target)
    return ctypes.CDLL(str(target))
