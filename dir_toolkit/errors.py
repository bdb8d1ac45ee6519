"""The exceptions and warnings of dir_toolkit. Every one of them is also the built-in kind a caller would expect."""

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
    """Base of the errors that dir_toolkit raises on its own behalf; those of missing files are Python's own."""


class ArgumentError(DirToolkitError, ValueError):
    """An argument has a value that it must not have, and no narrower error of ours says so."""


class ArgumentTypeError(DirToolkitError, TypeError):
    """An argument is of the wrong kind."""


class MissingPackageError(DirToolkitError, ImportError):
    """A package that is optional, and needed here, is not installed or does not load."""


class ShapeError(DirToolkitError, ValueError):
    """Shapes that must agree do not; nothing is ever broadcast in their place."""


class LabelError(DirToolkitError, ValueError):
    """A label is not finite, or lies outside the label axis."""


class SettingsError(DirToolkitError, ValueError):
    """One or several settings of a run or an object are wrong; all of them are named at once."""


class NotFittedError(DirToolkitError, RuntimeError):
    """An object that learns from labels was used before it had seen any."""


class DataError(DirToolkitError, ValueError):
    """A file from outside is damaged, hostile or not of the promised kind; names the file and the line or byte."""


class UsageError(DirToolkitError, RuntimeError):
    """Something was called at a time or place at which it must not be."""


class CheckpointError(DirToolkitError, ValueError):
    """A checkpoint cannot be read safely, or belongs to another run."""


class ResultsError(DirToolkitError, ValueError):
    """A result does not follow the schema of ``dir_toolkit.experiment.results``."""


class RunExistsError(DirToolkitError, FileExistsError):
    """A run folder already holds a run, and neither resuming nor another folder was asked for."""


class NonFiniteLossError(DirToolkitError, ArithmeticError):
    """Training met a loss that is NaN or infinite; tells step, rate, gradient norm and last good checkpoint."""


class StudyError(DirToolkitError, RuntimeError):
    """One or several runs of a study failed; names each and says why."""


class DirToolkitWarning(UserWarning):
    """Something legal that is likely unwanted; issued once for each cause."""
