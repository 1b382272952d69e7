"""`python -m alignops`: what is installed, what was built and what is in use."""

import importlib.metadata
import os
import platform
import sys

import torch

from alignops import _native, testing
from alignops._version import __version__

#: Environment variables that alignops or its libraries read at run time.
VARIABLES = (
    "ALIGNOPS_CPU_ISA",
    "ALIGNOPS_REFERENCE_ONLY",
    "ALIGNOPS_PREFER_TRITON",
    "ALIGNOPS_AUTOTUNE",
    "ALIGNOPS_CACHE_DIR",
    "ALIGNOPS_VLLM",
    "OMP_NUM_THREADS",
    "TRITON_INTERPRET",
)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cuda() -> str:
    if torch.version.cuda is None:
        return "none: this torch is built without CUDA"
    library = "loaded" if _native.cuda_loaded else "not built"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    devices = ", ".join(names) or "none"
    return f"{torch.version.cuda}, alignops/_cuda.so {library}, devices: {devices}"


def report() -> str:
    """Versions, build, instruction set, CUDA, Triton and environment, one fact per line."""
    rows = {
        "alignops": __version__,
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "numpy": _version("numpy"),
        "transformers": _version("transformers"),
    }
    if _native.library is None:
        rows["native library"] = "missing (ALIGNOPS_REFERENCE_ONLY=1)"
    else:
        build = _native.library.build_info()
        rows["native library"] = ", ".join(f"{key} {value}" for key, value in build.items())
        choices = ", ".join(testing.available_isas())
        rows["instruction set"] = f"{testing.active_isa()} (available: {choices})"
    rows["CUDA"] = _cuda()
    rows["Triton"] = _version("triton")
    rows |= {name: os.environ.get(name, "not set") for name in VARIABLES}
    return "\n".join(f"{name:24}{value}" for name, value in rows.items())


def command(*group: str) -> None:
    """The console command `alignops`, or one of its groups.

    Wrong arguments, files that cannot be read or written, a missing extra and Ctrl-C end it with
    one line.
    """
    try:
        from alignops.cli import app
    except ModuleNotFoundError as error:
        sys.exit(
            f"alignops: {error.name} is missing. This command needs: pip install 'alignops[demo]'\n"
            "Without it, `python -m alignops` prints versions and build information."
        )
    try:
        app([*group, *sys.argv[1:]], prog_name="alignops")
    except BrokenPipeError:  # the reader of our output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, MemoryError) as error:
        sys.exit(f"alignops: {error or type(error).__name__}")


if __name__ == "__main__":
    print(report())
