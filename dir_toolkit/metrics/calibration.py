"""How far probabilities can be believed: calibration error, log-loss and Brier score, from sums that merge."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .._checks import (
    MOST_BINS,
    finite,
    is_tensor,
    label_problem,
    length,
    not_negative,
    one_of,
    problem,
    real,
    same_device,
    same_shape,
    whole,
)
from .._numerics import readable
from ..errors import ShapeError
from ..labels.bins import Outside
from ._sums import MergingSums, check_memory, check_tensors

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["CalibrationMetrics", "calibration_metrics"]

_LEAST = torch.finfo(torch.float32).tiny
_SLACK = 1e-3
_MOST_WEIGHT = 1e300  # of which the sums of losses are finite


class CalibrationMetrics(MergingSums):
    r"""Expected calibration error, of the top label and class by class, with log-loss and Brier score.

    Confidences fall into M equally wide bins, ((m - 1)/M, m/M], zero into the first, compared with the edges in their
    own precision. In bin m, with :math:`n_m` samples of mean confidence :math:`c_m`, a share :math:`a_m` is right:

    .. math:: \mathrm{ECE} = \sum_m \frac{n_m}{N}\,|a_m - c_m|

    The class-wise error does so with the probability of each class in turn, and averages over all classes. Everything
    follows from float64 sums, so batches, ranks and objects merge exactly.

    Args:
        num_bins: M.
        outside: what a target beyond the classes does: ``"raise"``; ``"clip"``, which counts it as one of the first or
            last class, the end bins of an axis; ``"drop"``, which counts it nowhere.
    Attributes:
        histograms: (3, 1 + C, M) float64: the sums of weight, of weighted probability, and of the weight of samples
            that are of that label, by label (the top one, then each class) and confidence bin.
        totals: (3,) float64: the sums of weight, of log-loss and of Brier score.
    Source:
        Guo et al. 2017, equation 3 (arXiv:1706.04599), after Naeini et al. 2015; Kull et al. 2019, section 2
        (arXiv:1910.12656), for the class-wise error; Brier 1950.

    >>> metrics = CalibrationMetrics(2, num_bins=5)
    >>> metrics.update(torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.5, 0.5]]), torch.tensor([0, 1, 0]))
    >>> round(metrics.compute().ece.item(), 4)  # (2 |0.5 - 0.75| + |1 - 0.5|) / 3
    0.3333
    """

    kept: ClassVar[tuple[str, ...]] = ("histograms", "totals")

    histograms: Tensor
    totals: Tensor

    def __init__(self, num_classes: int, *, num_bins: int = 15, outside: Outside = "raise") -> None:
        self.num_classes = length("num_classes", num_classes)
        self.num_bins = length("num_bins", num_bins, most=MOST_BINS)
        one_of("outside", outside, ("raise", "clip", "drop"))
        self.outside = outside
        cells = (3, 1 + self.num_classes, self.num_bins)
        named = f"the histograms of {self.num_classes:,} classes in {self.num_bins:,} bins"
        check_memory(named, 8 * math.prod(cells), "Use fewer bins.")
        self._begin(histograms=cells, totals=(3,))

    @property
    def settings(self) -> dict[str, Any]:
        return {"num_classes": self.num_classes, "num_bins": self.num_bins, "outside": self.outside}

    def update(self, probabilities: Tensor, target: Tensor, weight: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            target: class indices.
            weight: >= 0; None means ones. Enters every sum: 2 is a sample seen twice, and 1 / count of its class gives
                the view in which all classes are equally common.
        Shape:
            probabilities: (N, C), each row summing to one within 0.001. target, weight: (N,). An empty batch adds
            nothing.
        Raises:
            ShapeError: the shapes do not fit. TypeError: target is not integers. LabelError: a class index lies beyond
            the classes under ``outside="raise"``. ValueError: probabilities or weights are not finite or negative, a
            row does not sum to one, or all weights together reach 1e300. In each case nothing has been added. On an
            accelerator nothing is looked at; each of these then makes the results NaN.
        """
        _check_batch(probabilities, target, weight, self.num_classes)
        p, index = probabilities.detach().double(), target.detach().long()
        w = torch.ones_like(p[:, 0]) if weight is None else weight.detach().double()
        if self.outside == "clip":
            index = index.clamp(0, self.num_classes - 1)
        astray = (index < 0) | (index >= self.num_classes)
        if self.outside == "drop":
            w, index, astray = w.masked_fill(astray, 0), index.masked_fill(astray, 0), torch.zeros_like(astray)
        off = ~((p.sum(1) - 1).abs() <= _SLACK)
        if readable(p):
            finite(probabilities=probabilities)
            _check_values(p, target, astray, off)
            if (total := w.sum().item() + self.totals[0].item()) >= _MOST_WEIGHT:
                rule, fix = f"all weights together must be below {_MOST_WEIGHT:g}", "Scale the weights down."
                raise problem(rule, got=f"{total:g}", fix=fix)
        broken = astray | off | (p < 0).any(1) | ~((w >= 0) & (w < torch.inf))
        w = w.masked_fill(broken, torch.nan)
        index = index.masked_fill(astray, 0)

        place = confidence_bin(probabilities, confidence_edges(self.num_bins, p.device))  # (N, C)
        # Of equal probabilities the first counts as the top label, as in classification.
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
        """The results so far, as a dataset of plain numbers; NaN before the first sample.

        ``ece`` and ``classwise_ece`` are the calibration errors; ``log_loss`` is in nats, a probability below 1.2e-38
        counting as that; ``brier`` sums the squared errors of all classes and so lies between 0 and 2; ``count`` is the
        sum of weights, which is the number of samples where none were given.
        """
        import xarray as xr

        histograms, (count, log_loss, brier) = self.histograms.cpu().numpy(), self.totals.cpu().numpy()
        gap = np.abs(histograms[2] - histograms[1]).sum(1)  # (1 + C,)
        with np.errstate(invalid="ignore"):
            result = xr.Dataset(
                {
                    "ece": gap[0] / count,
                    "classwise_ece": gap[1:].mean() / count,
                    "log_loss": log_loss / count,
                    "brier": brier / count,
                    "count": count,
                }
            )
        for name in result.data_vars:
            result[name].attrs["units"] = "1"
        return result

    def reliability(self, class_index: int | None = None) -> xr.Dataset:
        """What a reliability diagram shows: ``confidence`` (mean), ``accuracy`` and ``count`` over ``confidence_bin``.

        A bin without samples is missing (NaN) and its count, the sum of weights, zero.

        Args:
            class_index: None for the top label; else a class, with its probability as the confidence and its share
                among the samples as the accuracy.
        """
        import xarray as xr

        row = 0
        if class_index is not None:
            row = 1 + whole("class_index", class_index, low=0)
            if row > self.num_classes:
                raise problem(f"class_index must be at most {self.num_classes - 1}", got=class_index)
        count, confidence, right = self.histograms[:, row].cpu().numpy().copy()
        with np.errstate(invalid="ignore"):
            data = {"confidence": confidence / count, "accuracy": right / count, "count": count}
        edges = confidence_edges(self.num_bins).numpy()
        result = xr.Dataset(
            {name: ("confidence_bin", values) for name, values in data.items()},
            coords={
                "confidence_bin": np.arange(self.num_bins),
                "confidence_low": ("confidence_bin", edges[:-1].copy()),
                "confidence_high": ("confidence_bin", edges[1:].copy()),
            },
        )
        for name in (*data, "confidence_low", "confidence_high"):
            result[name].attrs["units"] = "1"
        return result


def calibration_metrics(
    probabilities: Tensor,
    target: Tensor,
    *,
    num_bins: int = 15,
    weight: Tensor | None = None,
    outside: Outside = "raise",
) -> xr.Dataset:
    """:class:`CalibrationMetrics` of one whole set: update and compute in one call."""
    is_tensor(probabilities=probabilities, target=target)
    if probabilities.ndim != 2 or probabilities.numel() == 0:
        raise problem(
            "probabilities must have the shape (N, C) and hold at least one value",
            got=tuple(probabilities.shape),
            error=ShapeError,
        )
    metrics = CalibrationMetrics(probabilities.shape[1], num_bins=num_bins, outside=outside)
    metrics.update(probabilities, target, weight)
    return metrics.compute()


def confidence_edges(num_bins: int, device: torch.device | str = "cpu") -> Tensor:
    """Edges of equally wide confidence bins, made on the device: (num_bins + 1,) float64."""
    return torch.arange(num_bins + 1, dtype=torch.float64, device=device) / num_bins


def confidence_bin(probabilities: Tensor, edges: Tensor) -> Tensor:
    """The confidence bin of each probability, whose upper edge belongs to it."""
    p = probabilities.detach()
    p = p if p.is_floating_point() else p.double()
    edges = edges.to(p.dtype).to(p.device)
    if p.itemsize < 4:  # both sides once rounded alike, since few operations know half precision
        p, edges = p.float(), edges.float()
    return (torch.searchsorted(edges, p.contiguous()) - 1).clamp(0, len(edges) - 2)


def _check_batch(probabilities: Tensor, target: Tensor, weight: Tensor | None, num_classes: int) -> None:
    is_tensor(probabilities=probabilities, target=target)
    check_tensors(probabilities=probabilities, target=target)
    real(probabilities=probabilities, target=target)
    same_device(probabilities=probabilities, target=target)
    if probabilities.ndim != 2 or probabilities.shape[1] != num_classes or target.shape != probabilities.shape[:1]:
        raise problem(
            f"probabilities must be (N, {num_classes}) and target (N,)",
            got=f"{tuple(probabilities.shape)} and {tuple(target.shape)}",
            error=ShapeError,
        )
    if target.is_floating_point():
        raise problem("target must be integers", got=f"dtype {target.dtype}", fix="Use target.long().", error=TypeError)
    if weight is not None:
        is_tensor(weight=weight)
        real(weight=weight)
        same_shape(target=target, weight=weight)
        same_device(target=target, weight=weight)
        finite(weight=weight)
        not_negative(weight=weight)


def _check_values(p: Tensor, target: Tensor, astray: Tensor, off: Tensor) -> None:
    softmax = "Use scores.float().softmax(1)."
    beyond = (p < 0) | (p > 1 + _SLACK)
    if bool(beyond.any()):
        row, column = beyond.nonzero()[0].tolist()
        place = f"{p[row, column]:g} at index [{row}, {column}]"
        rule = "probabilities must lie in [0, 1]"
        raise problem(rule, got=f"{place} ({int(beyond.sum())} such values)", fix=softmax)
    if bool(off.any()):
        row = int(off.nonzero()[0])
        rule = "each row of probabilities must sum to one"
        raise problem(rule, got=f"{p[row].sum():g} in row {row} ({int(off.sum())} such rows)", fix=softmax)
    if bool(astray.any()):
        at = int(astray.nonzero()[0])
        raise label_problem(
            f"target must be class indices from 0 to {p.shape[1] - 1}",
            got=f"{target[at].item()} at index [{at}] ({int(astray.sum())} such indices)",
        )
