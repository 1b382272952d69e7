"""Invalid arguments: native code and fake kernels raise the same about the same argument."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from tests.attention.samples import INVALID

LABELS = [(name, i) for name, make in INVALID.items() for i, _ in enumerate(make())]


@pytest.mark.parametrize(("name", "index"), LABELS, ids=str)
def test_native_and_fake_refuse_alike(name: str, index: int) -> None:
    sample = list(INVALID[name]())[index]
    op = getattr(torch.ops.alignops, name)
    pattern = f"^{name}: ({sample.argument}) must "
    with pytest.raises(ValueError, match=pattern):
        op(*sample.args)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        args = pytree.tree_map_only(torch.Tensor, mode.from_tensor, sample.args)
        with pytest.raises(ValueError, match=pattern):
            op(*args)
