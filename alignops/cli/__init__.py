"""The `alignops` command: one module of commands per core, without logic of its own."""

from alignops.cli import attention as attention
from alignops.cli import spans as spans
from alignops.cli import speculative as speculative
from alignops.cli import ternary as ternary
from alignops.cli import tree as tree
from alignops.cli._app import app as app
