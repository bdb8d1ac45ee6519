"""Exceptions and warnings. Each exception also derives from the built-in class that a caller would expect."""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "CheckpointError",
    "DataError",
    "DirToolkitError",
    "DirToolkitWarning",
    "LabelError",
    "MissingPackageError",
    "NonFiniteLossError",
    "NotFittedError",
    "ResultsError",
    "RunExistsError",
    "SettingsError",
    "ShapeError",
    "StudyError",
    "UsageError",
]


class DirToolkitError(Exception):
    """The base class of all errors of dir_toolkit. Errors for missing files are Python's own."""


class ArgumentError(DirToolkitError, ValueError):
    """An argument has an invalid value, and no more specific error applies."""


class ArgumentTypeError(DirToolkitError, TypeError):
    """An argument has the wrong type."""


class MissingPackageError(DirToolkitError, ImportError):
    """An optional package that is needed here is not installed or cannot be imported."""


class ShapeError(DirToolkitError, ValueError):
    """Shapes do not fit. Labels are never broadcast."""


class LabelError(DirToolkitError, ValueError):
    """A label is not finite, or lies outside the label axis."""


class SettingsError(DirToolkitError, ValueError):
    """One or several settings of a run or an object are invalid. The message names all of them."""


class NotFittedError(DirToolkitError, RuntimeError):
    """An object was used before it was fitted."""


class DataError(DirToolkitError, ValueError):
    """A data file is damaged, unsafe or of another format. The message names the file and the line or byte."""


class UsageError(DirToolkitError, RuntimeError):
    """A function was called in a state or a place in which it must not be called."""


class CheckpointError(DirToolkitError, ValueError):
    """A checkpoint cannot be read safely, or belongs to another run."""


class ResultsError(DirToolkitError, ValueError):
    """A result does not follow the schema of ``dir_toolkit.experiment.results``."""


class RunExistsError(DirToolkitError, FileExistsError):
    """A run folder already holds a run, and neither resuming nor another folder was requested."""


class NonFiniteLossError(DirToolkitError, ArithmeticError):
    """The training loss is NaN or infinite. The message gives step, learning rate, gradient norm and last
    checkpoint."""


class StudyError(DirToolkitError, RuntimeError):
    """One or several runs of a study failed. The message names each with its reason."""


class DirToolkitWarning(UserWarning):
    """A warning of something that is allowed but probably unwanted. It is issued once per cause."""
