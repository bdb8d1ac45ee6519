"""The model: a backbone, a head, and a readout that interprets the output of the head."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .._checks import (
    as_tensors,
    drop_alike,
    gathered,
    instance,
    keys,
    labels_array,
    length,
    one_of,
    problem,
    require,
    same_bins,
    shaped,
)
from .._numerics import readable
from .._settings import shown
from .._state import pack, unpack, whole_or_not_at_all
from ..errors import CheckpointError, ShapeError
from ..features.fds import FDS
from ..labels.bins import MISSING, OUTSIDE, Bins, Missing, Outside
from ..labels.density import LabelDensity
from ..labels.grid import AnyBins
from ..labels.weights import LDS
from ..priors import TauChoice
from .calibration import Judged, calibrate, choose_tau, held_out
from .prediction import predict
from .readouts import LongTailOutput, Placed, PriorKernel, Readout, Setup, TargetPrior, readout_for
from .rows import as_rows, of_shape, one_per_row

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["LongTailModel"]

_ONE_AXIS = "For several targets use MultiTargetModel, with one axis for each."
HeadName = Literal["regression", "gaussian", "linear", "cosine", "affinity", "coral", "corn"]


class LongTailModel(nn.Module):
    r"""A model for long-tailed labels: backbone, head, loss, and optional smoothing, weights and prior adjustment.

    By default, on a continuous axis the head scores bins, is trained on soft labels, and its distribution is decoded
    into a label. Over ``Bins.classes`` the model is a plain classifier. In both cases the softmax is the posterior
    under the training prior, which logit adjustment converts to a target prior:

    .. math:: P(b|x) = \mathrm{softmax}\big(s_b / T - \tau \log (\pi_b / u_b) + \log (P_{target}(b) / u_b)\big),

    Here :math:`\pi` is the training prior: the shares of labels times their loss weights, smoothed as the loss smooths
    labels. :math:`u_b` is the width of bin b as a share of the axis, and T is the temperature.

    The usual order is :meth:`for_labels`, training with ``model(x, labels).loss``, :meth:`calibrate` on validation
    data, and :meth:`predict`. Without :meth:`calibrate` or ``target_prior`` predictions are not adjusted towards rare
    labels.

    With :func:`dir_toolkit.experiment.training.loop.fit` use ``loss=model.criterion`` and, if there is one,
    ``fds=model.fds``. In other loops call ``model.fds.end_epoch()`` after each epoch. FDS is not a submodule, since
    DistributedDataParallel would broadcast its buffers. It still follows ``to()``, copies and the ``state_dict``.

    ``torch.export`` works for every model. ``torch.onnx`` cannot convert the median: use ``decode="expectation"`` or
    ``"mode"``.

    Args:
        backbone: a module from inputs to features (N, D).
        num_features: the number of features, D.
        bins: the label axis.
        density: the counted density of the training labels over these bins. ``"balanced_mse"``, a prior,
            :meth:`calibrate` and :meth:`calibrate_intervals` need it. With a sampler count the labels that it draws:
            ``LabelDensity.count(labels[sampler.order(0)], bins)``.
        head: ``"linear"``, ``"cosine"`` or ``"affinity"``, which score bins; ``"coral"`` or ``"corn"``, which score
            them by one binary ordinal classifier per inner edge; ``"regression"``, one number per sample;
            ``"gaussian"``, a mean and a variance; or a module from (N, D) to (N, B). The last two named heads work in
            standardized labels, with the median and the standard deviation of the density. The logits of affinities are
            their logarithms. An affinity head has one prototype per bin, or five per class.
        loss: a name; the first is the default. Bins: ``"cross_entropy"``, ``"coral_loss"`` (the default of
            ``"coral"``), ``"crps"``, ``"squared_emd"``. Classes: ``"cross_entropy"``; with affinities
            ``"affinity_loss"``, which adds the head's diversity term, or ``"cross_entropy"``. Regression:
            ``"weighted_l1"``, ``"weighted_mse"``, ``"weighted_huber"``, ``"weighted_focal_l1"``,
            ``"weighted_focal_mse"``, ``"balanced_mse"``, ``"ccc_loss"``. Gaussian: ``"gaussian_nll"``. Or a function or
            module ``loss(scores, labels, weight)`` that returns the mean over samples. Named losses in label units are
            divided by the standard deviation of the labels, and squared errors by the variance. For Huber and focal
            losses a tenth of the standard deviation is the unit.
        fds: an FDS over the features, not attached yet. The model attaches it to the input of its head.
        weights: a fitted LDS for the loss, used in training and eval mode unless weights are passed. Weights change the
            training prior. Pass them here even if your own loop weights the loss.
        outside: for labels beyond the axis in the loss: ``"raise"``; ``"clip"``, which uses the end bin, or the exact
            error; or ``"drop"``, which sets their loss to 0; the mean still divides by all samples. If the model
            drops, ``fds`` must also drop.
        missing: for NaN labels in the loss: ``"raise"``; or ``"drop"``, which takes the mean over the other samples. If
            the model drops, ``fds`` must also drop.
        options: those of the readout, which depends on head and axis: :class:`BinsReadout`, :class:`ClassReadout`,
            :class:`GaussianReadout` or :class:`PointReadout`.
    Attributes:
        backbone, head, readout: the three parts.
        fds, weights, bins, density: the arguments.
    Shape:
        forward: x as for the backbone; labels, weight: (N,). Returns :class:`LongTailOutput`. Floats are float32 or
            wider, even under autocast, except for the features, which are as the backbone gives them.

        A backbone may also return features (N, T, D), one row per step of a sequence or per pixel. All outputs then
        begin with (N, T). Labels and weights are (N, T), or (N,) for one per sequence. Padding steps have the label NaN
        with ``missing="drop"``, or weight 0. Their inputs and features must still be finite, such as 0: NaN there
        leaves the loss finite but makes gradients NaN.
    Units:
        labels, sigma and predictions are in label units; ``"cross_entropy"``, ``"coral_loss"`` and ``"gaussian_nll"``
        in nats, other named losses in standard deviations of the labels.
    Raises:
        ShapeError: head or backbone do not fit features and axis, or labels or weights do not fit features. TypeError:
            an option is not one of the readout's, or an argument has the wrong type. ValueError: a name is unknown, a
            number is out of range, or a density is missing. NotFittedError: weights are not fitted. LabelError: a label
            is NaN or beyond the axis under ``"raise"``; on accelerators the loss is NaN instead.
    Source:
        Menon et al. 2021 (arXiv:2007.07314) for the adjustment; Yang et al. 2021 (arXiv:2102.09554) for smoothing.

    >>> bins = Bins.uniform(0, 100, width=1)
    >>> density = LabelDensity(bins, torch.arange(1, 101))
    >>> model = LongTailModel(nn.Flatten(), 8, bins, density=density, target_prior="uniform", tau=0.5)
    >>> out = model(torch.zeros(3, 8), torch.tensor([20.0, 30.0, 99.5]))
    >>> out.loss.shape, out.prediction.shape, out.distribution.shape
    (torch.Size([]), torch.Size([3]), torch.Size([3, 100]))
    """

    fds: FDS | None
    weights: LDS | None

    @torch.inference_mode(False)  # Buffers must serve training later.
    def __init__(
        self,
        backbone: nn.Module,
        num_features: int,
        bins: Bins,
        *,
        density: LabelDensity | None = None,
        head: HeadName | nn.Module = "linear",
        loss: str | Callable[..., Tensor] | None = None,
        fds: FDS | None = None,
        weights: LDS | None = None,
        outside: Outside = "raise",
        missing: Missing = "raise",
        **options: Any,
    ) -> None:
        super().__init__()
        require(isinstance(bins, Bins), "bins must be one label axis, a Bins", got=type(bins), fix=_ONE_AXIS)
        instance(nn.Module, backbone=backbone)
        if density is not None:
            instance(LabelDensity, density=density)
            same_bins("density", density, bins)
        one_of("outside", outside, OUTSIDE)
        one_of("missing", missing, MISSING)
        if weights is not None:
            instance(LDS, weights=weights)
            _check_labels("weights", weights, bins)
        kind = readout_for(head, bins)
        own = [name for name, p in inspect.signature(kind).parameters.items() if p.kind is p.KEYWORD_ONLY]
        for name, value in options.items():
            got, fix = f"{name}={value!r}", f"It takes {', '.join(own)}."
            require(name in own, f"{name} must be an option of {kind.__name__}", got=got, fix=fix, error=TypeError)
        self.bins, self.density, self.outside, self.missing = bins, density, outside, missing
        self.backbone, self.num_features = backbone, (takes := length("num_features", num_features))
        gives = getattr(backbone, "num_features", takes)
        last = getattr(backbone, "head_hidden_size", gives)  # of timm, behind one more layer
        require(takes in (gives, last), f"num_features must be the backbone's {gives}", got=takes, error=ShapeError)
        self.neck = nn.Identity()  # FDS is attached here, so that head and readout get calibrated features
        self.head = kind.make_head(head, self.num_features, bins)
        self._head = head if isinstance(head, str) else None
        if isinstance(head, str):
            self._mark(self.head)
        self.weights = weights
        self.readout: Readout = kind(Setup(self.num_features, bins, density, weights, self.head, loss), **options)
        self.__dict__["fds"] = fds  # not a submodule
        if fds is not None:
            self._attach(fds)

    @classmethod
    def for_labels(
        cls,
        backbone: nn.Module,
        num_features: int,
        labels: Any,
        *,
        bins: Bins | None = None,
        for_metric: Literal["mae", "bmae", "mse", "bmse", "rmse"] | None = None,
        **options: Any,
    ) -> LongTailModel:
        """A model with bins and density from the training labels.

        After training call :meth:`calibrate`, which chooses the adjustment towards rare labels.

        Args:
            labels: the labels of all training samples: an array, a tensor, a list or a column. For classes pass
                ``bins=Bins.classes(n)``, since whole numbers could also be ages.
            bins: the axis; None means ``Bins.auto(labels)``.
            for_metric: the metric of predictions on a continuous axis. For absolute errors it decodes by the median,
                and for squared errors by the expectation. ``head="regression"`` is trained with the absolute or the
                squared error. None uses the defaults.
            options: those of the model and its readout. They override ``for_metric``.
        Raises:
            as :class:`LongTailModel`, :meth:`Bins.auto` and :meth:`LabelDensity.count`; ShapeError: labels are (N, 1).
            ValueError: ``for_metric`` is unknown, or given for classes.

        >>> ages = [21, 34, 34, 35, 60, 33, 18, 25, 41, 52]
        >>> model = LongTailModel.for_labels(nn.Linear(3, 8), 8, ages, for_metric="mse")
        >>> model.bins, model.settings["decode"]
        (<Bins: 11 from 12.5 to 67.5, unbounded>, 'expectation')
        """
        shape, rule = tuple(getattr(labels, "shape", ())), "labels must be (N,), one per sample"
        require(len(shape) != 2 or shape[1] != 1, rule, got=shape, fix="Use labels.squeeze(1).")
        one_of("missing", options.get("missing", "raise"), MISSING)
        if isinstance(weights := options.get("weights"), LDS):
            weights._check_fitted(weights._fitted)
        if bins is None:
            known = labels_array(labels)
            bins = Bins.auto(known[~np.isnan(known)] if options.get("missing") == "drop" else known)
        require(isinstance(bins, Bins), "bins must be one label axis, a Bins", got=type(bins), fix=_ONE_AXIS)
        if for_metric is not None:
            one_of("for_metric", for_metric, ("mae", "bmae", "mse", "bmse", "rmse"))
            require(not bins.categorical, "for_metric must be left out for classes", got=repr(for_metric))
            squared, head = for_metric in ("mse", "bmse", "rmse"), options.get("head", "linear")
            if head == "regression":
                options = {"loss": "weighted_mse" if squared else "weighted_l1", **options}
            elif head != "gaussian":
                options = {"decode": "expectation" if squared else "median", **options}
        placing = {name: options[name] for name in ("outside", "missing") if name in options}
        return cls(backbone, num_features, bins, density=LabelDensity.count(labels, bins, **placing), **options)

    def forward(self, x: Any, labels: Tensor | None = None, weight: Tensor | None = None) -> LongTailOutput:
        if labels is None and weight is not None:
            raise problem("weight needs labels", got="labels=None", fix="Use model(x, labels, weight).")
        features, shape = self._rows(self.backbone(x))
        if labels is None:
            output = self.readout(self.head(self._calibrated(features, None, None)), features, features)
            return self._of_shape(output, shape)
        labels, index, weight = self._placed_rows(labels, weight, shape, features)
        calibrated = self._calibrated(features, labels, index)
        output = self.readout(self.head(calibrated), features, calibrated)
        return self._of_shape(output._replace(loss=self._loss(output, labels, index, weight)), shape)

    def _calibrated(self, features: Tensor, labels: Tensor | None, index: Tensor | None) -> Tensor:
        if not self.training and torch.compiler.is_compiling():
            return features  # skips the FDS hook, which would break a compiled graph
        if self.fds is None or not self.training or labels is None or index is None:
            return self.neck(features)
        if self._shares_bins(self.fds.bins):
            rows = torch.where(index < 0, len(self.bins) - 1 - index, index)
        else:
            rows = self.fds._placed(self._clipped(labels))
        if torch.compiler.is_compiling():
            return self.fds._step(features, rows)
        with self.fds._on_rows(rows):
            return self.neck(features)

    def read(self, features: Tensor) -> LongTailOutput:
        """The output for features that the backbone computed before. FDS does not calibrate them.

        Shape:
            features: (N, num_features), or (N, T, num_features).
        Raises:
            UsageError: parameters are sharded by FSDP2, and this method is not registered as a forward method there.
        """
        features, shape = self._rows(features)
        for part in (self.head, self.readout):
            if not hasattr(part, "unshard"):  # which gathers its own
                gathered(part)
        return self._of_shape(self.readout(self.head(features), features, features), shape)

    def criterion(self, output: LongTailOutput, labels: Tensor, weight: Tensor | None = None) -> Tensor:
        """The mean loss of an output of ``model(x)``. ``model(x, labels)`` computes the same.

        Args:
            weight: >= 0, one per sample; None takes those of ``weights``.
        Shape:
            labels, weight: as those of the model. Returns ().
        Raises:
            as the model itself.
        """
        instance(LongTailOutput, output=output)
        output, shape = as_rows(output, len(self.readout.score_shape))
        shaped(("N", *self.readout.score_shape), "as this model gives them", **{"output.scores": output.scores})
        return self._loss(output, *self._placed_rows(labels, weight, shape, output.scores))

    def _placed_rows(
        self, labels: Tensor, weight: Tensor | None, shape: torch.Size, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The label, the bin and the weight of each row, (M,). Bins come from :meth:`Bins.place`, which is called once
        per batch."""
        labels = one_per_row("labels", labels, shape, rows)
        weight = None if weight is None else one_per_row("weight", weight, shape, rows)
        return labels, self.bins.place(labels, self.outside, self.missing), weight

    def _placed(self, labels: Tensor, index: Tensor) -> Placed:
        """Labels and their bins as the readout takes them; ignored labels have the values of the first bin."""
        row = index.clamp_min(0)
        values, exact = row, labels
        drops = "drop" in (self.outside, self.missing)
        if not self.bins.categorical:
            values = self._clipped(labels)
            if not readable(labels) or drops:
                values = values.to(self.bins.wide_dtype(values))
                values = torch.where(index >= 0, values, self.bins.tensor("edges", values)[0])
        if drops:
            exact = torch.where(index == -1, values, labels)
        return Placed(row, values, exact)

    def _loss(self, output: LongTailOutput, labels: Tensor, index: Tensor, weight: Tensor | None) -> Tensor:
        """The mean loss, with the weights of the model and without dropped labels."""
        placed, drops = self._placed(labels, index), "drop" in (self.outside, self.missing)
        if weight is None:
            weight = self._own_weight(placed, index)
        if drops:
            counts = index >= 0
            weight = counts.to(output.scores.dtype) if weight is None else torch.where(counts, weight, 0)
        if self.missing == "drop":  # the mean is over samples with a label
            weight = weight * (len(labels) / (~labels.isnan()).sum().clamp_min(1))  # type: ignore[operator]
        loss = self.readout.criterion(output, placed, weight, self.head)
        if readable(labels):
            return loss
        # Where values cannot be read, an invalid label makes the loss NaN.
        return loss * torch.where((index > -2).all(), 1.0, torch.nan).to(loss.dtype)

    def _own_weight(self, placed: Placed, index: Tensor) -> Tensor | None:
        """The weights that ``weights`` give, (N,), of any size for labels that are dropped."""
        if self.weights is None:
            return None
        axis: Any = self.weights.bins
        if self._shares_bins(axis):
            return self.weights._of_rows(placed.row)
        values = placed.values
        if "drop" in (self.outside, self.missing):  # dropped labels need a place on the axis of the weights, too
            values = torch.where(index >= 0, values, axis.tensor("edges", values)[0])
        return self.weights(values)

    def _clipped(self, labels: Tensor) -> Tensor:
        """The labels. With ``outside="clip"`` or unbounded bins they are clipped to the axis."""
        if self.outside != "clip" and not self.bins.unbounded:
            return labels
        if self.bins.categorical:
            return labels.clamp(0, len(self.bins) - 1)
        return labels.to(self.bins.wide_dtype(labels)).clamp(float(self.bins.edges[0]), float(self.bins.edges[-1]))

    def _shares_bins(self, bins: AnyBins) -> bool:
        """Whether the bins and the way to place labels on them are equal to the model's. A compiled graph cannot
        compare them: there equal bins that are another object count as different, and labels are placed twice."""
        return bins is self.bins or (not torch.compiler.is_compiling() and bins == self.bins)

    def set_prior(
        self,
        target_prior: TargetPrior = None,
        tau: float = 1.0,
        *,
        kernel: PriorKernel = "auto",
        temperature: float | None = None,
    ) -> None:
        """Set the prior under which the model predicts. This changes buffers, not parameters.

        With ``adjust="in_loss"`` the adjustment in the loss is taken into account. Intervals that were calibrated
        before must be calibrated again, and a warning is issued.

        Args:
            target_prior, tau: as in the readout. :meth:`calibrate` and :meth:`choose_tau` choose tau.
                The result of :func:`dir_toolkit.estimate_prior` stands for its estimate, or for None if that was not
                accepted.
            kernel: as ``prior_kernel`` of the readout; ``"auto"`` takes that of the readout.
            temperature: > 0; None keeps the current one.
        Raises:
            ValueError: there is no density, the target has another length or is not a distribution, or a number is out
            of range. RuntimeError: the head has no bins.
        """
        self.readout.set_prior(target_prior, tau, kernel, temperature, self.weights)

    def choose_tau(
        self,
        scores: Tensor,
        labels: Any,
        *,
        by: Judged | None = None,
        taus: Sequence[float] | np.ndarray | None = None,
        most_mae: float | Literal["auto"] | None = None,
        kernel: PriorKernel = "auto",
        outside: Outside | None = None,
    ) -> TauChoice:
        """Choose the tau for ``set_prior("uniform", tau)`` on validation data. The model does not change.

        The criterion estimates the error over bins of a test set: a mean over bins, weighted by width. A bin with fewer
        than three validation labels is represented by the nearest labels, since most bins of rare labels have none. A
        bin without any is weighted by the probability that a test set a third as large as the training set has a label
        there. Validation labels may be distributed differently from training labels.

        Args:
            scores: ``output.scores`` of validation data that were not used for training. The current prior and the
                offsets of ``residual`` have no influence.
            labels: in label units.
            by: ``"bmae"``, the mean absolute error over bins; ``"mae"``, over samples; ``"bmse"`` or ``"mse"``, the
                same with squared errors, for ``decode="expectation"``. For classes ``"balanced_error"`` or
                ``"error"``. None takes the first.
            taus: candidates, >= 0, rising; None means 0, 0.05, ... 3. A choice at their end causes a warning.
            most_mae: the largest allowed ratio, >= 1, of the MAE over samples, or the error of classes, to its value at
                tau 0. It bounds the cost for common labels. None is no bound. ``"auto"`` is 1.1 on an axis and none for
                classes; if no tau keeps to it, the smallest MAE is the bound.
            kernel: as in :meth:`set_prior`.
            outside: as in the model; None takes that of the model.
        Shape:
            scores: (N, B) or (N, T, B). labels: as in training.
        Returns:
            the choice, and the curves of both errors and of the MAE by region, in label units. Of several best taus it
            is the middle of their longest run.
        Raises:
            as :meth:`set_prior`; ShapeError: scores and labels do not fit; LabelError: a label lies beyond the axis.
            ValueError: there is no label, a score is not finite, taus are empty, not rising or negative, or all violate
                ``most_mae``. TypeError: scores are not a tensor of real numbers.
        """
        return choose_tau(self, scores, labels, by=by, taus=taus, most_mae=most_mae, kernel=kernel, outside=outside)

    def calibrate(
        self,
        scores_or_loader: Tensor | Iterable[Any],
        labels: Any = None,
        *,
        by: Judged | None = None,
        most_mae: float | Literal["auto"] | None = "auto",
        bias: bool | Literal["auto"] = "auto",
        outside: Outside | None = None,
    ) -> TauChoice:
        """Choose temperature, tau and, if it pays, a bias on validation data, and set them.

        A temperature is fitted by the log score of the labels' bins under the training prior. Then tau is chosen as in
        :meth:`choose_tau`, and ``set_prior("uniform", tau, temperature=temperature)`` is called. Print the result to
        see the errors before and after, and whether the bound mattered. Errors before are those at tau 0 and
        temperature 1, without a bias.

        Medians and means of an axis depend on the temperature. For them tau is also chosen at temperature 1, which is
        set if it has the lower error or alone keeps the bound. Then the distribution stays as sharp as it was trained.
        Of classes and modes, temperature 1 is set only if the fitted one raises the error or breaks the bound.

        By default the MAE over these data is at most 1.1 times that before; with ``bias=True`` it may be more if no tau
        keeps to that. Classes have no bound. ``most_mae=None`` takes all that rare labels can gain, whatever it costs
        the common ones.

        Args:
            scores_or_loader: scores as in :meth:`choose_tau`; or batches, such as a DataLoader or ``[(inputs,
                labels)]``, on which the model is run in eval mode.
            labels: the labels of the scores; None for batches.
            by, outside: as in :meth:`choose_tau`.
            most_mae: as in :meth:`choose_tau`, as a ratio to the MAE before; ``"auto"`` is 1.1, and None for classes.
            bias: whether to fit, at either temperature, a bias per class or a smooth bias along the axis, which
                is added to the divided logits and kept by :meth:`set_prior`. Classes without labels
                have none, and on an axis it is interpolated. ``"auto"`` fits it if that lowers the error, where each
                half of the data is calibrated on the other half, by more than its standard error over labels or
                sequences, if the bound can be kept, and if a best temperature is found. Sequences are not split, unless
                batches hold sequences of several lengths.
        Raises:
            as :meth:`choose_tau`. The model does not change then.
        """
        return calibrate(self, scores_or_loader, labels, by=by, most_mae=most_mae, bias=bias, outside=outside)

    def predict(self, inputs: Tensor | Iterable[Any], *, level: float | None = None) -> xr.Dataset:
        """A table of predictions with one row per sample, or per sample and step. ``to_dataframe()`` converts it to
        pandas.

        Its columns are ``prediction``; ``lower`` and ``upper``, the ends of :meth:`interval`, if the readout has
        intervals; and ``region``, the region of the training density at the prediction
        (:meth:`dir_toolkit.LabelDensity.regions`), if there is a density.

        Args:
            inputs: one batch of inputs as a tensor; or batches, such as a DataLoader, of inputs or of pairs of inputs
                and labels. The model runs in eval mode, on its own device.
            level: as in :meth:`interval`. If it is given, a readout without intervals raises an error.
        Raises:
            as :meth:`interval`. ValueError: a prediction is NaN or infinite, or there is no batch. TypeError: the
            inputs are not batches.
        """
        return predict(self, inputs, level)

    def calibrate_intervals(
        self,
        scores_or_loader: Tensor | Iterable[Any],
        labels: Any = None,
        level: float = 0.9,
        *,
        regions: Sequence[str] | np.ndarray | None = None,
        per_region: float = 1.0,
        gamma: float = 0.5,
        outside: Outside | None = None,
    ) -> None:
        """Calibrate :meth:`sets` and :meth:`interval` on held-out data by conformal prediction.

        They then hold at least a share ``level`` of the labels of each region, rare or common, for any model
        (:mod:`dir_toolkit.conformal`). Use data that were not used for training, nor to choose the epoch, the
        temperature, tau or a prior. Calibrate last: after :meth:`set_prior` or more training calibrate again. The
        thresholds are in the ``state_dict``.

        Args:
            scores_or_loader: ``output.scores`` of the model in eval mode; or batches, such as a DataLoader or
                ``[(inputs, labels)]``, on which the model is run in eval mode.
            labels: in label units; None for batches.
            level: in (0, 1).
            regions, per_region: as in :class:`dir_toolkit.conformal.PointConformal`.
            gamma: as in :class:`dir_toolkit.conformal.BinsConformal`, with the training prior. Other heads ignore it.
            outside: as ``outside`` of the model; None takes the model's own. A warning counts clipped labels that
                no interval can hold, because intervals of bins and of ``within_axis=True`` end with the axis.
        Shape:
            scores, labels: as in :class:`LongTailOutput` and in training.
        Raises:
            ShapeError: the shapes do not fit. LabelError: a label is NaN or lies beyond the axis, and the model does
            not drop it. ValueError: there is no density or no sample, a score is not finite, or a number is out of
            range.
        """
        outside = self.outside if outside is None else outside
        scores: Any = scores_or_loader
        if labels is None:
            scores, labels = held_out(self, scores)
        batches = not isinstance(scores, LongTailOutput) and not hasattr(scores, "__array__")
        rule, fix = "scores must be a tensor, or batches without labels beside them", "Pass the level by name."
        require(not batches, rule, got=type(scores), fix=fix, error=TypeError)
        scores, shape = as_rows(scores, len(self.readout.score_shape))
        if len(shape) > 1:
            (labels,) = as_tensors(labels=labels)
            labels = one_per_row("labels", labels, shape)
        self.readout.calibrate_intervals(
            scores, labels, level, gamma=gamma, weights=self.weights,
            regions=regions, per_region=per_region, outside=outside, missing=self.missing,
        )  # fmt: skip

    def interval(self, output: LongTailOutput | Tensor, level: float | None = None) -> tuple[Tensor, Tensor]:
        """Prediction intervals with the probability ``level``.

        After :meth:`calibrate_intervals` it is the hull of the calibrated set, which can be infinite if there were too
        few calibration samples. Before, it is the central interval of the predicted distribution.

        Args:
            output: the model's output or its ``distribution``; with ``"gaussian"`` and ``"regression"``, its
                ``scores``.
            level: in (0, 1). After calibration only the calibrated level is possible. None means that level, or 0.9
                before calibration.
        Shape:
            Returns the lower and the upper end, each as the predictions.
        Units:
            those of the label.
        Raises:
            ValueError: the level lies outside (0, 1), or is not the calibrated one. RuntimeError: the head scores
                classes; the head predicts one number and is not calibrated; or the prior was set after calibration.
        """
        rows, shape = as_rows(output, len(self.readout.score_shape))
        lower, upper = self.readout.interval(rows, level)
        return of_shape(lower, shape), of_shape(upper, shape)

    def sets(self, output: LongTailOutput | Tensor, level: float | None = None) -> Tensor:
        """Prediction sets of classes or bins, calibrated by :meth:`calibrate_intervals`.

        Args:
            output, level: as in :meth:`interval`.
        Shape:
            Returns (N, B), or (N, T, B), bool.
        Raises:
            ValueError: the level is not the calibrated one. RuntimeError: nothing is calibrated, or the prior was set
            after calibration.
        """
        rows, shape = as_rows(output, len(self.readout.score_shape))
        return of_shape(self.readout.sets(rows, level), shape)

    def _rows(self, features: Any) -> tuple[Tensor, torch.Size]:
        """Features as rows (M, D), and the shape of the samples that they are of, (N,) or (N, T)."""
        shape = features.shape if isinstance(features, Tensor) else torch.Size()
        size, rule = self.num_features, f"backbone must give features (N, {self.num_features}), one row per sample"
        rule, fix = f"{rule}, or (N, T, {size}), one per step", ""
        if len(shape) > 2:
            fix = "Pool over pixels or steps, or use movedim(1, -1) on features for a label per pixel or step."
        elif not shape:
            fix = "Let the backbone return its features alone, as output[0] of a GRU is."
        sound = len(shape) > 1 and shape[-1] == size
        require(sound, rule, got=shape or type(features), fix=fix, error=ShapeError)
        return features.flatten(0, -2), shape[:-1]

    def _of_shape(self, output: LongTailOutput, shape: torch.Size) -> LongTailOutput:
        return LongTailOutput(output.loss, *(of_shape(part, shape) for part in output[1:]))

    def _attach(self, fds: FDS) -> None:
        instance(FDS, fds=fds)
        _check_labels("fds", fds, self.bins)
        drop_alike("fds", fds, "model", outside=self.outside, missing=self.missing)
        takes, size = fds.num_features, self.num_features
        require(takes == size, f"fds must be over the backbone's {size} features", got=takes, error=ShapeError)
        require(not fds.attached, "fds must not be attached yet", got="one in use", fix="Make one for each model.")
        fds.attach(self.neck, "output")

    @torch.inference_mode(False)  # Buffers must serve training later.
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LongTailModel:
        super()._apply(fn, recurse)
        if self.fds is not None:
            self.fds._apply(fn)
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the model in one file for :func:`dir_toolkit.load`. It needs the package ``safetensors``.

        The file holds all parameters and buffers, axis, density, weights, options, prior and calibrated intervals. It
        holds no code: pass the backbone, and a custom head or loss, to ``load``; a head that took the place of a named
        one, as by ``stage_two(model, "lws")``, is custom. It does not hold the statistics of
        FDS, which predictions do not need.

        If parameters are sharded by FSDP2, all ranks must call this. It gathers them on each, and rank 0 writes the
        file.

        Args:
            path: a file, which is replaced atomically.
        Raises:
            ImportError: safetensors is not installed. FileNotFoundError: the folder does not exist. TypeError: the
                extra state of a module is not a tensor.
        """
        from .saving import save

        save(self, path)

    def get_extra_state(self) -> Tensor:
        without = self.fds is None or self.fds.running_count.is_meta
        return pack({"bins": self.bins.settings, "fds": None if without else dict(self.fds.state_dict())})  # type: ignore[union-attr]

    def set_extra_state(self, state: Tensor) -> None:
        """Do nothing: ``load_state_dict`` has read it before."""
        if self.__dict__.pop("_taken_up", None) is not state:
            self._take_up(state, assign=False)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch, but if it raises, nothing changes. It holds all tensors twice."""
        models = (part for part in self.modules() if isinstance(part, LongTailModel))
        with whole_or_not_at_all(self, *(model.fds for model in models if model.fds is not None)):
            return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *others: Any
    ) -> None:
        if self.weights is not None and f"{prefix}weights._extra_state" in state_dict:
            self.weights._was_fitted(state_dict[f"{prefix}weights._extra_state"])
        if f"{prefix}_extra_state" in state_dict:
            assign = local_metadata.get("assign_to_params_buffers", False)
            self._take_up(state_dict[f"{prefix}_extra_state"], assign)
            self.__dict__["_taken_up"] = state_dict[f"{prefix}_extra_state"]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)

    def _take_up(self, packed: Any, assign: bool) -> None:
        """Check and load the extra state."""
        state = unpack(packed)
        keys("the saved state", state, ("bins", "fds"))
        same_bins("the saved model", Bins.from_dict(state["bins"]), self.bins, error=CheckpointError)
        if self.fds is None:  # predictions do not need the statistics
            return
        if state["fds"] is None:
            fix = "Build the model without fds."
            raise problem("the saved model must hold FDS statistics", got="none", fix=fix, error=CheckpointError)
        self.fds.load_state_dict(state["fds"], assign=assign)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of the model except for its backbone, and its current prior, unless a ``state_dict`` set it."""
        return {
            "num_features": self.num_features,
            "bins": self.bins,
            "density": None if self.density is None else self.density.counts,
            "head": self._head if self._has_named_head else self.head,
            "fds": self.fds,
            "weights": self.weights,
            "outside": self.outside,
            "missing": self.missing,
            **self.readout.settings,
        }

    def _mark(self, head: nn.Module) -> nn.Module:
        """Note on a head that it is the one of the name that was given. Copies of it have this note, and others, as of
        ``stage_two(model, "lws")``, do not."""
        head.__dict__["_of_name"] = self._head
        return head

    @property
    def _has_named_head(self) -> bool:
        same = self.head.__dict__.get("_of_name") == self._head
        return self._head is not None and same and not is_parametrized(self.head)

    def extra_repr(self) -> str:
        return shown(self.settings)


def _check_labels(name: str, part: FDS | LDS, bins: Bins) -> None:
    """Check that a part takes the same kind of labels. Its bins may differ."""
    same = isinstance(part.bins, Bins) and part.bins.categorical == bins.categorical
    axis = "classes" if bins.categorical else "a continuous label axis"
    require(same, f"{name} must be over {axis}, as the model is", got=part.bins)
