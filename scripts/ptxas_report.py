"""Compiles every CUDA source for sm_80 and sm_90; prints registers and spills of each kernel.

Exits with 1 on a spill that is not listed here with a reason. Without nvcc it says so and passes.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = (80, 90)

# Kernels (regular expressions of the names printed) that may spill, with the reason.
ACCEPTED_SPILLS: dict[str, str] = {}

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def find_nvcc() -> str | None:
    """Path of the CUDA compiler."""
    return (
        os.environ.get("CUDACXX")
        or shutil.which("nvcc")
        or shutil.which("nvcc", path="/usr/local/cuda/bin")
    )


def compile_report(nvcc: str, source: Path) -> str:
    """What ptxas says about one file, for all architectures."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    command = [nvcc, "-std=c++20", "-O3", "-I", ROOT / "csrc", "-Xptxas=-v,-warn-spills", *targets]
    command += ["-c", source, "-o", os.devnull]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if result.returncode != 0:
        sys.exit(f"{source} does not compile:\n{result.stderr}")
    return result.stderr


def demangle(name: str) -> str:
    """A kernel's name with its template arguments, without namespaces and parameters."""
    full = subprocess.check_output(["c++filt", "-p", name], text=True).strip()
    return re.sub(r"(\w+|\(anonymous namespace\))::|^void ", "", full)


def main() -> None:
    """Report on all kernels."""
    nvcc = find_nvcc()
    if nvcc is None:
        print("nvcc not found: CUDA sources are not compiled")
        return
    unlisted = 0
    for source in sorted((ROOT / "csrc").rglob("*.cu")):
        print(source.relative_to(ROOT))
        for entry in ENTRY.finditer(compile_report(nvcc, source)):
            spilled = int(entry["stores"]) + int(entry["loads"])
            kernel = demangle(entry["name"])
            accepted = [why for name, why in ACCEPTED_SPILLS.items() if re.search(name, kernel)]
            note = f"spills {spilled} bytes" if spilled else ""
            if spilled and accepted:
                note += f" (accepted: {accepted[0]})"
            unlisted += bool(spilled and not accepted)
            print(
                f"  sm_{entry['arch']} {entry['registers']:>4} registers  {kernel}  {note}".rstrip()
            )
    if unlisted:
        sys.exit(f"{unlisted} kernels spill registers without a reason in {Path(__file__).name}")


if __name__ == "__main__":
    main()
