"""The label axis, and all that is known from labels alone.

A class is a bin, and a continuous label falls into a bin of a :class:`Bins`. What counts, weighs, draws, spreads or
decodes labels is made over such an axis, or, where it says so, over a :class:`BinGrid` of several.

:meth:`Bins.auto` makes an axis of labels alone, and :meth:`LabelDensity.describe` says how labels lie over it and what
to do about it.

The following holds of everything here and is not repeated there.

Labels:
    Labels are in label units, and so are edges, centres and whatever is decoded. They have any shape. Over a grid of K
    axes the last axis of an array of labels has length K. Class labels are whole numbers from 0.
Outside:
    ``outside`` says what happens to a label beyond the axis: ``"raise"`` raises a LabelError, ``"clip"`` takes it for
    one in the first or last bin, and ``"drop"`` leaves it out.
Missing:
    NaN is an error, unless ``missing="drop"`` says that it stands for a missing label, which then counts nowhere.
Devices:
    Tensors are answered by tensors on their device. Labels on an accelerator are not looked at, since that would stop
    it, and neither are labels in compiled graphs. Where a label without a bin would raise an error, the answer to it is
    then NaN, a weight or a row of shares that shows in the loss. Only :meth:`Bins.index` with ``"raise"`` waits.
Dtypes:
    Counts are int64, and smoothed counts and probabilities are float64. Weights and soft labels are computed in at
    least float32, and in float64 where labels or bins need it. Nothing that is handed in is written to.
Widths:
    Where bins differ in width, smoothing, weights, regions and sampling go by the counts per label unit, so that the
    answer follows the labels and not the bins.
"""

from .bins import Bins
from .decoding import decode, interval, quantiles
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
