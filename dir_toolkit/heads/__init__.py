"""Heads: from features (N, D) to scores (N, C), one per class or bin.

The following holds of every head and is not repeated there.

Sizes:
    ``num_features`` is D and ``num_classes`` is C, both at least 1.
Features:
    Real numbers (N, D) on the device of the head, of which values on an accelerator are not looked at. Scores are
    computed in at least float32.
Raises:
    ShapeError: features are not (N, D). TypeError: features are not real numbers. ValueError: an option lies outside
    its range, or features are on another device than the head.
"""

from .affinity import AffinityHead
from .cosine import CosineHead
from .linear import LinearHead
from .nearest_mean import NearestMeanHead
from .normalized import ScaledHead, tau_normalized
from .ordinal import CoralHead, CornHead

__all__ = [
    "AffinityHead",
    "CoralHead",
    "CornHead",
    "CosineHead",
    "LinearHead",
    "NearestMeanHead",
    "ScaledHead",
    "tau_normalized",
]
