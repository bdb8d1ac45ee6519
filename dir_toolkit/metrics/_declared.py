"""All metrics that this package declares, by the variables that hold them."""

from __future__ import annotations

from ._metric import Metric
from .classification import ClassificationMetrics
from .distribution import DistributionMetrics
from .intervals import IntervalMetrics
from .regression import RegressionMetrics
from .reliability import CalibrationMetrics

METRICS: dict[str, Metric] = {
    name: metric
    for kind in (RegressionMetrics, DistributionMetrics, IntervalMetrics, ClassificationMetrics, CalibrationMetrics)
    for metric in kind.metrics
    for name in metric.variables
}
WATCHED = {name: metric for name, metric in METRICS.items() if metric.watched and name == metric.name}
"""The metrics that training logs, by name."""
