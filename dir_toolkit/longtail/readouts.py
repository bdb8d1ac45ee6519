"""Readouts interpret the output of a head: they define targets, loss, prediction and intervals.

There is one readout per kind of output: a number, a Gaussian, a distribution over the bins of a continuous axis, or a
distribution over classes. Each has its own options (the keyword-only arguments of its constructor), named heads, named
losses and decoding. :class:`dir_toolkit.LongTailModel` creates the readout for its head and its axis.

Losses in label units are divided by the spread of the labels (squared errors by its square), so that a model does not
depend on the unit of its labels. The spread is the standard deviation of the density, or of a uniform distribution if
there is no density.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .._checks import (
    checked_tau,
    finite,
    instance,
    is_tensor,
    labels_array,
    number,
    on_host,
    one_of,
    prior_shares,
    problem,
    real,
    require,
    shaped,
    warn,
    word,
)
from .._numerics import default_dtype, wide_dtype
from .._state import WideBuffers
from ..conformal import BinsConformal, Conformal, GaussianConformal, PointConformal
from ..errors import ShapeError
from ..heads.affinity import AffinityHead
from ..heads.cosine import CosineHead
from ..heads.linear import LinearHead
from ..heads.ordinal import CoralHead, CornHead
from ..labels.bins import Bins
from ..labels.decoding import Decoding, decoded, interval, quantiles
from ..labels.density import LabelDensity, to_shares
from ..labels.grid import checked_windows
from ..labels.kernels import Window, usual_kernel
from ..labels.soft_labels import Ends, KernelUnit, LabelKernel, checked_sigma, limits, spread, spread_counts
from ..labels.weights import LDS
from ..losses.affinity import affinity_loss
from ..losses.balanced_mse import BinnedIntegrationLoss
from ..losses.concordance import ccc_loss
from ..losses.cross_entropy import cross_entropy
from ..losses.distribution import coral_loss, crps, soft_cross_entropy, squared_emd
from ..losses.gaussian_nll import gaussian_interval, gaussian_nll
from ..losses.regression import weighted_focal_l1, weighted_focal_mse, weighted_huber, weighted_l1, weighted_mse
from ..priors import LogitAdjuster, Prior, log_prior_offset
from ..target_prior import PriorEstimate
from .intervals import CalibratedIntervals

__all__ = ["BinsReadout", "ClassReadout", "GaussianReadout", "LongTailOutput", "PointReadout"]

TargetPrior = Literal["uniform"] | Prior | PriorEstimate | None
PriorKernel = Window | Literal["auto"] | None

_HARDLY_ANY = 1e-3  # the smallest smoothed count of a bin that has a label in or near it
_LEAST_VARIANCE = 1e-6  # the smallest variance of a Gaussian, in variances of the labels
_SMALL_ERROR = 0.1  # the unit of Huber and focal losses, in standard deviations of the labels


class LongTailOutput(NamedTuple):
    """The output of a :class:`LongTailModel` for a batch. All fields are tensors. For sequences each field except the
    loss has a second axis, of T steps.

    Attributes:
        loss: (). It is NaN without labels.
        scores: (N, B), the logits or affinities of the head. With ``head="regression"`` they are (N,), the prediction
            itself. With ``head="gaussian"`` they are (N, 2), mean and log-variance as in
            :func:`dir_toolkit.losses.gaussian_nll.gaussian_nll`. Both are in label units.
        prediction: (N,), in label units; int64 for classes.
        features: (N, num_features) from the backbone, before calibration by FDS.
        distribution: (N, B), the adjusted probabilities of the bins, each row summing to one; (N, 0) without bins. Over
            a continuous axis decode it with ``ends=model.readout.ends``.
        residual: (N, B), the offset from the centre of each bin, in label units; (N, 0) without ``residual=True``.
    """

    loss: Tensor
    scores: Tensor
    prediction: Tensor
    features: Tensor
    distribution: Tensor
    residual: Tensor


# torch.export can save a model only if the type of its output is registered.
torch.utils._pytree._register_namedtuple(LongTailOutput, serialized_type_name="dir_toolkit.LongTailOutput")


class Placed(NamedTuple):
    """Labels (N,) placed on the axis.

    Attributes:
        row: the bin of each label; the first bin for ignored labels.
        values: the labels clipped to the axis, in label units; for classes the row itself.
        exact: the labels without clipping, for errors.
    """

    row: Tensor
    values: Tensor
    exact: Tensor


class Setup(NamedTuple):
    """The arguments of a readout. The weights determine the training prior."""

    num_features: int
    bins: Bins
    density: LabelDensity | None
    weights: LDS | None
    head: nn.Module
    loss: str | Callable[..., Tensor] | None


class Loss(NamedTuple):
    """A named loss.

    Attributes:
        function: called as ``function(scores, target, weight, **options)``; returns the mean over samples.
        power: the power of the label unit in the unit of the loss.
        options: a function from bins and spread to the options of the loss.
    """

    function: Callable[..., Any]
    power: int = 0
    options: Callable[[Bins, float], dict[str, Any]] = lambda bins, spread: {}


class Readout(WideBuffers):
    """The base of readouts. The keyword-only arguments of a subclass are its options."""

    heads: ClassVar[Mapping[str, Callable[[int, int], nn.Module]]]
    losses: ClassVar[Mapping[str, Loss]]
    conformal: ClassVar[type[Conformal]]

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.intervals = CalibratedIntervals(setup.bins, self.conformal)
        self.bins, self.density = setup.bins, setup.density
        self.median, self.spread = _spread_of_labels(setup.bins, setup.density)
        names = self._loss_names(setup.head)
        loss = names[0] if setup.loss is None else setup.loss
        word("loss", loss, *names)
        require(isinstance(loss, str) or callable(loss), "loss must be a name or a function", got=type(loss))
        self.score_shape: tuple[int, ...] = (len(self.bins),)  # of one sample
        self.loss_name = loss if isinstance(loss, str) else None
        named = self.losses[loss] if isinstance(loss, str) else Loss(loss)
        self.loss, self.loss_options = named.function, named.options(self.bins, self.spread)
        self.loss_unit = self.spread**named.power

    @classmethod
    def make_head(cls, head: str | nn.Module, num_features: int, bins: Bins) -> nn.Module:
        """The head of this name, or the given module with sizes checked where it has them."""
        if isinstance(head, str):
            one_of("head", head, tuple(cls.heads))
            return cls.heads[head](num_features, len(bins))
        takes = getattr(head, "num_features", getattr(head, "in_features", num_features))
        rule = f"head must take the backbone's {num_features} features"
        require(takes == num_features, rule, got=takes, error=ShapeError)
        gives = getattr(head, "num_classes", getattr(head, "out_features", len(bins)))
        _fits(gives == len(bins), bins, gives)
        return head

    def _loss_names(self, head: nn.Module) -> tuple[str, ...]:
        """The named losses for this head; the first is the default."""
        return tuple(self.losses)

    def seen(self, scores: Tensor) -> Tensor:
        """The scores for the loss."""
        return scores

    def target(self, labels: Placed) -> Tensor:
        """The target for the loss."""
        return labels.exact

    def criterion(self, output: LongTailOutput, labels: Placed, weight: Tensor | None, head: nn.Module) -> Tensor:
        """The mean loss of a batch."""
        return self.loss_of(output.scores, self.target(labels), weight)

    def loss_of(self, scores: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """The mean loss of scores and the result of :meth:`target`."""
        return self.loss(self.seen(scores), target, weight, **self.loss_options) / self.loss_unit

    def set_prior(
        self, target_prior: TargetPrior, tau: float, kernel: PriorKernel, temperature: float | None, weights: LDS | None
    ) -> None:
        raise self.cannot("have a prior")

    def forecast(self, scores: Tensor) -> Tensor:
        """The forecast of checked scores for conformal calibration."""
        return scores

    @torch.no_grad()
    def calibrate_intervals(
        self, scores: Tensor, labels: Any, level: float, *, gamma: float, weights: LDS | None, **options: Any
    ) -> None:
        number("level", level, low=0, high=1, open_low=True, open_high=True, float32=True)
        is_tensor(scores=scores)
        real(scores=scores)
        shaped(("N", *self.score_shape), "output.scores of this model", scores=scores)
        scores = scores.to(wide_dtype(scores))
        finite(scores=on_host("scores", scores))
        calibration = self._calibration(_needed("calibrate_intervals", self.density), gamma, weights, **options)
        calibration._add(scores=self.forecast(scores), labels=labels)
        if self.ends_on_axis and (options["outside"] == "clip" or self.bins.unbounded):
            values = labels_array(labels, "labels")
            lost = int(((values < self.bins.edges[0]) | (values > self.bins.edges[-1])).sum())
            if lost:
                fix = "within_axis=False" if isinstance(self, _NumberReadout) else "an unbounded one"
                warn(
                    f"{lost} of {len(values)} labels lie beyond the axis, where intervals end, so that they are not "
                    f"held. Use a wider axis, or {fix}."
                )
        self.intervals.take(calibration, level)

    @property
    def ends_on_axis(self) -> bool:
        """Whether no interval reaches beyond the axis."""
        return not (self.bins.unbounded or self.bins.categorical)

    def _calibration(self, density: LabelDensity, gamma: float, weights: LDS | None, **options: Any) -> Conformal:
        return self.conformal(density, **options)

    def interval(self, output: LongTailOutput | Tensor, level: float | None) -> tuple[Tensor, Tensor]:
        if self.intervals.known(level):
            return self.intervals.interval(self._calibrated(output))
        return self._central(output, 0.9 if level is None else level)

    @property
    def has_interval(self) -> bool:
        return self.intervals.exact_level != 0 or type(self)._central is not Readout._central

    def sets(self, output: LongTailOutput | Tensor, level: float | None) -> Tensor:
        rule, fix = "intervals must be calibrated", "Call calibrate_intervals first."
        require(self.intervals.known(level), rule, got="a model that is not", fix=fix, error=RuntimeError)
        return self.intervals.sets(self._calibrated(output))

    def _calibrated(self, output: LongTailOutput | Tensor) -> Tensor:
        """The forecast of an output for conformal calibration."""
        scores = output.scores if isinstance(output, LongTailOutput) else output
        is_tensor(output=scores)
        return self.forecast(self.conformal._checked("output", scores, self.bins))

    def _central(self, output: LongTailOutput | Tensor, level: float) -> tuple[Tensor, Tensor]:
        """The central interval of the predicted distribution."""
        fix = 'Call calibrate_intervals first, or use a head that scores bins, such as head="linear".'
        raise self.cannot("give intervals of a label", fix)

    def cannot(self, what: str, fix: str = 'Use a head that scores bins, such as head="linear".') -> Exception:
        return problem(f"the readout must {what}", got=f"a {type(self).__name__}", fix=fix, error=RuntimeError)

    @property
    def settings(self) -> dict[str, Any]:
        """The loss and the options of the constructor."""
        return {"loss": self.loss_name or self.loss}


class _NumberReadout(Readout):
    """A readout of standardized numbers: relative to the median of the labels, in units of their spread."""

    offset: Tensor
    scale: Tensor
    _bytes_kept = 8  # labels that need float64 also need it after a cast

    def __init__(self, setup: Setup, within_axis: bool) -> None:
        super().__init__(setup)
        instance(bool, within_axis=within_axis)
        self.within_axis = within_axis
        dtype = self.bins.wide_dtype(torch.zeros(()))
        squares = self.loss_name in ("weighted_mse", "weighted_focal_mse", "gaussian_nll") and dtype == torch.float32
        rule = f'labels must have a spread from 1e-15 to 1e15 for loss="{self.loss_name}", as their squares are float32'
        fix = "Divide the labels by their spread."
        require(not squares or 1e-15 <= self.spread <= 1e15, rule, got=f"{self.spread:g}", fix=fix)
        self.register_buffer("offset", torch.tensor(self.median, dtype=dtype))
        self.register_buffer("scale", torch.tensor(self.spread, dtype=dtype))

    def forward(self, raw: Tensor, features: Tensor, calibrated: Tensor) -> LongTailOutput:
        raw = raw.to(self.bins.wide_dtype(raw.to(wide_dtype(raw))))
        scores, mean = self._read(raw, self.offset.to(raw.dtype), self.scale.to(raw.dtype))
        loss, none = scores.new_full((), torch.nan), scores.new_zeros(scores.shape[0], 0)
        return LongTailOutput(loss, scores, self._held(mean), features, none, none)

    def _read(self, raw: Tensor, offset: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The scores and the prediction, in label units."""
        raise NotImplementedError

    @property
    def ends_on_axis(self) -> bool:
        return self.within_axis

    def _held(self, prediction: Tensor) -> Tensor:
        if not self.within_axis:
            return prediction
        return prediction.clamp(float(self.bins.edges[0]), float(self.bins.edges[-1]))

    def interval(self, output: LongTailOutput | Tensor, level: float | None) -> tuple[Tensor, Tensor]:
        lower, upper = super().interval(output, level)
        return self._held(lower), self._held(upper)

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "within_axis": self.within_axis}


class PointReadout(_NumberReadout):
    """A point prediction: one number per sample.

    Args:
        within_axis: whether predictions and ends of intervals are clipped to the axis. Scores and the loss are not
            clipped. Balanced MSE needs it, since it can predict beyond the labels. Then no interval holds a
            label beyond the axis. ``outside="clip"`` and an unbounded axis allow such labels.
        prior_kernel: the window that smooths the density for ``"balanced_mse"``. ``"auto"`` is ``gaussian(5, 2)`` on an
            axis of five bins or more, else None.
    """

    conformal = PointConformal
    heads: ClassVar = {"regression": lambda num_features, num_bins: LinearHead(num_features, 1)}
    losses: ClassVar = {
        "weighted_l1": Loss(weighted_l1, 1),
        "weighted_mse": Loss(weighted_mse, 2),
        "weighted_huber": Loss(weighted_huber, 1, lambda bins, spread: {"delta": _SMALL_ERROR * spread}),
        "weighted_focal_l1": Loss(weighted_focal_l1, 1, lambda bins, spread: {"beta": 0.2 / (_SMALL_ERROR * spread)}),
        "weighted_focal_mse": Loss(weighted_focal_mse, 2, lambda bins, spread: {"beta": 0.2 / (_SMALL_ERROR * spread)}),
        "balanced_mse": Loss(BinnedIntegrationLoss, 2),  # made in the constructor
        "ccc_loss": Loss(ccc_loss),
    }

    def __init__(self, setup: Setup, *, within_axis: bool = False, prior_kernel: PriorKernel = "auto") -> None:
        super().__init__(setup, within_axis)
        self.score_shape = ()
        word("prior_kernel", prior_kernel, "auto")
        self.prior_kernel = prior_kernel
        if self.loss_name == "balanced_mse":
            density = _needed('loss="balanced_mse"', self.density)
            kernel = usual_kernel(self.bins) if isinstance(prior_kernel, str) else prior_kernel
            density = _weighted(density, setup.weights)
            if kernel is not None:
                density = _as_counted(self.density, density).smooth(kernel)
            self.loss = BinnedIntegrationLoss(self.bins, density)

    def _read(self, raw: Tensor, offset: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        prediction = offset + scale * raw.squeeze(1)  # (N, 1) -> (N,)
        return prediction, prediction

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "prior_kernel": self.prior_kernel}


class GaussianReadout(_NumberReadout):
    """A mean and a log-variance per sample. The mean is the prediction.

    Args:
        within_axis: whether predictions and ends of intervals are clipped to the axis. Scores are not clipped.
    """

    conformal = GaussianConformal
    heads: ClassVar = {"gaussian": lambda num_features, num_bins: LinearHead(num_features, 2)}
    losses: ClassVar = {
        "gaussian_nll": Loss(gaussian_nll, 0, lambda bins, spread: {"min_variance": _least_variance(spread)}),
    }

    def __init__(self, setup: Setup, *, within_axis: bool = False) -> None:
        super().__init__(setup, within_axis)
        self.score_shape = (2,)

    def _read(self, raw: Tensor, offset: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = raw.unbind(1)
        mean = offset + scale * mean
        return torch.stack([mean, log_variance + 2 * scale.log()], 1), mean

    def forecast(self, scores: Tensor) -> Tensor:
        least = scores.new_full((), _least_variance(self.spread)).log()
        return torch.stack([scores[:, 0], scores[:, 1].logaddexp(least)], 1)

    def _central(self, output: LongTailOutput | Tensor, level: float) -> tuple[Tensor, Tensor]:
        pred = output.scores if isinstance(output, LongTailOutput) else output
        return gaussian_interval(pred, level, min_variance=_least_variance(self.spread))


class ScoreReadout(Readout):
    """One score per bin. ``adjuster`` converts scores from the training prior to the target prior."""

    conformal = BinsConformal

    loss_offset: Tensor  # (B,), the offset of logits in the loss
    bias: Tensor  # (B,), the offset of logits that calibration found
    judged: ClassVar[tuple[str, ...]]  # the error over bins, the error over samples, and both with squared errors

    def __init__(
        self,
        setup: Setup,
        target_prior: TargetPrior,
        tau: float,
        adjust: Literal["after", "in_loss"],
        prior_kernel: PriorKernel,
        temperature: float,
    ) -> None:
        super().__init__(setup)
        one_of("adjust", adjust, ("after", "in_loss"))
        self.affinities = isinstance(setup.head, AffinityHead)
        word("prior_kernel", prior_kernel, "auto")
        self.adjust, self.prior_kernel = adjust, prior_kernel
        self._warned_unseen = self.density is not None and self.density._of_weighted_rows
        if adjust == "in_loss" and self.loss_name in (None, "affinity_loss"):
            rule, fix = 'adjust must be "after" with a loss that takes scores as they are', 'Use loss="cross_entropy".'
            raise problem(rule, got='"in_loss"', fix=fix)
        self.adjuster = LogitAdjuster(np.full(len(self.bins), 1 / len(self.bins)), tau=0.0)
        for name in ("loss_offset", "bias"):
            self.register_buffer(name, torch.zeros(len(self.bins), dtype=default_dtype()))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if (like := state_dict.get(prefix + "loss_offset")) is not None:  # older states have no bias
            state_dict.setdefault(prefix + "bias", torch.zeros_like(like))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _start_prior(self, target_prior: TargetPrior, tau: float, temperature: float, weights: LDS | None) -> None:
        """Set the initial prior from the options."""
        self.set_prior(target_prior, tau, "auto", temperature, weights)
        if self.adjust == "after":
            return
        shares: Any = self.prior_settings["target_prior"]
        if shares is None:
            got = "None" if target_prior is None else "an estimate that was not accepted"
            fix = 'Pass target_prior="uniform"' + (" or estimate.estimated" if target_prior is not None else "") + "."
            raise problem('adjust="in_loss" needs target_prior', got=got, fix=fix)
        if not isinstance(shares, str) and (shares == 0).any():
            raise problem('target_prior must be positive with adjust="in_loss"', got="a share of zero")
        self.loss_offset.copy_(-self.adjuster.offset)
        self.adjuster.offset.zero_()

    def set_prior(
        self,
        target_prior: TargetPrior,
        tau: float,
        kernel: PriorKernel,
        temperature: float | None,
        weights: LDS | None,
        bias: Tensor | None = None,
    ) -> None:
        if temperature is None:
            temperature = self.adjuster.temperature.item()
        temperature = number("temperature", temperature, low=0, open_low=True, float32=True)
        if isinstance(target_prior, PriorEstimate):
            target_prior = target_prior.estimated if target_prior.accepted else None
        target, tau, kernel = _target_shares(target_prior, self.bins), checked_tau(tau), self.chosen_kernel(kernel)
        offset, bias = self._offset(target, tau, kernel, weights), self.bias if bias is None else bias
        if (level := self.intervals.exact_level) > 0:  # as an error this comes before any change
            warn("intervals were calibrated under another prior. Call calibrate_intervals again before interval.")
            self.intervals.set_level(-level)
        self.bias.copy_(bias)
        self.adjuster.offset.copy_(offset + bias)
        self.adjuster.temperature.fill_(temperature)
        shares = target.numpy() if isinstance(target, Tensor) else target
        if isinstance(shares, np.ndarray):
            shares.setflags(write=False)
        self.prior_settings = {"target_prior": shares, "tau": tau, "temperature": temperature}

    def _offset(self, target: Any, tau: float, kernel: PriorKernel, weights: LDS | None) -> Tensor:
        """The offset of logits, (B,), for predictions under a checked target, without bias."""
        if target is None:
            return self.loss_offset
        return self.offset_from(self.training_prior(kernel, weights), target, tau)

    def offset_from(self, prior: Tensor, target: Any, tau: float) -> Tensor:
        """The offset of logits, (B,), from a training prior to a target."""
        uniform = isinstance(target, str)
        offset = log_prior_offset(prior, -tau, None if uniform else target)
        # Shares are per label unit. The widths cancel at tau 1, unless the target is uniform over the axis.
        power = tau if uniform else tau - 1
        offset = offset + power * torch.from_numpy(np.log(self.bins.relative_widths))
        return offset.float().to(self.loss_offset) + self.loss_offset

    def chosen_kernel(self, kernel: PriorKernel) -> PriorKernel:
        """The checked kernel. ``"auto"`` is that of the readout."""
        word("kernel", kernel, "auto")
        kernel = self.prior_kernel if isinstance(kernel, str) else kernel
        if kernel is not None and not isinstance(kernel, str):
            (kernel,) = checked_windows(kernel, self.bins)
        return kernel

    def training_prior(self, kernel: PriorKernel, weights: LDS | None) -> Tensor:
        """The training prior, (B,): the shares of labels times their weights, smoothed as the loss smooths labels."""
        density = _needed("the training prior", self.density)
        reached, learnt = self._spread_out(kernel, density, _weighted(density, weights))
        unseen = int((reached < _HARDLY_ANY).sum())
        if unseen and not self._warned_unseen:
            self._warned_unseen = True
            warn(f"no label in or near {unseen} of {len(self.bins)} bins; in the prior each has a count of one.")
        one_each = _weighted(LabelDensity(self.bins, np.ones(len(self.bins))), weights).counts
        # A minimum count bounds the adjustment of bins without labels.
        counts = learnt + one_each * (1 - reached).clip(min=0)
        if weights is not None and (one_each == 0).any():  # of labels that lie beyond the axis of the weights
            table = weights.table[:-1].detach().cpu().double().numpy()
            counts = np.maximum(counts, np.where(one_each > 0, 0, table[table > 0].min()))
        return torch.from_numpy(to_shares(counts))

    def _spread_out(self, kernel: PriorKernel, *densities: LabelDensity) -> Sequence[np.ndarray] | np.ndarray:
        """The counts (B,) of each density, smoothed as the loss smooths labels or by a window."""
        if kernel is None or isinstance(kernel, str):
            return [density.counts for density in densities]
        return [_as_counted(self.density, density).smooth(kernel).counts for density in densities]

    def seen(self, scores: Tensor) -> Tensor:
        return scores if self.loss_name in (None, "affinity_loss") else self.trained_logits(scores)

    def target(self, labels: Placed) -> Tensor:
        return labels.values

    def forward(self, scores: Tensor, features: Tensor, calibrated: Tensor) -> LongTailOutput:
        _fits(isinstance(scores, Tensor), self.bins, type(scores))
        _fits(scores.shape == (features.shape[0], len(self.bins)), self.bins, scores.shape)
        scores = scores.to(wide_dtype(scores))
        prediction, distribution, residual = self._read(self.adjuster._adjusted(self.logits(scores)), calibrated)
        return LongTailOutput(scores.new_full((), torch.nan), scores, prediction, features, distribution, residual)

    def forecast(self, scores: Tensor) -> Tensor:
        return self.adjuster._adjusted(self.logits(scores)).softmax(1)

    def _calibrated(self, output: LongTailOutput | Tensor) -> Tensor:
        shares = output.distribution if isinstance(output, LongTailOutput) else output
        is_tensor(output=shares)
        return self.conformal._checked("output", shares, self.bins)

    def _calibration(self, density: LabelDensity, gamma: float, weights: LDS | None, **options: Any) -> Conformal:
        prior = self.training_prior(self.chosen_kernel("auto"), weights).numpy()
        return BinsConformal(density, gamma=gamma, prior=prior, **options)

    def _read(self, adjusted: Tensor, calibrated: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The prediction, the distribution and the residuals."""
        raise NotImplementedError

    def errors(self, adjusted: Tensor, labels: Tensor) -> Tensor:
        """The error (N,) of the prediction from adjusted logits for each label, without residuals."""
        raise NotImplementedError

    def logits(self, scores: Tensor) -> Tensor:
        """Scores as logits. Affinities are raised to a minimum, since log 0 has an infinite slope."""
        return scores.clamp_min(torch.finfo(scores.dtype).tiny).log() if self.affinities else scores

    def trained_logits(self, scores: Tensor) -> Tensor:
        """The logits for the loss."""
        return self.logits(scores) + self.loss_offset.to(scores.dtype)

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, **self.prior_settings, "adjust": self.adjust, "prior_kernel": self.prior_kernel}


class BinsReadout(ScoreReadout):
    """A distribution over the bins of a continuous axis, decoded into a point prediction.

    Args:
        target_prior: the prior of predictions: None, the training prior; ``"uniform"``, uniform per label unit; or the
            probability of each bin, (B,).
        tau: the strength of the adjustment, >= 0.
        adjust: ``"after"`` adjusts predictions. ``"in_loss"`` adds tau times the log of the training prior to the
            logits in training, so that plain logits predict under the target prior.
        prior_kernel: the smoothing of the training prior. ``"auto"`` smooths as the loss smooths labels. A window
            smooths the counts instead, and None does not smooth. Every bin has a minimum of one label of its own
            weight, or of the smallest weight if its own is 0.
        temperature: the divisor of logits, T > 0, :func:`dir_toolkit.fit_temperature`.
        sigma: the standard deviation of soft labels for ``"cross_entropy"``, ``"coral_loss"`` and ``"squared_emd"``, in
            label units. ``"auto"`` is two bins. None or 0 means hard labels, as in the papers of CORAL and CORN. Soft
            labels use ``ends="open"`` of :func:`dir_toolkit.labels.soft_labels.soft_labels`, unless each bin is one
            whole number.
        label_kernel: as ``kernel`` of :func:`dir_toolkit.labels.soft_labels.soft_labels`.
        decode: the point prediction, as ``point`` of :func:`dir_toolkit.labels.decoding.decode`. ``"median"`` suits
            absolute errors (MAE, bMAE), and ``"expectation"`` squared errors (MSE, RMSE).
        residual: whether to also learn an offset of the label within its bin. The prediction is then the centre of the
            decoded bin plus its offset. Use it for wide bins.
        residual_weight: the factor, >= 0, of the absolute error of that offset in the loss. The error is in bin widths.
        expectation_weight: the factor, >= 0, of the absolute error of the expectation in the loss. The error is in
            spreads of the labels.
    """

    heads: ClassVar = {
        "linear": LinearHead,
        "cosine": CosineHead,
        "affinity": partial(AffinityHead, prototypes=1),
        "coral": CoralHead,
        "corn": CornHead,
    }
    losses: ClassVar = {
        "cross_entropy": Loss(soft_cross_entropy),
        "coral_loss": Loss(coral_loss),
        "crps": Loss(crps, 1, lambda bins, spread: {"bins": bins}),
        "squared_emd": Loss(squared_emd, 1, lambda bins, spread: {"bins": bins}),
    }
    judged: ClassVar = ("bmae", "mae", "bmse", "mse")
    _spread_labels = (
        "cross_entropy",
        "coral_loss",
        "squared_emd",
    )  # the losses with soft labels as targets

    reach: Tensor  # (B,), the largest residual in each bin

    def __init__(
        self,
        setup: Setup,
        *,
        target_prior: TargetPrior = None,
        tau: float = 1.0,
        adjust: Literal["after", "in_loss"] = "after",
        prior_kernel: PriorKernel = "auto",
        temperature: float = 1.0,
        sigma: float | Literal["auto"] | None = "auto",
        label_kernel: LabelKernel = "gaussian",
        decode: Decoding = "median",
        residual: bool = False,
        residual_weight: float = 0.1,
        expectation_weight: float = 0.0,
    ) -> None:
        super().__init__(setup, target_prior, tau, adjust, prior_kernel, temperature)
        one_of("label_kernel", label_kernel, ("gaussian", "laplace", "triangular"))
        one_of("decode", decode, ("expectation", "median", "mode"))
        instance(bool, residual=residual)
        self.label_kernel, self.decoding = label_kernel, decode
        self.residual_weight = number("residual_weight", residual_weight, low=0)
        self.expectation_weight = number("expectation_weight", expectation_weight, low=0)
        self.sigma = self._numeric(sigma)
        self._given_sigma = sigma if sigma is None or isinstance(sigma, str) else float(sigma)
        # A soft label near an end of the axis needs an end bin that extends beyond it. Bins of one whole number have
        # their labels in the middle, and already extend half a number beyond them.
        self.ends: Ends = "open" if self.sigma and self.bins.centers[0] > self.bins.edges[0] else "closed"
        self._start_prior(target_prior, tau, temperature, setup.weights)
        self.residual = LinearHead(setup.num_features, len(self.bins)) if residual else None
        if residual:
            reach = np.maximum(self.bins.edges[1:] - self.bins.centers, self.bins.centers - self.bins.edges[:-1])
            self.register_buffer("reach", torch.tensor(reach, dtype=torch.float32))

    def _loss_names(self, head: nn.Module) -> tuple[str, ...]:
        first = ["coral_loss"] * isinstance(head, CoralHead)
        return tuple(dict.fromkeys([*first, *self.losses]))

    def target(self, labels: Placed) -> Tensor:
        if self.loss_name not in self._spread_labels:
            return labels.values
        if not self.sigma:
            bins = torch.arange(len(self.bins), device=labels.row.device)
            return (labels.row[:, None] == bins).to(wide_dtype(labels.values))
        return spread(labels.values, self.bins, self.sigma, self.label_kernel, self._sigma_unit, self.ends)

    def criterion(self, output: LongTailOutput, labels: Placed, weight: Tensor | None, head: nn.Module) -> Tensor:
        loss = super().criterion(output, labels, weight, head)
        if self.expectation_weight:
            expected = self.label(self.trained_logits(output.scores).softmax(1), "expectation")
            loss = loss + self.expectation_weight / self.spread * weighted_l1(expected, labels.exact, weight)
        if self.residual is not None:
            values = labels.exact.to(self.bins.wide_dtype(labels.exact))
            widths = self.bins.tensor("edges", values).diff()[labels.row]
            rest = (values - self.bins.tensor("centers", values)[labels.row]) / widths
            own = output.residual.gather(1, labels.row[:, None]).squeeze(1) / widths
            loss = loss + self.residual_weight * weighted_l1(own, rest, weight)
        return loss

    def label(self, distribution: Tensor, point: Decoding) -> Tensor:
        """The decoded label, (N,). It is NaN where scores are NaN."""
        known = distribution.detach().isfinite().all(1)
        value = decoded(torch.where(known[:, None], distribution, 1 / len(self.bins)), self.bins, point, self.ends)
        return value.masked_fill(~known, torch.nan)

    def _read(self, adjusted: Tensor, calibrated: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        distribution = adjusted.softmax(1)
        prediction = self.label(distribution, self.decoding)
        if self.residual is None:
            return prediction, distribution, adjusted.new_zeros(adjusted.shape[0], 0)
        residual = self.residual(calibrated)
        residual = self.reach.to(adjusted.dtype) * residual.to(adjusted.dtype).tanh()
        if self.decoding == "mode":
            row = distribution.argmax(1)
        else:
            row = torch.searchsorted(limits(self.bins, adjusted)[1:-1].contiguous(), prediction.detach(), right=True)
        inside = self.bins.tensor("centers", prediction)[row] + residual.gather(1, row[:, None]).squeeze(1)
        # searchsorted would place NaN in the last bin
        return inside.masked_fill(prediction.isnan(), torch.nan), distribution, residual

    def _spread_out(self, kernel: PriorKernel, *densities: LabelDensity) -> Sequence[np.ndarray] | np.ndarray:
        if not isinstance(kernel, str) or not self.sigma:
            return super()._spread_out(kernel, *densities)
        counts = np.stack([_as_counted(self.density, density).counts for density in densities]).astype(np.float64)
        return spread_counts(
            counts, self.bins, self.sigma, kernel=self.label_kernel, unit=self._sigma_unit, ends=self.ends
        )

    def errors(self, adjusted: Tensor, labels: Tensor) -> Tensor:
        return (self.label(adjusted.softmax(1), self.decoding) - labels).abs()

    def _central(self, output: LongTailOutput | Tensor, level: float) -> tuple[Tensor, Tensor]:
        shares: Any = output.distribution if isinstance(output, LongTailOutput) else output
        return interval(shares, self.bins, level, ends=self.ends)

    def _numeric(self, sigma: Any) -> float | None:
        """Sigma as a number, or None for hard labels. Warns if it is too large."""
        self._sigma_unit: KernelUnit = "label"
        word("sigma", sigma, "auto")
        spreads, rule = (
            self.loss_name in self._spread_labels,
            "sigma must be omitted with a loss of hard labels",
        )
        require(spreads or sigma in ("auto", None, 0), rule, got=repr(sigma), fix='Use loss="cross_entropy".')
        if sigma is None or not spreads:
            return None
        density_warned = self.density is not None and self.density._warned_crowded and isinstance(sigma, str)
        if isinstance(sigma, str):
            even = bool((self.bins.relative_widths == 1).all())
            self._sigma_unit = "label" if even else "bin"
            sigma = 2 * float(np.median(np.diff(self.bins.edges))) if even else 2.0
        sigma = checked_sigma(sigma, self.bins, self._sigma_unit)
        self._warn_of_wide(sigma, density_warned)
        return sigma

    def _warn_of_wide(self, sigma: float, density_warned: bool) -> None:
        """Warn if sigma is large beside the axis or the labels."""
        in_bins = self._sigma_unit == "bin"
        length = len(self.bins) if in_bins else float(self.bins.edges[-1] - self.bins.edges[0])
        name = f"sigma={sigma:g}" + " bins" * in_bins
        if sigma > length / 4:
            axis = f"an axis of {length} bins" if in_bins else f"an axis {length:g} long"
            warn(
                f"{name} spreads each label over most of {axis}. Pass a smaller one, or bins=Bins.classes(n) if labels "
                "are classes."
            )
        elif self.density is not None and not density_warned:
            middle = interquartile_range(self.bins, self.density, in_bins)
            if sigma > middle / 1.35:
                warn(
                    f"{name} is larger than the interquartile range of the labels, {middle:.3g} of "
                    f"{length:g}. Learn the logarithm of the labels, or use bins that are narrow where labels are, as "
                    "Bins.quantile or Bins.from_edges(numpy.geomspace(...)) make them.",
                )

    @property
    def settings(self) -> dict[str, Any]:
        return {
            **super().settings,
            "sigma": self._given_sigma,
            "label_kernel": self.label_kernel,
            "decode": self.decoding,
            "residual": self.residual is not None,
            "residual_weight": self.residual_weight,
            "expectation_weight": self.expectation_weight,
        }


def interquartile_range(bins: Bins, density: LabelDensity, in_bins: bool = False) -> float:
    """The interquartile range of the labels, in label units or in bins."""
    ends = quantiles(torch.from_numpy(density.prior()), bins, [0.25, 0.75]).numpy()
    if in_bins:
        ends = np.interp(ends, bins.edges, np.arange(len(bins) + 1))
    return float(ends[1] - ends[0])


class ClassReadout(ScoreReadout):
    """A distribution over classes. The prediction is the most probable class.

    Args:
        target_prior, tau, adjust, temperature: as in :class:`BinsReadout`. ``"uniform"`` is uniform over classes.
        prior_kernel: a window that smooths the training prior. ``"auto"`` and None do not smooth, since classes have no
            neighbours.
    """

    heads: ClassVar = {"linear": LinearHead, "cosine": CosineHead, "affinity": partial(AffinityHead, prototypes=5)}
    losses: ClassVar = {"cross_entropy": Loss(cross_entropy), "affinity_loss": Loss(affinity_loss)}
    judged: ClassVar = ("balanced_error", "error")
    has_interval = False

    def __init__(
        self,
        setup: Setup,
        *,
        target_prior: TargetPrior = None,
        tau: float = 1.0,
        adjust: Literal["after", "in_loss"] = "after",
        prior_kernel: PriorKernel = "auto",
        temperature: float = 1.0,
    ) -> None:
        super().__init__(setup, target_prior, tau, adjust, prior_kernel, temperature)
        self._start_prior(target_prior, tau, temperature, setup.weights)

    def _loss_names(self, head: nn.Module) -> tuple[str, ...]:
        return ("affinity_loss", "cross_entropy") if isinstance(head, AffinityHead) else ("cross_entropy",)

    def criterion(self, output: LongTailOutput, labels: Placed, weight: Tensor | None, head: nn.Module) -> Tensor:
        loss = super().criterion(output, labels, weight, head)
        return loss + head.diversity() if self.loss_name == "affinity_loss" else loss  # type: ignore[operator]

    def interval(self, output: LongTailOutput | Tensor, level: float | None) -> tuple[Tensor, Tensor]:
        raise self.cannot("give intervals of a label", "Classes have no order: use sets.")

    def _read(self, adjusted: Tensor, calibrated: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return adjusted.argmax(1), adjusted.softmax(1), adjusted.new_zeros(adjusted.shape[0], 0)

    def errors(self, adjusted: Tensor, labels: Tensor) -> Tensor:
        return adjusted.argmax(1) != labels


_OF_NUMBERS = (PointReadout, GaussianReadout, BinsReadout)


def readout_for(head: Any, bins: Bins) -> type[Readout]:
    """The class of the readout for a head, given by name or as a module, and an axis."""
    if bins.categorical:
        return ClassReadout
    if isinstance(head, nn.Module):
        return BinsReadout
    by_head: dict[str, type[Readout]] = {name: readout for readout in _OF_NUMBERS for name in readout.heads}
    one_of("head", head, tuple(by_head))
    return by_head[head]


def _target_shares(target: TargetPrior, bins: Bins) -> Any:
    """None, ``"uniform"``, or the checked prior (B,) as a float64 tensor."""
    word("target_prior", target, "uniform", fix="Or pass None, one share per bin, or the result of estimate_prior.")
    if target is None or isinstance(target, str):
        return target
    shares = torch.from_numpy(labels_array(target, "target_prior").astype(np.float64))
    shaped((len(bins),), "one share per bin", target_prior=shares)
    prior_shares("target_prior", shares, zeros=True)
    return shares


def _needed(what: str, density: LabelDensity | None) -> LabelDensity:
    if density is None:
        raise problem(f"{what} needs density", got="None", fix="Pass density=LabelDensity.count(train_labels, bins).")
    return density


def _as_counted(given: LabelDensity | None, density: LabelDensity) -> LabelDensity:
    """Return ``density``, after checking that the given density is not smoothed."""
    smoothed = given is not None and given.counts.dtype.kind == "f" and not given._of_weighted_rows
    fix = "Pass the density as counted, in integers, or prior_kernel=None."
    require(not smoothed, "density must not be smoothed already", got=lambda: repr(given), fix=fix)
    return density


def _weighted(density: LabelDensity, weights: LDS | None) -> LabelDensity:
    if weights is None or (weights.table.is_meta and torch.empty(0).is_meta):
        return density  # meta weights, and with them the prior, are loaded from a state later
    return density.weighted(weights)


def _spread_of_labels(bins: Bins, density: LabelDensity | None) -> tuple[float, float]:
    """The median and the standard deviation of labels spread uniformly within bins; 0 and 1 for classes."""
    if bins.categorical:
        return 0.0, 1.0
    widths = np.diff(bins.edges)
    shares = widths / widths.sum() if density is None else density.prior()
    median = quantiles(torch.from_numpy(shares), bins, 0.5).item()
    variance = shares @ ((bins.centers - shares @ bins.centers) ** 2 + widths**2 / 12)
    return median, math.sqrt(variance)


def _least_variance(spread: float) -> float:
    return max(_LEAST_VARIANCE * spread**2, torch.finfo(torch.float32).tiny)


def _fits(sound: bool, bins: Bins, gives: object) -> None:
    require(sound, f"head must give one score per bin, (N, {len(bins)})", got=gives, error=ShapeError)
