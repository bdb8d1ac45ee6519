"""The nearest-class-mean classifier, which is computed from features without training."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .._checks import classes_exist, finite, integers, length, one_of, one_per_sample, require, same_device, warn
from .._numerics import default_dtype, full_precision, squared_distances, unit_rows, wide_dtype
from .._ranks import summed
from .._state import SoundModule
from ..errors import LabelError, NotFittedError
from ..features.moments import BinMoments
from ._features import checked_features

__all__ = ["NearestMeanHead"]

Metric = Literal["cosine", "euclidean"]


class NearestMeanHead(SoundModule):
    r"""Scores by the mean feature of each class: the cosine with it, or minus the squared distance to it.

    .. code-block:: python

        for x, y in loader:
            head.update(backbone(x), y)
        head.finish()

    The paper uses the Euclidean distance to means scaled to length one, which ranks classes as ``"cosine"`` does. In
    ``"euclidean"`` means are not scaled. Features are not normalized before averaging in either.

    Scores do not depend on the number of samples of a class. The ``state_dict`` holds the means of :meth:`finish`, but
    not samples that were added since. Before :meth:`finish` the head raises NotFittedError.

    Args:
        num_features: the number of features, D.
        num_classes: the number of classes, C.
        metric: ``"cosine"`` or ``"euclidean"``.
    Attributes:
        means: (C, D), zero for a class without samples. count: (C,) int64, the number of samples per class.
    Shape:
        forward: features (N, D). Returns (N, C), minus infinity for a class without samples.
    Source:
        Kang et al. 2020, section 4 (arXiv:1910.09217).

    >>> head = NearestMeanHead(2, 2, metric="euclidean")
    >>> head.update(torch.tensor([[0.0, 0.0], [2.0, 0.0], [5.0, 0.0]]), torch.tensor([0, 0, 1]))
    >>> head.finish()
    >>> head(torch.tensor([[2.0, 0.0]])).tolist()
    [[-1.0, -9.0]]
    """

    means: Tensor
    count: Tensor

    def __init__(self, num_features: int, num_classes: int, *, metric: Metric = "cosine") -> None:
        super().__init__()
        self.num_features = length("num_features", num_features)
        self.num_classes = length("num_classes", num_classes)
        one_of("metric", metric, ("cosine", "euclidean"))
        self.metric = metric
        with torch.inference_mode(False):
            self.register_buffer("means", torch.zeros(self.num_classes, self.num_features, dtype=default_dtype()))
            self.register_buffer("count", torch.zeros(self.num_classes, dtype=torch.int64))
        self._fitted = self._warned = False
        self._start_over()

    def _start_over(self) -> None:
        self._moments = BinMoments(self.num_classes, self.num_features, device="cpu")
        with torch.inference_mode(False):
            self._outside = torch.zeros((), dtype=torch.int64, device="cpu")

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add samples for the means that :meth:`finish` computes.

        Shape:
            features: (N, D). labels: (N,), integers from 0 to C - 1.
        Raises:
            ShapeError: the shapes do not fit. TypeError: features are not real numbers, or labels are not integers.
            LabelError: a label is not one of the classes. ValueError: a feature is not finite. Nothing is added then.
                On an accelerator :meth:`finish` raises the last two.
        """
        checked_features(features, self.num_features)
        integers(labels=labels)
        one_per_sample("features", features, labels=labels)
        finite(features=features)
        index = labels.long()
        classes_exist("labels", index, self.num_classes)
        outside = (index < 0) | (index >= self.num_classes)
        with torch.inference_mode(False):
            self._outside = self._outside.to(index.device) + outside.sum()
        self._moments.update(features, torch.where(outside, -1, index))

    @torch.no_grad()
    def finish(self) -> None:
        """Compute the means of all samples since the last call, merged over the ranks, which must all call this.

        Warns once about classes without samples.

        Raises:
            NotFittedError: there is no sample. ValueError: a mean overflows the dtype of the buffer. LabelError,
                ValueError: on an accelerator, as in :meth:`update`. The means then do not change, and the samples are
                dropped.
        """
        moments, outside = self._moments, self._outside
        self._start_over()
        moments.all_reduce()
        (outside,) = summed(outside.to(moments.count.device))
        rule = f"labels must hold class indices from 0 to {self.num_classes - 1}"
        require(not int(outside), rule, got=f"{int(outside)} that are not", error=LabelError)
        some = bool(moments.count.any())
        require(some, "there must be samples", got="none", fix="Call update first.", error=NotFittedError)
        means = moments.mean.to(self.means.dtype)
        finite(means=means.cpu())
        self.means.copy_(means)
        self.count.copy_(moments.count)
        self._fitted = True
        missing = torch.nonzero(moments.count == 0).flatten().tolist()
        if missing and not self._warned:
            self._warned = True
            listed = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
            warn(f"{len(missing)} of {self.num_classes} classes have no sample and are never chosen: {listed}.")

    def forward(self, features: Tensor) -> Tensor:
        checked_features(features, self.num_features)
        if not self._fitted:
            self._require_means()
        same_device(means=self.means, features=features)
        dtype = wide_dtype(features, self.means)
        with full_precision(features.device):
            z, means = features.to(dtype), self.means.to(dtype)
            if self.metric == "cosine":
                scores = unit_rows(z) @ unit_rows(means).t()
            else:
                centre = means.mean(0)  # avoids cancellation far from the origin
                scores = -squared_distances(z - centre, means - centre)
            return scores.masked_fill(self.count == 0, -torch.inf)

    def _require_means(self) -> None:
        """Raise unless there are means, from :meth:`finish` or copied from another module."""
        self._fitted = bool(self.count.any())
        rule = "the means must be computed before scores"
        fix = "Call update with the training features, then finish; or load a state_dict."
        require(self._fitted, rule, got="none", fix=fix, error=NotFittedError)

    @torch.inference_mode(False)
    def _apply(self, fn: Any, recurse: bool = True) -> NearestMeanHead:
        empty = self.means.is_meta
        super()._apply(fn, recurse)
        if empty and not self.means.is_meta:  # meta tensors have no values
            self.means.zero_()
            self.count.zero_()
            self._fitted = False
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._fitted = self.count.device.type != "meta" and bool(self.count.any())

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {"num_features": self.num_features, "num_classes": self.num_classes, "metric": self.metric}
