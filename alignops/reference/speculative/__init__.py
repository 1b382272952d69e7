"""Definition of the speculative core: random words, distributions, acceptance rules."""

from alignops.reference.speculative.laws import Law as Law
from alignops.reference.speculative.laws import given as given
from alignops.reference.speculative.laws import law as law
from alignops.reference.speculative.laws import philox as philox
from alignops.reference.speculative.laws import race_noise as race_noise
from alignops.reference.speculative.rules import Outcome as Outcome
from alignops.reference.speculative.rules import Path as Path
from alignops.reference.speculative.rules import Row as Row
from alignops.reference.speculative.rules import Tree as Tree
from alignops.reference.speculative.rules import verify as verify
from alignops.reference.speculative.rules import verify_tree as verify_tree
