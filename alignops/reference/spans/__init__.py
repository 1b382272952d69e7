"""Definition of the spans core: corpus index, belief conflict, filter, loss, decoding.

Source: TraceAlign, arXiv 2508.02063.
"""

from alignops.reference.spans.corpus import Attribution as Attribution
from alignops.reference.spans.corpus import Hits as Hits
from alignops.reference.spans.corpus import InfGram as InfGram
from alignops.reference.spans.corpus import Match as Match
from alignops.reference.spans.corpus import NaiveIndex as NaiveIndex
from alignops.reference.spans.corpus import NextDist as NextDist
from alignops.reference.spans.corpus import Spans as Spans
from alignops.reference.spans.corpus import top_docs as top_docs
