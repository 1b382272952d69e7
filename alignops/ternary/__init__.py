"""3:4 sparse ternary weights in 1.25 bits (Sherry, arXiv 2601.07892)."""

from alignops.ternary import _triton as _triton
from alignops.ternary import diagnostics as diagnostics
from alignops.ternary.arenas import ArenasLinear as ArenasLinear
from alignops.ternary.arenas import ArenasSchedule as ArenasSchedule
from alignops.ternary.arenas import finalize as finalize
from alignops.ternary.arenas import prepare_arenas as prepare_arenas
from alignops.ternary.convert import ConvertReport as ConvertReport
from alignops.ternary.convert import convert as convert
from alignops.ternary.diagnostics import effective_rank as effective_rank
from alignops.ternary.layers import Int8Linear as Int8Linear
from alignops.ternary.layers import TernaryLinear as TernaryLinear
from alignops.ternary.ops import int8_linear as int8_linear
from alignops.ternary.ops import int8_quantize as int8_quantize
from alignops.ternary.ops import ternary_linear as ternary_linear
from alignops.ternary.weight import TernaryWeight as TernaryWeight
from alignops.ternary.weight import quantize as quantize
