"""Calibration error, log loss and Brier score of class probabilities."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .._checks import MOST_BINS, finite, length, no_bad, not_negative, require, shaped, whole
from .._memory import check_memory
from .._numerics import confidence_bin, confidence_edges, readable
from ..labels.bins import Bins, Missing, Outside
from ._metric import Metric
from ._sums import MergingSums, check_samples, check_some

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["CalibrationMetrics", "calibration_metrics"]

_LEAST = torch.finfo(torch.float32).tiny
_SLACK = 1e-3
_SOFTMAX = "Use scores.float().softmax(1)."
_MOST_WEIGHT = 1e300  # keeps the sums of losses finite
_PLAIN = {"units": "1"}


class CalibrationMetrics(MergingSums):
    r"""Expected calibration error (ECE) of the top label and class-wise, log loss, and Brier score.

    Confidences are sorted into M bins of equal width, ((m - 1)/M, m/M]; zero belongs to the first. Bin m holds
    :math:`n_m` samples with mean confidence :math:`c_m` and accuracy :math:`a_m`:

    .. math:: \mathrm{ECE} = \sum_m \frac{n_m}{N}\,|a_m - c_m|

    The class-wise ECE uses the probability of each class in turn as the confidence, and averages over all classes. The
    log loss is in nats; probabilities below 1.2e-38 are raised to it. The Brier score sums the squared errors of all
    classes.

    Args:
        num_bins: the number of confidence bins, M.
        outside: ``"raise"``, ``"clip"`` or ``"drop"``. A clipped target counts as the first or the last class.
        missing: ``"raise"``, or ``"drop"``, which ignores targets that are NaN.
    Attributes:
        histograms: (3, 1 + C, M) float64, by label (the top label, then each class) and confidence bin. They are the
            sums of weights, of weighted probabilities, and of the weights of samples with that label.
        totals: (3,) float64: the sums of weights, of log losses and of Brier scores.
    Source:
        Guo et al. 2017, equation 3 (arXiv:1706.04599), after Naeini et al. 2015; Kull et al. 2019, section 2
        (arXiv:1910.12656), for the class-wise error; Brier 1950.

    >>> metrics = CalibrationMetrics(2, num_bins=5)
    >>> metrics.update(torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.5, 0.5]]), torch.tensor([0, 1, 0]))
    >>> round(metrics.compute().ece.item(), 4)  # (2 |0.5 - 0.75| + |1 - 0.5|) / 3
    0.3333
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("ece", "ECE", "%", ("gaps", "count"), lambda gaps, n: gaps[0] / n, over=("",), low=0, high=1),
        Metric(
            "classwise_ece", "classwise ECE", "%", ("gaps", "count"), lambda gaps, n: gaps[1:].mean() / n,
            over=("",), low=0, high=1,
        ),
        Metric("log_loss", "log loss", "1", ("log_loss", "count"), lambda total, n: total / n, over=("",), low=0),
        Metric("brier", "Brier score", "1", ("brier", "count"), lambda total, n: total / n, over=("",), low=0, high=2),
    )  # fmt: skip
    kept: ClassVar[tuple[str, ...]] = ("histograms", "totals")

    histograms: Tensor
    totals: Tensor

    def __init__(
        self, num_classes: int, *, num_bins: int = 15, outside: Outside = "raise", missing: Missing = "raise"
    ) -> None:
        super().__init__(outside, missing)
        self.num_classes = length("num_classes", num_classes)
        self.num_bins = length("num_bins", num_bins, most=MOST_BINS)
        self.bins = Bins.classes(self.num_classes)
        cells = (3, 1 + self.num_classes, self.num_bins)
        named = f"the histograms of {self.num_classes:,} classes in {self.num_bins:,} bins"
        check_memory(named, 8 * math.prod(cells), "Use fewer bins.")
        self._begin(histograms=cells, totals=(3,))

    @property
    def settings(self) -> dict[str, Any]:
        names = ("num_classes", "num_bins", "outside", "missing")
        return {name: getattr(self, name) for name in names}

    def update(self, probabilities: Tensor, target: Tensor, weight: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            target: class indices, whole numbers of any dtype.
            weight: >= 0; None means ones. A weight of 2 counts a sample twice.
        Shape:
            probabilities: (N, C), each row summing to one within 0.001. target, weight: (N,). An empty batch adds
            nothing.
        Raises:
            ShapeError: the shapes do not fit. LabelError: a target is NaN under ``missing="raise"``, is not a whole
            number, or lies beyond the classes under ``outside="raise"``. ValueError: probabilities or weights are not
            finite or negative, a row does not sum to one, or the sum of all weights reaches 1e300. On an accelerator
            each of these but the first makes the results NaN.
        """
        _check_batch(probabilities, target, weight, self.num_classes)
        p = probabilities.detach().double()
        w = torch.ones_like(p[:, 0]) if weight is None else weight.detach().double()
        off = ~((p.sum(1) - 1).abs() <= _SLACK)
        if readable(p):
            finite(probabilities=probabilities)
            no_bad("probabilities must lie in [0, 1]", p, (p < 0) | (p > 1 + _SLACK), fix=_SOFTMAX)
            no_bad("each row of probabilities must sum to one", p.sum(1), off, fix=_SOFTMAX)
        index = self.bins.place(target, self.outside, self.missing, name="target")
        w, astray, index = w.masked_fill(index == -1, 0), index == -2, index.clamp_min(0)
        if readable(p):
            total, rule = (
                w.sum().item() + self.totals[0].item(),
                f"the sum of all weights must be below {_MOST_WEIGHT:g}",
            )
            require(not total >= _MOST_WEIGHT, rule, got=f"{total:g}", fix="Scale the weights down.")
        broken = astray | off | (p < 0).any(1) | ~((w >= 0) & (w < torch.inf))
        w = w.masked_fill(broken, torch.nan)

        place = confidence_bin(probabilities, confidence_edges(self.num_bins, p.device))  # (N, C)
        # Of equal probabilities the first is the top label, as in classification.
        top = p.argmax(1, keepdim=True)
        labels = torch.arange(1 + self.num_classes, device=p.device)
        is_class = (index[:, None] == labels[:-1]).to(p.dtype)  # (N, C)
        chosen = torch.cat([p.gather(1, top), p], 1)  # (N, 1 + C)
        hit = torch.cat([is_class.gather(1, top), is_class], 1)
        rows = torch.stack([torch.ones_like(chosen), chosen, hit]) * w[:, None]  # (3, N, 1 + C)
        cell = labels * self.num_bins + torch.cat([place.gather(1, top), place], 1)

        log_loss = -p.gather(1, index[:, None])[:, 0].clamp_min(_LEAST).log()
        brier = (p - is_class).square().sum(1)
        self._ready(p.device)
        self.histograms.view(3, -1).index_add_(1, cell.flatten(), rows.flatten(1))
        self.totals.add_(torch.stack([w, w * log_loss, w * brier]).sum(1))

    def compute(self) -> xr.Dataset:
        """The numbers so far, as a dataset of scalars, which are NaN before the first sample.

        ``count`` is the sum of weights, which is the number of samples if none were given.
        """
        import xarray as xr

        histograms, totals = self.histograms.cpu().numpy(), self.totals.cpu().numpy()
        sums = dict(zip(("count", "log_loss", "brier"), totals, strict=True))
        sums["gaps"] = np.abs(histograms[2] - histograms[1]).sum(1)  # (1 + C,)
        with np.errstate(invalid="ignore"):
            values = {metric.name: ((), metric.of(sums), _PLAIN) for metric in self.metrics}
        return xr.Dataset({**values, "count": ((), sums["count"], _PLAIN)})

    def reliability(self, class_index: int | None = None) -> xr.Dataset:
        """The data of a reliability diagram: mean ``confidence``, ``accuracy`` and ``count`` over ``confidence_bin``.

        A bin without samples is NaN. ``count`` is the sum of weights.

        Args:
            class_index: a class. Its probability is the confidence, and its share of the samples is the accuracy. None
                uses the top label.
        """
        import xarray as xr

        most = self.num_classes - 1
        row = 0 if class_index is None else 1 + whole("class_index", class_index, low=0, high=most)
        count, confidence, right = self.histograms[:, row].cpu().numpy().copy()
        edges = confidence_edges(self.num_bins).numpy()
        with np.errstate(invalid="ignore"):
            data = {"confidence": confidence / count, "accuracy": right / count, "count": count}
        coords = {"confidence_low": edges[:-1].copy(), "confidence_high": edges[1:].copy()}
        axis = "confidence_bin"
        return xr.Dataset(
            {name: (axis, values, _PLAIN) for name, values in data.items()},
            coords={axis: np.arange(self.num_bins), **{name: (axis, v, _PLAIN) for name, v in coords.items()}},
        )


def calibration_metrics(
    probabilities: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    num_bins: int = 15,
    outside: Outside = "raise",
    missing: Missing = "raise",
) -> xr.Dataset:
    """:class:`CalibrationMetrics` of one whole data set, with the arguments of the class and ``update``."""
    check_some(probabilities=probabilities)
    shaped(("N", "C"), probabilities=probabilities)
    metrics = CalibrationMetrics(probabilities.shape[1], num_bins=num_bins, outside=outside, missing=missing)
    metrics.update(probabilities, target, weight)
    return metrics.compute()


def _check_batch(probabilities: Tensor, target: Tensor, weight: Tensor | None, num_classes: int) -> None:
    given = {} if weight is None else {"weight": weight}
    check_samples(probabilities=probabilities, target=target, **given)
    shaped(("N", num_classes), probabilities=probabilities)
    shaped(probabilities.shape[:1], "one per row of probabilities", target=target, **given)
    finite(**given)
    not_negative(**given)
