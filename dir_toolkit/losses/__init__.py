"""Losses for long-tailed labels: each as a function and, in the same file, as a module.

A function is called as ``loss(pred, target, weight=None, *, reduction="mean", ...)``. Its module takes the options in
its constructor and is called as ``loss(output, target, weight=None)``, which gives the mean over the batch: what a
training loop needs, whether the loss is a sum over samples or one of the batch as a whole. ``output`` is a tensor, or
an object that holds what the loss reads as ``prediction``, ``scores`` or ``features``.

The following holds of every loss and is not repeated there.

Target:
    Labels are called ``labels`` in data and ``target`` in losses. Class indices are int64, from 0 to C - 1.
Weight:
    One number per sample, dimensionless, not negative; None means ones. The mean divides by N, the number of samples,
    and not by the sum of the weights. Weight 2 is a sample that was seen twice. A sample of weight 0 is absent: it adds
    nothing and has the gradient zero, whatever its prediction and its target are, NaN too, so that a mask of missing
    labels is ``mask.float()``. Weights per class are handed over as ``weight[target]``.
Reduction:
    ``"mean"``, ``"sum"``, or ``"none"`` for one value per sample.
NaN:
    A target or a weight that is not finite is refused, unless the target's weight is zero. A prediction that is not
    finite makes the loss NaN or infinite, and training loops stop there.
Devices and dtypes:
    All tensors are on one device. Values on an accelerator are not looked at, since that would stop it, so that what
    is said of values is checked on the CPU, and outside compiled graphs. Losses are computed in at least float32.
Arrays:
    Options with one value per class (``prior``, ``counts``, ``alpha``) are tensors on the device of the scores or,
    outside compiled graphs, any array. Priors are positive and sum to one within 1e-4.
Raises:
    ShapeError: shapes do not fit; labels are never broadcast. TypeError: an argument is of another kind.
    LabelError: a class or a label lies beyond the axis. ValueError: a value or an option lies outside its range, or
    there is no sample. The sentence names the argument, what came, and what to do.
"""

from .affinity import AffinityLoss, affinity_loss
from .balanced_mse import (
    BatchMCLoss,
    BinnedIntegrationLoss,
    GaussianMixtureLoss,
    batch_mc_loss,
    binned_integration_loss,
    gaussian_mixture_loss,
)
from .center import CenterLoss, center_loss
from .concordance import CCCLoss, ccc_loss
from .conr import ConRLoss, conr_loss
from .cross_entropy import (
    BalancedCrossEntropy,
    CrossEntropy,
    EqualizationLoss,
    LDAMLoss,
    LogitAdjustedCrossEntropy,
    PairwiseCrossEntropy,
    balanced_cross_entropy,
    cross_entropy,
    equalization_loss,
    ldam_loss,
    logit_adjusted_cross_entropy,
    pairwise_cross_entropy,
)
from .distribution import (
    CRPS,
    CoralLoss,
    SoftCrossEntropy,
    SquaredEMD,
    coral_loss,
    crps,
    soft_cross_entropy,
    squared_emd,
)
from .focal import FocalLoss, focal_loss
from .gaussian_nll import GaussianNLL, gaussian_interval, gaussian_nll
from .rank_n_contrast import RankNContrast, rank_n_contrast
from .regression import (
    WeightedFocalL1,
    WeightedFocalMSE,
    WeightedHuber,
    WeightedL1,
    WeightedMSE,
    weighted_focal_l1,
    weighted_focal_mse,
    weighted_huber,
    weighted_l1,
    weighted_mse,
)

__all__ = [
    "CRPS",
    "AffinityLoss",
    "BalancedCrossEntropy",
    "BatchMCLoss",
    "BinnedIntegrationLoss",
    "CCCLoss",
    "CenterLoss",
    "ConRLoss",
    "CoralLoss",
    "CrossEntropy",
    "EqualizationLoss",
    "FocalLoss",
    "GaussianMixtureLoss",
    "GaussianNLL",
    "LDAMLoss",
    "LogitAdjustedCrossEntropy",
    "PairwiseCrossEntropy",
    "RankNContrast",
    "SoftCrossEntropy",
    "SquaredEMD",
    "WeightedFocalL1",
    "WeightedFocalMSE",
    "WeightedHuber",
    "WeightedL1",
    "WeightedMSE",
    "affinity_loss",
    "balanced_cross_entropy",
    "batch_mc_loss",
    "binned_integration_loss",
    "ccc_loss",
    "center_loss",
    "conr_loss",
    "coral_loss",
    "cross_entropy",
    "crps",
    "equalization_loss",
    "focal_loss",
    "gaussian_interval",
    "gaussian_mixture_loss",
    "gaussian_nll",
    "ldam_loss",
    "logit_adjusted_cross_entropy",
    "pairwise_cross_entropy",
    "rank_n_contrast",
    "soft_cross_entropy",
    "squared_emd",
    "weighted_focal_l1",
    "weighted_focal_mse",
    "weighted_huber",
    "weighted_l1",
    "weighted_mse",
]
