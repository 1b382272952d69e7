"""Speculative decoding of whole batches that says what the target alone would say."""

from alignops.speculative.kv import RealignPlan as RealignPlan
from alignops.speculative.kv import kv_gather as kv_gather
from alignops.speculative.kv import kv_packed as kv_packed
from alignops.speculative.kv import kv_paged_tree_ as kv_paged_tree_
from alignops.speculative.kv import kv_shift_ as kv_shift_
from alignops.speculative.kv import kv_tree_ as kv_tree_
from alignops.speculative.kv import plan_realign as plan_realign
from alignops.speculative.kv import ragged_append_ as ragged_append_
from alignops.speculative.layout import SelectedTree as SelectedTree
from alignops.speculative.layout import TreeTables as TreeTables
from alignops.speculative.layout import build_mask as build_mask
from alignops.speculative.layout import build_positions as build_positions
from alignops.speculative.layout import build_tree as build_tree
from alignops.speculative.layout import select_tree as select_tree
from alignops.speculative.verify import Proposal as Proposal
from alignops.speculative.verify import TreeOut as TreeOut
from alignops.speculative.verify import VerifyOut as VerifyOut
from alignops.speculative.verify import propose as propose
from alignops.speculative.verify import verify as verify
from alignops.speculative.verify import verify_tree as verify_tree
