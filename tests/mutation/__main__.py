"""Plants the faults that `tests/<core>/mutants.py` lists; exits with the number not caught."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.mutation import Mutant, markdown, run

CORES = ("speculative", "attention")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the number of faults that were not caught."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--core", choices=CORES, default=CORES[0])
    parser.add_argument("--fast", action="store_true", help="only those of every run of CI")
    parser.add_argument("--only", help="names of faults, comma separated")
    parser.add_argument("--out", type=Path, help="page to write the results to")
    options = parser.parse_args(arguments)
    mutants: Sequence[Mutant] = importlib.import_module(f"tests.{options.core}.mutants").MUTANTS
    if options.fast:
        mutants = [mutant for mutant in mutants if mutant.fast]
    if options.only:
        names = options.only.split(",")
        unknown = sorted(set(names) - {mutant.name for mutant in mutants})
        if unknown:
            parser.error(f"--only: unknown faults: {', '.join(unknown)}")
        mutants = [mutant for mutant in mutants if mutant.name in names]
    results = run(mutants)
    if options.out is not None:
        options.out.write_text(markdown(results))
    return sum(not result.caught for result in results)


if __name__ == "__main__":
    sys.exit(main())
