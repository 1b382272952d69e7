"""Loads the native libraries. Every failure says what to do about it."""

import os
import warnings
from pathlib import Path

import torch

__all__ = ["cpu_layout", "cuda_loaded", "library", "refresh"]

BUILD_COMMAND = 'pip install --no-build-isolation -e ".[dev]"'

#: Layout of packed ternary weights that the active instruction set reads (csrc/ternary/kernels.h).
cpu_layout: int = 0
#: Whether the CUDA operators are registered.
cuda_loaded: bool = False

# The module alignops._C. None only with ALIGNOPS_REFERENCE_ONLY=1, which lets documentation be
# built without a compiler: then alignops.reference works and every operator is missing.
try:
    from alignops import _C as library  # noqa: N811
except ImportError as error:
    if os.environ.get("ALIGNOPS_REFERENCE_ONLY") != "1":
        raise ImportError(
            f"alignops: the native library does not load: {error}. It is compiled for one Python "
            f"and needs torch >= 2.11 (this is torch {torch.__version__}). In a checkout, build it "
            f"with: {BUILD_COMMAND}"
        ) from error
    library = None  # type: ignore[assignment]


def refresh() -> None:
    """Read again what depends on the instruction set in use."""
    global cpu_layout
    cpu_layout = library.cpu_layout()


def _choose_isa() -> None:
    name = os.environ.get("ALIGNOPS_CPU_ISA")
    if name is not None:
        try:
            library.set_isa(name)
        except ValueError as error:
            raise ImportError(
                f"alignops: bad environment variable ALIGNOPS_CPU_ISA: {error}"
            ) from None
    refresh()
    if (family := library.self_test_failure()) is not None:
        warnings.warn(
            f"alignops: the {family} kernels for this CPU disagree with the scalar code and are "
            "replaced by slower ones. Please report this with the output of `python -m alignops`.",
            RuntimeWarning,
            stacklevel=2,
        )


def _load_cuda() -> None:
    global cuda_loaded
    path = Path(__file__).with_name("_cuda.so")
    if torch.version.cuda is None or not path.exists():
        return
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"alignops: {path} does not load: {error}. Build it again for this torch "
            f"({torch.__version__}), or leave it out: ALIGNOPS_CUDA=0 {BUILD_COMMAND}"
        ) from error
    cuda_loaded = True


if library is not None:
    _choose_isa()
    _load_cuda()
