"""Learning from long-tailed labels, continuous or discrete, on one label axis."""

from .errors import DirToolkitError as DirToolkitError
from .errors import DirToolkitWarning as DirToolkitWarning
from .features.fds import FDS as FDS
from .labels.bins import Bins as Bins
from .labels.density import LabelDensity as LabelDensity
from .labels.kernels import gaussian as gaussian
from .labels.kernels import laplace as laplace
from .labels.kernels import triangular as triangular
from .labels.weights import LDS as LDS
from .losses.regression import weighted_focal_l1 as weighted_focal_l1
from .losses.regression import weighted_focal_mse as weighted_focal_mse
from .losses.regression import weighted_huber as weighted_huber
from .losses.regression import weighted_l1 as weighted_l1
from .losses.regression import weighted_mse as weighted_mse
from .metrics.regression import RegressionMetrics as RegressionMetrics
from .metrics.regression import regression_metrics as regression_metrics

__version__ = "0.1.0"
