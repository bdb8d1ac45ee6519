"""Metrics whose sums merge over batches, objects and ranks.

Every class here has the same methods. ``update`` adds a batch. ``compute`` makes an ``xarray.Dataset`` of it.
``merge`` adds what another object has seen, and ``all_reduce`` what other ranks have seen. ``fresh`` makes an object of
the same settings that has seen nothing. Sums are float64 and counts are int64, whatever the inputs are. The
function beside each class updates and computes in one call.

Targets beyond the axis are refused by default. ``outside="clip"`` counts such a target in the end bin, and
``outside="drop"`` counts it nowhere; so does ``missing="drop"`` with a target that is NaN. A region or a bin without a
test sample is NaN, not zero, and its count says so.

An update that raises has added nothing. The values of a batch on an accelerator are not looked at, since that would
stop the device. What must be refused is counted there, and the first call that looks at results raises for it.
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
