"""Classification errors by region and by class, from a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .._checks import as_tensors, length, no_bad, on_host, require, shaped
from .._memory import check_memory
from ..errors import ShapeError
from ..labels.bins import Missing, Outside
from ..labels.density import REGIONS, LabelDensity
from ._metric import Metric
from ._regions import Axis, RegionMetrics
from ._sums import check_samples, check_some, class_indices, placed

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["ClassificationMetrics", "balanced_error", "classification_metrics"]


def balanced_error(pred: Any, target: Any, num_classes: int) -> float:
    r"""The balanced error: the error rate of each class, averaged over the L classes in ``target``.

    .. math:: \mathrm{BER} = \frac1L \sum_y P(\hat y \ne y \mid y)

    Args:
        pred: class indices, or scores. Of equal scores the first is used. ``pred`` and ``target`` are tensors, NumPy
            arrays, pandas columns or lists.
    Shape:
        pred: (N,) or (N, num_classes). target: (N,) class indices.
    Raises:
        ShapeError: the shapes do not fit, or there is no sample. TypeError: class indices are not integers.
        LabelError: a class index lies beyond the classes. ValueError: a score is NaN.
    Source:
        Menon et al. 2021, section 2 (arXiv:2007.07314).

    Of 10, 20 and 30 samples, 1, 10 and 20 are right. The plain error is 29/60.

    >>> target = torch.arange(3).repeat_interleave(torch.tensor([10, 20, 30]))
    >>> right = torch.cat([torch.arange(n) < k for n, k in [(10, 1), (20, 10), (30, 20)]])
    >>> pred = torch.where(right, target, (target + 1) % 3)
    >>> round(balanced_error(pred, target, 3), 4), (pred != target).sum().item()
    (0.5778, 29)
    """
    num_classes = length("num_classes", num_classes)
    pred, target = as_tensors(pred=pred, target=target)
    _check_shapes(pred, target, num_classes)
    check_some(target=target)
    pred, target = on_host("pred", pred), on_host("target", target)
    index, predicted = class_indices("target", target, num_classes), _predicted(pred, num_classes)
    count = torch.bincount(index, minlength=num_classes)
    wrong = torch.bincount(index[predicted != index], minlength=num_classes)
    present = count > 0
    return (wrong[present].double() / count[present]).mean().item()


def _error(right: np.ndarray, count: np.ndarray) -> np.ndarray:
    return (count - right) / count


class ClassificationMetrics(RegionMetrics):
    """Error, balanced error and macro F1, over all labels and by region of the training density.

    All are computed from one int64 confusion matrix, so that merging is exact and regions can be chosen afterwards. A
    class is a bin. A continuous label counts as its bin.

    The error is the share of wrong predictions. The balanced error is the mean of one minus recall over the tested
    bins, and macro F1 is the mean of F1. Samples of all regions enter the precision and F1 of a bin. For a bin that was
    never predicted F1 is zero and precision is NaN.

    Args:
        density: the density of the training labels, which defines the label axis and the region of each bin. ``(bins,
            density)``, in two arguments, means the same.
        regions: the region of each bin, B names out of "many", "medium", "few" and "unseen". None takes those of
            ``density``.
        outside: ``"raise"``, ``"clip"`` or ``"drop"``.
        missing: ``"raise"``, or ``"drop"``, which ignores targets that are NaN.
    Attributes:
        confusion: (B, B) int64, samples by true bin (rows) and predicted bin (columns).
    Raises:
        ValueError: the confusion matrix would not fit into memory.
    Source:
        Menon et al. 2021, section 2 (arXiv:2007.07314); Liu et al. 2019, section 4 (arXiv:1904.05160), for the regions.

    >>> from dir_toolkit import Bins
    >>> metrics = ClassificationMetrics(LabelDensity(Bins.classes(2), [200, 5]))
    >>> metrics.update(torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [4.0, 0.0]]), torch.tensor([0, 1, 1, 0]))
    >>> metrics.compute().balanced_error.sel(region=["all", "many", "few"]).values.tolist()
    [0.25, 0.0, 0.5]
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(
            "balanced_error", "balanced error", "%", ("right", "count"), _error,
            mean_over_bins=True, low=0, high=1, watched=("all", "many", "medium", "few"), short="BER",
        ),
        Metric("error", "error", "%", ("right", "count"), _error, low=0, high=1, watched=("all",)),
        Metric(
            "macro_f1", "macro F1", "%", ("right", "count", "predicted"), lambda r, n, p: 2 * r / (n + p),
            mean_over_bins=True, low=0, high=1,
        ),
        Metric("recall", "recall", "%", ("right", "count"), lambda r, n: r / n, over=("bin",), low=0, high=1),
        Metric(
            "precision", "precision", "%", ("right", "predicted"), lambda r, p: r / p,
            over=("bin",), low=0, high=1, may_be_nan=True, at_empty=0,
        ),
    )  # fmt: skip
    selects: ClassVar[str] = "balanced_error/all"
    takes: ClassVar[str] = "scores"
    kept: ClassVar[tuple[str, ...]] = ("confusion", "refused")

    confusion: Tensor

    def __init__(
        self,
        density: Axis,
        counted: LabelDensity | None = None,
        *,
        regions: Sequence[str] | np.ndarray | None = None,
        outside: Outside = "raise",
        missing: Missing = "raise",
    ) -> None:
        super().__init__(density, counted, outside, missing, grids=False)
        size = len(self.bins)
        self.regions = None if regions is None else _region_names(regions, size)
        check_memory(f"the confusion matrix of {size:,} bins", 8 * size**2, "Use fewer bins.")
        self._begin(confusion=(size, size), refused=(2,))

    @property
    def settings(self) -> dict[str, Any]:
        return {"density": self.density, "regions": self.regions, "outside": self.outside, "missing": self.missing}

    def update(self, pred: Any, target: Any) -> None:
        """Add a batch, without waiting for an accelerator.

        Args:
            pred: bin indices, or scores. Of equal scores the first is used. Convert predicted labels first:
                ``bins.index(label, "clip")``.
            target: labels in label units, or class indices if bins are classes. Both are tensors, NumPy arrays, pandas
                columns or lists.
        Shape:
            pred: (N,) or (N, B). target: (N,). An empty batch adds nothing.
        Raises:
            ShapeError: the shapes do not fit. TypeError: bin indices are not integers. LabelError: a target is NaN, or
            lies beyond the axis under ``outside="raise"``, or a bin index lies beyond the bins. ValueError: a score is
            NaN.
        """
        size = len(self.bins)
        pred, target = as_tensors(pred=pred, target=target)
        _check_shapes(pred, target, size)
        index, refused = placed(self.bins, target, self.outside, self.missing)
        predicted = _predicted(pred, size)
        counts = (index >= 0) & (predicted >= 0)
        cell = (index * size + predicted).masked_fill(~counts, 0)
        self._ready(cell.device)
        if refused is not None:
            self.refused.add_(torch.stack([refused, (predicted < 0).sum()]))
        self.confusion.view(-1).index_add_(0, cell, counts.long())

    def _sums_by_bin(self) -> dict[str, np.ndarray]:
        confusion = self.confusion.cpu().numpy()
        rows = {"right": np.diagonal(confusion), "count": confusion.sum(1), "predicted": confusion.sum(0)}
        return {name: row[None] for name, row in rows.items()}

    def confusion_matrix(self) -> xr.DataArray:
        """The number of samples by true and predicted bin, int64 over ``target`` and ``pred``."""
        import xarray as xr

        self._check_refused()
        index = np.arange(len(self.bins))
        return xr.DataArray(
            self.confusion.cpu().numpy().copy(),
            dims=("target", "pred"),
            coords={"target": index, "pred": index},
            name="confusion",
            attrs={"units": "1"},
        )


def classification_metrics(
    pred: Any,
    target: Any,
    density: Axis,
    counted: LabelDensity | None = None,
    *,
    regions: Sequence[str] | np.ndarray | None = None,
    outside: Outside = "raise",
    missing: Missing = "raise",
    many: int = 100,
    few: int = 20,
) -> xr.Dataset:
    """:class:`ClassificationMetrics` of one whole data set, with the arguments of the class, ``update`` and
    ``compute``."""
    (target,) = as_tensors(target=target)
    check_some(target=target)
    metrics = ClassificationMetrics(density, counted, regions=regions, outside=outside, missing=missing)
    metrics.update(pred, target)
    return metrics.compute(many=many, few=few)


def _check_shapes(pred: Tensor, target: Tensor, num_classes: int) -> None:
    check_samples(pred=pred, target=target)
    shaped(("N",), target=target)
    indices, scores = (len(target),), (len(target), num_classes)
    rule, fix = f"pred must be indices {indices} or scores {scores}", "There is one row for each target."
    require(pred.shape in (indices, scores), rule, got=pred.shape, fix=fix)


def _predicted(pred: Tensor, num_classes: int) -> Tensor:
    """The predicted class of each sample, (N,) int64, and -1 for invalid predictions on an accelerator."""
    if pred.ndim == 1:
        return class_indices("pred", pred, num_classes)
    unclear = pred.detach().isnan()
    no_bad("pred must not be NaN", pred, unclear, fix="Remove or repair these samples first.")
    return pred.detach().argmax(1).masked_fill(unclear.any(1), -1)


def _region_names(regions: Any, num_bins: int) -> np.ndarray:
    """The checked region of each bin."""
    rule = f"regions must be {num_bins} names, one per bin, out of {', '.join(map(repr, REGIONS))}"
    in_row = isinstance(regions, (Sequence, np.ndarray)) and getattr(regions, "ndim", 1) > 0
    require(in_row and not isinstance(regions, str), rule, got=repr(regions), error=TypeError)
    require(len(regions) == num_bins, rule, got=f"{len(regions)} names", error=ShapeError)
    for place, name in enumerate(regions):
        require(isinstance(name, str) and name in REGIONS, rule, got=f"{name!r} at index [{place}]")
    names = np.array([str(name) for name in regions])
    names.setflags(write=False)
    return names
