"""Post-hoc logit adjustment: adjust logits to another class prior, choose tau, fit a temperature.

Classes may be the bins of a label axis. A smoothed prior is ``class_prior(density.smooth(kernel))``. The uniform target
is uniform over bins. For a target that is uniform per label unit, divide the prior by ``bins.relative_widths`` and
scale it to sum to one, as :class:`dir_toolkit.LongTailModel` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ._checks import (
    MOST_TAU,
    checked_tau,
    classes_exist,
    finite,
    instance,
    integers,
    labels_array,
    not_empty,
    not_negative,
    number,
    on_host,
    one_of,
    prior_shares,
    real,
    require,
    same_device,
    shaped,
    warn,
)
from ._numerics import confidence_bin, confidence_edges, default_dtype, wide_dtype
from ._state import SoundModule, WideBuffers
from .labels.bins import Bins
from .labels.density import LabelDensity, counts_array
from .labels.weights import LDS

__all__ = [
    "LogitAdjuster",
    "TauChoice",
    "adjust_logits",
    "choose_tau",
    "class_prior",
    "fit_temperature",
    "pointwise_mutual_information",
]

Criterion = Literal["balanced_error", "log_loss", "ece"]
Prior = Tensor | np.ndarray | Sequence[float]

_TEMPERATURES = (1e-3, 1e3)
_SLACK = 1e-6
_CONFIDENCE_EDGES = confidence_edges(15)
TIE = 1e-12  # errors that differ by less are equal
_HANDFUL = 4  # more taus are a range, and a choice at its end causes a warning


def class_prior(density_or_counts: LabelDensity | Prior, *, weights: LDS | None = None, floor: float = 1.0) -> Tensor:
    """The class prior that a model was trained under: the share of samples in each class, times their loss weights.

    Args:
        density_or_counts: a density, or the number of training samples per class. With a sampler count the samples that
            it draws.
        weights: the fitted LDS of the loss weights, or None. A model trained with weights has the weighted prior, and
            the plain prior would correct it twice.
        floor: the smallest count, in samples per bin of mean width. Smaller counts are raised to it, which keeps
            log-priors finite, and classes without samples cause a warning. Use 0 for a target prior.
    Shape:
        counts: (C,). Returns (C,) float64 on the CPU, summing to one.
    Raises:
        ShapeError: counts are not one-dimensional. ValueError: a count is negative or not finite, the floor is
        negative, or it is zero and so are all counts. NotFittedError: weights are not fitted.

    >>> class_prior([6, 3, 1]).tolist()
    [0.6, 0.3, 0.1]
    >>> weights = LDS(Bins.classes(2), kernel=None, scheme="inverse").fit([0, 0, 0, 1])
    >>> class_prior([3, 1], weights=weights).round(decimals=6).tolist()
    [0.5, 0.5]
    """
    if not isinstance(density_or_counts, LabelDensity):
        counts = counts_array(density_or_counts)
        density_or_counts = LabelDensity(Bins.classes(len(counts)), counts)
    bins, counts = density_or_counts.bins, density_or_counts.counts
    unseen = np.flatnonzero(counts == 0)
    prior = density_or_counts.prior(floor=floor)
    if weights is not None:
        instance(LDS, weights=weights)
        prior = LabelDensity(bins, np.maximum(counts, floor * bins.relative_widths)).weighted(weights).prior()
    if floor > 0 and len(unseen) > 0:
        warn(f"no sample of {_listed(unseen)}; the prior takes each to have {floor:g}.")
    return torch.from_numpy(prior)


def adjust_logits(
    logits: Tensor, prior: Prior, *, target: Literal["uniform"] | Prior = "uniform", tau: float = 1.0
) -> Tensor:
    r"""Post-hoc logit adjustment: convert scores of a model trained under one class prior to another prior.

    .. math:: s_y - \tau \log \pi_y + \log P_{target}(y)

    At :math:`\tau = 1` the softmax of exact logits becomes the posterior under the target prior. The uniform target
    minimises the balanced error.

    Args:
        logits: those of a model trained with a plain loss. Logits of a logit-adjusted loss are balanced already.
        prior: the training prior, positive, summing to one: :func:`class_prior`.
        target: a prior summing to one. Zero makes a class impossible, with the score -inf.
        tau: the strength of the adjustment, >= 0: :func:`choose_tau`.
    Shape:
        logits: (..., C). prior, target: (C,). Returns (..., C), at least float32, on the device of the logits.
    Raises:
        ShapeError: the number of classes differs. ValueError: a prior does not sum to one within 1e-4 or is not
        positive, or tau is negative. On accelerators values are not checked.
    Source:
        Menon et al. 2021, sections 3 and 4.1 (arXiv:2007.07314).

    >>> logits = torch.tensor([[0.9, 0.1]]).log()
    >>> adjust_logits(logits, [0.9, 0.1]).softmax(-1)
    tensor([[0.5000, 0.5000]])
    """
    offset = _offset(prior, target, tau)
    logits = _wide(logits, len(offset))
    return logits + offset.to(logits.dtype).to(logits.device)


def pointwise_mutual_information(logits: Tensor, prior: Prior) -> Tensor:
    r"""The pointwise mutual information, :math:`\log P(y|x) - \log P(y)`, with P(y|x) the softmax of the logits.

    Shape:
        as in :func:`adjust_logits`, which has the same errors.
    Units:
        nats.
    Source:
        Menon et al. 2021, section 3 (arXiv:2007.07314).

    >>> pointwise_mutual_information(torch.zeros(1, 2), [0.5, 0.5])
    tensor([[0., 0.]])
    """
    offset = _offset(prior, "uniform", 1.0)
    logits = _wide(logits, len(offset))
    return logits.log_softmax(-1) + offset.to(logits.dtype).to(logits.device)


def fit_temperature(logits: Tensor, labels: Tensor, *, weight: Tensor | None = None) -> float:
    r"""Temperature scaling: the T > 0 that minimises the log loss of ``softmax(logits / T)`` on held-out data.

    If there is no minimum from 0.001 to 1000, the nearer bound is returned with a warning. It is the lower bound if
    every label has the largest logit, and the upper bound if logits are no better than chance. If all logits of each
    row are equal, T is 1, with a warning.

    Args:
        labels: integer classes. weight: one per sample, >= 0; None means ones.
    Shape:
        logits: (N, C). labels, weight: (N,).
    Raises:
        ShapeError, LabelError, TypeError: shapes differ, or labels are not classes of the logits. ValueError: there is
        no sample, logits or weights are not finite, or no weight is positive.
    Source:
        Guo et al. 2017, section 4.2 (arXiv:1706.04599).

    >>> logits = torch.tensor([[2.0, 0.0]]).repeat(4, 1)
    >>> round(2 / fit_temperature(logits, torch.tensor([0, 0, 0, 1])), 6)  # the log-odds of 3 in 4
    1.098612
    """
    scores, classes = _held_out(logits, labels)
    shares = np.ones(len(classes))
    if weight is not None:
        real(weight=weight)
        shaped(labels.shape, "one per label", weight=weight)
        weight = on_host("weight", weight)
        finite(weight=weight)
        not_negative(weight=weight)
        shares = weight.double().numpy()
        require(shares.any(), "at least one weight must be positive", got="zeros")
        shares = shares / shares.max()  # avoids overflow of sums
    return warn_of_temperature(best_temperature(scores, classes, shares), scores)


@dataclass(frozen=True, eq=False)
class TauChoice:
    """A tau chosen on held-out labels, with the error curves. It prints as a sentence on gain and cost.

    Attributes:
        tau: the chosen tau, one of ``taus``.
        taus: (K,) float64, read-only: the candidates.
        curves: errors at each candidate, (K,) float64 each, by name: the criterion and, from a model, also the errors
            over all samples and per region, such as "mae" and "mae_few". Lower is better.
        by: the name of the criterion.
        temperature: the divisor of the logits. Pass it to :class:`LogitAdjuster` together with tau.
        samples: the number of held-out labels.
        biased: whether biases were fitted together with the temperature.
        start: each error at tau 0 and temperature 1 without biases, from ``calibrate`` of a model; else None.
        bound: ``most_mae``, if it kept the criterion from being lower; None if it did not matter.
    """

    tau: float
    taus: np.ndarray
    curves: Mapping[str, np.ndarray]
    by: str
    temperature: float
    samples: int
    biased: bool = False
    start: Mapping[str, float] | None = None
    bound: float | None = None

    @property
    def scores(self) -> np.ndarray:
        """The criterion at each candidate, (K,)."""
        return self.curves[self.by]

    @property
    def before(self) -> dict[str, float]:
        """Each error at the first candidate, which is no adjustment if candidates start with zero; or ``start``."""
        return (
            dict(self.start)
            if self.start is not None
            else {name: float(curve[0]) for name, curve in self.curves.items()}
        )

    @property
    def after(self) -> dict[str, float]:
        """Each error at the chosen tau."""
        place = int(np.flatnonzero(self.taus == self.tau)[0])
        return {name: float(curve[place]) for name, curve in self.curves.items()}

    def __repr__(self) -> str:
        changes = [f"{_in_words(name)} from {x:.3g} to {self.after[name]:.3g}" for name, x in self.before.items()]
        temperature = f"temperature {self.temperature:.3g}" + " with a bias" * self.biased
        start = f"tau {self.tau:g} at {temperature}, chosen on {self.samples:,} labels"
        bounded = "" if self.bound is None else f" Bounded by most_mae={self.bound:g}; most_mae=None chooses without."
        return f"{start}, takes {', '.join(changes)}.{bounded}"


def choose_tau(
    logits: Tensor,
    labels: Tensor,
    prior: Prior,
    *,
    by: Criterion = "balanced_error",
    taus: Sequence[float] | np.ndarray | None = None,
    temperature: float | None = None,
) -> TauChoice:
    r"""Choose the tau of ``adjust_logits(logits / temperature, prior, tau=tau)`` on validation data.

    Every class has equal weight. Classes without validation labels are ignored, with a warning. If several taus are
    best, the middle of their longest run is chosen.

    Args:
        logits: those of a model trained with a plain loss. labels: integer classes. prior: its training prior.
        by: the criterion. ``"balanced_error"`` is the mean error rate of the classes, ``"log_loss"`` their mean log
            loss in nats, and ``"ece"`` the expected calibration error of the top label over 15 bins.
        taus: candidates, >= 0, rising; None means 0, 0.05, ... 3. A choice at the end of a range causes a warning.
        temperature: the divisor of the logits. None fits it for ``"log_loss"`` and ``"ece"``, with validation classes
            weighted by the prior, and is 1 for ``"balanced_error"``.
    Shape:
        logits: (N, C). labels: (N,). prior: (C,). taus: (K,).
    Raises:
        as :func:`adjust_logits` and :func:`fit_temperature`. ValueError: taus are empty, not rising or negative.
    Source:
        Menon et al. 2021, section 4.1 (arXiv:2007.07314); the temperature: Guo et al. 2017 (arXiv:1706.04599).

    >>> logits = torch.tensor([[2.0, 0.0], [1.5, 0.0], [1.0, 0.0], [0.5, 0.0]])
    >>> choose_tau(logits, torch.tensor([0, 0, 1, 1]), [0.75, 0.25], taus=[0, 0.5, 1, 1.5]).tau
    1.0
    """
    one_of("by", by, ("balanced_error", "log_loss", "ece"))
    log_prior = -on_host("prior", _offset(prior, "uniform", 1.0)).numpy()
    scores, classes = _held_out(logits, labels)
    shaped(("N", len(log_prior)), _AS_PRIOR, logits=logits)
    counts = np.bincount(classes, minlength=len(log_prior))
    if temperature is not None:
        temperature = number("temperature", temperature, low=0, open_low=True, float32=True)
    elif by == "balanced_error":
        temperature = 1.0
    else:
        temperature = best_temperature(scores, classes, np.exp(log_prior[classes]) / counts[classes])
        warn_of_temperature(temperature, scores)
    absent = np.flatnonzero(counts == 0)
    if len(absent) > 0:
        warn(f"no validation label of {_listed(absent)}; the criterion leaves them out.")
    shares = 1 / counts[classes] / np.count_nonzero(counts)
    scores = scores / temperature
    choice = search_tau(
        lambda tau: {by: _criterion(by, scores - tau * log_prior, classes, shares)},
        taus,
        by,
        temperature=temperature,
        samples=len(classes),
    )
    return warn_of_tau(choice)


def search_tau(
    errors_at: Callable[[float], Mapping[str, float]],
    taus: Any,
    by: str,
    *,
    samples: int,
    temperature: float = 1.0,
    most: float = 3.0,
    bound: tuple[str, float] | None = None,
    strict: bool = True,
    start: Mapping[str, float] | None = None,
) -> TauChoice:
    """The tau with the smallest error. Of several best taus it is the middle of their longest run. It does not
    warn; callers pass the choice to :func:`warn_of_tau`.

    Args:
        errors_at: a function from tau to errors by name.
        taus: candidates, >= 0, rising; None means steps of 0.05 up to ``most``.
        bound: the name of an error, and its largest allowed ratio to its value at tau 0, or in ``start``.
        strict: whether it raises if no tau keeps the bound. Otherwise the bound is then the least value of that error.
    """
    values = labels_array(np.linspace(0, most, round(20 * most) + 1) if taus is None else taus, "taus")
    values = values.astype(np.float64)
    not_empty(taus=values)
    finite(taus=values)
    rises = values.ndim == 1 and (np.diff(values) > 0).all() and values[0] >= 0 and values[-1] <= MOST_TAU
    require(rises, f"taus must be one row, rising and not negative, at most {MOST_TAU:g}", got=values.tolist())
    errors = [errors_at(float(tau)) for tau in values]
    curves = {name: np.array([each[name] for each in errors]) for name in errors[0]}
    for array in (values, *curves.values()):
        array.setflags(write=False)
    allowed, held_by = np.ones(len(values), dtype=bool), None
    if bound is not None:
        name, factor = bound
        least = curves[name].min()
        limit = factor * (errors_at(0.0) if start is None else start)[name]
        allowed = curves[name] <= (limit if strict else max(limit, least))
        rule = f"taus must hold one with a {_in_words(name)} of"
        fix = "Begin them with 0." if start is None else "Pass a larger most_mae, or bias=False."
        rule = rule if start is None else f"with a bias the {_in_words(name)} at some tau must be"
        require(allowed.any(), f"{rule} at most {limit:.3g}", got=f"at least {least:.3g}", fix=fix)
        held_by = factor if least <= limit and curves[by][allowed].min() > curves[by].min() else None
    best = middle_of_best(np.where(allowed, curves[by], np.inf))
    return TauChoice(float(values[best]), values, curves, by, temperature, samples, start=start, bound=held_by)


def warn_of_tau(choice: TauChoice) -> TauChoice:
    """The choice. A warning is issued if it lies at the end of a range."""
    if choice.tau == choice.taus[-1] and len(choice.taus) > _HANDFUL:
        warn(
            f"the best tau is the largest of those tried, {choice.tau:g}. Labels are so few that chance decides, or "
            "the prior is not the one of training. Give more labels and the right prior, or try larger taus.",
        )
    return choice


class LogitAdjuster(WideBuffers, SoundModule):
    """:func:`adjust_logits` as the last layer of a deployed model: ``nn.Sequential(model, LogitAdjuster(prior))``.

    It computes ``logits / temperature + offset``. Both are buffers, so that a ``state_dict`` includes prior, target and
    tau. They are float32, and stay so where a model is cast to half precision. It can be exported by ``torch.export``.
    Logits in float64 stay float64, but are adjusted only to about seven digits.

    Args:
        prior, target, tau: as in :func:`adjust_logits`.
        temperature: the divisor of the logits, > 0: :func:`fit_temperature`, :func:`choose_tau`.
    Shape:
        forward: logits (..., C). Returns (..., C), at least float32.
    Raises:
        as :func:`adjust_logits`; ValueError: the temperature is not positive or does not fit into float32, or logits
        are on another device than the buffers.
    Source:
        Menon et al. 2021, section 4.1 (arXiv:2007.07314).

    >>> LogitAdjuster([0.75, 0.25])(torch.tensor([[3.0, 1.0]]).log()).softmax(-1)
    tensor([[0.5000, 0.5000]])
    """

    @torch.inference_mode(False)  # buffers must be usable in training
    def __init__(
        self,
        prior: Prior,
        *,
        target: Literal["uniform"] | Prior = "uniform",
        tau: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.offset: Tensor
        self.temperature: Tensor
        temperature = number("temperature", temperature, low=0, open_low=True, float32=True)
        offset = _offset(prior, target, tau).detach().float()
        device = prior.device if isinstance(prior, Tensor) else torch.empty(()).device  # the default one
        self.register_buffer("offset", offset.to(device))
        self.register_buffer("temperature", torch.full((), temperature, dtype=default_dtype(), device=device))

    def forward(self, logits: Tensor) -> Tensor:
        logits = _wide(logits, len(self.offset))
        same_device(offset=self.offset, logits=logits)
        return self._adjusted(logits)

    def _adjusted(self, logits: Tensor) -> Tensor:
        """:meth:`forward` without checks."""
        return logits / self.temperature.to(logits.dtype) + self.offset.to(logits.dtype)

    @property
    def settings(self) -> dict[str, Any]:
        """The offset, computed from prior, target and tau, and the temperature."""
        return {"offset": self.offset, "temperature": self.temperature}


def log_prior_offset(prior: Tensor, tau: float, target: Tensor | None = None) -> Tensor:
    """The offset of logits, (C,): tau times the log of the prior, plus the log of a target. A negative tau removes the
    prior. Arguments are not checked."""
    offset = tau * prior.log()
    return offset if target is None else offset + target.log().to(offset.device)


_AS_PRIOR = "one per class of the prior"


def _offset(prior: Prior, target: Any, tau: float) -> Tensor:
    """The checked offset of logits from a prior to a target: (C,) float64, on the prior's device."""
    shares = _shares("prior", prior)
    tau = checked_tau(tau)
    if isinstance(target, str):
        one_of("target", target, ("uniform",))
        return log_prior_offset(shares, -tau)
    wanted = _shares("target", target, zeros=True)
    shaped(shares.shape, _AS_PRIOR, target=wanted)
    return log_prior_offset(shares, -tau, wanted)


def _shares(name: str, prior: Any, *, zeros: bool = False) -> Tensor:
    """A checked prior as float64, (C,)."""
    if not isinstance(prior, Tensor):
        prior = torch.from_numpy(labels_array(prior, name).astype(np.float64))
    real(**{name: prior})
    shaped(("C",), "one share per class", **{name: prior})
    not_empty(**{name: prior})
    prior = prior.double()
    prior_shares(name, prior, zeros=zeros)
    return prior


def _wide(logits: Tensor, num_classes: int) -> Tensor:
    """Checked logits over ``num_classes`` classes, in at least float32."""
    real(logits=logits)
    shaped((..., num_classes), _AS_PRIOR, logits=logits)
    return logits.to(wide_dtype(logits))


def _held_out(logits: Tensor, labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Checked logits (N, C) in float64 and classes (N,) in int64, as NumPy arrays."""
    real(logits=logits)
    integers(labels=labels)
    shaped(("N", "C"), logits=logits)
    shaped(logits.shape[:1], "one per row of logits", labels=labels)
    not_empty(logits=logits)
    logits, classes = on_host("logits", logits), on_host("labels", labels).long()
    finite(logits=logits)
    classes_exist("labels", classes, logits.shape[1])
    return logits.double().numpy(), classes.numpy()


def best_temperature(
    scores: np.ndarray, classes: np.ndarray, shares: np.ndarray, offset: float | np.ndarray = 0.0
) -> float:
    """:func:`fit_temperature` without checks or warnings. ``offset`` is added to the divided logits."""
    # After subtracting the largest logit, rows of equal logits are exactly zero, and so is their slope.
    scores = scores - scores.max(1, keepdims=True)
    of_label = scores[np.arange(len(classes)), classes]

    from scipy.optimize import brentq
    from scipy.special import softmax

    def slope(log_temperature: float) -> float:
        """The slope of the mean log loss in 1 / T. It falls as T rises."""
        expected = (softmax(scores / math.exp(log_temperature) + offset, axis=1) * scores).sum(1)
        return float(np.average(expected - of_label, weights=shares))

    low, high = (math.log(bound) for bound in _TEMPERATURES)
    at_low, at_high = slope(low), slope(high)
    if at_low > 0 > at_high:
        return math.exp(brentq(slope, low, high, xtol=1e-13))
    return 1.0 if at_low == 0 == at_high else _TEMPERATURES[at_low > 0]


def within_bounds(temperature: float) -> bool:
    """Whether a fitted temperature lies within the bounds of the search."""
    return _TEMPERATURES[0] * (1 + _SLACK) <= temperature <= _TEMPERATURES[1] * (1 - _SLACK)


def warn_of_temperature(temperature: float, logits: np.ndarray) -> float:
    """The temperature. A warning is issued if it is a bound of the search, or if any is as good."""
    if temperature == 1 and (logits == logits[:, :1]).all():
        warn("the logits of each sample are all equal, so that every temperature is equally good; it is set to 1.")
    elif temperature < 1 and not within_bounds(temperature):
        warn(
            f"the best temperature lies at or below {_TEMPERATURES[0]:g}, since every label has the largest logit or "
            "logits hardly differ; that bound is returned. Use more held-out data.",
        )
    elif not within_bounds(temperature):
        warn(
            f"the best temperature lies at or above {_TEMPERATURES[1]:g}, since the logits tell no more than chance or "
            "are huge; that bound is returned. Check that labels belong to the logits.",
        )
    return temperature


def _criterion(by: Criterion, adjusted: np.ndarray, classes: np.ndarray, shares: np.ndarray) -> float:
    """The criterion, lower is better. ``shares`` (N,) sum to one."""
    from scipy.special import log_softmax, softmax

    if by == "log_loss":
        return float(-(shares * log_softmax(adjusted, axis=1)[np.arange(len(classes)), classes]).sum())
    right = adjusted.argmax(1) == classes
    if by == "balanced_error":
        return float((shares * ~right).sum())
    confidence = softmax(adjusted, axis=1).max(1)
    place = confidence_bin(torch.from_numpy(confidence), _CONFIDENCE_EDGES).numpy()
    return float(np.abs(np.bincount(place, weights=shares * (right - confidence))).sum())


def middle_of_best(scores: np.ndarray) -> int:
    """The middle of the longest run of smallest scores. Equal scores may differ by rounding."""
    best = np.append(scores <= scores.min() + TIE, False)
    starts = np.flatnonzero(best & ~np.append(False, best[:-1]))
    ends = np.flatnonzero(~best & np.append(False, best[:-1]))
    longest = int((ends - starts).argmax())
    return int(starts[longest] + ends[longest] - 1) // 2


def _in_words(name: str) -> str:
    """``bMAE``, or ``MAE of few``."""
    name, _, region = name.replace("balanced_error", "balanced error").replace("log_loss", "log-loss").partition("_")
    return {"bmae": "bMAE", "mae": "MAE", "bmse": "bMSE", "mse": "MSE", "ece": "ECE"}.get(name, name) + (
        f" of {region}" if region else ""
    )


def _listed(classes: np.ndarray) -> str:
    """``class 3`` or ``classes 3, 5, ... (40 in all)``."""
    if len(classes) == 1:
        return f"class {classes[0]}"
    shown = ", ".join(str(c) for c in classes[:10])
    return f"classes {shown}" + (f", ... ({len(classes)} in all)" if len(classes) > 10 else "")
