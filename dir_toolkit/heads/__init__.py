"""Heads compute scores (N, C), one per class or bin, from features (N, D).

The rules below hold for every head and are not repeated.

Sizes:
    ``num_features`` is D, and ``num_classes`` is C. Both are at least 1.
Features:
    Real numbers (N, D) on the device of the head. Values on an accelerator are not checked. Scores are computed in at
    least float32.
Raises:
    ShapeError: features are not (N, D). TypeError: features are not real numbers. ValueError: an option lies outside
    its range, or features and head are on different devices.
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
