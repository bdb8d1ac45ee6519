"""The label axis and everything that is computed from labels alone.

A :class:`Bins` cuts the label axis into bins. A class is a bin, and a continuous label falls into one. Densities,
weights, samplers, soft labels and decoders take a :class:`Bins`. Those that say so also take a :class:`BinGrid`, which
has several axes.

:meth:`Bins.auto` chooses bins from the labels. :meth:`LabelDensity.describe` summarises their distribution and gives
advice.

The rules below hold for everything in this package and are not repeated.

Labels:
    Labels, edges, centres and decoded values are in label units. Arrays of labels have any shape. Over a grid of K axes
    their last axis has length K. Class labels are whole numbers from 0.
Outside:
    ``outside`` says what happens to a label beyond the axis: ``"raise"`` raises a LabelError, ``"clip"`` moves it into
    the first or last bin, and ``"drop"`` ignores it.
Missing:
    NaN is an error. With ``missing="drop"`` it marks a missing label, which is ignored.
Devices:
    A function of tensors returns tensors on the same device. Labels on an accelerator are not checked, since reading
    them would block it. Labels in compiled graphs are not checked either. Where a check would have raised an error, the
    result for that label is NaN, which shows in the loss. Only :meth:`Bins.index` with ``"raise"`` waits for the
    accelerator.
Dtypes:
    Counts are int64. Smoothed counts and probabilities are float64. Weights and soft labels are computed in at least
    float32, and in float64 where labels or bins need it. Inputs are never modified.
Widths:
    Where bins differ in width, smoothing, weights, regions and sampling use counts per label unit, so that results
    depend on the labels and not on the choice of bins.
"""

from .bins import Bins
from .decoding import bin_shares, decode, interval, quantiles
from .density import REGIONS, LabelDensity
from .description import Description
from .grid import BinGrid
from .kernels import gaussian, laplace, smooth, smoothing_matrix, triangular
from .mixing import c_mixup
from .sampling import BinSampler, bin_probabilities, progressive_probabilities
from .soft_labels import limits, soft_labels
from .weights import LDS

__all__ = [
    "LDS",
    "REGIONS",
    "BinGrid",
    "BinSampler",
    "Bins",
    "Description",
    "LabelDensity",
    "bin_probabilities",
    "bin_shares",
    "c_mixup",
    "decode",
    "gaussian",
    "interval",
    "laplace",
    "limits",
    "progressive_probabilities",
    "quantiles",
    "smooth",
    "smoothing_matrix",
    "soft_labels",
    "triangular",
]
