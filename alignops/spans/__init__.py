"""Exact span matching against a token corpus, and what alignment makes of it (arXiv 2508.02063)."""

from alignops.spans.bounds import DriftBound as DriftBound
from alignops.spans.bounds import chance_bound as chance_bound
from alignops.spans.bounds import clopper_pearson as clopper_pearson
from alignops.spans.bounds import fit_drift_bound as fit_drift_bound
from alignops.spans.bounds import residual_bound as residual_bound
from alignops.spans.bounds import tau_null as tau_null
from alignops.spans.build import BuildReport as BuildReport
from alignops.spans.build import build_index as build_index
from alignops.spans.build import build_shard as build_shard
from alignops.spans.build import clean_stale as clean_stale
from alignops.spans.build import merge_manifest as merge_manifest
from alignops.spans.build import shard_of as shard_of
from alignops.spans.errors import IndexCorruptError as IndexCorruptError
from alignops.spans.errors import IndexIncompleteError as IndexIncompleteError
from alignops.spans.errors import IndexVersionError as IndexVersionError
from alignops.spans.errors import NotAnIndexError as NotAnIndexError
from alignops.spans.errors import ShardUnavailableError as ShardUnavailableError
from alignops.spans.errors import TokenizerMismatchError as TokenizerMismatchError
from alignops.spans.scores import bci as bci
from alignops.spans.scores import token_surprisal as token_surprisal
from alignops.spans.scores import unigram_probs as unigram_probs
