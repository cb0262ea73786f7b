"""The version, in its one place: `pyproject.toml`, the announcement and `evbus version` take it from here."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
