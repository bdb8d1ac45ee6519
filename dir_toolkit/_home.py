"""Where recipes and data cards lie."""

from pathlib import Path

__all__ = ["HOME"]

_PACKAGE = Path(__file__).resolve().parent
HOME = _PACKAGE if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parent
"""The folder that holds ``recipes`` and ``data_cards``: the package in a wheel, and the one above it in a checkout."""
