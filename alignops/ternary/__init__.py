"""3:4 sparse ternary weights in 1.25 bits (Sherry, arXiv 2601.07892)."""

from alignops.ternary.layers import Int8Linear as Int8Linear
from alignops.ternary.layers import TernaryLinear as TernaryLinear
from alignops.ternary.ops import int8_linear as int8_linear
from alignops.ternary.ops import int8_quantize as int8_quantize
from alignops.ternary.ops import ternary_linear as ternary_linear
from alignops.ternary.weight import TernaryWeight as TernaryWeight
from alignops.ternary.weight import quantize as quantize
