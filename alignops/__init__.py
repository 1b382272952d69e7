"""Fast operators for language models.

`alignops.ternary` holds linear layers with 1.25-bit weights (Sherry, arXiv 2601.07892): quantize a
weight or convert a model, multiply on CPU or GPU, train with Arenas. `alignops.reference` defines
every operator in plain PyTorch, `alignops.testing` has tools for tests of your own models.
"""

from alignops import _native
from alignops._version import __version__

if _native.library is not None:  # otherwise ALIGNOPS_REFERENCE_ONLY=1
    from alignops import attention, spans, speculative, ternary, tree
    from alignops.ternary import ternary_linear

__all__ = ["__version__", "attention", "spans", "speculative", "ternary", "ternary_linear", "tree"]
