"""Several targets: one backbone, and one model per target on its features."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .._checks import as_tensors, instance, is_tensor, labels_array, not_empty, require, shaped
from .._settings import shown
from .._state import SoundModule, whole_or_not_at_all
from ..errors import ShapeError
from ..labels.bins import Bins, Outside
from ..labels.grid import BinGrid
from ..priors import TauChoice
from .calibration import OF_MODEL, Judged, held_out
from .model import LongTailModel
from .prediction import columns, read_batches, table
from .readouts import LongTailOutput, ScoreReadout, TargetPrior

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["MultiTargetModel"]

_FDS = "Attach one FDS over Bins.grid(...) to model.neck, and use fds.labels(y) with y of (N, K)."


class MultiTargetModel(SoundModule):
    """One backbone for several targets, such as age and head pose, with one :class:`LongTailModel` per target.

    Each target has its own label axis, density, head, prior and tau. The loss is the mean of their losses. Named losses
    do not depend on the unit of labels, so that no unit dominates. With missing labels each target has the mean over
    its own labels, and training on n ranks is therefore close, but not equal, to training on one.

    With :func:`dir_toolkit.experiment.training.loop.fit` use ``loss=model.criterion``.

    Args:
        backbone: a module from inputs to the features of all targets.
        targets: one model per target on these features, ``LongTailModel(nn.Identity(), num_features, bins, ...)``.
            :meth:`for_labels` makes them. Their options may differ, and some may be over classes.
    Attributes:
        backbone, neck: the backbone, and an identity after it to attach an FDS over ``Bins.grid(...)``.
        targets: the K models, for methods of one target: ``model.targets[0].set_prior("uniform", 0.5)``.
    Shape:
        forward: x as for the backbone; labels (N, K); weight (N,), for all targets, or (N, K). For sequences labels
            are (N, T, K), or (N, K) for all steps; weights also (N, T) or (N, T, K). If T is K, (N, K) is ambiguous
            and refused. Returns :class:`LongTailOutput` with the loss, predictions (N, K) and features (N, D). Scores,
            distributions and residuals of the targets are concatenated in the last axis; :meth:`of_targets` splits
            them.
    Raises:
        TypeError: an argument has the wrong type. ValueError: there is no target, or a target has its own FDS.
        ShapeError: features or labels do not fit. Otherwise as :class:`LongTailModel`.

    >>> age, pose = torch.arange(200) % 50, torch.linspace(-90, 90, 200)
    >>> model = MultiTargetModel.for_labels(nn.Linear(3, 8), 8, torch.stack([age, pose], 1))
    >>> [len(target.bins) for target in model.targets]
    [13, 12]
    >>> out = model(torch.zeros(5, 3), torch.tensor([[30.0, 45.0]]).expand(5, 2))
    >>> out.loss.shape, out.prediction.shape, out.distribution.shape
    (torch.Size([]), torch.Size([5, 2]), torch.Size([5, 25]))
    """

    targets: Any

    def __init__(self, backbone: nn.Module, targets: Sequence[LongTailModel]) -> None:
        super().__init__()
        instance(nn.Module, backbone=backbone)
        instance((list, tuple, nn.ModuleList), targets=targets)
        require(len(targets) > 0, "targets must hold at least one LongTailModel", got="none")
        for k, target in enumerate(targets):
            instance(LongTailModel, **{f"targets[{k}]": target})
            require(target.fds is None, "targets must not have their own FDS", got=f"one in targets[{k}]", fix=_FDS)
        self.backbone, self.neck, self.targets = backbone, nn.Identity(), nn.ModuleList(targets)

    @classmethod
    def for_labels(
        cls,
        backbone: nn.Module,
        num_features: int,
        labels: Any,
        *,
        bins: BinGrid | Sequence[Bins | None] | None = None,
        **options: Any,
    ) -> MultiTargetModel:
        """A model with bins and densities from the training labels.

        Args:
            labels: the labels of all training samples, (N, K): an array, a tensor or a table. With ``missing="drop"``
                NaN is a missing label of that target alone.
            bins: one axis per target, as a sequence or a grid; None instead of an axis means ``Bins.auto`` of its
                labels.
            options: as in :meth:`LongTailModel.for_labels`, for all targets.

        >>> y = torch.rand(200, 2) * torch.tensor([1.0, 60.0])
        >>> MultiTargetModel.for_labels(nn.Linear(3, 8), 8, y, for_metric="mse").targets[1].settings["decode"]
        'expectation'
        """
        array = labels_array(labels)
        rule, fix = "labels must be (N, K), one column per target", "Use LongTailModel for one target."
        require(array.ndim == 2, rule, got=array.shape, fix=fix)
        axes: Any = [None] * array.shape[1] if bins is None else getattr(bins, "axes", bins)
        instance((list, tuple), bins=axes)
        rule = "bins must hold one axis per column of labels"
        require(len(axes) == array.shape[1], rule, got=f"{len(axes)} for {array.shape[1]} columns")
        made = zip(array.T, axes, strict=True)
        return cls(
            backbone,
            [LongTailModel.for_labels(nn.Identity(), num_features, y, bins=axis, **options) for y, axis in made],
        )

    def forward(self, x: Any, labels: Tensor | None = None, weight: Tensor | None = None) -> LongTailOutput:
        features = self.neck(self.backbone(x))
        outputs = [target(features) for target in self.targets]
        if labels is None:
            require(weight is None, "weight needs labels", got="labels=None", fix="Use model(x, labels, weight).")
            return self._together(outputs, outputs[0].loss)
        return self._together(outputs, self._loss(outputs, labels, weight))

    def criterion(self, output: LongTailOutput, labels: Tensor, weight: Tensor | None = None) -> Tensor:
        """The mean over targets of :meth:`LongTailModel.criterion`, for an output of ``model(x)``."""
        return self._loss(self.of_targets(output), labels, weight)

    def _loss(self, outputs: Sequence[LongTailOutput], labels: Tensor, weight: Tensor | None) -> Tensor:
        """The mean over targets of their losses."""
        self._check_labels(labels)
        shape = outputs[0].prediction.shape
        if labels.shape[:-1] not in (shape, shape[:1]):
            shaped((*shape, len(self.targets)), "one per sample and target", labels=labels)
        weights = self._weights(weight, shape)
        parts = zip(self.targets, outputs, labels.unbind(-1), weights, strict=True)
        return torch.stack([target.criterion(*own) for target, *own in parts]).mean()

    def _weights(self, weight: Tensor | None, shape: torch.Size) -> Sequence[Tensor | None]:
        """The weight of each target, for predictions of this shape, (N,) or (N, T)."""
        count = len(self.targets)
        if weight is None:
            return [None] * count
        is_tensor(weight=weight)
        for_all, for_each = ((shape[0],), (*shape,)), ((shape[0], count), (*shape, count))
        shared, own = weight.shape in for_all, weight.shape in for_each
        rule, fix = "", ""
        if shared and own:
            rule = "weight must be clearly for steps or for targets, which are equally many"
            fix = "Expand it to one number for each step and target, (N, T, K)."
        elif not shared and not own:
            rule = f"the shape of weight must be one of {for_all} for all targets, or of {for_each} for each"
        require(not rule, rule, got=weight.shape, fix=fix, error=ShapeError)
        return weight.unbind(-1) if own else [weight] * count

    def _check_labels(self, labels: Any) -> None:
        is_tensor(labels=labels)
        shaped((..., len(self.targets)), "one per target in the last axis", labels=labels)

    def _together(self, outputs: Sequence[LongTailOutput], loss: Tensor) -> LongTailOutput:
        """Join the outputs of all targets."""
        sizes = [math.prod(target.readout.score_shape) for target in self.targets]
        scores = [one.scores.reshape(*one.prediction.shape, size) for one, size in zip(outputs, sizes, strict=True)]
        return LongTailOutput(
            loss,
            torch.cat(scores, -1),
            torch.stack([one.prediction for one in outputs], -1),
            outputs[0].features,
            torch.cat([one.distribution for one in outputs], -1),
            torch.cat([one.residual for one in outputs], -1),
        )

    def of_targets(self, output: LongTailOutput) -> list[LongTailOutput]:
        """The output of each target, in the form of its own model."""
        instance(LongTailOutput, output=output)
        readouts = [target.readout for target in self.targets]
        binned = [len(readout.bins) * isinstance(readout, ScoreReadout) for readout in readouts]
        moved = [len(readout.bins) * (getattr(readout, "residual", None) is not None) for readout in readouts]
        of_each = zip(self.targets, output.prediction.unbind(-1), strict=True)
        parts = zip(
            self._split(output.scores),
            [labels.long() if target.bins.categorical else labels for target, labels in of_each],
            output.distribution.split(binned, -1),
            output.residual.split(moved, -1),
            strict=True,
        )
        return [
            LongTailOutput(output.loss, scores, prediction, output.features, distribution, residual)
            for scores, prediction, distribution, residual in parts
        ]

    def _split(self, scores: Any) -> list[Tensor]:
        """The scores of each target, in the form of its own model."""
        is_tensor(scores=scores)
        shapes = [target.readout.score_shape for target in self.targets]
        sizes = [math.prod(shape) for shape in shapes]
        shaped((..., sum(sizes)), OF_MODEL, scores=scores)
        parts = zip(scores.split(sizes, -1), shapes, strict=True)
        return [part if shape else part.squeeze(-1) for part, shape in parts]

    def set_prior(self, target_prior: TargetPrior = None, tau: float = 1.0) -> None:
        """:meth:`LongTailModel.set_prior` of all targets, which must have bins or classes.

        Args:
            target_prior: one for all targets. A prior (B,) fits only if all have B bins.
            tau: >= 0.
        Raises:
            as :meth:`LongTailModel.set_prior`. No target changes then.
        """
        with whole_or_not_at_all(self.targets):
            for target in self.targets:
                target.set_prior(target_prior, tau)

    def calibrate(
        self,
        scores_or_loader: Tensor | Iterable[Any],
        labels: Any = None,
        *,
        by: Judged | None = None,
        most_mae: float | Literal["auto"] | None = "auto",
        bias: bool | Literal["auto"] = "auto",
        outside: Outside | None = None,
    ) -> list[TauChoice]:
        """Choose temperature, tau and, if it pays, a bias of each target, by :meth:`LongTailModel.calibrate`.

        Args:
            scores_or_loader: the scores of this model's output; or batches of inputs and labels (N, K).
            labels: (N, K), the labels of the scores; None for batches.
            by, most_mae, bias, outside: as in :meth:`LongTailModel.calibrate`, for all targets.
        Returns:
            the choice for each target.
        Raises:
            as :meth:`LongTailModel.calibrate`. No target changes then.
        """
        if labels is None:
            scores_or_loader, labels = held_out(self, scores_or_loader)
        pairs = self._scores_and_labels(scores_or_loader, labels)
        options: Any = {"by": by, "most_mae": most_mae, "bias": bias, "outside": outside}
        with whole_or_not_at_all(self.targets):
            return [target.calibrate(*pair, **options) for target, pair in zip(self.targets, pairs, strict=True)]

    def calibrate_intervals(
        self,
        scores_or_loader: Tensor | Iterable[Any],
        labels: Any = None,
        level: float = 0.9,
        *,
        outside: Outside | None = None,
    ) -> None:
        """:meth:`LongTailModel.calibrate_intervals` of each target. The level holds for each target, not jointly. If it
        raises, no target changes."""
        scores, labels = held_out(self, scores_or_loader) if labels is None else (scores_or_loader, labels)
        with whole_or_not_at_all(self.targets):
            for target, pair in zip(self.targets, self._scores_and_labels(scores, labels), strict=True):
                target.calibrate_intervals(*pair, level, outside=outside)

    def _scores_and_labels(self, scores: Any, labels: Any) -> list[tuple[Tensor, Tensor]]:
        (labels,) = as_tensors(labels=labels)
        self._check_labels(labels)
        not_empty(labels=labels)
        return list(zip(self._split(scores), labels.unbind(-1), strict=True))

    def interval(self, output: LongTailOutput, level: float | None = None) -> tuple[Tensor, Tensor]:
        """:meth:`LongTailModel.interval` of each target.

        Args:
            level: in (0, 1), for all targets; None means the calibrated level of each, or 0.9 before calibration.
        Shape:
            Returns the lower and the upper end, (N, K) each.
        Units:
            those of each label.
        Raises:
            as :meth:`LongTailModel.interval`.
        """
        pairs = zip(self.targets, self.of_targets(output), strict=True)
        lower, upper = zip(*(target.interval(own, level) for target, own in pairs), strict=True)
        return torch.stack(lower, -1), torch.stack(upper, -1)

    def predict(self, inputs: Tensor | Iterable[Any], *, level: float | None = None) -> xr.Dataset:
        """The table of :meth:`LongTailModel.predict` over (sample, target), or (sample, step, target) for sequences. It
        has ``lower`` and ``upper`` if all targets have intervals, and ``interval_level`` if their levels are equal.

        Args:
            inputs: as in :meth:`LongTailModel.predict`.
            level: as in :meth:`interval`. If it is given, a target without intervals raises an error.
        Raises:
            as :meth:`LongTailModel.predict`.
        """
        import xarray as xr

        ends = level is not None or all(target.readout.has_interval for target in self.targets)

        def read(output: LongTailOutput, _: Any) -> list[list[np.ndarray]]:
            parts = zip(self.targets, self.of_targets(output), strict=True)
            return [columns(target, own, level, ends) for target, own in parts]

        batches = zip(*read_batches(self, inputs, read), strict=True)
        tables = [table(target, own, level) for target, own in zip(self.targets, batches, strict=True)]
        return xr.concat(tables, "target", combine_attrs="drop_conflicts").transpose("sample", ..., "target")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the model in one file, as :meth:`LongTailModel.save`, which has the same errors.

        Raises:
            ValueError: a head or a loss is custom, not named.
        """
        from .saving import save

        save(self, path)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of each target."""
        return {"targets": [target.settings for target in self.targets]}

    def extra_repr(self) -> str:
        return shown({"num_targets": len(self.targets)})
