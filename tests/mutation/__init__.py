"""Known faults, planted one at a time in a copy of the checkout, to see whether the tests notice.

A fault is a replacement of one piece of text. It is caught if the tests named beside it fail, and
they must pass in the copy before anything is planted.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 900  # a fault may make a loop endless, which is noticed, too


@dataclass(frozen=True)
class Mutant:
    """A fault: `old`, which stands once in the file, becomes `new`.

    `tests`, arguments of pytest, are to fail then. `fast` ones are planted in every run of CI.
    """

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]
    fast: bool = False

    @property
    def native(self) -> bool:
        return self.path.startswith(("csrc/", "cmake/"))


@dataclass(frozen=True)
class Result:
    """What the tests did with a fault: `first` is the first test that failed."""

    mutant: Mutant
    caught: bool
    seconds: float
    first: str


class Gate:
    """A copy of the checkout in which faults are planted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = subprocess.check_output(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT
        )
        names = [name for name in listed.decode().split("\0") if name]
        names += [str(path.relative_to(ROOT)) for path in (ROOT / "alignops").glob("_*.so")]
        for name in names:
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        self.built = False  # the native code of the copy, by the copy itself

    def build(self) -> None:
        """Compiles what changed, or everything the first time.

        Raises:
            RuntimeError: it does not compile.
        """
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = self._run(command, ALIGNOPS_CUDA="0")
        if done.returncode != 0:
            raise RuntimeError(f"mutation: the copy does not compile\n{done.stdout}")
        self.built = True

    def test(self, tests: Sequence[str]) -> tuple[bool, str]:
        """Whether the tests pass, and the first one that fails.

        Raises:
            RuntimeError: no test ran.
        """
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
        try:
            done = self._run(command)
        except subprocess.TimeoutExpired:
            return False, "no end"
        if done.returncode not in (0, 1) and "error" not in done.stdout.lower():
            raise RuntimeError(f"mutation: {' '.join(tests)} did not run\n{done.stdout}")
        found = [
            line.split(" ")[1]
            for line in done.stdout.splitlines()
            if line.startswith(("FAILED ", "ERROR "))
        ]
        return done.returncode == 0, found[0] if found else ""

    @contextlib.contextmanager
    def planted(self, mutant: Mutant) -> Iterator[None]:
        """The copy with the fault in it.

        Raises:
            ValueError: `old` does not stand exactly once in the file.
        """
        path = self.folder / mutant.path
        text = path.read_text()
        if text.count(mutant.old) != 1:
            raise ValueError(
                f"mutation: {mutant.name}: the text to replace must stand once in "
                f"{mutant.path}, it stands there {text.count(mutant.old)} times"
            )
        path.write_text(text.replace(mutant.old, mutant.new))
        try:
            if mutant.native:
                self.build()
            yield
        finally:
            path.write_text(text)
            if mutant.native:
                self.build()

    def _run(self, command: Sequence[str], **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(self.folder), **variables}
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
        return subprocess.run(
            command,
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )


def run(mutants: Sequence[Mutant]) -> list[Result]:
    """Plants each fault in turn.

    Raises:
        RuntimeError: the tests fail without any fault.
    """
    results = []
    with tempfile.TemporaryDirectory(prefix="mutation-gate-") as name:
        gate = Gate(Path(name))
        if any(mutant.native for mutant in mutants):
            gate.build()
        for tests in dict.fromkeys(mutant.tests for mutant in mutants):
            passed, first = gate.test(tests)
            if not passed:
                raise RuntimeError(f"mutation: {first} fails without any fault")
        for mutant in mutants:
            start = time.perf_counter()
            with gate.planted(mutant):
                passed, first = gate.test(mutant.tests)
            result = Result(mutant, not passed, time.perf_counter() - start, first)
            print(f"{'caught' if result.caught else 'NOT CAUGHT'}: {mutant.name} ({first})")
            results.append(result)
    return results


def markdown(results: Sequence[Result]) -> str:
    """The results as a page."""
    caught = sum(result.caught for result in results)
    lines = [
        "# Faults planted in the code, and the tests that noticed",
        "",
        f"{caught} of {len(results)} were caught, {datetime.date.today().isoformat()}, Python "
        f"{platform.python_version()}. `python -m tests.mutation` plants them again.",
        "",
        "| fault | file | caught by |",
        "|---|---|---|",
    ]
    for result in results:
        test = f"`{result.first}`" if result.caught else "**nothing**"
        lines.append(f"| {result.mutant.name} | `{result.mutant.path}` | {test} |")
    return "\n".join([*lines, ""])
