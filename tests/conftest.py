"""Settings for all tests: seeds, interpreted Triton kernels without a GPU, the `isa` fixture."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from alignops import testing

SEED = 20260107

hypothesis.settings.register_profile(
    "alignops", deadline=None, derandomize=True, print_blob=True, max_examples=50
)
hypothesis.settings.load_profile("alignops")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(SEED)


@pytest.fixture(params=testing.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per CPU instruction set level of this machine."""
    with testing.use_isa(request.param):
        yield request.param


def _level(item: pytest.Item) -> str | None:
    callspec = getattr(item, "callspec", None)
    return None if callspec is None else callspec.params.get("isa")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what nobody asked for.

    With ALIGNOPS_CPU_ISA set, tests that visit every level themselves say nothing new. Only the
    attention core has kernels for "avx512bf16"; for the others it is "avx512" again. A Ray cluster
    starts only for `-m ray`.
    """
    own = [item for item in items if "attention" in item.nodeid or _level(item) != "avx512bf16"]
    if "ALIGNOPS_CPU_ISA" in os.environ:
        own = [item for item in own if "isa" not in getattr(item, "fixturenames", ())]
    if "ray" not in config.option.markexpr:
        own = [item for item in own if item.get_closest_marker("ray") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in own])
    items[:] = own


def pytest_report_header() -> str:
    choices = ", ".join(testing.available_isas())
    return f"alignops: isa {testing.active_isa()} of {choices}, seed {SEED}"
