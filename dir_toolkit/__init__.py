"""Learning from long-tailed labels, continuous or discrete, on one label axis."""

from .errors import DirToolkitError as DirToolkitError
from .errors import DirToolkitWarning as DirToolkitWarning
from .labels.bins import Bins as Bins
from .labels.density import LabelDensity as LabelDensity
from .labels.kernels import gaussian as gaussian
from .labels.kernels import laplace as laplace
from .labels.kernels import triangular as triangular

__version__ = "0.1.0"
