"""The profile of the property tests here: the same examples on every machine, and none fails for being slow."""

from hypothesis import settings

settings.register_profile("attack", derandomize=True, deadline=None, max_examples=40, database=None)
