"""The maps that carry a bin's features from its own statistics to the smoothed ones."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import interval, is_tensor, same_shape

__all__ = ["diagonal_map"]


def diagonal_map(
    mean: Tensor, variance: Tensor, smoothed_mean: Tensor, smoothed_variance: Tensor, *, clip: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    r"""Scale and shift of :math:`z' = \sqrt{v'/v}\,(z - \mu) + \mu'`, feature by feature.

    Args:
        clip: bounds of the ratio :math:`v'/v`. A feature that does not vary in a bin (v = 0), or whose variance is not
            known (NaN), keeps its scale.
    Shape:
        all (B, D). Returns scale and shift, (B, D); where a mean is NaN the map is the identity.
    Raises:
        ShapeError: shapes differ. ValueError: clip is no pair 0 <= low < high.
    Source:
        Yang et al. 2021, equation 2 with a diagonal covariance (arXiv:2102.09554).
    """
    statistics = {
        "mean": mean,
        "variance": variance,
        "smoothed_mean": smoothed_mean,
        "smoothed_variance": smoothed_variance,
    }
    is_tensor("diagonal_map", **statistics)
    same_shape("diagonal_map", **statistics)
    ratio = (smoothed_variance / variance).clamp(*interval("diagonal_map", "clip", clip))
    scale = torch.where((variance > 0) & ratio.isfinite(), ratio.sqrt(), 1.0)
    shift = smoothed_mean - scale * mean
    known = shift.isfinite()
    return torch.where(known, scale, 1.0), torch.where(known, shift, 0.0)
