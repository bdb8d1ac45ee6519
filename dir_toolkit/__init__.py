"""Imbalanced regression and long-tailed classification in PyTorch.

The most used names can be imported from here. All others are in ``dt.labels``, ``dt.features``, ``dt.heads``,
``dt.losses``, ``dt.metrics``, ``dt.priors``, ``dt.longtail``, ``dt.target_prior``, ``dt.conformal``, ``dt.decoupling``
and ``dt.errors``. Data sets, training loops and results are in ``dir_toolkit.experiment``, which is not imported here.
"""

from . import conformal, decoupling, errors, features, heads, labels, losses, metrics, priors
from .decoupling import stage_two
from .errors import DirToolkitError, DirToolkitWarning, LabelError, ShapeError
from .features.fds import FDS
from .heads.affinity import AffinityHead
from .labels.bins import Bins
from .labels.decoding import decode, interval
from .labels.density import LabelDensity
from .labels.kernels import gaussian, laplace, triangular
from .labels.sampling import BinSampler
from .labels.soft_labels import soft_labels
from .labels.weights import LDS
from .longtail.model import LongTailModel
from .longtail.readouts import LongTailOutput
from .longtail.saving import load
from .longtail.several import MultiTargetModel
from .losses.affinity import affinity_loss
from .losses.cross_entropy import logit_adjusted_cross_entropy
from .losses.distribution import crps, soft_cross_entropy
from .losses.regression import weighted_l1, weighted_mse
from .metrics.classification import ClassificationMetrics, balanced_error, classification_metrics
from .metrics.regression import RegressionMetrics, regression_metrics
from .priors import LogitAdjuster, adjust_logits, choose_tau, class_prior, fit_temperature
from .target_prior import estimate_prior

__all__ = [
    "FDS",
    "LDS",
    "AffinityHead",
    "BinSampler",
    "Bins",
    "ClassificationMetrics",
    "DirToolkitError",
    "DirToolkitWarning",
    "LabelDensity",
    "LabelError",
    "LogitAdjuster",
    "LongTailModel",
    "LongTailOutput",
    "MultiTargetModel",
    "RegressionMetrics",
    "ShapeError",
    "adjust_logits",
    "affinity_loss",
    "balanced_error",
    "choose_tau",
    "class_prior",
    "classification_metrics",
    "conformal",
    "crps",
    "decode",
    "decoupling",
    "errors",
    "estimate_prior",
    "features",
    "fit_temperature",
    "gaussian",
    "heads",
    "interval",
    "labels",
    "laplace",
    "load",
    "logit_adjusted_cross_entropy",
    "losses",
    "metrics",
    "priors",
    "regression_metrics",
    "soft_cross_entropy",
    "soft_labels",
    "stage_two",
    "triangular",
    "weighted_l1",
    "weighted_mse",
]

__version__ = "0.1.0"
