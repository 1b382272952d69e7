"""The gate of planted faults, on the few that are quick to notice."""

from pathlib import Path

import pytest

from tests import mutation
from tests.attention import mutants as attention
from tests.mutation.__main__ import CORES, main
from tests.speculative import mutants as speculative

MUTANTS = {"speculative": speculative.MUTANTS, "attention": attention.MUTANTS}


@pytest.mark.parametrize("core", CORES)
def test_every_fault_can_be_planted(core: str) -> None:
    for mutant in MUTANTS[core]:
        text = (mutation.ROOT / mutant.path).read_text()
        assert text.count(mutant.old) == 1, mutant.name
        assert mutant.new != mutant.old
    assert len({mutant.name for mutant in MUTANTS[core]}) == len(MUTANTS[core])


@pytest.mark.slow
@pytest.mark.parametrize("core", CORES)
def test_the_fast_ones_are_caught(core: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    assert main(["--core", core, "--fast", "--out", str(page)]) == 0
    count = sum(mutant.fast for mutant in MUTANTS[core])
    assert f"{count} of {count} were caught" in page.read_text()


def test_a_fault_that_no_test_notices_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    harmless = mutation.Mutant(
        "a comment",
        "alignops/_version.py",
        "__version__",
        "__version__",
        ("tests/test_mutation.py::test_every_fault_can_be_planted",),
    )
    monkeypatch.setattr("tests.speculative.mutants.MUTANTS", [harmless])
    page = tmp_path / "page.md"
    assert main(["--out", str(page)]) == 1
    assert "**nothing**" in page.read_text()
    with pytest.raises(SystemExit):
        main(["--only", "unknown"])
