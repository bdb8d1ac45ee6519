r"""Split conformal prediction with coverage per region of the label, for rare labels too.

Intervals that cover 90 % of all labels may cover far fewer rare labels. Here each region of the label axis has its own
threshold. The prediction set holds each label whose score exceeds the threshold of the label's region. With a score
:math:`V(x, y)`, higher for a better fit, and :math:`n_r` calibration samples with labels in region r,

.. math:: C(x) = \{y : V(x, y) \ge q_{r(y)}\}, \quad q_r = \text{the } \lfloor \alpha (n_r + 1) \rfloor
          \text{-th smallest } V(x_i, y_i), \quad \alpha = 1 - \text{level},

where the 0-th smallest is :math:`-\infty`. Then :math:`P(y \in C(x) \mid y \in r) \ge \text{level}` for every region
and any model, if calibration samples and new samples are exchangeable. The interval is the hull of the set.

Exchangeable means that calibration data are drawn from the same distribution as new data, and were not used for
training, nor to choose the epoch, the temperature or tau. Where new data drift and their labels arrive later,
:meth:`PointConformal.adapt` keeps the coverage of each region.

Each class takes one kind of forecast: :class:`PointConformal` takes point predictions of any regressor,
:class:`GaussianConformal` takes means and variances, and :class:`BinsConformal` takes distributions over bins or
classes. :func:`conformal_interval` handles point predictions in one call.

Source:
    Vovk 2012 (arXiv:1209.2673) for label-conditional conformal prediction; Ding et al. 2026 (arXiv:2507.06867) for the
    division by the prior; Gibbs and Candès 2021 (arXiv:2106.00170) for data that drift.
"""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
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
from ._numerics import has_values, wide_dtype
from ._ranks import check_group, is_parallel
from ._settings import described, differing, shown
from .errors import ShapeError
from .labels.bins import MISSING, OUTSIDE, Bins, Missing, Outside, continuous
from .labels.density import LabelDensity

__all__ = ["BinsConformal", "GaussianConformal", "PointConformal", "conformal_interval"]

Array = Tensor | np.ndarray
_Own = TypeVar("_Own", bound="Conformal")
_BLOCK = 2**15  # the number of forecasts for which intervals are computed at once


class Conformal(ABC):
    """The base of conformal calibration: scores of calibration samples, prediction sets and intervals.

    Forecasts and labels are tensors, or anything that NumPy converts to an array. Results are tensors on the same
    device, or NumPy arrays.
    """

    def __init__(
        self,
        density: LabelDensity,
        *,
        regions: Sequence[str] | np.ndarray | None = None,
        per_region: float = 1.0,
        outside: Outside = "raise",
        missing: Missing = "raise",
    ) -> None:
        instance(LabelDensity, density=density)
        bins: Any = density.bins
        require(isinstance(bins, Bins), "density must be over one axis", got=bins)
        one_of("outside", outside, OUTSIDE)
        one_of("missing", missing, MISSING)
        self.density, self.bins, self.outside, self.missing = density, bins, outside, missing
        self.regions = label_regions(density) if regions is None else _checked_regions(regions, self.bins)
        self._names, self._of_bin = np.unique(self.regions, return_inverse=True)
        self.per_region = number("per_region", per_region, low=0, high=1)
        self._scores, self._rows, self._warned = [np.empty(0)], [np.empty(0, dtype=np.int64)], False
        self._moved = np.zeros(len(self._names))  # by how much adapt() has raised the miss rate of each region

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        return {
            "density": self.density,
            "regions": self.regions,
            "per_region": self.per_region,
            "outside": self.outside,
            "missing": self.missing,
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({shown(self.settings)})"

    def update(self, output: Any, labels: Any) -> None:
        """Add calibration samples. ``+`` merges objects, and :meth:`all_reduce` merges ranks.

        Args:
            labels: (N,), in label units.
        Raises:
            ShapeError: the shapes do not fit. LabelError: a label is NaN or lies beyond the axis, under ``"raise"``.
            ValueError: a forecast is not finite, or not a distribution in :class:`BinsConformal`.
        """
        self._add(output=output, labels=labels)

    def adapt(self, output: Any, labels: Any, level: float = 0.9, *, rate: float = 0.005) -> None:
        r"""Follow data that drift, by labels that have arrived: adaptive conformal inference for each region.

        Every label of region r that its set misses lowers the miss rate :math:`\alpha_r` from which the threshold of r
        follows, and every label that it holds raises it:

        .. math:: \alpha_r \leftarrow \alpha_r + \text{rate}\,(1 - \text{level} - \text{missed})

        After n labels of a region that came one by one, each followed by this call, the share of missed ones differs
        from 1 - level by at most (max(level, 1 - level) + rate) / (rate n), whatever the data. Meanwhile a set may hold
        all labels of a region, or none. Calibration samples stay as they are. ``+`` sums the steps of both.

        Args:
            output, labels: as in :meth:`update`; forecasts whose sets were used, and their labels.
            level: that of the sets.
            rate: > 0; a higher rate follows faster, and makes sets vary more.
        Raises:
            as :meth:`update` and :meth:`thresholds`.
        Source:
            Gibbs and Candès 2021, equation 2 and proposition 4.1 (arXiv:2106.00170), here for each region.
        """
        rate = number("rate", rate, low=0, high=1, open_low=True)
        scores, rows = self._scored(output=output, labels=labels)
        missed = scores < self._scores_at(level)[rows]
        steps = 1 - level - missed
        self._moved = self._moved + rate * np.bincount(self._of_bin[rows], steps, minlength=len(self._names))

    def _add(self, **given: Any) -> None:
        """:meth:`update` with other names of forecasts and labels for errors."""
        scores, rows = self._scored(**given)
        self._scores.append(scores)
        self._rows.append(rows)

    def _scored(self, **given: Any) -> tuple[np.ndarray, np.ndarray]:
        """V and the bin of each sample whose label counts, of checked forecasts and labels."""
        (name, output), (of_labels, labels) = given.items()
        output = self._checked(name, on_host(name, _as_tensor(name, output)), self.bins)
        labels = on_host(of_labels, _as_tensor(of_labels, labels))
        shaped(output.shape[:1], f"one per forecast of {name}", **{of_labels: labels})
        row = self.bins.index(labels, self.outside, missing=self.missing, name=of_labels)
        if not (counted := row >= 0).all():
            output, labels, row = (part[counted] for part in (output, labels, row))
        finite(**{of_labels: labels})
        return self._score(output, labels, row).double().numpy(), row.numpy()

    def __add__(self: _Own, other: _Own) -> _Own:
        if type(other) is not type(self):
            return NotImplemented
        self._check_same(described("settings", other.settings))
        total = type(self)(**self.settings)
        total._scores, total._rows = self._scores + other._scores, self._rows + other._rows
        total._moved = self._moved + other._moved
        return total

    def all_reduce(self: _Own, *, group: dist.ProcessGroup | None = None) -> _Own:
        """The samples of all ranks, on each rank. All ranks must call this. Outside ``torch.distributed`` it returns
        the object itself.

        Args:
            group: the ranks that hold different samples; None means all ranks.
        Raises:
            ValueError: the settings of the ranks differ. TypeError: ``group`` is not a process group.
        """
        check_group(group)
        if not is_parallel():
            return self
        samples = np.concatenate(self._scores), np.concatenate(self._rows), self._moved
        own = described("settings", self.settings), *samples
        known: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(known, own, group=group)
        total = type(self)(**self.settings)
        for settings, scores, rows, moved in known:
            self._check_same(settings)
            total._scores.append(scores)
            total._rows.append(rows)
            total._moved = total._moved + moved
        return total

    def _check_same(self, settings: Any) -> None:
        differ = differing(settings, described("settings", self.settings))
        require(not differ, "only calibrations with the same settings can be added", got=differ)

    def counts(self) -> dict[str, int]:
        """The number of calibration samples in each region."""
        counts = np.bincount(self._of_bin[np.concatenate(self._rows)], minlength=len(self._names))
        return dict(zip(map(str, self._names), counts.tolist(), strict=True))

    def thresholds(self, level: float = 0.9) -> np.ndarray:
        """The threshold of each bin, (B,) float64: the smallest score of a label in the set.

        It is -inf, so that all labels belong to the set, for a region with fewer than ``1 / (1 - level) - 1`` samples.
        A warning is then issued once.

        Args:
            level: the coverage, in (0, 1).
        Raises:
            ValueError: the level lies outside (0, 1), or there is no calibration sample.
        """
        return self._scores_at(level)

    def _scores_at(self, level: float) -> np.ndarray:
        """The smallest V of a label in the set, for each bin, (B,)."""
        level = number("level", level, low=0, high=1, open_low=True, open_high=True)
        miss = 1 - Fraction(str(level))
        scores, rows = np.concatenate(self._scores), np.concatenate(self._rows)
        some = len(scores) > 0
        require(some, "there must be calibration samples", got="none", fix="Give some with labels on the axis first.")
        counts = np.array(list(self.counts().values()) if self.per_region else [len(rows)])
        needed, fewest = math.ceil(1 / miss) - 1, int(counts.argmin())
        if counts[fewest] < needed and not self._warned:
            self._warned = True
            where = f"region {str(self._names[fewest])!r} has" if self.per_region else "there are"
            warn(
                f"{where} {counts[fewest]} calibration samples, and level {digits(level)} needs {needed}, so that sets "
                "hold all of these labels. Use more samples, a lower level, or larger regions."
            )
        misses, alone = [miss + Fraction(moved) for moved in self._moved], np.arange(len(self._names))
        cuts = ((self.per_region, alone), (1 - self.per_region, np.zeros_like(alone)))
        own = [share * _thresholds(scores, self._of_bin[rows], group, misses) for share, group in cuts if share]
        return np.sum(own, axis=0)[self._of_bin]

    def sets(self, output: Any, level: float = 0.9) -> Any:
        """The bins with a label in the prediction set, (N, B) bool. For classes this is the set itself."""
        checked = self._checked("output", _as_tensor("output", output), self.bins)
        return _as_given(output, self._sets_at(checked, self.bins, self.thresholds(level)))[0]

    def interval(self, output: Any, level: float = 0.9) -> tuple[Any, Any]:
        """The hull of each prediction set: its lower and its upper end, (N,) each, in label units.

        If a set is empty, the interval is the best bin, or the predicted value for a point or a Gaussian.

        Raises:
            as :meth:`update` for forecasts and as :meth:`thresholds`. ValueError: bins are classes, which have no
            order; use :meth:`sets`.
        """
        return self._interval(level, output=output)

    def _interval(self, level: float, **given: Any) -> tuple[Any, Any]:
        """:meth:`interval` with another name of forecasts for errors."""
        ((name, output),) = given.items()
        continuous(self.bins, "Use sets(output, level).", of="an interval")
        checked = self._checked(name, _as_tensor(name, output), self.bins)
        return _as_given(output, *self._interval_at(checked, self.bins, self.thresholds(level)))

    @staticmethod
    @abstractmethod
    def _checked(name: str, output: Tensor, bins: Bins) -> Tensor:
        """Checked forecasts in the dtype to compute in."""

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
    r"""Conformal intervals around point predictions of any regressor, with :math:`V(x, y) = -|y - \hat y(x)|`.

    The first and the last bin extend to infinity.

    Args:
        density: the counted density of the training labels, which decides the regions.
        regions: (B,), the region of each bin, any names. None takes many, medium and few of
            :meth:`LabelDensity.regions`; bins without training labels belong to the rarest of these.
        per_region: 1 uses one threshold per region, and 0 uses one for all labels, as in plain split conformal
            prediction. In between thresholds are averaged with this weight: intervals are narrower, and rare labels are
            covered less often. Only 0 and 1 have a guarantee.
        outside: for a calibration label beyond the axis: ``"raise"``; ``"clip"``, which assigns it to the end bin; or
            ``"drop"``.
        missing: for a calibration label that is NaN: ``"raise"`` or ``"drop"``.
    Shape:
        output: (N,), predictions in label units.

    >>> density = LabelDensity(Bins.uniform(0, 20, width=10), [500, 9])
    >>> calibration = PointConformal(density)
    >>> calibration.update([5.0] * 20 + [9.0] * 20, [6.0] * 20 + [13.0] * 20)  # errors of rare labels are 4
    >>> lower, upper = calibration.interval([5.0, 8.0], level=0.9)
    >>> lower.round(6).tolist(), upper.round(6).tolist()
    ([4.0, 7.0], [6.0, 12.0])
    """

    @staticmethod
    def _checked(name: str, output: Tensor, bins: Bins) -> Tensor:
        return _numbers(name, output, bins, ())

    def _score(self, output: Tensor, labels: Tensor, row: Tensor) -> Tensor:
        return (labels.double() - output.double()).abs_().neg_()

    @staticmethod
    def _sets_at(output: Tensor, bins: Bins, thresholds: Array) -> Tensor:
        return _pieces(output, -_like(thresholds, output), bins.edges)[2]

    @staticmethod
    def _interval_at(output: Tensor, bins: Bins, thresholds: Array) -> tuple[Tensor, Tensor]:
        thresholds, edges = _runs(thresholds, bins)
        reach = -_like(thresholds, output)
        return _hulls(output, lambda part: (part, *_pieces(part, reach, edges)))


class GaussianConformal(Conformal):
    r"""Conformal intervals around Gaussian forecasts, with the log density of the label as the score.

    Intervals are wider for forecasts with a larger variance. Calibration corrects variances that are too small or too
    large.

    Args:
        density, regions, per_region, outside, missing: as those of :class:`PointConformal`.
    Shape:
        output: (N, 2), the mean and the log-variance, as in :func:`dir_toolkit.losses.gaussian_nll.gaussian_nll`.

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
        return _hulls(output, lambda part: (part[:, 0], *_pieces(part[:, 0], _gaussian_reach(part, thresholds), edges)))


class BinsConformal(Conformal):
    r"""Prediction sets from distributions over bins or classes, with :math:`V(x, b) = p(b|x) / (width_b\,
    \pi_b^\gamma)`.

    With one threshold for all labels, gamma 1 optimises coverage averaged over bins for a given mean set size, and
    gamma 0 the coverage over all samples. With one threshold per region coverage holds for any gamma. The logarithm of
    V is computed and averaged.

    Args:
        density, regions, per_region, outside, missing: as those of :class:`PointConformal`.
        gamma: in [0, 1].
        prior: the training prior, (B,), > 0. None takes that of the density, with at least one label in each bin.
    Shape:
        output: (N, B), each row summing to one.

    Intervals end at the ends of the axis, or at infinity if it is unbounded. An end bin of an unbounded axis that holds
    no training label, as both of ``Bins.auto``, belongs to no set, so that intervals stay finite. Labels in it count as
    missed, for which the sets of their region grow, until they hold everything. That is so at once for such a bin that
    is a region of its own.

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
        missing: Missing = "raise",
        gamma: float = 0.5,
        prior: Tensor | np.ndarray | Sequence[float] | None = None,
    ) -> None:
        super().__init__(density, regions=regions, per_region=per_region, outside=outside, missing=missing)
        self.gamma = number("gamma", gamma, low=0, high=1)
        self.prior = density.prior(floor=1.0) if prior is None else labels_array(prior, "prior").astype(np.float64)
        shaped((len(self.bins),), "one share per bin", prior=self.prior)
        prior_shares("prior", torch.from_numpy(self.prior))

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "gamma": self.gamma, "prior": self.prior}

    def thresholds(self, level: float = 0.9) -> np.ndarray:
        """The threshold of each bin, (B,) float64: the smallest log p(b|x) of a bin in the set."""
        scores = super().thresholds(level)
        some = scores > -np.inf  # the others stay, also where the divisor is infinite
        scores[some] += self._log_divisor()[some]
        return scores

    def _log_divisor(self) -> np.ndarray:
        """The logarithm of what p(b|x) is divided by, infinite for a bin that belongs to no set, (B,)."""
        divisor = np.log(self.bins.relative_widths) + self.gamma * np.log(self.prior)
        if self.bins.unbounded:
            ends = np.array([0, -1])
            divisor[ends] = np.where(self.density.counts[ends] == 0, np.inf, divisor[ends])
        return divisor

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
        """The hull of each set, or the best bin where the set is empty."""
        inside = BinsConformal._sets_at(output, bins, thresholds)
        gap = output.log() - _like(thresholds, output)
        best = torch.where(gap.isneginf().all(1, keepdim=True), output, gap).argmax(1, keepdim=True)
        inside = inside | (~inside.any(1, keepdim=True) & (torch.arange(len(bins), device=output.device) == best))
        edges = _opened(bins.edges) if bins.unbounded else bins.edges
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
    missing: Missing = "raise",
) -> tuple[Any, Any]:
    """Conformal intervals around the predictions of any regressor, by :class:`PointConformal`.

    Args:
        pred: the predictions to compute intervals for.
        calibration_pred, calibration_labels: predictions and labels of held-out samples, used neither for training nor
            for choosing settings.
        density, regions, per_region, outside, missing: as in :class:`PointConformal`.
        level: the coverage in each region, in (0, 1).
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
    calibration = PointConformal(density, regions=regions, per_region=per_region, outside=outside, missing=missing)
    calibration._add(calibration_pred=calibration_pred, calibration_labels=calibration_labels)
    return calibration._interval(level, pred=pred)


def label_regions(density: LabelDensity) -> np.ndarray:
    """The region of each bin. Bins without training labels belong to the rarest region that has any."""
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


def _thresholds(scores: np.ndarray, region: np.ndarray, group: np.ndarray, misses: list[Fraction]) -> np.ndarray:
    """The threshold of each of R regions, (R,): of new samples of its group at most a share of ``misses`` has a lower
    score. ``group`` (R,) has the group of each region, and ``misses`` has one share per region."""
    of_sample = group[region].astype(np.min_scalar_type(len(group)))  # NumPy sorts small integers by radix
    counts = np.bincount(of_sample, minlength=len(group))
    size, stop = counts[group], counts.cumsum()
    ranks = np.array([math.floor(miss * (int(n) + 1)) for miss, n in zip(misses, size, strict=True)])
    place = (stop - counts)[group] + (ranks.clip(1, size.clip(min=1)) - 1)
    of_groups = scores[of_sample.argsort(kind="stable")]
    by_group = group.argsort(kind="stable")
    groups, first = np.unique(group[by_group], return_index=True)
    for g, places in zip(groups, np.split(place[by_group], first[1:]), strict=True):
        if counts[g]:
            start = stop[g] - counts[g]
            of_groups[start : stop[g]].partition(np.unique(places - start))
    own = of_groups[place.clip(max=len(scores) - 1)]
    return np.where(ranks < 1, -math.inf, np.where(ranks > size, math.inf, own))


def _as_tensor(name: str, values: Any) -> Tensor:
    if not isinstance(values, Tensor):
        return torch.from_numpy(np.array(labels_array(values, name)))
    real(**{name: values})
    return values.detach()


def _as_given(given: Any, *results: Tensor) -> tuple[Any, ...]:
    """Results as tensors if ``given`` is a tensor, else as NumPy arrays."""
    return results if isinstance(given, Tensor) else tuple(result.numpy() for result in results)


def _numbers(name: str, output: Tensor, bins: Bins, more: tuple[int, ...]) -> Tensor:
    """Checked forecasts (N, ...), finite, of a label on a continuous axis."""
    continuous(bins, "Use BinsConformal.")
    shaped(("N", *more), "", **{name: output})
    finite(**{name: output})
    output = output if output.is_floating_point() else output.double()
    return output.to(bins.wide_dtype(output))


def _like(thresholds: Array, output: Tensor) -> Tensor:
    return torch.as_tensor(thresholds).to(output.device, output.dtype)


def _rounding(values: Tensor) -> float:
    """The relative amount by which sets are widened, so that rounding removes no label exactly on the threshold."""
    return 16 * torch.finfo(values.dtype).eps


def _runs(thresholds: Array, bins: Bins) -> tuple[Array, np.ndarray]:
    """The thresholds (K,) of runs of bins with the same threshold, and the edges (K + 1,) of these runs. In a graph
    each bin is a run."""
    if isinstance(thresholds, Tensor) and not has_values(thresholds):
        return thresholds, bins.edges
    host = torch.as_tensor(thresholds).cpu().numpy()
    first = np.flatnonzero(np.append(True, host[1:] != host[:-1]))
    return host[first], np.append(bins.edges[first], bins.edges[-1])


def _pieces(center: Tensor, reach: Tensor, edges: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """The part between each two adjacent edges that is within reach of the centre.

    Shape:
        center: (N,). reach: (N, K) or (K,), NaN if not even the centre is within reach. edges: (K + 1,); the outer
            edges are treated as infinite. Returns the lower and upper ends and whether the part is not empty, (N, K).
    """
    below, above = _outwards(_opened(edges), center)
    center, slack = center[:, None], _rounding(center)
    reach = reach + slack * (reach + center.abs())
    lower, upper = torch.maximum(center - reach, below[:-1]), torch.minimum(center + reach, above[1:])
    return lower, upper, lower <= upper


def _opened(edges: np.ndarray) -> np.ndarray:
    """Edges (K,) whose ends are infinite."""
    return np.append(np.append(-np.inf, edges[1:-1]), np.inf)


def _outwards(edges: np.ndarray, like: Tensor) -> tuple[Tensor, Tensor]:
    """Edges (K,) rounded down and rounded up in the dtype of ``like``, so that an interval that ends at an edge holds a
    float64 label on it."""
    exact = torch.from_numpy(edges.astype(np.float64))
    near = exact.to(like.dtype)
    far = torch.full_like(near, math.inf)
    below = torch.where(near.double() > exact, torch.nextafter(near, -far), near)
    above = torch.where(near.double() < exact, torch.nextafter(near, far), near)
    return below.to(like.device), above.to(like.device)


def _hulls(output: Tensor, parts_of: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
    """The hull of the pieces of each forecast, or its centre if all are empty. Forecasts are taken in blocks, so that
    pieces stay in the cache, but in a graph at once."""
    if not has_values(output):
        return _hull(*parts_of(output))
    hulls = [_hull(*parts_of(block)) for block in output.split(_BLOCK)]
    lower, upper = zip(*hulls, strict=True)
    return torch.cat(lower), torch.cat(upper)


def _hull(center: Tensor, lower: Tensor, upper: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    low, high = torch.where(there, lower, math.inf).amin(1), torch.where(there, upper, -math.inf).amax(1)
    empty = low > high
    return torch.where(empty, center, low), torch.where(empty, center, high)


def _peak(log_variance: Tensor) -> Tensor:
    """The log density of a Gaussian at its mean."""
    return -(log_variance + math.log(2 * math.pi)) / 2


def _gaussian_reach(output: Tensor, thresholds: Array) -> Tensor:
    """The distance from the mean within which the log density exceeds each threshold, (N, K). It is NaN if even the
    density at the mean is below it."""
    log_variance = output[:, 1:]
    room = _peak(log_variance) - _like(thresholds, output)
    room = room + _rounding(room) * (1 + room.abs())
    return (2 * room).sqrt() * (log_variance / 2).exp()
