from __future__ import annotations

import pickle

import pytest

import dir_toolkit
from dir_toolkit import errors


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_is_ours_and_a_built_in_kind_and_survives_pickling(name: str) -> None:
    kind = getattr(errors, name)
    if issubclass(kind, Warning):
        assert kind is dir_toolkit.DirToolkitWarning
        return
    assert issubclass(kind, dir_toolkit.DirToolkitError)
    error = pickle.loads(pickle.dumps(kind("what happened")))  # as a loader's worker process does
    assert type(error) is kind
    assert str(error) == "what happened"
    if kind is not dir_toolkit.DirToolkitError:
        assert set(kind.__mro__[1:]) - {dir_toolkit.DirToolkitError, Exception, BaseException, object}
