"""What an operation needs of memory, as the operating system sees it. Linux."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

PROCESS = Path("/proc/self")


def peak_growth(run: Callable[[], object]) -> int:
    """Bytes by which resident memory grows up to its highest point during `run`.

    What the process has freed is given back before, so that it counts when it is used again.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    (PROCESS / "clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", (PROCESS / "status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{PROCESS}/status has no {field}")
    return int(found[1]) << 10
