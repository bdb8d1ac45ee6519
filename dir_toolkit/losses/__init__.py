"""Losses for long-tailed labels, each as a function and as a module.

A function is called as ``loss(pred, target, weight=None, *, reduction="mean", ...)``. Its module takes the options in
its constructor. It is called as ``loss(output, target, weight=None)`` and returns the mean over the batch. ``output``
is a tensor, or an object with the attribute that the loss reads: ``prediction``, ``scores`` or ``features``.

The rules below hold for every loss and are not repeated.

Target:
    Labels are called ``labels`` in data and ``target`` in losses. Class indices are int64, from 0 to C - 1.
Weight:
    One number per sample, dimensionless, not negative; None means ones. The mean divides by N, the number of samples,
    and not by the sum of the weights. A weight of 2 counts a sample twice, except where a loss compares samples with
    each other and says what a weight scales. A sample of weight 0 adds nothing and has zero gradient, even if its
    prediction or its target is NaN. A mask of missing labels is therefore the weight ``mask.float()``. Pass weights per
    class as ``weight[target]``.
Missing:
    With ``missing="drop"``, which each loss takes whose target can be NaN, NaN is a missing label. It has weight 0,
    whatever weight it is given, and the mean is over the labels that are present. Its value is 0 under
    ``reduction="none"``. A batch without any label has the loss 0 and gradients of zero. Where a label is a row of
    numbers, one that is NaN makes it missing. A distribution is missing if it holds NaN, or only zeros, as
    ``soft_labels(..., missing="drop")`` makes it.
Reduction:
    ``"mean"``, ``"sum"``, or ``"none"`` for one value per sample.
NaN:
    A target or a weight that is not finite raises an error, unless the target's weight is zero or the label is missing.
    A prediction that is not finite makes the loss NaN or infinite.
Devices and dtypes: All tensors are on one device. Values on an accelerator or in compiled graphs are not checked, since
    reading them would block the accelerator. Losses are computed in at least float32.
Arrays:
    Options with one value per class (``prior``, ``counts``, ``alpha``) are tensors on the device of the scores or,
    outside compiled graphs, any array. Priors are positive and sum to one within 1e-4.
Raises:
    ShapeError: shapes do not fit; labels are never broadcast. TypeError: an argument has the wrong type.
    LabelError: a class or a label lies beyond the axis. ValueError: a value or an option lies outside its range, or
        there is no sample.
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
from .dist_loss import DistLoss, dist_loss
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
from .srl import SRLLoss, srl_loss

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
    "DistLoss",
    "EqualizationLoss",
    "FocalLoss",
    "GaussianMixtureLoss",
    "GaussianNLL",
    "LDAMLoss",
    "LogitAdjustedCrossEntropy",
    "PairwiseCrossEntropy",
    "RankNContrast",
    "SRLLoss",
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
    "dist_loss",
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
    "srl_loss",
    "weighted_focal_l1",
    "weighted_focal_mse",
    "weighted_huber",
    "weighted_l1",
    "weighted_mse",
]
