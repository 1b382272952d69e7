"""Exact span matching against a token corpus, and what alignment makes of it (arXiv 2508.02063)."""

from alignops.spans.bounds import DriftBound as DriftBound
from alignops.spans.bounds import chance_bound as chance_bound
from alignops.spans.bounds import clopper_pearson as clopper_pearson
from alignops.spans.bounds import fit_drift_bound as fit_drift_bound
from alignops.spans.bounds import residual_bound as residual_bound
from alignops.spans.bounds import tau_null as tau_null
from alignops.spans.scores import bci as bci
from alignops.spans.scores import token_surprisal as token_surprisal
from alignops.spans.scores import unigram_probs as unigram_probs
