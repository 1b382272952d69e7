"""torch.library.opcheck for every operator of the namespace: schema, fake kernel, autograd, AOT."""

import pytest
import torch

from tests.attention import samples as attention
from tests.spans import samples as spans
from tests.speculative import samples as speculative
from tests.ternary import samples as ternary

VALID = {**ternary.VALID, **spans.VALID, **speculative.VALID, **attention.VALID}
INVALID = {**ternary.INVALID, **spans.INVALID, **speculative.INVALID, **attention.INVALID}


def operators() -> set[str]:
    """Those of the CPU; the ones that only GPUs have are in test_cuda.py."""
    names = torch._C._dispatch_get_all_op_names()
    return {
        name.split("::")[1].split(".")[0]
        for name in names
        if name.startswith("alignops::")
        and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
    }


def test_every_operator_has_samples() -> None:
    assert operators() == set(VALID)
    assert set(INVALID) == set(VALID)


@pytest.mark.parametrize("name", sorted(VALID))
def test_opcheck(name: str) -> None:
    op = getattr(torch.ops.alignops, name).default
    count = 0
    for args in VALID[name]():
        torch.library.opcheck(op, args)
        count += 1
    assert count > 1
