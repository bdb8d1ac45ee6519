"""The tests of LongTailModel share ``small_models.py``, which pytest's importlib mode does not put on the path."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("small_models")
