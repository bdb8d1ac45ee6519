"""Readouts: what the numbers of a head mean, how labels become their loss, and how they become a prediction.

There is one readout per kind of answer: a number, a Gaussian, a distribution over the bins of a continuous axis, or a
class. Each owns its options (the keyword-only arguments of its constructor), the heads that can be named, the losses
that can be named, and its decoding. :class:`dir_toolkit.LongTailModel` builds the one that suits its head and its axis.

Losses in label units are divided by the spread of the labels (squared errors by its square), so that a model does not
depend on the unit of its labels. The spread is the standard deviation of the density, or of evenly spread labels where
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
from .._numerics import has_values, wide_dtype
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
from .intervals import CalibratedIntervals

__all__ = ["BinsReadout", "ClassReadout", "GaussianReadout", "LongTailOutput", "PointReadout"]

TargetPrior = Literal["uniform"] | Prior | None
PriorKernel = Window | Literal["auto"] | None

_HARDLY_ANY = 1e-3  # A bin that less of a label reaches, once labels are spread, has no label in or near it.
_LEAST_VARIANCE = 1e-6  # of a Gaussian, in variances of the labels
_SMALL_ERROR = 0.1  # in standard deviations of the labels: the unit of Huber's loss and of the focal losses


class LongTailOutput(NamedTuple):
    """What a :class:`LongTailModel` says about a batch. All fields are tensors, so that an output can be gathered,
    saved and averaged. Of sequences each field but the loss has a second axis, of T steps.

    Attributes:
        loss: (). It is NaN without labels.
        scores: (N, B), the logits or affinities that the head gives. With ``head="regression"`` they are (N,), the
            prediction itself. With ``head="gaussian"`` they are (N, 2), which
            :func:`dir_toolkit.losses.gaussian_nll.gaussian_nll` takes. Both are in label units.
        prediction: (N,), in label units; int64 for classes.
        features: (N, num_features), as the backbone gives them, before any calibration.
        distribution: (N, B), the adjusted shares of the bins, each row summing to one; (N, 0) without bins. Functions
            that decode it take ``ends=model.readout.ends`` where bins are those of a continuous axis.
        residual: (N, B), what is added to the centre of each bin, in label units; (N, 0) unless asked for.
    """

    loss: Tensor
    scores: Tensor
    prediction: Tensor
    features: Tensor
    distribution: Tensor
    residual: Tensor


# torch.export can only save a model whose output it knows by name.
torch.utils._pytree._register_namedtuple(LongTailOutput, serialized_type_name="dir_toolkit.LongTailOutput")


class Placed(NamedTuple):
    """Labels (N,) that have been placed on the axis.

    Attributes:
        row: the bin of each label; the first bin for a label that counts nowhere.
        values: the labels moved onto the axis, in label units; for classes the row itself.
        exact: the labels from which errors are measured: those that were clipped are as far out as they were.
    """

    row: Tensor
    values: Tensor
    exact: Tensor


class Setup(NamedTuple):
    """What a model hands to its readout. The weights are needed to know the prior under which the loss trains."""

    num_features: int
    bins: Bins
    density: LabelDensity | None
    weights: LDS | None
    head: nn.Module
    loss: str | Callable[..., Tensor] | None


class Loss(NamedTuple):
    """A loss that can be named.

    Attributes:
        function: called as ``function(scores, target, weight, **options)``; returns the mean over the samples.
        power: of the label's unit that the loss is in.
        options: of the function, given the bins and the spread of the labels.
    """

    function: Callable[..., Any]
    power: int = 0
    options: Callable[[Bins, float], dict[str, Any]] = lambda bins, spread: {}


class Readout(nn.Module):
    """What all readouts share. The keyword-only arguments of a subclass are its options."""

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
        """The head of this name, or a module as it is, once its sizes are checked where it tells them."""
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
        """The losses that can be named for this head; the first is the default."""
        return tuple(self.losses)

    def seen(self, scores: Tensor) -> Tensor:
        """The scores that the loss is given."""
        return scores

    def target(self, labels: Placed) -> Tensor:
        """The labels that the loss is given."""
        return labels.exact

    def criterion(self, output: LongTailOutput, labels: Placed, weight: Tensor | None, head: nn.Module) -> Tensor:
        """The mean loss of a batch."""
        return self.loss_of(output.scores, self.target(labels), weight)

    def loss_of(self, scores: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """The mean loss of scores against what :meth:`target` made of their labels."""
        return self.loss(self.seen(scores), target, weight, **self.loss_options) / self.loss_unit

    def set_prior(
        self, target_prior: TargetPrior, tau: float, kernel: PriorKernel, temperature: float | None, weights: LDS | None
    ) -> None:
        raise self.cannot("have a prior")

    def forecast(self, scores: Tensor) -> Tensor:
        """What is calibrated, of scores that have been checked."""
        return scores

    @torch.no_grad()
    def calibrate_intervals(
        self, scores: Tensor, labels: Any, level: float, *, gamma: float, weights: LDS | None, **options: Any
    ) -> None:
        number("level", level, low=0, high=1, open_low=True, open_high=True, float32=True)
        is_tensor(scores=scores)
        real(scores=scores)
        shaped(("N", *self.score_shape), scores=scores)
        scores = scores.to(wide_dtype(scores))
        finite(scores=on_host("scores", scores))
        calibration = self._calibration(_needed("calibrate_intervals", self.density), gamma, weights, **options)
        calibration._add(scores=self.forecast(scores), labels=labels)
        self.intervals.take(calibration, level)

    def _calibration(self, density: LabelDensity, gamma: float, weights: LDS | None, **options: Any) -> Conformal:
        return self.conformal(density, **options)

    def interval(self, output: LongTailOutput | Tensor, level: float | None) -> tuple[Tensor, Tensor]:
        if self.intervals.known(level):
            return self.intervals.interval(self._calibrated(output))
        return self._central(output, 0.9 if level is None else level)

    @property
    def has_interval(self) -> bool:
        return self.intervals.level.item() != 0 or type(self)._central is not Readout._central

    def sets(self, output: LongTailOutput | Tensor, level: float | None) -> Tensor:
        rule, fix = "intervals must be calibrated", "Call calibrate_intervals first."
        require(self.intervals.known(level), rule, got="a model that is not", fix=fix, error=RuntimeError)
        return self.intervals.sets(self._calibrated(output))

    def _calibrated(self, output: LongTailOutput | Tensor) -> Tensor:
        """The part of an output that is calibrated."""
        scores = output.scores if isinstance(output, LongTailOutput) else output
        is_tensor(output=scores)
        return self.forecast(self.conformal._checked("output", scores, self.bins))

    def _central(self, output: LongTailOutput | Tensor, level: float) -> tuple[Tensor, Tensor]:
        """The interval of the model's own distribution."""
        raise self.cannot("give intervals of a label")

    def cannot(self, what: str, fix: str = 'Use a head that scores bins, such as head="linear".') -> Exception:
        return problem(f"the readout must {what}", got=f"a {type(self).__name__}", fix=fix, error=RuntimeError)

    @property
    def settings(self) -> dict[str, Any]:
        """The loss and the options, with which the readout could be made again."""
        return {"loss": self.loss_name or self.loss}


class _NumberReadout(Readout):
    """What the head gives is read around the median of the labels, in units of their spread."""

    offset: Tensor
    scale: Tensor

    def __init__(self, setup: Setup, within_axis: bool) -> None:
        super().__init__(setup)
        instance(bool, within_axis=within_axis)
        self.within_axis = within_axis
        dtype = self.bins.wide_dtype(torch.zeros(()))
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

    def _held(self, prediction: Tensor) -> Tensor:
        if not self.within_axis:
            return prediction
        return prediction.clamp(float(self.bins.edges[0]), float(self.bins.edges[-1]))

    @torch.inference_mode(False)  # Buffers must serve training later.
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name in ("offset", "scale"):  # Where labels lie is not rounded to the precision of weights.
            old, new = kept[name], self._buffers[name]
            if old is not None and new is not None and new.itemsize < old.itemsize:
                self._buffers[name] = new.to(old.dtype) if old.is_meta else old.to(new.device)
        return self

    def interval(self, output: LongTailOutput | Tensor, level: float | None) -> tuple[Tensor, Tensor]:
        lower, upper = super().interval(output, level)
        return self._held(lower), self._held(upper)

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "within_axis": self.within_axis}


class PointReadout(_NumberReadout):
    """One number per sample, which is the prediction.

    Args:
        within_axis: whether predictions and the ends of intervals are held to the axis. Scores, and with them the loss,
            are left as they are. Balanced MSE predicts beyond the labels otherwise.
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
    """A mean and a log-variance per sample; the mean is the prediction.

    Args:
        within_axis: whether predictions and the ends of intervals are held to the axis. Scores are left as they are.
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
    """One score per bin. The softmax of the scores is a posterior under the training prior, and is carried to the
    target prior by what ``adjuster`` adds."""

    conformal = BinsConformal

    loss_offset: Tensor  # (B,), what the loss adds to the logits
    judged: ClassVar[tuple[str, str]]  # the error over the axis, and that over samples

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
        self.register_buffer("loss_offset", torch.zeros(len(self.bins)))

    def _start_prior(self, target_prior: TargetPrior, tau: float, temperature: float, weights: LDS | None) -> None:
        """Adjust as the options say, once all that decides the training prior is known."""
        self.set_prior(target_prior, tau, "auto", temperature, weights)
        if self.adjust == "after":
            return
        if target_prior is None:
            raise problem('adjust="in_loss" needs target_prior', got="None", fix='Pass target_prior="uniform".')
        if not isinstance(target_prior, str) and (labels_array(target_prior, "target_prior") == 0).any():
            raise problem('target_prior must be positive with adjust="in_loss"', got="a share of zero")
        self.loss_offset.copy_(-self.adjuster.offset)
        self.adjuster.offset.zero_()

    def set_prior(
        self, target_prior: TargetPrior, tau: float, kernel: PriorKernel, temperature: float | None, weights: LDS | None
    ) -> None:
        if temperature is None:
            temperature = self.adjuster.temperature.item()
        temperature = number("temperature", temperature, low=0, open_low=True, float32=True)
        target, kernel = _target_shares(target_prior, self.bins), self.chosen_kernel(kernel)
        offset = self._offset(target, checked_tau(tau), kernel, weights)
        self.adjuster.offset.copy_(offset)
        self.adjuster.temperature.fill_(temperature)
        if has_values(self.intervals.level) and self.intervals.level > 0:
            self.intervals.level.neg_()
            warn("intervals were calibrated under another prior. Call calibrate_intervals again before interval.")
        self.prior_settings = {"target_prior": target_prior, "tau": tau, "temperature": temperature}

    def _offset(self, target: Any, tau: float, kernel: PriorKernel, weights: LDS | None) -> Tensor:
        """What is added to the logits to predict under a target that has been checked, (B,)."""
        if target is None:
            return self.loss_offset.clone()
        return self.offset_from(self.training_prior(kernel, weights), target, tau)

    def offset_from(self, prior: Tensor, target: Any, tau: float) -> Tensor:
        """What is added to the logits, (B,), to get from a training prior to a target."""
        uniform = isinstance(target, str)
        offset = log_prior_offset(prior, -tau, None if uniform else target)
        # Shares are taken per label unit. The widths cancel at tau 1, unless the target is even over the axis itself.
        power = tau if uniform else tau - 1
        offset = offset + power * torch.from_numpy(np.log(self.bins.relative_widths))
        return offset.float().to(self.loss_offset) + self.loss_offset

    def chosen_kernel(self, kernel: PriorKernel) -> PriorKernel:
        """The checked kernel; the readout's own for ``"auto"``."""
        word("kernel", kernel, "auto")
        kernel = self.prior_kernel if isinstance(kernel, str) else kernel
        if kernel is not None and not isinstance(kernel, str):
            (kernel,) = checked_windows(kernel, self.bins)
        return kernel

    def training_prior(self, kernel: PriorKernel, weights: LDS | None) -> Tensor:
        """The shares of the labels times their weights, (B,), spread over bins as the loss spreads labels."""
        density = _needed("target_prior", self.density)
        reached, learnt = self._spread_out(kernel, density, _weighted(density, weights))
        unseen = int((reached < _HARDLY_ANY).sum())
        if unseen and not self._warned_unseen:
            self._warned_unseen = True
            warn(f"no label in or near {unseen} of {len(self.bins)} bins; the prior takes each to have one.")
        one_each = _weighted(LabelDensity(self.bins, np.ones(len(self.bins))), weights).counts
        # Bins are filled up, so that the adjustment of a bin that training has hardly seen stays bounded.
        return torch.from_numpy(to_shares(learnt + one_each * (1 - reached).clip(min=0)))

    def _spread_out(self, kernel: PriorKernel, *densities: LabelDensity) -> Sequence[np.ndarray] | np.ndarray:
        """The counts (B,) of each density, spread as the loss spreads labels or smoothed by a window."""
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
        """How far off each label (N,) is what adjusted logits predict, without residuals."""
        raise NotImplementedError

    def logits(self, scores: Tensor) -> Tensor:
        """Scores as logits. An affinity that has underflowed to zero has no slope; log 0 would give it an infinite
        one."""
        return scores.clamp_min(torch.finfo(scores.dtype).tiny).log() if self.affinities else scores

    def trained_logits(self, scores: Tensor) -> Tensor:
        """The logits that the loss sees."""
        return self.logits(scores) + self.loss_offset.to(scores.dtype)

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, **self.prior_settings, "adjust": self.adjust, "prior_kernel": self.prior_kernel}


class BinsReadout(ScoreReadout):
    """A distribution over the bins of a continuous axis, decoded into a label.

    Args:
        target_prior: what the model predicts under. None is the training prior; ``"uniform"`` is even over the axis,
            whatever the widths of its bins; or the share of each bin, (B,).
        tau: strength of the adjustment, >= 0.
        adjust: ``"after"`` adjusts predictions. ``"in_loss"`` trains with the logits plus tau times the log of the
            training prior, so that scores that are not adjusted already predict under the target prior.
        prior_kernel: how the training prior is spread over bins. ``"auto"`` spreads it as the loss spreads labels, each
            of which is taken to lie at the centre of its bin, and not at all where the loss takes labels as they are. A
            window smooths the prior instead, and None leaves it as counted. A bin that less than one label reaches is
            filled up to one label of its own weight.
        temperature: T > 0, by which logits are divided first, :func:`dir_toolkit.fit_temperature`.
        sigma: by how much ``"cross_entropy"``, ``"coral_loss"`` and ``"squared_emd"`` spread labels over bins, in label
            units. ``"auto"`` takes two bins, as wide as they are where the label lies. None or 0 means hard labels, as
            in the papers of CORAL and CORN. Where labels are spread, the first and the last bin reach one width beyond
            the axis, ``ends="open"`` of :func:`dir_toolkit.labels.soft_labels.soft_labels`, unless each bin is one
            whole number.
        label_kernel: as ``kernel`` of :func:`dir_toolkit.labels.soft_labels.soft_labels`.
        decode: how a distribution becomes a label, :func:`dir_toolkit.labels.decoding.decode`. The ``"median"`` errs
            least where absolute errors are judged (MAE, bMAE), ``"expectation"`` where squared ones are (MSE, RMSE).
        residual: whether to learn where in its bin a label lies, too, as an offset that does not reach beyond the
            edges of the bin. The prediction is then the centre of the decoded bin plus its offset. This pays where bins
            are coarse.
        residual_weight: factor, >= 0, of the absolute error of that offset, in widths of the bin, in the loss.
        expectation_weight: factor, >= 0, of the absolute error of the expectation, in spreads of the labels, in the
            loss.
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
    judged: ClassVar = ("bmae", "mae")
    _spread_labels = (
        "cross_entropy",
        "coral_loss",
        "squared_emd",
    )  # the losses whose targets are labels spread over bins

    warned_crowded = False  # whether labels are spread wider than most of them lie
    reach: Tensor  # (B,), how far a residual may lead from the centre of its bin

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
        self._given_sigma = sigma
        self.sigma = self._numeric(sigma)
        # A label that is spread near an end of the axis needs an end bin that reaches beyond it. Bins of one whole
        # number each have their labels in the middle, and reach half a number beyond the axis as they are.
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

    def label(self, distribution: Tensor, how: Decoding) -> Tensor:
        """The decoded label, (N,). It is NaN where scores are, so that a training loop sees where training broke."""
        known = distribution.detach().isfinite().all(1)
        value = decoded(torch.where(known[:, None], distribution, 1 / len(self.bins)), self.bins, how, self.ends)
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
        # The search places NaN in the last bin.
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
        """Sigma as a number, after a warning where it hides the labels; None where labels are not spread."""
        self._sigma_unit: KernelUnit = "label"
        word("sigma", sigma, "auto")
        spreads, rule = (
            self.loss_name in self._spread_labels,
            "sigma must be left out with a loss of labels as they are",
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
        in_bins = self._sigma_unit == "bin"
        length = len(self.bins) if in_bins else float(self.bins.edges[-1] - self.bins.edges[0])
        name = f"sigma={sigma:g}" + " bins" * in_bins
        if sigma > length / 4:
            axis = f"an axis of {length} bins" if in_bins else f"an axis {length:g} long"
            warn(f"{name} spreads each label over most of {axis}. Pass a smaller one.")
        elif self.density is not None and not density_warned:
            middle = self._middle_half(self.density, in_bins)
            if sigma > middle / 1.35:
                self.warned_crowded = True
                warn(
                    f"{name} spreads each label wider than the middle half of all labels lies, {middle:.3g} of "
                    f"{length:g}. Learn the logarithm of the labels, or use bins that are narrow where labels are, as "
                    "Bins.quantile or Bins.from_edges(numpy.geomspace(...)) make them.",
                )

    def _middle_half(self, density: LabelDensity, in_bins: bool) -> float:
        """How far the quartiles of the labels lie apart, in label units or in bins."""
        ends = quantiles(torch.from_numpy(density.prior()), self.bins, [0.25, 0.75]).numpy()
        if in_bins:
            ends = np.interp(ends, self.bins.edges, np.arange(len(self.bins) + 1))
        return float(ends[1] - ends[0])

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


class ClassReadout(ScoreReadout):
    """A distribution over classes, of which the most probable one is the prediction.

    Args:
        target_prior, tau, adjust, temperature: as those of :class:`BinsReadout`. ``"uniform"`` gives each class the
            same share.
        prior_kernel: a window that smooths the training prior. ``"auto"`` and None leave it as counted, since classes
            have no neighbours.
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
    """The readout that suits a head, given by name or as a module, and an axis."""
    if bins.categorical:
        return ClassReadout
    if isinstance(head, nn.Module):
        return BinsReadout
    by_head: dict[str, type[Readout]] = {name: readout for readout in _OF_NUMBERS for name in readout.heads}
    one_of("head", head, tuple(by_head))
    return by_head[head]


def _target_shares(target: TargetPrior, bins: Bins) -> Any:
    """None, ``"uniform"``, or the shares (B,) as a tensor of float64."""
    word("target_prior", target, "uniform")
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
    """``density``, which is to be smoothed, if the density that was given has not been smoothed before."""
    smoothed = given is not None and given.counts.dtype.kind == "f" and not given._of_weighted_rows
    fix = "Pass the counted density, or prior_kernel=None."
    require(not smoothed, "density must not be smoothed already", got=lambda: repr(given), fix=fix)
    return density


def _weighted(density: LabelDensity, weights: LDS | None) -> LabelDensity:
    if weights is None or (weights.table.is_meta and torch.empty(0).is_meta):
        return density  # Weights that are made without storage are filled by a state later, and so is the prior.
    return density.weighted(weights)


def _spread_of_labels(bins: Bins, density: LabelDensity | None) -> tuple[float, float]:
    """The median and the standard deviation of labels that lie evenly in each bin; 0 and 1 for classes."""
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
