"""Search trees of language models: batched selection, expansion and backup."""

from alignops.tree.errors import CapacityError as CapacityError
from alignops.tree.errors import InvalidPriorError as InvalidPriorError
from alignops.tree.errors import InvalidValueError as InvalidValueError
from alignops.tree.errors import NodeIndexError as NodeIndexError
from alignops.tree.errors import StateError as StateError
from alignops.tree.policies import PUCT as PUCT
from alignops.tree.policies import UCT as UCT
from alignops.tree.policies import Backup as Backup
from alignops.tree.policies import Boltzmann as Boltzmann
from alignops.tree.policies import Greedy as Greedy
from alignops.tree.policies import Max as Max
from alignops.tree.policies import Mean as Mean
from alignops.tree.policies import Policy as Policy
from alignops.tree.policies import RainPUCT as RainPUCT
from alignops.tree.policies import Soft as Soft
from alignops.tree.policies import SubtreeMean as SubtreeMean
from alignops.tree.policies import lightzero as lightzero
from alignops.tree.policies import muzero as muzero
from alignops.tree.policies import p_aligner as p_aligner
from alignops.tree.policies import rain as rain
from alignops.tree.policies import rain_paper as rain_paper
from alignops.tree.policies import wu_uct as wu_uct
from alignops.tree.store import Edges as Edges
from alignops.tree.store import Leaves as Leaves
from alignops.tree.store import Trees as Trees
from alignops.tree.store import TreeStore as TreeStore
