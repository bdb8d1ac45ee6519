"""Backbone, feature smoothing, head, loss and prior as one module: continuous labels and classes by the same path."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ._checks import (
    checked_tau,
    finite,
    instance,
    is_tensor,
    keys,
    labels_array,
    length,
    not_empty,
    number,
    on_host,
    one_of,
    prior_shares,
    problem,
    real,
    same_device,
    same_shape,
    warn,
)
from ._numerics import readable, wide_dtype
from ._settings import shown
from ._state import pack, unpack, whole_or_not_at_all
from .errors import CheckpointError, ShapeError
from .features.fds import FDS
from .heads.affinity import AffinityHead
from .heads.cosine import CosineHead
from .heads.linear import LinearHead
from .labels.bins import Bins, Outside
from .labels.decoding import Decoding, decode, interval, quantiles
from .labels.density import LabelDensity, to_shares
from .labels.grid import AnyBins
from .labels.kernels import Window, checked_window, usual_kernel
from .labels.soft_labels import KernelUnit, LabelKernel, checked_sigma, limits, soft_labels, spread_counts
from .labels.weights import LDS
from .losses._loss import Reduction
from .losses.affinity import affinity_loss
from .losses.balanced_mse import BinnedIntegrationLoss
from .losses.cross_entropy import cross_entropy
from .losses.distribution import crps, soft_cross_entropy, squared_emd
from .losses.gaussian_nll import gaussian_interval, gaussian_nll
from .losses.regression import weighted_focal_l1, weighted_focal_mse, weighted_huber, weighted_l1, weighted_mse
from .priors import LogitAdjuster, Prior, TauChoice, candidate_taus, chosen_tau, prior_offset

__all__ = ["LongTailModel", "LongTailOutput"]

HeadName = Literal["regression", "gaussian", "linear", "cosine", "affinity"]
TargetPrior = Literal["uniform"] | Prior | None

_HEADS = ("regression", "gaussian", "linear", "cosine", "affinity")
# Losses that are in label units, and the power of them.
_POINT_LOSSES = {
    "weighted_l1": 1,
    "weighted_mse": 2,
    "weighted_huber": 1,
    "weighted_focal_l1": 1,
    "weighted_focal_mse": 2,
    "balanced_mse": 2,
}
_BIN_LOSSES = {"crps": 1, "squared_emd": 1}

_HARDLY_ANY = 1e-3  # of a label, spread, that reaches a bin: none lies in or near it
_LEAST_VARIANCE = 1e-6  # of the Gaussian head, in variances of the labels
_SMALL_ERROR = 0.1  # in standard deviations of the labels: what Huber's and the focal losses take for one unit


class LongTailOutput(NamedTuple):
    """What a :class:`LongTailModel` says of a batch: tensors all, for whatever gathers, saves or averages outputs.

    Attributes:
        loss: (); NaN without labels.
        scores: (N, B), logits or affinities as the head gives them. Of ``"regression"`` (N,), the prediction; of
            ``"gaussian"`` (N, 2), what :func:`dir_toolkit.losses.gaussian_nll.gaussian_nll` takes; both in label units.
        prediction: (N,), in label units; int64 for classes.
        features: (N, num_features), as the backbone gives them, before any calibration.
        distribution: (N, B), the adjusted shares of the bins, each row summing to one; (N, 0) without bins.
        residual: (N, B), what the label adds to the centre of each bin, in label units; (N, 0) unless asked for.
    """

    loss: Tensor
    scores: Tensor
    prediction: Tensor
    features: Tensor
    distribution: Tensor
    residual: Tensor


# So that torch.export can save a model that returns it.
torch.utils._pytree._register_namedtuple(LongTailOutput, serialized_type_name="dir_toolkit.LongTailOutput")


class LongTailModel(nn.Module):
    r"""A backbone with all that long-tailed labels ask for, each part optional, over classes or a continuous axis.

    On a continuous axis a head scores bins, is trained on labels spread over neighbouring bins, and is decoded into a
    label. Its softmax is the posterior under the training prior, and is carried to any other prior as classes are:

    .. math:: P(b|x) = \mathrm{softmax}\big(s_b / T - \tau \log (\pi_b / u_b) + \log (P_{target}(b) / u_b)\big),

    with :math:`\pi` the training prior, the shares of labels times the weights that their loss had, spread over bins
    as the loss spreads labels, and :math:`u` the shares of the bins' widths. So a network that learns nothing from its
    inputs answers with the target at :math:`\tau = 1`. Over ``Bins.classes`` the same path is plain classification
    with logit adjustment. ``model(x, labels)`` computes the loss, too; in training it enters ``fds.labels(labels)``.
    With :func:`dir_toolkit.experiment.training.loop.fit` use ``loss=model.criterion`` and, if there is one,
    ``fds=model.fds``. In other loops call ``model.fds.end_epoch()`` after each epoch. FDS is no submodule, so that
    DistributedDataParallel does not send its buffers around; it goes along with ``to()``, with copies, and with the
    ``state_dict``.

    ``torch.export`` takes and saves every model. ``torch.onnx`` has no search among sorted numbers, which the median
    needs: convert a model with ``decode="expectation"`` or ``"mode"``.

    Args:
        num_features: D, what the backbone gives.
        bins: the label axis.
        density: of the training labels, as counted, over these bins; needed for a prior and ``"balanced_mse"``. Where a
            sampler draws them, of what it draws: ``LabelDensity.count(labels[sampler.order(0)], bins)``.
        head: ``"linear"``, ``"cosine"`` or ``"affinity"``, which score bins; ``"regression"``, one number, or
            ``"gaussian"``, mean and variance, both around the density's median in units of its standard deviation
            (those of evenly spread labels, without one); or a module from (N, D) to (N, B).
            Affinities a are read as logits log a, so that they are shares after division by their sum; on a continuous
            axis each bin has one prototype, else five.
        loss: by name, in the order default first: bins ``"cross_entropy"``, ``"crps"``, ``"squared_emd"``; classes
            ``"cross_entropy"``, or with affinities ``"affinity_loss"``, the max-margin loss plus the head's diversity,
            ``"cross_entropy"``; regression ``"weighted_l1"``, ``"weighted_mse"``, ``"weighted_huber"``,
            ``"weighted_focal_l1"``, ``"weighted_focal_mse"``, ``"balanced_mse"``; Gaussian ``"gaussian_nll"``. Or
            a function or module called as ``loss(scores, labels, weight, reduction=reduction)``. Named losses that
            are in label units are divided by the labels' spread, squared errors by its square, so that a model does not
            depend on the unit; what Huber's and the focal losses take for one unit is a tenth of the spread. The spread
            is the standard deviation of the density, or of evenly spread labels without one.
        sigma: by how much ``"cross_entropy"`` and ``"squared_emd"`` spread labels over bins, in label units;
            ``"auto"`` takes two bins on a continuous axis, as wide as they are where the label lies. None or 0 means
            hard labels; other losses take labels as they are.
        label_kernel: as in :func:`dir_toolkit.labels.soft_labels.soft_labels`.
        fds: not attached yet; the model attaches it to what its head takes.
        weights: fitted, over these bins or others of the axis; weighs the loss, in eval mode too, where none are given.
            Weights are a part of the training prior, which is the density times them; so a model that is trained with
            weights should know them here, however they reach its loss.
        prior: what to predict under: None, the training prior; ``"uniform"``, even over the axis, whatever the widths
            of its bins; or the share of each bin, (B,).
        tau: strength of the adjustment, >= 0.
        adjust: ``"after"`` adjusts predictions; ``"in_loss"`` adds the opposite to the logits that a named loss sees
            (``"affinity_loss"`` apart), so that plain scores predict under ``prior``.
        prior_kernel: how the training prior is spread over bins. ``"auto"`` spreads it as the loss spreads labels, each
            taken to lie at the centre of its bin, and not at all where the loss takes labels as they are. A window
            smooths it instead, and None leaves it. A bin that less than one label reaches is filled up to one, of its
            own weight. ``"balanced_mse"`` has its density smoothed by the window; there ``"auto"`` is
            ``gaussian(5, 2)`` on an axis of five bins or more, else None.
        temperature: T > 0, :func:`dir_toolkit.fit_temperature`.
        decode: how a distribution becomes a label, :func:`dir_toolkit.labels.decoding.decode`. None means the median,
            or the mode for classes.
        residual: also learn where in its bin a label lies, an offset no larger than reaches the bin's edges. The
            prediction is then the centre of the decoded bin plus its offset. Pays where bins are coarse.
        residual_weight: factor, >= 0, of the absolute error of that offset, in widths of the bin, in the loss.
        expectation_weight: factor, >= 0, of the absolute error of the expectation, in the labels' spread, in the loss.
        within_axis: hold the predictions of heads of one number, and their intervals, to the axis; scores, and with
            them the loss, are left as they are. Balanced MSE predicts beyond the labels otherwise.
        outside: what a label beyond the axis does in the loss: ``"raise"``; ``"clip"``, to be placed in the end bin,
            while its error stays exact; ``"drop"``, to count nowhere, as a weight of zero does. An ``fds`` must drop,
            too, where the model does.
    Attributes:
        backbone, head: the two parts. adjuster: a :class:`dir_toolkit.LogitAdjuster`, with bins.
        fds, weights, bins, density: as given.
    Shape:
        forward: x as the backbone takes it; labels, weight: (N,). Returns :class:`LongTailOutput`; floats are float32
        or wider, under autocast too.
    Units:
        labels, sigma and predictions in those of the axis, in float64 where float32 does not tell its bins apart;
        ``"cross_entropy"`` and ``"gaussian_nll"`` in nats, other named losses in spreads of the labels.
    Raises:
        ShapeError: head or backbone do not fit features and axis; labels are not (N,), one a sample: maps of labels
        are not supported. ValueError: options do not go together, a word is unknown, a number is out of range, or
        there is no density where one is needed. TypeError: a part is of another kind. NotFittedError: weights are not
        fitted where a prior is asked for. LabelError: a label is NaN, or lies beyond the axis under ``"raise"``; on
        accelerators the loss is NaN instead.
    Source:
        Menon et al. 2021 (arXiv:2007.07314) for the adjustment; Yang et al. 2021 (arXiv:2102.09554) for smoothing.

    >>> bins = Bins.uniform(0, 100, width=1)
    >>> density = LabelDensity(bins, torch.arange(1, 101))
    >>> model = LongTailModel(nn.Flatten(), 8, bins, density=density, prior="uniform", tau=0.5)
    >>> out = model(torch.zeros(3, 8), torch.tensor([20.0, 30.0, 99.5]))
    >>> out.loss.shape, out.prediction.shape, out.distribution.shape
    (torch.Size([]), torch.Size([3]), torch.Size([3, 100]))
    """

    fds: FDS | None
    weights: LDS | None
    _warned_crowded = False
    offset: Tensor
    scale: Tensor
    loss_offset: Tensor
    reach: Tensor

    @torch.inference_mode(False)  # what is kept must serve training, too
    def __init__(
        self,
        backbone: nn.Module,
        num_features: int,
        bins: Bins,
        *,
        density: LabelDensity | None = None,
        head: HeadName | nn.Module = "linear",
        loss: str | Callable[..., Tensor] | None = None,
        sigma: float | Literal["auto"] | None = "auto",
        label_kernel: LabelKernel = "gaussian",
        fds: FDS | None = None,
        weights: LDS | None = None,
        prior: TargetPrior = None,
        tau: float = 1.0,
        adjust: Literal["after", "in_loss"] = "after",
        prior_kernel: Window | Literal["auto"] | None = "auto",
        temperature: float = 1.0,
        decode: Decoding | None = None,
        residual: bool = False,
        residual_weight: float = 0.1,
        expectation_weight: float = 0.0,
        within_axis: bool = False,
        outside: Outside = "raise",
    ) -> None:
        super().__init__()
        _check_axis(bins, density)
        instance(nn.Module, backbone=backbone)
        instance(bool, residual=residual, within_axis=within_axis)
        one_of("outside", outside, ("raise", "clip", "drop"))
        one_of("label_kernel", label_kernel, ("gaussian", "laplace", "triangular"))
        one_of("adjust", adjust, ("after", "in_loss"))
        if decode is not None:
            one_of("decode", decode, ("expectation", "median", "mode"))
        self.bins, self.density, self.num_features = bins, density, _num_features(backbone, num_features)
        self.adjust, self.label_kernel, self.within_axis, self.outside = adjust, label_kernel, within_axis, outside
        self.residual_weight = number("residual_weight", residual_weight, low=0)
        self.expectation_weight = number("expectation_weight", expectation_weight, low=0)

        self.backbone = backbone
        self.neck = nn.Identity()  # where FDS is attached, so that all that reads features reads calibrated ones
        self.head = self._make_head(head)
        self._by_affinity = isinstance(self.head, AffinityHead)
        self._kind = head if head in ("regression", "gaussian") else "classes" if bins.categorical else "bins"
        self._has_bins = self._kind in ("classes", "bins")
        self._refuse_options(sigma, prior, tau, temperature, decode, residual)
        self._given: dict[str, Any] = {"head": head, "sigma": sigma}  # as given
        median, self._spread = (0.0, 1.0) if bins.categorical else self._spread_of_labels()
        self.decoding: Decoding = decode or ("median" if self._kind == "bins" else "mode")
        if isinstance(prior_kernel, str):
            one_of("prior_kernel", prior_kernel, ("auto",))
        self.prior_kernel = prior_kernel
        if weights is not None:
            instance(LDS, weights=weights)
            _check_kind("weights", weights.bins, bins)
        self.weights = weights
        self.loss = self._make_loss(loss)
        self._calls_loss = not isinstance(self.loss, str)  # told now: torch 2.4's compiler cannot ask a partial
        self.sigma = self._checked_sigma(sigma)

        self._warned_unseen = density is not None and density._of_weighted_rows
        self._prior: dict[str, Any] = {"prior": prior, "tau": tau, "temperature": temperature}
        if self._has_bins:
            self._start_prior(prior, tau, temperature)
        else:
            dtype = bins.wide_dtype(torch.zeros(()))
            self.register_buffer("offset", torch.tensor(median, dtype=dtype))
            self.register_buffer("scale", torch.tensor(self._spread, dtype=dtype))
        self.residual = LinearHead(num_features, len(bins)) if residual else None
        if residual:
            reach = np.maximum(bins.edges[1:] - bins.centers, bins.centers - bins.edges[:-1])
            self.register_buffer("reach", torch.tensor(reach, dtype=torch.float32))

        self.__dict__["fds"] = fds  # no submodule
        if fds is not None:
            self._attach(fds)

    def forward(self, x: Any, labels: Tensor | None = None, weight: Tensor | None = None) -> LongTailOutput:
        if labels is None and weight is not None:
            fix = "Use model(x, labels, weight)."
            raise problem("weight needs labels", got="labels=None", fix=fix)
        features = self.backbone(x)
        self._check_features(features)
        calibrated = features
        # A compiled graph in eval mode has no use for the hook, which would break it.
        if self.training or not torch.compiler.is_compiling():
            if self.fds is not None and self.training and labels is not None:
                calibrated = self._neck_under(self._clipped(labels), features)
            else:
                calibrated = self.neck(features)
        output = self._read(self.head(calibrated), features, calibrated)
        return output if labels is None else LongTailOutput(self.criterion(output, labels, weight), *output[1:])

    @torch._disable_dynamo  # so that the compiler breaks its graph once, around all of FDS, and not within a with
    def _neck_under(self, labels: Tensor, features: Tensor) -> Tensor:
        with self.fds.labels(labels):  # type: ignore[union-attr]
            return self.neck(features)

    def read(self, features: Tensor) -> LongTailOutput:
        """What the model says of features that its backbone gave before; no FDS calibrates them.

        Shape:
            features: (N, num_features).
        """
        self._check_features(features)
        return self._read(self.head(features), features, features)

    def criterion(
        self, output: LongTailOutput, labels: Tensor, weight: Tensor | None = None, *, reduction: Reduction = "mean"
    ) -> Tensor:
        """The loss of what ``model(x)`` returned, with all its terms; ``model(x, labels)`` computes it like this.

        Args:
            weight: >= 0, one a sample; None takes those of ``weights``. Divides by N, not by the sum of weights.
        Shape:
            labels, weight: (N,). Returns (), or (N,) for ``reduction="none"``.
        Raises:
            as the model itself.
        """
        instance(LongTailOutput, output=output)
        if self._has_bins and output.scores.shape[1:] != (len(self.bins),):
            rule = f"output must be this model's, with scores (N, {len(self.bins)})"
            raise problem(rule, got=f"shape {tuple(output.scores.shape)}", error=ShapeError)
        one_of("reduction", reduction, ("none", "mean", "sum"))
        is_tensor(labels=labels)
        if labels.shape != output.scores.shape[:1]:
            rule = f"labels must be ({len(output.scores)},), one a sample"
            fix = "Use labels.squeeze(1)." if labels.shape[1:] == (1,) else ""
            raise problem(rule, got=f"shape {tuple(labels.shape)}", fix=fix, error=ShapeError)
        same_device(scores=output.scores, labels=labels)
        placed, counts, sound = self._placed(labels)
        if weight is None and self.weights is not None:
            weight = self.weights(placed)
        if counts is not None:
            if weight is not None:
                same_shape(labels=labels, weight=weight)
            weight = counts.to(output.scores.dtype) if weight is None else torch.where(counts, weight, 0)
        how: dict[str, Any] = {"reduction": reduction}
        # A bin is that of the label as it was placed; an error is that of the label itself.
        exact = placed if self.outside == "drop" else labels
        loss = self._first_term(output.scores, placed if self._has_bins else exact, weight, how)
        if self.expectation_weight:
            expected = self._decoded(self._trained_logits(output.scores).softmax(1), "expectation")
            off = weighted_l1(expected, exact, weight, **how)
            loss = loss + self.expectation_weight / self._spread * off
        if self.residual is not None:
            row = self.bins.rows(placed, "clip").clamp_max(len(self.bins) - 1)
            values = exact.to(self.bins.wide_dtype(exact))
            widths = self.bins.tensor("edges", values).diff()[row]
            rest = (values - self.bins.tensor("centers", values)[row]) / widths
            own = output.residual.gather(1, row[:, None]).squeeze(1) / widths
            loss = loss + self.residual_weight * weighted_l1(own, rest, weight, **how)
        if sound is not None:
            sound = sound if reduction == "none" else sound.all()
            loss = loss * torch.where(sound, 1.0, torch.nan).to(loss.dtype)
        return loss

    def _placed(self, labels: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Labels moved onto the axis; which of them count, None for all; and which are labels that may be there, None
        where those that may not would have raised.

        Raises:
            LabelError: a label is NaN, or lies beyond the axis and is to raise.
        """
        looked_at = readable(labels)
        if looked_at and self.outside != "drop":
            self.bins.index(labels, self.outside)
            return self._clipped(labels), None, None
        index = self.bins.index(labels, "clip" if self.outside == "clip" else "drop")
        placed: Tensor = index.clamp_min(0)
        if not self.bins.categorical:
            values = self._clipped(labels.to(self.bins.wide_dtype(labels)))
            placed = torch.where(index >= 0, values, self.bins.tensor("edges", values)[0])
        if self.outside != "drop":
            return placed, None, index >= 0
        return placed, index >= 0, None if looked_at else self.bins.index(labels, "clip") >= 0

    def _clipped(self, labels: Tensor) -> Tensor:
        """Labels as they are, or with ``outside="clip"`` those beyond the axis at its end."""
        if self.outside != "clip":
            return labels
        if self.bins.categorical:
            return labels.clamp(0, len(self.bins) - 1)
        return labels.to(self.bins.wide_dtype(labels)).clamp(float(self.bins.edges[0]), float(self.bins.edges[-1]))

    def set_prior(
        self,
        target: TargetPrior = None,
        tau: float = 1.0,
        *,
        kernel: Window | Literal["auto"] | None = "auto",
        temperature: float | None = None,
    ) -> None:
        """Choose, after training, the prior under which the model predicts. Its buffers change, no parameter does.

        Where the prior was adjusted in the loss already, what the scores know of it is taken off first.

        Args:
            target, tau: as ``prior`` and ``tau`` of the model. :func:`dir_toolkit.choose_tau` finds tau for classes,
                given ``class_prior(density, weights=weights)`` where the loss was weighted.
            kernel: as ``prior_kernel`` of the model; ``"auto"`` takes the model's own.
            temperature: > 0; None leaves it as it is.
        Raises:
            ValueError: there is no density, the target has another length or is no distribution, or a number is out of
            range. RuntimeError: the head has no bins.
        """
        if not self._has_bins:
            raise problem("only heads that score bins have a prior", got=repr(self._kind), error=RuntimeError)
        if temperature is None:
            temperature = self.adjuster.temperature.item()
        self._adjust(target, tau, kernel, temperature, "target")

    def _adjust(
        self,
        target: TargetPrior,
        tau: float,
        kernel: Window | Literal["auto"] | None,
        temperature: float,
        name: str,
    ) -> None:
        """Predict under ``target``, which the caller knows as ``name``."""
        temperature = number("temperature", temperature, low=0, open_low=True, float32=True)
        self.adjuster.offset.copy_(self._offset(target, tau, kernel, name))
        self.adjuster.temperature.fill_(temperature)
        self._prior = {"prior": target, "tau": tau, "temperature": temperature}

    def _offset(
        self, target: TargetPrior, tau: float, kernel: Window | Literal["auto"] | None, name: str = "target"
    ) -> Tensor:
        """What is added to the logits to predict under ``target``, (B,)."""
        checked_tau(tau)
        if isinstance(target, str):
            one_of(name, target, ("uniform",))
        elif target is not None:
            target = torch.from_numpy(labels_array(target, name).astype(np.float64))
            if target.shape != (len(self.bins),):
                rule = f"{name} must be ({len(self.bins)},), one share a bin"
                raise problem(rule, got=f"shape {tuple(target.shape)}", error=ShapeError)
            prior_shares(name, target, zeros=True)
        kernel = self._chosen_kernel(kernel)
        if target is None:
            return self.loss_offset.clone()
        return self._offset_from(self._training_prior(kernel), target, tau)

    def _chosen_kernel(self, kernel: Window | Literal["auto"] | None) -> Window | Literal["auto"] | None:
        if isinstance(kernel, str):
            one_of("kernel", kernel, ("auto",))
            kernel = self.prior_kernel
        if kernel is not None and not isinstance(kernel, str):
            checked_window(kernel, len(self.bins))
        return kernel

    def _offset_from(self, prior: Tensor, target: Literal["uniform"] | Prior, tau: float) -> Tensor:
        offset = prior_offset(prior, target, tau)
        # Per label unit: u cancels at tau 1, but where the target is u itself.
        power = tau if isinstance(target, str) else tau - 1
        offset = offset + power * torch.from_numpy(np.log(self.bins.relative_widths))
        return offset.float().to(self.loss_offset) + self.loss_offset

    @torch.no_grad()
    def choose_tau(
        self,
        scores: Tensor,
        labels: Tensor,
        *,
        by: Literal["bmae", "mae"] = "bmae",
        taus: Sequence[float] | np.ndarray | None = None,
        kernel: Window | Literal["auto"] | None = "auto",
        outside: Outside | None = None,
    ) -> TauChoice:
        """The tau with which ``set_prior("uniform", tau)`` errs least on validation data; the model stays as it is.

        Args:
            scores: as the model gives them, of validation data that training has not seen; whatever prior it predicts
                under now does not matter, and neither do the offsets of ``residual``.
            labels: in label units.
            by: ``"bmae"``, the mean over the axis of each bin's mean absolute error, bins without labels left out, or
                ``"mae"``, over samples.
            taus: candidates, >= 0, rising; None means 0, 0.05, ... 3. A choice at their end is warned of.
            kernel: as in :meth:`set_prior`.
            outside: as ``outside`` of the model; None takes the model's own.
        Shape:
            scores: (N, B). labels: (N,).
        Returns:
            the choice and its curve, in label units; among equals the middle of the longest run.
        Raises:
            as :meth:`set_prior`; ShapeError: scores and labels do not fit; LabelError: a label lies beyond the axis.
            ValueError: there is no label, a score is not finite, taus are empty, not rising or negative, or bins are
            classes: for these :func:`dir_toolkit.choose_tau` serves. TypeError: scores are no tensor of real numbers.
        """
        one_of("by", by, ("bmae", "mae"))
        if self._kind != "bins":
            rule, got = "the head must score bins of a continuous axis", repr(self._kind)
            if self._has_bins:
                raise problem(rule, got=got, fix="For classes use dir_toolkit.choose_tau.")
            raise problem(rule, got=got, error=RuntimeError)
        outside = self.outside if outside is None else outside
        one_of("outside", outside, ("raise", "clip", "drop"))
        is_tensor(scores=scores, labels=labels)
        real(scores=scores)
        if scores.shape != (*labels.shape[:1], len(self.bins)) or labels.ndim != 1:
            rule = f"scores must be (N, {len(self.bins)}) and labels (N,)"
            got = f"{tuple(scores.shape)} and {tuple(labels.shape)}"
            raise problem(rule, got=got, error=ShapeError)
        not_empty(labels=labels)
        scores = scores.to(wide_dtype(scores))
        finite(scores=on_host("scores", scores))
        row = self.bins.index(on_host("labels", labels), outside)
        if not bool((row >= 0).all()):
            scores, labels, row = (part[(row >= 0).to(part.device)] for part in (scores, labels, row))
            if len(row) == 0:
                raise problem("at least one label must lie on the axis", got="none")
        row = row.to(scores.device)
        share = torch.tensor(self.bins.relative_widths, device=scores.device)
        tried = candidate_taus(taus)
        trial = copy.deepcopy(self.adjuster)
        prior = self._training_prior(self._chosen_kernel(kernel))
        curve = []
        for tau in tried:
            trial.offset.copy_(self._offset_from(prior, "uniform", float(tau)))
            error = (self._decoded(trial(self._logits(scores)).softmax(1), self.decoding) - labels).abs().double()
            sums, counts = (error.new_zeros(len(self.bins)).index_add(0, row, x) for x in (error, error**0))
            seen = counts > 0
            of_bins = (share * sums / counts)[seen].sum() / share[seen].sum()
            curve.append((of_bins if by == "bmae" else error.mean()).item())
        return chosen_tau(tried, np.array(curve), by, trial.temperature.item())

    def interval(self, output: LongTailOutput | Tensor, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """The central interval that holds a label with the probability ``level``.

        Args:
            output: of the model, or its ``distribution``; with ``"gaussian"``, its ``scores``.
            level: in (0, 1).
        Shape:
            Returns the lower and the upper end, (N,) each.
        Units:
            those of the label.
        Raises:
            ValueError: the level lies outside (0, 1), or bins are classes, which have no order. RuntimeError: a head of
            one number has no distribution.
        """
        level = number("level", level, low=0, high=1, open_low=True, open_high=True)
        if self._kind == "regression":
            fix = 'Use head="gaussian", or one that scores bins.'
            raise problem("the head must tell a distribution", got="'regression'", fix=fix, error=RuntimeError)
        instance((LongTailOutput, Tensor), output=output)
        if self._kind == "gaussian":
            pred = output.scores if isinstance(output, LongTailOutput) else output
            lower, upper = gaussian_interval(pred, level, min_variance=self._least_variance)
            return self._held(lower), self._held(upper)
        shares: Any = output.distribution if isinstance(output, LongTailOutput) else output
        return interval(shares, self.bins, level)

    def _check_features(self, features: Any) -> None:
        shape = tuple(features.shape) if isinstance(features, Tensor) else ()
        if shape[1:] != (self.num_features,):
            rule = f"backbone must give features (N, {self.num_features}), one row a sample"
            fix = "Pool over pixels first: maps of labels are not supported." if len(shape) in (3, 4) else ""
            got = shape if isinstance(features, Tensor) else type(features).__name__
            raise problem(rule, got=got, fix=fix, error=ShapeError)

    def _read(self, scores: Tensor, features: Tensor, calibrated: Tensor) -> LongTailOutput:
        if not isinstance(scores, Tensor):
            raise _wrong_head(len(self.bins), type(scores).__name__)
        scores = scores.to(wide_dtype(scores))
        loss, none = scores.new_full((), torch.nan), scores.new_zeros(scores.shape[0], 0)
        if not self._has_bins:
            scores = scores.to(self.bins.wide_dtype(scores))
            offset, scale = self.offset.to(scores.dtype), self.scale.to(scores.dtype)
            if self._kind == "regression":
                scores = mean = offset + scale * scores.squeeze(1)  # (N, 1) -> (N,)
            else:
                mean, log_variance = scores.unbind(1)
                mean = offset + scale * mean
                scores = torch.stack([mean, log_variance + 2 * scale.log()], 1)
            return LongTailOutput(loss, scores, self._held(mean), features, none, none)
        if scores.shape != (features.shape[0], len(self.bins)):
            raise _wrong_head(len(self.bins), f"shape {tuple(scores.shape)}")
        adjusted = self.adjuster(self._logits(scores))
        distribution = adjusted.softmax(1)
        if self._kind == "classes":
            return LongTailOutput(loss, scores, adjusted.argmax(1), features, distribution, none)
        prediction = self._decoded(distribution, self.decoding)
        if self.residual is None:
            return LongTailOutput(loss, scores, prediction, features, distribution, none)
        residual = self.residual(calibrated)
        residual = self.reach.to(scores.dtype) * residual.to(scores.dtype).tanh()
        if self.decoding == "mode":
            row = distribution.argmax(1)
        else:
            row = torch.searchsorted(limits(self.bins, scores)[1:-1].contiguous(), prediction.detach(), right=True)
        inside = self.bins.tensor("centers", prediction)[row] + residual.gather(1, row[:, None]).squeeze(1)
        # The search places NaN in the last bin.
        prediction = inside.masked_fill(prediction.isnan(), torch.nan)
        return LongTailOutput(loss, scores, prediction, features, distribution, residual)

    def _held(self, prediction: Tensor) -> Tensor:
        if not self.within_axis:
            return prediction
        return prediction.clamp(float(self.bins.edges[0]), float(self.bins.edges[-1]))

    def _logits(self, scores: Tensor) -> Tensor:
        # An affinity that has underflowed to zero has no slope; log 0 would give it an infinite one.
        return scores.clamp_min(torch.finfo(scores.dtype).tiny).log() if self._by_affinity else scores

    def _trained_logits(self, scores: Tensor) -> Tensor:
        """The logits that the loss sees."""
        return self._logits(scores) + self.loss_offset.to(scores.dtype)

    def _decoded(self, distribution: Tensor, how: Decoding) -> Tensor:
        """NaN where the scores are, so that a training loop tells where training broke."""
        known = distribution.detach().isfinite().all(1)
        value = decode(torch.where(known[:, None], distribution, 1 / len(self.bins)), self.bins, how)
        return value.masked_fill(~known, torch.nan)

    def _first_term(self, scores: Tensor, labels: Tensor, weight: Tensor | None, how: dict[str, Any]) -> Tensor:
        if self._calls_loss:
            return self.loss(scores, labels, weight, **how) / self._loss_unit  # type: ignore[operator]
        if self.loss == "affinity_loss":
            samples = len(labels) if how["reduction"] == "sum" else 1
            return affinity_loss(scores, labels, weight, **how) + samples * self.head.diversity()  # type: ignore[operator]
        logits = self._trained_logits(scores)
        if self.loss == "crps":
            return crps(logits, labels, weight, bins=self.bins, **how) / self._loss_unit
        if self._kind == "classes":
            return cross_entropy(logits, labels, weight, **how)
        target = soft_labels(labels, self.bins, self.sigma, kernel=self.label_kernel, unit=self._sigma_unit)
        if self.loss == "squared_emd":
            return squared_emd(logits, target, weight, bins=self.bins, **how) / self._loss_unit
        return soft_cross_entropy(logits, target, weight, **how)

    def _make_head(self, head: Any) -> nn.Module:
        size, count = self.num_features, len(self.bins)
        if isinstance(head, nn.Module):
            takes = getattr(head, "num_features", getattr(head, "in_features", size))
            if takes != size:
                rule = f"head must take the backbone's {size} features"
                raise problem(rule, got=takes, error=ShapeError)
            gives = getattr(head, "num_classes", getattr(head, "out_features", count))
            if gives != count:
                raise _wrong_head(count, gives)
            return head
        one_of("head", head, _HEADS)
        if head in ("regression", "gaussian"):
            if self.bins.categorical:
                rule = f"head must score classes, which are no numbers, with {self.bins!r}"
                raise problem(rule, got=repr(head), fix="Use head='linear'.")
            return LinearHead(size, 1 if head == "regression" else 2)
        if head == "affinity":
            return AffinityHead(size, count, prototypes=5 if self.bins.categorical else 1)
        return CosineHead(size, count) if head == "cosine" else LinearHead(size, count)

    def _refuse_options(self, sigma: Any, prior: Any, tau: Any, temperature: Any, decode: Any, residual: bool) -> None:
        """Options that the kind of head cannot follow must not be left without effect."""
        given: dict[str, tuple[Any, tuple[Any, ...]]] = {}  # each with what it may be
        if self._kind != "bins":
            given = {
                "residual": (residual, (False,)),
                "expectation_weight": (self.expectation_weight, (0,)),
                "sigma": (sigma, ("auto", None, 0)),
                "decode": (decode, (None, "mode") if self._has_bins else (None,)),
            }
        if not self._has_bins:
            given["prior"] = ("one" if prior is not None else None, (None,))
            given["adjust"] = (self.adjust, ("after",))
            given["tau"], given["temperature"] = (tau, (1,)), (temperature, (1,))
        elif self.within_axis:
            rule = "within_axis must be left out for heads that score bins, whose predictions lie on it"
            raise problem(rule, got="True")
        for name, (value, allowed) in given.items():
            if value not in allowed:
                without = "classes, which have no distances" if self._has_bins else f"head={self._kind!r}, without bins"
                raise problem(f"{name} must be left out for {without}", got=repr(value))

    def _checked_sigma(self, sigma: Any) -> float | None:
        self._sigma_unit: KernelUnit = "label"
        if self._kind != "bins" or sigma is None:
            return None
        if isinstance(sigma, str):
            one_of("sigma", sigma, ("auto",))
        if self.loss not in ("cross_entropy", "squared_emd"):
            if sigma not in ("auto", 0):
                rule, fix = (
                    "sigma must be left out with a loss that takes labels as they are",
                    'Use loss="cross_entropy".',
                )
                raise problem(rule, got=repr(sigma), fix=fix)
            return None
        warned_before = self.density is not None and self.density._warned_crowded and isinstance(sigma, str)
        if isinstance(sigma, str):  # two bins, however wide each is
            even = bool((self.bins.relative_widths == 1).all())
            self._sigma_unit = "label" if even else "bin"
            sigma = 2 * float(np.median(np.diff(self.bins.edges))) if even else 2.0
        sigma = checked_sigma(sigma, self.bins, self._sigma_unit)
        in_bins = self._sigma_unit == "bin"
        reach = len(self.bins) if in_bins else float(self.bins.edges[-1] - self.bins.edges[0])
        told = f"sigma={sigma:g}" + " bins" * in_bins
        if sigma > reach / 4:
            axis = f"an axis of {reach} bins" if in_bins else f"an axis {reach:g} long"
            warn(f"{told} spreads each label over most of {axis}. Pass a smaller one.")
        elif self.density is not None and sigma > (middle := self._middle_half(in_bins)) / 1.35:
            self._warned_crowded = True
            if warned_before:
                return sigma
            warn(
                f"{told} spreads each label wider than the middle half of all labels lies, {middle:.3g} of {reach:g}. "
                "Learn the logarithm of the labels, or use bins that are narrow where labels are, as Bins.quantile or "
                "Bins.from_edges(numpy.geomspace(...)) make them.",
            )
        return sigma

    def _middle_half(self, in_bins: bool) -> float:
        """How far the quartiles of the labels lie apart, in label units or in bins."""
        assert self.density is not None
        ends = quantiles(torch.from_numpy(self.density.prior()), self.bins, [0.25, 0.75]).numpy()
        if in_bins:
            ends = np.interp(ends, self.bins.edges, np.arange(len(self.bins) + 1))
        return float(ends[1] - ends[0])

    def _make_loss(self, loss: Any) -> str | Callable[..., Tensor]:
        """A function, or the name of a loss of bins."""
        names: tuple[str, ...] = {
            "regression": tuple(_POINT_LOSSES),
            "gaussian": ("gaussian_nll",),
            "bins": ("cross_entropy", *_BIN_LOSSES),
            "classes": ("affinity_loss", "cross_entropy") if self._by_affinity else ("cross_entropy",),
        }[self._kind]
        loss = self._given["loss"] = names[0] if loss is None else loss
        if isinstance(loss, str):
            one_of("loss", loss, names)
        elif not callable(loss):
            raise problem("loss must be a name or a function", got=type(loss).__name__, error=TypeError)
        if self.adjust == "in_loss" and (not isinstance(loss, str) or loss == "affinity_loss"):
            rule = 'adjust must be "after" with a loss that takes scores as they are'
            raise problem(rule, got='"in_loss"', fix='Use loss="cross_entropy".')
        power = {**_POINT_LOSSES, **_BIN_LOSSES}.get(loss, 0) if isinstance(loss, str) else 0
        self._loss_unit = self._spread**power
        self._least_variance = max(_LEAST_VARIANCE * self._spread**2, torch.finfo(torch.float32).tiny)
        if loss == "balanced_mse":
            density = self._needed_density('loss="balanced_mse"')
            usual = isinstance(self.prior_kernel, str)
            kernel: Any = usual_kernel(self.bins) if usual else self.prior_kernel
            (counts,) = self._spread_as(kernel, self._weighted(density))
            return BinnedIntegrationLoss(self.bins, LabelDensity(self.bins, counts))
        small = _SMALL_ERROR * self._spread
        functions: dict[str, Callable[..., Tensor]] = {
            "weighted_l1": weighted_l1,
            "weighted_mse": weighted_mse,
            "weighted_huber": partial(weighted_huber, delta=small),
            "weighted_focal_l1": partial(weighted_focal_l1, beta=0.2 / small),
            "weighted_focal_mse": partial(weighted_focal_mse, beta=0.2 / small),
            "gaussian_nll": partial(gaussian_nll, min_variance=self._least_variance),
        }
        return functions.get(loss, loss) if isinstance(loss, str) else loss

    def _start_prior(self, prior: TargetPrior, tau: float, temperature: float) -> None:
        self.adjuster = LogitAdjuster(np.full(len(self.bins), 1 / len(self.bins)), tau=0.0)
        self.register_buffer("loss_offset", torch.zeros(len(self.bins)))
        self._adjust(prior, tau, "auto", temperature, "prior")
        if self.adjust == "after":
            return
        if prior is None:
            raise problem('adjust="in_loss" needs a prior', got="None", fix='Pass prior="uniform".')
        if not isinstance(prior, str) and (labels_array(prior, "prior") == 0).any():
            raise problem('prior must be positive with adjust="in_loss"', got="a share of zero")
        self.loss_offset.copy_(-self.adjuster.offset)
        self.adjuster.offset.zero_()

    def _training_prior(self, kernel: Window | Literal["auto"] | None) -> Tensor:
        density = self._needed_density("a prior")
        reached, learnt = self._spread_as(kernel, density, self._weighted(density))
        unseen = int((reached < _HARDLY_ANY).sum())
        if unseen and not self._warned_unseen:
            self._warned_unseen = True
            warn(f"no label in or near {unseen} of {len(self.bins)} bins; the prior takes each to have one.")
        one_each = self._weighted(LabelDensity(self.bins, np.ones(len(self.bins)))).counts
        # Filled up, so that the adjustment of a bin that training has hardly seen stays bounded.
        return torch.from_numpy(to_shares(learnt + one_each * (1 - reached).clip(min=0)))

    def _needed_density(self, what: str) -> LabelDensity:
        if self.density is None:
            fix = "Pass density=LabelDensity.count(train_labels, bins)."
            raise problem(f"{what} needs density", got="None", fix=fix)
        return self.density

    def _spread_as(
        self, kernel: Window | Literal["auto"] | None, *densities: LabelDensity
    ) -> Sequence[np.ndarray] | np.ndarray:
        """The counts of each density, (B,), spread as the loss spreads labels, or smoothed by a window."""
        if kernel is None or (isinstance(kernel, str) and not self.sigma):
            return [density.counts for density in densities]
        assert self.density is not None
        if self.density.counts.dtype.kind == "f" and not self.density._of_weighted_rows:
            fix = "Hand over the counted density, or None as the kernel."
            raise problem("density must be as counted, to be smoothed", got=repr(self.density), fix=fix)
        if not isinstance(kernel, str):
            return [density.smooth(kernel).counts for density in densities]
        assert self.sigma is not None
        counts = np.stack([density.counts for density in densities]).astype(np.float64)
        return spread_counts(counts, self.bins, self.sigma, kernel=self.label_kernel, unit=self._sigma_unit)

    def _weighted(self, density: LabelDensity) -> LabelDensity:
        if self.weights is None or (self.weights.table.is_meta and torch.empty(0).is_meta):
            return density  # without storage, which a state will fill
        return density.weighted(self.weights)

    def _spread_of_labels(self) -> tuple[float, float]:
        """Median and standard deviation of the labels, spread evenly in each bin."""
        edges, centers = self.bins.edges, self.bins.centers
        widths = np.diff(edges)
        shares = widths / widths.sum() if self.density is None else self.density.prior()
        median = quantiles(torch.from_numpy(shares), self.bins, 0.5).item()
        variance = shares @ ((centers - shares @ centers) ** 2 + widths**2 / 12)
        return median, math.sqrt(variance)

    def _attach(self, fds: FDS) -> None:
        instance(FDS, fds=fds)
        _check_kind("fds", fds.bins, self.bins)
        if self.outside == "drop" and fds.outside != "drop":
            raise problem('fds must have outside="drop", as the model has', got=repr(fds.outside))
        if fds.num_features != self.num_features:
            rule = f"fds must be over the backbone's {self.num_features} features"
            raise problem(rule, got=fds.num_features, error=ShapeError)
        if fds.attached:
            rule = "fds must not be attached yet, since the model attaches it"
            raise problem(rule, got="an FDS in use", fix="Make one for each model.")
        fds.attach(self.neck, "output")

    @torch.inference_mode(False)  # what is kept must serve training, too
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LongTailModel:
        kept = {name: self._buffers[name] for name in ("offset", "scale") if name in self._buffers}
        super()._apply(fn, recurse)
        for name, old in kept.items():  # where labels lie is not rounded to the precision of weights
            new = self._buffers[name]
            if old is not None and new is not None and new.itemsize < old.itemsize:
                self._buffers[name] = new.to(old.dtype) if old.is_meta else old.to(new.device)
        if self.fds is not None:
            self.fds._apply(fn)
        return self

    def get_extra_state(self) -> Tensor:
        without = self.fds is None or self.fds.running_count.is_meta
        return pack({"bins": self.bins.settings, "fds": None if without else dict(self.fds.state_dict())})  # type: ignore[union-attr]

    def set_extra_state(self, state: Tensor) -> None:
        """``load_state_dict`` has taken it up before anything of the model changed; others hand over nothing else."""
        if self.__dict__.pop("_taken_up", None) is not state:
            self._take_up(state, assign=False)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's, but a state that is refused changes nothing, for which all numbers are held twice meanwhile."""
        with whole_or_not_at_all(self, *([] if self.fds is None else [self.fds])):
            return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *others: Any
    ) -> None:
        if self.weights is not None and f"{prefix}weights._extra_state" in state_dict:
            self.weights._checked_state(state_dict[f"{prefix}weights._extra_state"])
        if f"{prefix}_extra_state" in state_dict:
            assign = local_metadata.get("assign_to_params_buffers", False)
            self._take_up(state_dict[f"{prefix}_extra_state"], assign)
            self.__dict__["_taken_up"] = state_dict[f"{prefix}_extra_state"]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)

    def _take_up(self, packed: Any, assign: bool) -> None:
        state = unpack(packed)
        keys("the saved state", state, ("bins", "fds"))
        if (saved := Bins.from_dict(state["bins"])) != self.bins:
            rule = "the saved model must be over the same bins"
            raise problem(rule, got=f"{saved!r} for {self.bins!r}", error=CheckpointError)
        if self.fds is None:  # nothing to calibrate; predictions do not need the statistics
            return
        if state["fds"] is None:
            rule, fix = "the saved model must hold FDS statistics", "Build the model without fds."
            raise problem(rule, got="none", fix=fix, error=CheckpointError)
        self.fds.load_state_dict(state["fds"], assign=assign)

    @property
    def settings(self) -> dict[str, Any]:
        """What the model was made with, but for its backbone, and the prior that it predicts under now."""
        head, loss = self._given["head"], self._given["loss"]
        return {
            "num_features": self.num_features,
            "bins": self.bins,
            "density": None if self.density is None else self.density.counts,
            "head": head if isinstance(head, str) else self.head,
            "loss": loss if isinstance(loss, str) else self.loss,
            "sigma": self._given["sigma"],
            "label_kernel": self.label_kernel,
            "fds": self.fds,
            "weights": self.weights,
            **self._prior,
            "adjust": self.adjust,
            "prior_kernel": self.prior_kernel,
            "decode": self.decoding,
            "residual": self.residual is not None,
            "residual_weight": self.residual_weight,
            "expectation_weight": self.expectation_weight,
            "within_axis": self.within_axis,
            "outside": self.outside,
        }

    def extra_repr(self) -> str:
        return shown(self.settings)


def _check_axis(bins: Any, density: Any) -> None:
    if not isinstance(bins, Bins):
        fix = "One label a sample: use Bins.uniform, .from_edges, .quantile or .classes."
        raise problem("bins must be one label axis, a Bins", got=type(bins).__name__, fix=fix, error=TypeError)
    if density is None:
        return
    instance(LabelDensity, density=density)
    if density.bins != bins:
        raise problem("density must be over the same bins", got=f"{density.bins} for {bins}")


def _check_kind(name: str, own: AnyBins, bins: Bins) -> None:
    """A part may cut the axis into bins of its own, but must take the same labels."""
    if not isinstance(own, Bins) or own.categorical != bins.categorical:
        rule = f"{name} must be over {'classes' if bins.categorical else 'a continuous label axis'}, as the model is"
        raise problem(rule, got=repr(own))


def _num_features(backbone: nn.Module, num_features: Any) -> int:
    size = length("num_features", num_features)
    gives = getattr(backbone, "num_features", size)
    if gives != size:
        rule = f"num_features must be the backbone's {gives}"
        raise problem(rule, got=size, error=ShapeError)
    return size


def _wrong_head(count: int, got: object) -> Exception:
    rule = f"head must give one score a bin, (N, {count})"
    return problem(rule, got=got, error=ShapeError)
