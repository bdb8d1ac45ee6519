from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys

import pytest

import dir_toolkit

ROOMS = ("conformal", "decoupling", "errors", "features", "heads", "labels", "losses", "metrics", "priors")


def test_the_everyday_names_are_documented_and_listed_where_they_are_made() -> None:
    names = set(dir_toolkit.__all__) - set(ROOMS)
    assert {"Bins", "LabelDensity", "LDS", "FDS", "weighted_l1", "RegressionMetrics"} <= names
    assert len(names) <= 40
    assert len(dir_toolkit.__all__) == len(set(dir_toolkit.__all__))
    for name in names:
        value = getattr(dir_toolkit, name)
        assert value.__doc__, name
        home = sys.modules[value.__module__]
        assert name in home.__all__, name
        assert getattr(home, name) is value


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_lists_what_its_files_make(room: str) -> None:
    """So that ``dt.losses.`` completes in a REPL to each loss and nothing else."""
    module = getattr(dir_toolkit, room)
    assert room in dir_toolkit.__all__
    assert module.__doc__
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("room", ["heads", "losses", "metrics"])
def test_every_class_and_function_of_a_room_is_in_its_list(room: str) -> None:
    module = getattr(dir_toolkit, room)
    files = [part.name for part in pkgutil.iter_modules(module.__path__) if not part.name.startswith("_")]
    homes = [importlib.import_module(f"{module.__name__}.{name}") for name in files]
    made = {name for home in homes for name in home.__all__ if inspect.isroutine(getattr(home, name))}
    made |= {name for home in homes for name in home.__all__ if inspect.isclass(getattr(home, name))}
    assert len(made) > 5
    assert made <= set(module.__all__)
