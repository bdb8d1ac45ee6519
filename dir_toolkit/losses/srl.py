"""SRL: terms that ask the bin means of features to form a smooth curve that covers the unit sphere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import MOST_LONG, floats, length, number, require, same_device, shaped, whole
from .._numerics import default_dtype, full_precision, unit_rows, wide_dtype
from ..labels.bins import Bins, Missing, continuous
from ._inputs import of_features, present
from ._loss import Loss, Reduction, drops_missing, held, reduce
from .regression import weighted_l1

__all__ = ["SRLLoss", "srl_loss"]


@drops_missing("number")
def srl_loss(
    features: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    bins: Bins,
    points: Tensor,
    surrogate: Tensor | None = None,
    temperature: float = 0.1,
    enveloping: float = 1.0,
    homogeneity: float = 0.1,
    missing: Missing = "raise",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Contrast features with bin means, and regularize the means on the unit sphere.

    .. math::
        L = \frac1N \sum_i w_i \Big[-\log \frac{e^{z_i \cdot s_{b_i} / \tau}}{\sum_b e^{z_i \cdot s_b / \tau}}
            + \lambda_e \Big(1 - \frac1P \sum_p \max_b u_p \cdot s_b\Big)
            + \lambda_h \sum_b \frac{\lVert s_{b+1} - s_b \rVert^2}{t_{b+1} - t_b}\Big]

    Here z are features of length one and s their means per bin, of length one, in the order of the labels. For a bin
    without samples in the batch its row of ``surrogate`` is taken, and bins without either are skipped. The enveloping
    term is small if every point u has a mean nearby, and the homogeneity term if means move at an even speed. In it t
    are the centers of the bins, with the axis from 0 to 1, so that bins much narrower than the others dominate it. The
    contrast moves features alone, and the other terms move the means of the batch.

    Weights scale the terms of samples, and count in the means. Labels beyond the axis count in its end bins.

    Args:
        bins: the label axis, which must not be classes.
        points: u, of length one, spread evenly over the sphere.
        surrogate: a mean per bin, zero rows for unknown bins; None means that all are unknown. No gradient passes to
            it.
        temperature: :math:`\tau`, > 0.
        enveloping: :math:`\lambda_e`, >= 0.
        homogeneity: :math:`\lambda_h`, >= 0.
    Shape:
        features: (N, D). target, weight: (N,). points: (P, D). surrogate: (B, D). Returns (), or (N,) for
        ``reduction="none"``.
    Units:
        none.
    Source:
        Dong et al. 2025 (arXiv:2503.00876). The enveloping term is that of the authors' code
        (github.com/yilei-wu/imbalanced-regression). The paper's term, the share of covered points, has no gradient.

    >>> bins, compass = Bins.uniform(0, 2, width=1), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> loss = srl_loss(compass, torch.tensor([0.5, 1.5]), bins=bins, points=compass, homogeneity=0.5)
    >>> round(loss.item(), 4)  # a contrast of log(1 + exp(-10)), nothing to envelop, and 0.5 * 2
    1.0
    """
    scales = _scales(temperature, enveloping, homogeneity)
    value, _, _ = _parts(features, target, weight, bins, points, surrogate, reduction=reduction, **scales)
    return value


class SRLLoss(Loss):
    r"""A regression loss with SRL added to it, which keeps the surrogate: :math:`L = L_\text{base} + c L_\text{SRL}`.

    In training each batch moves the surrogate of the bins that it holds,
    :math:`s_b \leftarrow m s_b + (1 - m) \bar z_b`; a first mean is taken whole. The paper moves it once in an epoch.
    Surrogate and points are buffers, so that a checkpoint holds them.

    Args:
        num_features: D.
        bins: as in :func:`srl_loss`.
        base: called as ``base(prediction, target, weight)``.
        coefficient: c, >= 0.
        temperature, enveloping, homogeneity: as in :func:`srl_loss`.
        momentum: m, in [0, 1).
        num_points: P, drawn evenly from the sphere.
        seed: of the points, at least 0.
        missing: as for all losses, in both terms. The base is given weight 0 for a missing label.
    Attributes:
        surrogate: (B, D), zeros for bins that were not seen. points: (P, D).
    Shape:
        forward: output.prediction (N,), output.features (N, D), target (N,), weight (N,). Returns ().
    Units:
        those of the base loss.
    Source:
        Dong et al. 2025 (arXiv:2503.00876).

    >>> from types import SimpleNamespace
    >>> loss = SRLLoss(2, Bins.uniform(0, 2, width=1), homogeneity=0.0, enveloping=0.0)
    >>> output = SimpleNamespace(prediction=torch.tensor([0.5, 1.0]), features=torch.tensor([[3.0, 0.0], [0.0, 2.0]]))
    >>> round(loss(output, torch.tensor([0.5, 1.5])).item(), 3), loss.surrogate.tolist()
    (0.25, [[1.0, 0.0], [0.0, 1.0]])
    """

    bins: Bins
    base: Callable[..., Tensor]
    coefficient: float
    momentum: float
    missing: Missing
    surrogate: Tensor
    points: Tensor
    seed: int

    def __init__(
        self,
        num_features: int,
        bins: Bins,
        *,
        base: Callable[..., Tensor] = weighted_l1,
        coefficient: float = 1.0,
        temperature: float = 0.1,
        enveloping: float = 1.0,
        homogeneity: float = 0.1,
        momentum: float = 0.9,
        num_points: int = 1000,
        seed: int = 0,
        missing: Missing = "raise",
    ) -> None:
        require(callable(base), "base must be a loss to call", got=type(base))
        continuous(bins, "Classes have no order.")
        super().__init__(
            srl_loss,
            num_features=length("num_features", num_features),
            bins=bins,
            base=base,
            coefficient=number("coefficient", coefficient, low=0, float32=True),
            **_scales(temperature, enveloping, homogeneity),
            momentum=number("momentum", momentum, low=0, high=1, open_high=True),
            num_points=length("num_points", num_points),
            seed=whole("seed", seed, low=0, high=MOST_LONG),
            missing=missing,
        )
        generator = torch.Generator("cpu").manual_seed(self.seed)
        points = torch.randn(num_points, num_features, generator=generator, device="cpu", dtype=torch.float32)
        with torch.inference_mode(False):  # buffers must be usable in training
            self.register_buffer("points", unit_rows(points))
            self.register_buffer("surrogate", torch.zeros(len(bins), num_features, dtype=default_dtype()))

    def forward(self, output: Any, target: Tensor, weight: Tensor | None = None) -> Tensor:
        return self._sum(output, target, weight, missing=self.missing)

    @drops_missing("number")
    def _sum(self, output: Any, target: Tensor, weight: Tensor | None, *, missing: Missing = "raise") -> Tensor:
        prediction, features = (held(output, name) for name in ("prediction", "features"))
        scales: dict[str, Any] = {name: getattr(self, name) for name in ("temperature", "enveloping", "homogeneity")}
        value, means, here = _parts(
            features, target, weight, self.bins, self.points, self.surrogate, reduction="mean", **scales
        )
        if self.training:
            with torch.no_grad():
                old = self.surrogate
                keep = torch.where((old != 0).any(1, keepdim=True), self.momentum, 0.0)
                self.surrogate.copy_(torch.where(here[:, None], keep * old + (1 - keep) * means.to(old.dtype), old))
        return self.base(prediction, target, weight) + self.coefficient * value


def _scales(temperature: float, enveloping: float, homogeneity: float) -> dict[str, float]:
    return {
        "temperature": number("temperature", temperature, low=0, open_low=True, float32=True),
        "enveloping": number("enveloping", enveloping, low=0, float32=True),
        "homogeneity": number("homogeneity", homogeneity, low=0, float32=True),
    }


def _parts(
    features: Tensor,
    target: Tensor,
    weight: Tensor | None,
    bins: Bins,
    points: Tensor,
    surrogate: Tensor | None,
    *,
    temperature: float,
    enveloping: float,
    homogeneity: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the means of the batch (B, D) of length one, and which bins the batch holds (B,)."""
    continuous(bins, "Classes have no order.")
    features, gone = of_features(features, {"target": target}, weight, reduction)
    kept = {"points": points} if surrogate is None else {"points": points, "surrogate": surrogate}
    floats(**kept)
    same_device(features=features, **kept)
    shaped(("P", features.shape[1]), "as the features are", points=points)
    if surrogate is not None:
        shaped((len(bins), features.shape[1]), "one row per bin", surrogate=surrogate)
    row = bins.index(present(target.detach(), gone), "clip", name="target")
    dtype = wide_dtype(features)
    share = torch.ones_like(features[:, 0]) if weight is None else weight.to(dtype)
    with full_precision(features.device):
        z = unit_rows(features)
        means = unit_rows(
            torch.zeros(len(bins), z.shape[1], dtype=dtype, device=z.device).index_add(0, row, share[:, None] * z)
        )
        here = torch.zeros_like(means[:, 0]).index_add(0, row, share) > 0
        held_before = torch.zeros_like(means) if surrogate is None else unit_rows(surrogate.detach().to(dtype))
        trace = torch.where(here[:, None], means, held_before)
        known = here | (held_before != 0).any(1)
        scores = (z @ trace.detach().t() / temperature).masked_fill(~known, torch.finfo(dtype).min)
        contrast = F.cross_entropy(scores, row, reduction="none")
        nearest = (points.to(dtype) @ trace.t()).masked_fill(~known, -1.0).amax(1)
    values = contrast + enveloping * (1 - nearest.mean()) + homogeneity * _homogeneity(trace, known, bins)
    return reduce(present(values, gone), weight, reduction), means.detach(), here


def _homogeneity(trace: Tensor, known: Tensor, bins: Bins) -> Tensor:
    """The sum of squared steps from each known bin to the next, over their distance on an axis from 0 to 1, ()."""
    place = torch.arange(len(known), device=known.device)
    last = torch.where(known, place, -1).cummax(0).values  # the last known bin up to here
    before = F.pad(last[:-1], (1, 0), value=-1)
    point = bins.tensor("centers", trace.new_empty(0, dtype=bins.wide_dtype(trace)))
    step = known & (before >= 0)
    before = before.clamp_min(0)
    # Centers are subtracted first, since centers on an axis from 0 to 1 may be equal after rounding.
    way = (point - point[before]) / (point[-1] - point[0]).clamp_min(torch.finfo(point.dtype).tiny)
    way = torch.where(step, way, 1.0).to(trace.dtype)
    return ((trace - trace[before]).square().sum(1) / way).masked_fill(~step, 0.0).sum()
