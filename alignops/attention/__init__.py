"""Attention of several workers over shared cache blocks, each with its own order of them."""

from alignops.attention import _triton as _triton
from alignops.attention.errors import BlockBusy as BlockBusy
from alignops.attention.errors import LayoutError as LayoutError
from alignops.attention.errors import PoolExhausted as PoolExhausted
from alignops.attention.errors import PositionError as PositionError
from alignops.attention.errors import StalePlan as StalePlan
from alignops.attention.errors import StepError as StepError
from alignops.attention.errors import UnsupportedModel as UnsupportedModel
from alignops.attention.plan import Plan as Plan
from alignops.attention.pool import KVPool as KVPool
from alignops.attention.rope import RopeSpec as RopeSpec
from alignops.attention.workspace import Block as Block
from alignops.attention.workspace import Workspace as Workspace
