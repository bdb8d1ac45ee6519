"""scikit-learn estimators for tables, LDS weights and prior adjustment for any regressor, scorers for rare labels."""

from ..._checks import missing_package

try:
    from sklearn.utils.validation import validate_data as _validate_data  # noqa: F401
except ImportError as error:
    raise missing_package("scikit-learn 1.6 or newer", error, "integrations") from error

from .classifier import LongTailClassifier
from .prior_adjusted import PriorAdjusted
from .regressor import LongTailRegressor
from .sample_weighted import SampleWeighted
from .scorers import bmae_scorer, few_shot_scorer

__all__ = [
    "LongTailClassifier",
    "LongTailRegressor",
    "PriorAdjusted",
    "SampleWeighted",
    "bmae_scorer",
    "few_shot_scorer",
]
