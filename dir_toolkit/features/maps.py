"""Formulas of the maps from a bin's own statistics to the smoothed statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Map", "covariance_map", "diagonal_map"]

Map = Literal["paper", "transport"]
_FLOOR = 1e-9  # times the mean variance: the variance given to constant directions, which then keep their scale


def diagonal_map(
    mean: Tensor, variance: Tensor, smoothed_mean: Tensor, smoothed_variance: Tensor, *, clip: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    r"""The scale and the shift of :math:`z' = \sqrt{v'/v}\,(z - \mu) + \mu'` for each feature.

    Args:
        clip: bounds of the ratio :math:`v'/v`. The scale is one if a feature is constant in a bin (v = 0) or its
            variance is not known (NaN).
    Shape:
        All are (B, D). Returns the scale and the shift, (B, D). Where a mean is NaN, the map is the identity.
    Source:
        Yang et al. 2021, equation 2 with a diagonal covariance (arXiv:2102.09554).
    """
    ratio = (smoothed_variance / variance).clamp(*clip)
    scale = torch.where((variance > 0) & ratio.isfinite(), ratio.sqrt(), 1.0)
    shift = smoothed_mean - scale * mean
    known = shift.isfinite()
    return torch.where(known, scale, 1.0), torch.where(known, shift, 0.0)


def covariance_map(covariance: Tensor, smoothed: Tensor, *, clip: tuple[float, float], map: Map) -> Tensor:
    r"""A matrix A that maps covariance :math:`\Sigma` to :math:`\Sigma'`: :math:`A \Sigma A^T = \Sigma'`.

    First :math:`\Sigma'` is clipped to between clip[0] and clip[1] times :math:`\Sigma` in every direction. A constant
    feature (variance 0) keeps its scale and is not mixed with others. If both covariances are diagonal, A is the map of
    :func:`diagonal_map`.

    Args:
        clip: bounds of the ratio of variances in any direction.
        map: ``"paper"`` is :math:`\Sigma'^{1/2} \Sigma^{-1/2}`, which also rotates if the two do not commute.
            ``"transport"`` is :math:`\Sigma^{-1/2} (\Sigma^{1/2} \Sigma' \Sigma^{1/2})^{1/2} \Sigma^{-1/2}`, the only
            symmetric map, and the one that moves samples least.
    Shape:
        Both are (D, D), symmetric, positive semidefinite and float64. Returns (D, D).
    Source:
        Yang et al. 2021, equation 2 (arXiv:2102.09554); Olkin and Pukelsheim 1982 for the transport.
    """
    low, high = clip
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    varies = covariance.diagonal() > 0
    smoothed = torch.where(varies[:, None] & varies, smoothed, 0.0)
    floor = _FLOOR * torch.maximum(covariance.diagonal().mean(), smoothed.diagonal().mean())
    if floor == 0:  # all features are constant
        return identity
    covariance, smoothed = covariance + floor * identity, smoothed + floor * identity
    factor = torch.linalg.cholesky(covariance)
    within = all(
        int(torch.linalg.cholesky_ex(d).info) == 0 for d in (high * covariance - smoothed, smoothed - low * covariance)
    )
    if not within:
        half = torch.linalg.solve_triangular(factor, smoothed, upper=False)
        ratio = torch.linalg.solve_triangular(
            factor, half.T, upper=False
        )  # smoothed, in coordinates where the covariance is the identity
        smoothed = factor @ _of_eigenvalues(ratio, lambda values: values.clamp(low, high)) @ factor.T
    if map == "paper":
        return _of_eigenvalues(smoothed, _root) @ _of_eigenvalues(covariance, lambda values: 1 / _root(values))
    # With S = L L^T the map is L^-T (L^T S' L)^(1/2) L^-1, which needs only one eigendecomposition.
    middle = _of_eigenvalues(factor.T @ smoothed @ factor, _root)
    half = torch.linalg.solve_triangular(factor.T, middle, upper=True)
    return torch.linalg.solve_triangular(factor.T, half.T, upper=True)


def _root(values: Tensor) -> Tensor:
    return values.clamp_min(0).sqrt()


def _of_eigenvalues(matrix: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of a symmetric matrix, applied to its eigenvalues."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * function(values)) @ vectors.T
