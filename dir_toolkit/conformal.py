r"""Intervals that hold rare labels as often as common ones: split conformal prediction by region of the label.

An interval that is right nine times in ten on average can be right half the time where labels are few. Here each region
of the label axis has a threshold of its own. Each possible label is asked whether it could be the true one, by the
threshold of the region that it lies in. With :math:`V(x, y)` a score of how well a label fits a forecast, and
:math:`n_r` calibration samples whose labels lie in region r,

.. math:: C(x) = \{y : V(x, y) \ge q_{r(y)}\}, \quad q_r = \text{the } \lfloor \alpha (n_r + 1) \rfloor
          \text{-th smallest } V(x_i, y_i), \quad \alpha = 1 - \text{level},

and :math:`q_r = -\infty` where that is the 0-th. Then :math:`P(y \in C(x) \mid y \in r) \ge \text{level}` for every
region, whatever the model, if calibration samples and new ones are exchangeable. The interval is the hull of the set.

Exchangeable means that calibration data are drawn as new data will be, and have chosen nothing: neither the parameters
of the model, nor its epoch, temperature or tau. Split them off before all of that.

Each class here takes one kind of forecast: :class:`PointConformal` numbers, as any regressor predicts them,
:class:`GaussianConformal` means with variances, and :class:`BinsConformal` distributions over bins or classes.
:func:`conformal_interval` does it in one call for numbers.

Source:
    Vovk 2012 (arXiv:1209.2673) for label-conditional conformal prediction; Ding et al. 2026 (arXiv:2507.06867) for the
    division by the prior.
"""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ._checks import (
    digits,
    distributions,
    finite,
    floats,
    instance,
    labels_array,
    number,
    on_host,
    one_of,
    prior_shares,
    real,
    require,
    shaped,
    warn,
)
from ._numerics import wide_dtype
from ._ranks import check_group, is_parallel
from ._settings import described, differing, shown
from .errors import ShapeError
from .labels.bins import OUTSIDE, Bins, Outside, continuous
from .labels.density import LabelDensity

__all__ = ["BinsConformal", "GaussianConformal", "PointConformal", "conformal_interval"]

Array = Tensor | np.ndarray
_Own = TypeVar("_Own", bound="Conformal")


class Conformal(ABC):
    """What calibration samples scored, and the sets and intervals that follow.

    Forecasts and labels are tensors, arrays or whatever NumPy makes an array of. Tensors are answered by tensors on
    their device, and all else by NumPy.
    """

    def __init__(
        self,
        density: LabelDensity,
        *,
        regions: Sequence[str] | np.ndarray | None = None,
        per_region: float = 1.0,
        outside: Outside = "raise",
    ) -> None:
        instance(LabelDensity, density=density)
        bins: Any = density.bins
        require(isinstance(bins, Bins), "density must be over one axis", got=bins)
        one_of("outside", outside, OUTSIDE)
        self.density, self.bins, self.outside = density, bins, outside
        self.regions = label_regions(density) if regions is None else _checked_regions(regions, self.bins)
        self._names, self._of_bin = np.unique(self.regions, return_inverse=True)
        self.per_region = number("per_region", per_region, low=0, high=1)
        self._scores, self._rows, self._warned = [np.empty(0)], [np.empty(0, dtype=np.int64)], False

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that it was made with, by name."""
        return {
            "density": self.density,
            "regions": self.regions,
            "per_region": self.per_region,
            "outside": self.outside,
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({shown(self.settings)})"

    def update(self, output: Any, labels: Any) -> None:
        """Add calibration samples. Those of other objects are added by ``+``, and those of other ranks by
        :meth:`all_reduce`.

        Args:
            labels: (N,), in label units.
        Raises:
            ShapeError: the shapes do not fit. LabelError: a label is NaN, or lies beyond the axis under ``"raise"``.
            ValueError: a forecast is not finite, or is not a distribution where it must be one.
        """
        self._add(output=output, labels=labels)

    def _add(self, **given: Any) -> None:
        """:meth:`update` with forecasts and labels of any names, which errors call them by."""
        (name, output), (of_labels, labels) = given.items()
        output = self._checked(name, on_host(name, _as_tensor(name, output)), self.bins)
        labels = on_host(of_labels, _as_tensor(of_labels, labels))
        shaped(output.shape[:1], f"one per forecast of {name}", **{of_labels: labels})
        row = self.bins.index(labels, self.outside, name=of_labels)
        output, labels, row = (part[row >= 0] for part in (output, labels, row))
        finite(**{of_labels: labels})
        self._scores.append(self._score(output, labels, row).double().numpy())
        self._rows.append(row.numpy())

    def __add__(self: _Own, other: _Own) -> _Own:
        if type(other) is not type(self):
            return NotImplemented
        self._check_same(described("settings", other.settings))
        total = type(self)(**self.settings)
        total._scores, total._rows = self._scores + other._scores, self._rows + other._rows
        return total

    def all_reduce(self: _Own, *, group: dist.ProcessGroup | None = None) -> _Own:
        """The samples of all ranks together, on each rank. All ranks must call this. Outside ``torch.distributed`` it
        is the object itself.

        Args:
            group: the ranks that hold different samples, where not all ranks do. None means all ranks.
        Raises:
            ValueError: the settings of the ranks differ. TypeError: ``group`` is not a process group.
        """
        check_group(group)
        if not is_parallel():
            return self
        own = (described("settings", self.settings), np.concatenate(self._scores), np.concatenate(self._rows))
        known: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(known, own, group=group)
        for settings, _, _ in known:
            self._check_same(settings)
        total = type(self)(**self.settings)
        total._scores, total._rows = [scores for _, scores, _ in known], [rows for _, _, rows in known]
        return total

    def _check_same(self, settings: Any) -> None:
        differ = differing(settings, described("settings", self.settings))
        require(not differ, "only calibrations of the same settings can be added", got=differ)

    def counts(self) -> dict[str, int]:
        """The number of calibration samples of each region."""
        counts = np.bincount(self._of_bin[np.concatenate(self._rows)], minlength=len(self._names))
        return dict(zip(map(str, self._names), counts.tolist(), strict=True))

    def thresholds(self, level: float = 0.9) -> np.ndarray:
        """The threshold of each bin, (B,) float64: the least score with which a label of it belongs to the set.

        It is -inf, so that all labels belong, where a region has fewer than ``1 / (1 - level) - 1`` samples; a warning
        says so once.

        Args:
            level: the share of labels of each region that sets are to hold, in (0, 1).
        Raises:
            ValueError: the level lies outside (0, 1), or there is no calibration sample at all.
        """
        level = number("level", level, low=0, high=1, open_low=True, open_high=True)
        miss = 1 - Fraction(str(level))
        scores, rows = np.concatenate(self._scores), np.concatenate(self._rows)
        some = len(scores) > 0
        require(some, "there must be calibration samples", got="none", fix="Call update(output, labels) first.")
        counts = np.array(list(self.counts().values()) if self.per_region else [len(rows)])
        needed, fewest = math.ceil(1 / miss) - 1, int(counts.argmin())
        if counts[fewest] < needed and not self._warned:
            self._warned = True
            where = f"region {str(self._names[fewest])!r} has" if self.per_region else "there are"
            warn(
                f"{where} {counts[fewest]} calibration samples, and level {digits(level)} needs {needed}, so that sets "
                "hold all of these labels. Use more samples, a lower level, or larger regions."
            )
        cuts = ((self.per_region, self._of_bin), (1 - self.per_region, np.zeros_like(self._of_bin)))
        return np.sum([share * _thresholds(scores, rows, of_bin, miss) for share, of_bin in cuts if share], axis=0)

    def sets(self, output: Any, level: float = 0.9) -> Any:
        """The bins that hold a label of the set, (N, B) bool; for classes the set itself."""
        checked = self._checked("output", _as_tensor("output", output), self.bins)
        return _as_given(output, self._sets_at(checked, self.bins, self.thresholds(level)))[0]

    def interval(self, output: Any, level: float = 0.9) -> tuple[Any, Any]:
        """The hull of each set: its lower and its upper end, (N,) each, in label units.

        An empty set, which a forecast that fits no label can have, gives the best bin; of a number or a Gaussian, its
        middle.

        Raises:
            as :meth:`update` for forecasts and as :meth:`thresholds`. ValueError: bins are classes, which have no
            order; use :meth:`sets`.
        """
        return self._interval(level, output=output)

    def _interval(self, level: float, **given: Any) -> tuple[Any, Any]:
        """:meth:`interval` of forecasts of any name."""
        ((name, output),) = given.items()
        continuous(self.bins, "Use sets(output, level).", of="an interval")
        checked = self._checked(name, _as_tensor(name, output), self.bins)
        return _as_given(output, *self._interval_at(checked, self.bins, self.thresholds(level)))

    @staticmethod
    @abstractmethod
    def _checked(name: str, output: Tensor, bins: Bins) -> Tensor:
        """The forecasts in the dtype to compute in."""

    @abstractmethod
    def _score(self, output: Tensor, labels: Tensor, row: Tensor) -> Tensor:
        """V of each sample, (N,)."""

    @staticmethod
    @abstractmethod
    def _sets_at(output: Tensor, bins: Bins, thresholds: Array) -> Tensor:
        """:meth:`sets` of checked forecasts, given the threshold of each bin."""

    @staticmethod
    @abstractmethod
    def _interval_at(output: Tensor, bins: Bins, thresholds: Array) -> tuple[Tensor, Tensor]:
        """:meth:`interval` of checked forecasts, given the threshold of each bin."""


class PointConformal(Conformal):
    r"""Intervals around numbers, whatever predicts them, with :math:`V(x, y) = -|y - \hat y(x)|`.

    The threshold of a region is how far the labels of that region lie from their predictions. A label belongs to the
    set if it is not further away than its own region allows. The first and the last bin reach to infinity.

    Args:
        density: of the training labels, as counted; it decides the regions.
        regions: (B,), the region of each bin, by any names; None takes many, medium and few of
            :meth:`LabelDensity.regions`, where bins without a training label belong to the rarest of these.
        per_region: 1 gives each region a threshold of its own, and 0 gives one to all, as plain split conformal
            prediction does. In between it is the mean of both, with this share of the first: rare labels are held less
            often, and intervals are narrower. Only 0 and 1 have a guarantee.
        outside: what a calibration label beyond the axis does: ``"raise"``; ``"clip"`` counts it in the region of the
            end bin, with its whole error; ``"drop"`` leaves it out.
    Shape:
        output: (N,), predictions in label units.

    >>> density = LabelDensity(Bins.uniform(0, 20, width=10), [500, 9])
    >>> calibration = PointConformal(density)
    >>> calibration.update([5.0] * 20 + [9.0] * 20, [6.0] * 20 + [13.0] * 20)  # rare labels are missed by 4
    >>> lower, upper = calibration.interval([5.0, 8.0], level=0.9)
    >>> lower.round(6).tolist(), upper.round(6).tolist()
    ([4.0, 7.0], [6.0, 12.0])
    """

    @staticmethod
    def _checked(name: str, output: Tensor, bins: Bins) -> Tensor:
        return _numbers(name, output, bins, ())

    def _score(self, output: Tensor, labels: Tensor, row: Tensor) -> Tensor:
        return -(labels.double() - output.double()).abs()

    @staticmethod
    def _sets_at(output: Tensor, bins: Bins, thresholds: Array) -> Tensor:
        return _pieces(output, -_like(thresholds, output), bins.edges)[2]

    @staticmethod
    def _interval_at(output: Tensor, bins: Bins, thresholds: Array) -> tuple[Tensor, Tensor]:
        thresholds, edges = _runs(thresholds, bins)
        return _hull(output, *_pieces(output, -_like(thresholds, output), edges))


class GaussianConformal(Conformal):
    r"""Intervals around Gaussians, with the log density of the label as its score.

    Where a forecast is less sure, its interval is wider; how much the model overrates itself is calibrated away.

    Args:
        density, regions, per_region, outside: as those of :class:`PointConformal`.
    Shape:
        output: (N, 2), the mean and the log-variance, as :func:`dir_toolkit.losses.gaussian_nll.gaussian_nll` takes
        them.

    >>> density = LabelDensity(Bins.uniform(0, 20, width=10), [500, 9])
    >>> calibration = GaussianConformal(density)
    >>> calibration.update([[5.0, 0.0]] * 20 + [[9.0, 0.0]] * 20, [6.0] * 20 + [13.0] * 20)
    >>> [end.round(6).tolist() for end in calibration.interval([[5.0, 0.0]])]
    [[4.0], [6.0]]
    """

    @staticmethod
    def _checked(name: str, output: Tensor, bins: Bins) -> Tensor:
        return _numbers(name, output, bins, (2,))

    def _score(self, output: Tensor, labels: Tensor, row: Tensor) -> Tensor:
        mean, log_variance = output.double().unbind(1)
        return _peak(log_variance) - (labels.double() - mean).square() / (2 * log_variance.exp())

    @staticmethod
    def _sets_at(output: Tensor, bins: Bins, thresholds: Array) -> Tensor:
        return _pieces(output[:, 0], _gaussian_reach(output, thresholds), bins.edges)[2]

    @staticmethod
    def _interval_at(output: Tensor, bins: Bins, thresholds: Array) -> tuple[Tensor, Tensor]:
        thresholds, edges = _runs(thresholds, bins)
        return _hull(output[:, 0], *_pieces(output[:, 0], _gaussian_reach(output, thresholds), edges))


class BinsConformal(Conformal):
    r"""Sets of bins or classes from a distribution over them, with
    :math:`V(x, b) = p(b|x) / (width_b\, \pi_b^\gamma)`, whose logarithm is what is computed and averaged.

    With one threshold for all, gamma 1 has the best coverage averaged over bins for the mean size of its sets, and
    gamma 0 the best coverage of all samples. With a threshold per region the coverage is right for any gamma, which
    then decides within each region alone.

    Args:
        density, regions, per_region, outside: as those of :class:`PointConformal`.
        gamma: in [0, 1].
        prior: the share of each bin, (B,), all above zero: the training prior. None takes that of the density, with at
            least one label in each bin.
    Shape:
        output: (N, B), each row summing to one.

    The interval ends where the axis ends, which is nowhere if it is unbounded.

    >>> density = LabelDensity(Bins.classes(2), [500, 9])
    >>> calibration = BinsConformal(density)
    >>> calibration.update([[0.9, 0.1]] * 40, [0] * 20 + [1] * 20)
    >>> calibration.sets([[0.95, 0.05], [0.9, 0.1]]).tolist()
    [[True, False], [True, True]]
    """

    def __init__(
        self,
        density: LabelDensity,
        *,
        regions: Sequence[str] | np.ndarray | None = None,
        per_region: float = 1.0,
        outside: Outside = "raise",
        gamma: float = 0.5,
        prior: Tensor | np.ndarray | Sequence[float] | None = None,
    ) -> None:
        super().__init__(density, regions=regions, per_region=per_region, outside=outside)
        self.gamma = number("gamma", gamma, low=0, high=1)
        self.prior = density.prior(floor=1.0) if prior is None else labels_array(prior, "prior").astype(np.float64)
        shaped((len(self.bins),), "one share per bin", prior=self.prior)
        prior_shares("prior", torch.from_numpy(self.prior))

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "gamma": self.gamma, "prior": self.prior}

    def thresholds(self, level: float = 0.9) -> np.ndarray:
        """As for the other classes, in the logarithm of the bin's own probability: the least log p(b|x) with which it
        belongs to the set."""
        return super().thresholds(level) + self._log_divisor()

    def _log_divisor(self) -> np.ndarray:
        return np.log(self.bins.relative_widths) + self.gamma * np.log(self.prior)

    @staticmethod
    def _checked(name: str, output: Tensor, bins: Bins) -> Tensor:
        shaped(("N", len(bins)), "a distribution over the bins for each sample", **{name: output})
        floats(**{name: output})
        distributions(zeros=False, **{name: output})
        return output.to(wide_dtype(output))

    def _score(self, output: Tensor, labels: Tensor, row: Tensor) -> Tensor:
        own = output.gather(1, row[:, None])[:, 0].double()
        return own.log() - torch.from_numpy(self._log_divisor())[row]

    @staticmethod
    def _sets_at(output: Tensor, bins: Bins, thresholds: Array) -> Tensor:
        threshold = _like(thresholds, output)
        return output.log() >= threshold - _rounding(threshold) * (1 + threshold.abs())

    @staticmethod
    def _interval_at(output: Tensor, bins: Bins, thresholds: Array) -> tuple[Tensor, Tensor]:
        inside = BinsConformal._sets_at(output, bins, thresholds)
        best = (output.log() - _like(thresholds, output)).argmax(1, keepdim=True)
        inside = inside | (~inside.any(1, keepdim=True) & (torch.arange(len(bins), device=output.device) == best))
        edges = np.append(np.append(-np.inf, bins.edges[1:-1]), np.inf) if bins.unbounded else bins.edges
        below, above = _outwards(edges, output.to(bins.wide_dtype(output)))
        first = inside.to(torch.uint8).argmax(1)
        last = len(bins) - inside.flip(1).to(torch.uint8).argmax(1)
        return below[first], above[last]


def conformal_interval(
    pred: Any,
    calibration_pred: Any,
    calibration_labels: Any,
    density: LabelDensity,
    level: float = 0.9,
    *,
    regions: Sequence[str] | np.ndarray | None = None,
    per_region: float = 1.0,
    outside: Outside = "raise",
) -> tuple[Any, Any]:
    """Intervals around the predictions of any regressor, by :class:`PointConformal`, whose arguments these are.

    Args:
        pred: what the intervals are for.
        calibration_pred, calibration_labels: of samples that neither the regressor nor its settings have seen.
        density: of the training labels.
        level: the share of labels of each region that intervals are to hold, in (0, 1).
    Shape:
        pred: (N,). calibration_pred, calibration_labels: (M,). Returns the lower and the upper end, (N,) each.
    Units:
        those of the label.
    Raises:
        as :meth:`PointConformal.update` and :meth:`PointConformal.thresholds`.

    >>> density = LabelDensity(Bins.uniform(0, 20, width=10), [500, 9])
    >>> lower, upper = conformal_interval([5.0], [5.0] * 40, [6.0] * 20 + [13.0] * 20, density)
    >>> lower.round(6).tolist(), upper.round(6).tolist()
    ([4.0], [13.0])
    """
    calibration = PointConformal(density, regions=regions, per_region=per_region, outside=outside)
    calibration._add(calibration_pred=calibration_pred, calibration_labels=calibration_labels)
    return calibration._interval(level, pred=pred)


def label_regions(density: LabelDensity) -> np.ndarray:
    """The region of each bin, where bins without a training label belong to the rarest region that has any."""
    regions = density.regions()
    regions[regions == "unseen"] = next((name for name in ("few", "medium") if name in regions), "many")
    return regions


def _checked_regions(regions: Any, bins: Bins) -> np.ndarray:
    instance((Sequence, np.ndarray), regions=regions)
    names = list(regions) if getattr(regions, "ndim", 1) else []
    sound = len(names) == len(bins) and all(isinstance(name, (str, numbers.Integral)) for name in names)
    rule = f"regions must be ({len(bins)},) names or whole numbers, one per bin"
    require(sound, rule, got=lambda: shown({"regions": regions}), error=ShapeError)
    return np.array([str(name) for name in names])


def _thresholds(scores: np.ndarray, rows: np.ndarray, of_bin: np.ndarray, miss: Fraction) -> np.ndarray:
    """The score that at most a share ``miss`` of new samples falls below, by the region of each bin, (B,)."""
    of_sample = of_bin[rows]
    counts = np.bincount(of_sample, minlength=of_bin.max() + 1)
    ranks = np.array([int(miss * (int(n) + 1)) for n in counts])
    rising = scores[np.lexsort((scores, of_sample))]
    at = (counts.cumsum() - counts + ranks - 1).clip(min=0, max=len(scores) - 1)
    return np.where(ranks > 0, rising[at], -math.inf)[of_bin]


def _as_tensor(name: str, values: Any) -> Tensor:
    if not isinstance(values, Tensor):
        return torch.from_numpy(np.array(labels_array(values, name)))
    real(**{name: values})
    return values.detach()


def _as_given(given: Any, *results: Tensor) -> tuple[Any, ...]:
    """Tensors for tensors, and NumPy for all else."""
    return results if isinstance(given, Tensor) else tuple(result.numpy() for result in results)


def _numbers(name: str, output: Tensor, bins: Bins, more: tuple[int, ...]) -> Tensor:
    """Finite forecasts (N, ...) of a label on a continuous axis."""
    continuous(bins, "Use BinsConformal.")
    shaped(("N", *more), "", **{name: output})
    finite(**{name: output})
    output = output if output.is_floating_point() else output.double()
    return output.to(bins.wide_dtype(output))


def _like(thresholds: Array, output: Tensor) -> Tensor:
    return torch.as_tensor(thresholds).to(output.device, output.dtype)


def _rounding(values: Tensor) -> float:
    """By what share of their size sets are widened, so that rounding takes no label out of them that calibration had on
    the threshold itself."""
    return 16 * torch.finfo(values.dtype).eps


def _runs(thresholds: Array, bins: Bins) -> tuple[Array, np.ndarray]:
    """The thresholds (K,) of runs of bins that share one, and the edges (K + 1,) between these runs."""
    host = torch.as_tensor(thresholds).cpu().numpy()
    first = np.flatnonzero(np.append(True, host[1:] != host[:-1]))
    return host[first], np.append(bins.edges[first], bins.edges[-1])


def _pieces(center: Tensor, reach: Tensor, edges: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Where labels between neighbouring edges lie within reach of the centre.

    Shape:
        center: (N,). reach: (N, K) or (K,), NaN where not even the centre is within reach. edges: (K + 1,), of which
        the outer ones count as infinite. Returns the lower and upper ends and whether there is such a label, (N, K).
    """
    below, above = _outwards(np.array([-math.inf, *edges[1:-1], math.inf]), center)
    center, slack = center[:, None], _rounding(center)
    reach = reach + slack * (reach + center.abs())
    lower, upper = torch.maximum(center - reach, below[:-1]), torch.minimum(center + reach, above[1:])
    return lower, upper, lower <= upper


def _outwards(edges: np.ndarray, like: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest numbers of a dtype that do not lie above edges (K,), and those that do not lie below them, so that an
    interval that ends at an edge holds a label in float64 that lies on it."""
    exact = torch.from_numpy(edges.astype(np.float64))
    near = exact.to(like.dtype)
    far = torch.full_like(near, math.inf)
    below = torch.where(near.double() > exact, torch.nextafter(near, -far), near)
    above = torch.where(near.double() < exact, torch.nextafter(near, far), near)
    return below.to(like.device), above.to(like.device)


def _hull(center: Tensor, lower: Tensor, upper: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    low, high = lower.masked_fill(~there, math.inf).amin(1), upper.masked_fill(~there, -math.inf).amax(1)
    empty = ~there.any(1)
    return torch.where(empty, center, low), torch.where(empty, center, high)


def _peak(log_variance: Tensor) -> Tensor:
    """The log density of a Gaussian at its mean."""
    return -(log_variance + math.log(2 * math.pi)) / 2


def _gaussian_reach(output: Tensor, thresholds: Array) -> Tensor:
    """How far from the mean the log density stays above each threshold, (N, K); NaN where it is below at the mean."""
    log_variance = output[:, 1:]
    room = _peak(log_variance) - _like(thresholds, output)
    room = room + _rounding(room) * (1 + room.abs())
    return (2 * room).sqrt() * (log_variance / 2).exp()
