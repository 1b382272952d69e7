"""Choice of the CPU instruction set: by environment variable and by context manager."""

import os
import subprocess
import sys

import pytest

from alignops import _native, testing


def import_with(isa: str) -> subprocess.CompletedProcess[str]:
    code = "from alignops import testing; print(testing.active_isa())"
    environment = os.environ | {"ALIGNOPS_CPU_ISA": isa}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("name", testing.available_isas())
def test_environment_variable_forces_a_level(name: str) -> None:
    result = import_with(name)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == name


@pytest.mark.parametrize("name", ["sse9", "", "AVX2"])
def test_unknown_level_is_an_import_error_that_lists_the_choices(name: str) -> None:
    result = import_with(name)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: alignops: bad environment variable ALIGNOPS_CPU_ISA")
    assert ", ".join(testing.available_isas()) in last
    assert f"got '{name}'" in last


def test_best_level_is_the_default() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "ALIGNOPS_CPU_ISA"}
    code = "from alignops import testing; print(testing.active_isa())"
    output = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert output.strip() == testing.available_isas()[-1]


def test_use_isa_restores() -> None:
    before, layout = testing.active_isa(), _native.cpu_layout
    with testing.use_isa("scalar"):
        assert testing.active_isa() == "scalar"
        assert _native.cpu_layout == 0
        with testing.use_isa(testing.available_isas()[-1]):
            assert testing.active_isa() == testing.available_isas()[-1]
        assert testing.active_isa() == "scalar"
    assert (testing.active_isa(), _native.cpu_layout) == (before, layout)


def test_use_isa_restores_after_an_exception() -> None:
    before = testing.active_isa()
    with pytest.raises(KeyError), testing.use_isa("scalar"):
        raise KeyError
    assert testing.active_isa() == before


def test_use_isa_refuses_an_unknown_level_and_changes_nothing() -> None:
    before = testing.active_isa()
    with (
        pytest.raises(ValueError, match=r"isa must be one of scalar.*got 'sse9'"),
        testing.use_isa("sse9"),
    ):
        pass
    assert testing.active_isa() == before


def test_fixture_sets_the_level(isa: str) -> None:
    assert testing.active_isa() == isa
    assert _native.cpu_layout == _native.library.cpu_layout()


def test_every_level_of_this_machine_passes_its_self_test() -> None:
    assert _native.library.self_test_failure() is None
