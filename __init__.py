"""pared: a runtime for language models that have been pared down."""

from __future__ import annotations

__version__ = "0.1.0"
