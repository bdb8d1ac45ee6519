"""Models of backbone, feature smoothing, head, loss and prior, for continuous labels and classes."""

from .ensembles import ensemble
from .model import LongTailModel
from .readouts import BinsReadout, ClassReadout, GaussianReadout, LongTailOutput, PointReadout
from .several import MultiTargetModel
from .voting import VotingModel, VotingOutput

__all__ = [
    "BinsReadout",
    "ClassReadout",
    "GaussianReadout",
    "LongTailModel",
    "LongTailOutput",
    "MultiTargetModel",
    "PointReadout",
    "VotingModel",
    "VotingOutput",
    "ensemble",
]
