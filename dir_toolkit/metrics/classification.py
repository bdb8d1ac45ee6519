"""Classification errors by region and by class, from a confusion matrix that merges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .._checks import is_tensor, label_problem, length, on_host, one_of, problem, real, same_device, same_shape
from .._numerics import readable
from ..errors import ShapeError
from ..labels.bins import Bins, Outside
from ..labels.density import REGIONS, LabelDensity
from . import _regions
from ._sums import MergingSums, check_memory, check_tensors, placed

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["ClassificationMetrics", "balanced_error", "classification_metrics"]


def balanced_error(pred: Tensor, target: Tensor, num_classes: int) -> float:
    r"""The share of wrong answers in each class, averaged over the classes that ``target`` holds.

    .. math:: \mathrm{BER} = \frac1L \sum_y P(\hat y \ne y \mid y)

    Args:
        pred: class indices, or scores, of which the highest is taken and, of equal ones, the first.
    Shape:
        pred: (N,) or (N, num_classes). target: (N,) class indices.
    Raises:
        ShapeError: the shapes do not fit, or there is no sample. TypeError: class indices are not integers.
        LabelError: a class index lies beyond the classes. ValueError: a score is NaN.
    Source:
        Menon et al. 2021, section 2 (arXiv:2007.07314).

    Of 10, 20 and 30 instances, 1, 10 and 20 are right; the plain error is 29/60.

    >>> target = torch.arange(3).repeat_interleave(torch.tensor([10, 20, 30]))
    >>> right = torch.cat([torch.arange(n) < k for n, k in [(10, 1), (20, 10), (30, 20)]])
    >>> pred = torch.where(right, target, (target + 1) % 3)
    >>> round(balanced_error(pred, target, 3), 4), (pred != target).sum().item()
    (0.5778, 29)
    """
    num_classes = length("num_classes", num_classes)
    _check_batch(pred, target, num_classes)
    if target.numel() == 0:
        raise problem("target must hold at least one value", got=f"shape {tuple(target.shape)}", error=ShapeError)
    pred, target = on_host("pred", pred), on_host("target", target)
    index, predicted = _class_indices("target", target, num_classes), _predicted(pred, num_classes)
    count = torch.bincount(index, minlength=num_classes)
    wrong = torch.bincount(index[predicted != index], minlength=num_classes)
    present = count > 0
    return (wrong[present].double() / count[present]).mean().item()


class ClassificationMetrics(MergingSums):
    """Error, balanced error and macro F1, over all labels and by region of the training density.

    Everything follows from one int64 confusion matrix, so batches, ranks and objects merge exactly, and regions can be
    chosen afterwards. A class is a bin; a continuous label counts as the bin it falls into.

    Args:
        bins: the label axis.
        density: of the training labels, which decides the region of each bin.
        regions: the region of each bin, B names out of "many", "medium", "few" and "unseen", in place of those that
            ``density`` gives.
        outside: what a target beyond the axis does: ``"raise"``; ``"clip"``, which counts it as one of the end bin;
            ``"drop"``, which counts it nowhere.
    Attributes:
        confusion: (B, B) int64, samples by true bin (rows) and predicted bin (columns).
        selects: the key of :meth:`summary` whose least value marks the best model.
        takes: what :meth:`update` takes of a model's output, by name.
    Raises:
        ValueError: the confusion matrix would not fit into memory.
    Source:
        Menon et al. 2021, section 2 (arXiv:2007.07314); Liu et al. 2019, section 4 (arXiv:1904.05160), for the regions.

    >>> metrics = ClassificationMetrics(Bins.classes(2), LabelDensity(Bins.classes(2), [200, 5]))
    >>> metrics.update(torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [4.0, 0.0]]), torch.tensor([0, 1, 1, 0]))
    >>> metrics.compute().balanced_error.sel(region=["all", "many", "few"]).values.tolist()
    [0.25, 0.0, 0.5]
    """

    selects: ClassVar[str] = "balanced_error/all"
    takes: ClassVar[str] = "scores"

    kept: ClassVar[tuple[str, ...]] = ("confusion", "refused")

    confusion: Tensor

    def __init__(
        self,
        bins: Bins,
        density: LabelDensity,
        *,
        regions: Sequence[str] | np.ndarray | None = None,
        outside: Outside = "raise",
    ) -> None:
        _regions.check_axis(bins, density)
        one_of("outside", outside, ("raise", "clip", "drop"))
        self.bins, self.density, self.outside = bins, density, outside
        self.regions = None if regions is None else _region_names(regions, len(bins))
        check_memory(f"the confusion matrix of {len(bins):,} bins", 8 * len(bins) ** 2, "Use fewer bins.")
        self._begin(confusion=(len(bins), len(bins)), refused=(2,))

    @property
    def settings(self) -> dict[str, Any]:
        return {"bins": self.bins, "density": self.density, "regions": self.regions, "outside": self.outside}

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Add a batch. On an accelerator nothing waits for the host.

        Args:
            pred: bin indices, or scores, of which the highest is taken and, of equal ones, the first. A predicted
                label has to be placed first: ``bins.index(label, "clip")``.
            target: labels in label units; where bins are classes, class indices.
        Shape:
            pred: (N,) or (N, B). target: (N,). An empty batch adds nothing.
        Raises:
            ShapeError: the shapes do not fit. TypeError: bin indices are not integers. LabelError: a target is NaN, or
            beyond the axis under ``outside="raise"``, or a bin index beyond the bins. ValueError: a score is NaN. In
            each case nothing has been added. On an accelerator such samples are counted, and :meth:`compute`,
            :meth:`confusion_matrix` and ``all_reduce`` raise for them.
        """
        _check_batch(pred, target, len(self.bins))
        index, refused = placed(self.bins, target, self.outside)
        predicted = _predicted(pred, len(self.bins))
        counts = (index >= 0) & (predicted >= 0)
        cell = (index * len(self.bins) + predicted).masked_fill(~counts, 0)
        self._ready(cell.device)
        if refused is not None:
            self.refused.add_(torch.stack([refused, (predicted < 0).sum()]))
        self.confusion.view(-1).index_add_(0, cell, counts.long())

    def summary(self) -> dict[str, float]:
        """The numbers to watch in training, under keys such as "balanced_error/few": the error, and the balanced error
        over all labels and in each region that has a bin; NaN where none of them was tested."""
        result = self.compute()
        row = {"error/all": float(result.error.sel(region="all"))}
        for region in ("all", *(name for name in ("many", "medium", "few") if name in result["bin_region"].values)):
            row[f"balanced_error/{region}"] = float(result.balanced_error.sel(region=region))
        return row

    def compute(self, *, many: int = 100, few: int = 20) -> xr.Dataset:
        """The errors so far, as a dataset over ``region`` (all, many, medium, few, unseen) and ``bin``.

        ``error`` is the share of samples that are wrong; ``balanced_error`` and ``macro_f1`` are means over the bins
        that were tested, of one minus recall and of F1, which is zero for a bin that was never predicted. False
        positives from other regions count against a bin's F1 and precision. A region or bin without a test sample is
        missing (NaN), not zero, and its count says so; so is the precision of a bin that was never predicted.

        Args:
            many, few: limits of the regions, as in :meth:`LabelDensity.regions`; not used where the regions were given.
        Raises:
            LabelError, ValueError: on an accelerator :meth:`update` was handed what it refuses on the CPU.
        """
        self._check_refused()
        regions = self.density.regions(many=many, few=few) if self.regions is None else self.regions
        confusion = self.confusion.cpu().numpy()
        right, count, predicted = np.diagonal(confusion), confusion.sum(1), confusion.sum(0)
        inside = _regions.membership(regions)
        tested = inside & (count > 0)
        n = (inside * count).sum(1)
        with np.errstate(invalid="ignore"):
            data = {
                "error": ("region", (inside * (count - right)).sum(1) / n),
                "balanced_error": ("region", _regions.bin_mean((count - right) / count, tested)),
                "macro_f1": ("region", _regions.bin_mean(2 * right / (count + predicted), tested)),
                "count": ("region", n),
                "bins": ("region", tested.sum(1).astype(np.int64)),
                "bin_recall": ("bin", right / count),
                "bin_precision": ("bin", right / predicted),
                "bin_count": ("bin", count),
            }
        return _regions.dataset(data, self.density, regions)

    def confusion_matrix(self) -> xr.DataArray:
        """Samples by true and predicted bin, int64 over ``target`` and ``pred``."""
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
    pred: Tensor,
    target: Tensor,
    bins: Bins,
    density: LabelDensity,
    *,
    regions: Sequence[str] | np.ndarray | None = None,
    outside: Outside = "raise",
    many: int = 100,
    few: int = 20,
) -> xr.Dataset:
    """:class:`ClassificationMetrics` of one whole set: update and compute in one call."""
    is_tensor(pred=pred, target=target)
    if target.numel() == 0:
        raise problem("target must hold at least one value", got=f"shape {tuple(target.shape)}", error=ShapeError)
    metrics = ClassificationMetrics(bins, density, regions=regions, outside=outside)
    metrics.update(pred, target)
    return metrics.compute(many=many, few=few)


def _check_batch(pred: Tensor, target: Tensor, num_classes: int) -> None:
    is_tensor(pred=pred, target=target)
    check_tensors(pred=pred, target=target)
    real(pred=pred, target=target)
    same_device(pred=pred, target=target)
    if target.ndim != 1:
        rule = "target must have the shape (N,)"
        raise problem(rule, got=tuple(target.shape), fix="Use target.flatten().", error=ShapeError)
    if pred.ndim == 1:
        same_shape(pred=pred, target=target)
    elif pred.shape != (len(target), num_classes):
        raise problem(
            f"pred must be indices ({len(target)},) or scores ({len(target)}, {num_classes})",
            got=tuple(pred.shape),
            error=ShapeError,
        )


def _predicted(pred: Tensor, num_classes: int) -> Tensor:
    """The predicted class of each sample, (N,) int64; -1 where it names none, and values are not looked at."""
    if pred.ndim == 1:
        return _class_indices("pred", pred, num_classes)
    unclear = pred.detach().isnan().any(1)
    if readable(pred) and bool(unclear.any()):
        raise problem(
            "pred must not be NaN",
            got=f"NaN in row {int(unclear.nonzero()[0])} ({int(unclear.sum())} such rows)",
            fix="Remove or repair these samples first.",
        )
    return pred.detach().argmax(1).masked_fill(unclear, -1)


def _class_indices(name: str, index: Tensor, num_classes: int) -> Tensor:
    """``index`` as int64 numbers from 0 to ``num_classes`` - 1; -1 for others, where values are not looked at."""
    if index.is_floating_point():
        raise problem(
            f"{name} must be integers", got=f"dtype {index.dtype}", fix=f"Use {name}.long().", error=TypeError
        )
    classes = index.detach().long()
    beyond = (classes < 0) | (classes >= num_classes)
    if readable(index) and bool(beyond.any()):
        at = int(beyond.nonzero()[0])
        raise label_problem(
            f"{name} must be indices from 0 to {num_classes - 1}",
            got=f"{index[at].item()} at index [{at}] ({int(beyond.sum())} such indices)",
        )
    return classes.masked_fill(beyond, -1)


def _region_names(regions: object, num_bins: int) -> np.ndarray:
    listed = ", ".join(repr(name) for name in REGIONS)
    rule = f"regions must be {num_bins} names, one per bin, out of {listed}"
    scalar = isinstance(regions, str) or (isinstance(regions, np.ndarray) and regions.ndim == 0)
    if scalar or not isinstance(regions, (Sequence, np.ndarray)):
        raise problem(rule, got=repr(regions), error=TypeError)
    if len(regions) != num_bins:
        raise problem(rule, got=f"{len(regions)} names", error=ShapeError)
    for at, name in enumerate(regions):
        if not isinstance(name, str) or name not in REGIONS:
            raise problem(rule, got=f"{name!r} at index [{at}]")
    names = np.array([str(name) for name in regions])
    names.setflags(write=False)
    return names
