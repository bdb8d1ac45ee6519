"""Metrics that accumulate over batches and merge over objects and ranks.

Every class here has the same methods. ``update`` adds a batch. ``compute`` returns an ``xarray.Dataset``. ``merge``
adds the samples of another object, and ``all_reduce`` those of other ranks. ``fresh`` returns an empty object with the
same settings. Sums are float64 and counts are int64 for inputs of any dtype. The function beside each class updates and
computes in one call.

A target beyond the axis raises an error by default. ``outside="clip"`` counts it in the end bin, and ``outside="drop"``
ignores it. ``missing="drop"`` ignores a target that is NaN. A region or a bin without a test sample is NaN and has the
count zero.

An update that raises adds nothing. Values on an accelerator are not checked by ``update``, since that would block it.
Invalid samples are counted there, and the first call that reads results raises the error.
"""

from __future__ import annotations

from .classification import ClassificationMetrics, balanced_error, classification_metrics
from .distribution import DistributionMetrics, distribution_metrics
from .intervals import IntervalMetrics, interval_metrics
from .regression import RegressionMetrics, regression_metrics
from .relevance import Relevance
from .reliability import CalibrationMetrics, calibration_metrics

__all__ = [
    "CalibrationMetrics",
    "ClassificationMetrics",
    "DistributionMetrics",
    "IntervalMetrics",
    "RegressionMetrics",
    "Relevance",
    "balanced_error",
    "calibration_metrics",
    "classification_metrics",
    "distribution_metrics",
    "interval_metrics",
    "regression_metrics",
]
