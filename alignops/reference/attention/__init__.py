"""Definition of attention over shared cache blocks: rotary positions, the operator."""

from alignops.reference.attention.operator import Rotary as Rotary
from alignops.reference.attention.operator import Seen as Seen
from alignops.reference.attention.operator import Segment as Segment
from alignops.reference.attention.operator import Worker as Worker
from alignops.reference.attention.operator import concurrent_attention as concurrent_attention
from alignops.reference.attention.operator import origins as origins
from alignops.reference.attention.rope import rotate as rotate
from alignops.reference.attention.rope import rotations as rotations
