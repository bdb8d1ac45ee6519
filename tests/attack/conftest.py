"""The profile of the property tests here: the same examples on every machine, and none fails for being slow.

With ``--mutations`` above its default the examples are drawn anew each time, a quarter as many.
"""

import pytest
from hypothesis import settings


def pytest_configure(config: pytest.Config) -> None:
    mutations = config.getoption("--mutations")
    examples = max(1, mutations // 4)
    settings.register_profile(
        "attack", derandomize=mutations <= 100, deadline=None, max_examples=examples, database=None
    )
