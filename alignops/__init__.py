"""Fast operators for language models."""

from alignops import _native as _native
from alignops._version import __version__ as __version__
