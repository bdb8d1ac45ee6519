"""Backbone, feature smoothing, head, loss and prior as one module: continuous labels and classes by the same path."""

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
]
