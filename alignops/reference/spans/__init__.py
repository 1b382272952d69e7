"""Definition of the spans core: corpus index, belief conflict, filter, loss, decoding.

Source: TraceAlign, arXiv 2508.02063.
"""

from alignops.reference.spans.corpus import Attribution as Attribution
from alignops.reference.spans.corpus import Document as Document
from alignops.reference.spans.corpus import Hits as Hits
from alignops.reference.spans.corpus import InfGram as InfGram
from alignops.reference.spans.corpus import Match as Match
from alignops.reference.spans.corpus import NaiveIndex as NaiveIndex
from alignops.reference.spans.corpus import NextDist as NextDist
from alignops.reference.spans.corpus import Spans as Spans
from alignops.reference.spans.corpus import top_docs as top_docs
from alignops.reference.spans.matcher import MatchState as MatchState
from alignops.reference.spans.matcher import NaiveMatcher as NaiveMatcher
from alignops.reference.spans.methods import Category as Category
from alignops.reference.spans.methods import Rule as Rule
from alignops.reference.spans.methods import bci as bci
from alignops.reference.spans.methods import cbd_penalty as cbd_penalty
from alignops.reference.spans.methods import cbd_weights as cbd_weights
from alignops.reference.spans.methods import passing_span as passing_span
from alignops.reference.spans.methods import prov_decode as prov_decode
from alignops.reference.spans.methods import risk as risk
from alignops.reference.spans.methods import spans_ending as spans_ending
from alignops.reference.spans.methods import token_surprisal as token_surprisal
from alignops.reference.spans.methods import vetoed as vetoed
