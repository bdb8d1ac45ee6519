"""Scores of forecast distributions over bins, by region and by bin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .._checks import as_tensors, finite, length, number, one_of, problem, require
from ..errors import ShapeError
from ..labels.bins import Bins, Missing, Outside
from ..labels.decoding import cumulative_at, quantiles_of
from ..labels.density import REGIONS, LabelDensity
from ..labels.soft_labels import ENDS, Ends, knots_of
from ..losses.distribution import crps_of
from ._metric import Metric
from ._regions import Axis, RegionMetrics
from ._sums import check_samples, check_some, placed

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["DistributionMetrics", "distribution_metrics"]

_PIECE = 2**20  # probabilities at a time
_LEAST = 1e-30  # the smallest probability of a bin in the log score
_SUMS = ("count", "crps", "log", "pinball", "interval", "pit", "pit_spread")


class DistributionMetrics(RegionMetrics):
    r"""CRPS, log score, pinball loss, interval score and PIT of forecast distributions over bins.

    The probability of a bin is spread uniformly between its limits, as in :func:`dir_toolkit.crps`. Let F be the
    cumulative distribution of a forecast, z its quantile of level q, and l and u the ends of its central interval of
    probability :math:`1 - \alpha`. The scores of a label y are

    .. math:: \mathrm{CRPS} = \int (F(t) - [t \ge y])^2\,dt, \qquad
              \mathrm{log} = -\log F'(y), \qquad \mathrm{pinball} = \max(q(y - z), (q - 1)(y - z)),

    .. math:: \mathrm{interval} = u - l + \tfrac2\alpha \max(l - y, 0) + \tfrac2\alpha \max(y - u, 0)

    Lower is better. The log score is in nats of a density per label unit, so that it depends on the unit. Probabilities
    of a label's bin below 1e-30 are raised to 1e-30.

    The PIT of a label is F(y). Where forecasts are calibrated its mean is 0.5, and a larger one says that labels lie
    above their forecasts. Its spread, twelve times the mean square of F(y) - 0.5, is 1 then, and a larger one says that
    forecasts are too narrow. :meth:`pit` gives the whole histogram.

    Args:
        density: the density of the training labels, over bins of a continuous axis. ``(bins, density)`` means the same.
        level: :math:`1 - \alpha`, in (0, 1), of the interval score.
        quantile: q, in (0, 1), of the pinball loss. At 0.5 this is half the absolute error of the median.
        pit_bins: the number of bins of ``pit``.
        ends: as in :func:`dir_toolkit.decode`. For a model use ``model.readout.ends``.
        outside: ``"raise"``, ``"clip"`` or ``"drop"``. A clipped target is scored by its exact value, except in the log
            score, which moves it to the end of the axis.
        missing: ``"raise"``, or ``"drop"``, which ignores targets that are NaN.
    Source:
        Gneiting and Raftery 2007, doi:10.1198/016214506000001437; Dawid 1984, doi:10.2307/2981683, for the PIT.

    >>> from dir_toolkit import Bins
    >>> metrics = DistributionMetrics(LabelDensity(Bins.uniform(0, 2, width=1), [200, 5]))
    >>> metrics.update(torch.tensor([[0.5, 0.5], [0.5, 0.5]]), torch.tensor([1.0, 2.0]))
    >>> metrics.compute().crps.sel(region="few").round(4).item()  # (1/6 + 2/3) / 2
    0.4167
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(
            "crps", "CRPS", "label", ("crps", "count"), np.divide,
            over=("region", "bin"), low=0, may_be_nan=True, watched=("all",),
        ),
        Metric("log_score", "log score", "1", ("log", "count"), np.divide, may_be_nan=True),
        Metric("pinball", "pinball loss", "label", ("pinball", "count"), np.divide, low=0, may_be_nan=True),
        Metric("interval_score", "interval score", "label", ("interval", "count"), np.divide, low=0, may_be_nan=True),
        Metric("pit_mean", "mean PIT", "1", ("pit", "count"), np.divide, low=0, high=1, may_be_nan=True),
        Metric("pit_spread", "PIT spread", "1", ("pit_spread", "count"), np.divide, low=0, high=3, may_be_nan=True),
    )  # fmt: skip
    selects: ClassVar[str] = "crps/all"
    takes: ClassVar[str] = "distribution"
    kept: ClassVar[tuple[str, ...]] = ("sums", "places", "refused")

    bins: Bins
    sums: Tensor
    places: Tensor

    def __init__(
        self,
        density: Axis,
        counted: LabelDensity | None = None,
        *,
        level: float = 0.9,
        quantile: float = 0.9,
        pit_bins: int = 10,
        ends: Ends = "closed",
        outside: Outside = "raise",
        missing: Missing = "raise",
    ) -> None:
        super().__init__(density, counted, outside, missing, grids=False)
        require(not self.bins.categorical, "density must be over a continuous axis", got=repr(self.bins))
        self.level = number("level", level, low=0, high=1, open_low=True, open_high=True)
        self.quantile = number("quantile", quantile, low=0, high=1, open_low=True, open_high=True)
        self.pit_bins = length("pit_bins", pit_bins)
        one_of("ends", ends, ENDS)
        self.ends: Ends = ends
        self._begin(sums=(len(_SUMS), len(self.bins)), places=(self.pit_bins, len(self.bins)), refused=(2,))

    @property
    def settings(self) -> dict[str, Any]:
        names = ("density", "level", "quantile", "pit_bins", "ends", "outside", "missing")
        return {name: getattr(self, name) for name in names}

    def update(self, probabilities: Any, target: Any) -> None:
        """Add a batch, without waiting for an accelerator.

        Args:
            probabilities, target: tensors, or NumPy arrays, pandas columns and lists of numbers.
        Shape:
            probabilities: (..., B), each row summing to one. target: (...). An empty batch adds nothing.
        Units:
            targets in those of the label.
        Raises:
            ShapeError, TypeError, ValueError: as ``bins.shares``, or shapes do not fit. LabelError: a target is NaN, or
                lies beyond the axis under ``outside="raise"``. ValueError: a clipped target is infinite. On an
                accelerator values that are not finite make results NaN or infinite.
        """
        probabilities, target = as_tensors(probabilities=probabilities, target=target)
        check_samples(probabilities=probabilities, target=target)
        if probabilities.shape != (*target.shape, len(self.bins)):
            rule = f"probabilities must be (..., {len(self.bins)}) and target (...)"
            got = f"{tuple(probabilities.shape)} and {tuple(target.shape)}"
            raise problem(rule, got=got, error=ShapeError)
        shares = self.bins.shares(probabilities.detach()).reshape(-1, len(self.bins))
        index, refused = placed(self.bins, target, self.outside, self.missing)
        if self.outside == "clip":
            finite(target=target if self.missing == "raise" else target.masked_fill(target.isnan(), 0))
        self._ready(index.device)
        if refused is not None:
            self.refused[0].add_(refused)
        rows = max(1, _PIECE // len(self.bins))
        pieces = (x.split(rows) for x in (shares, target.detach().flatten(), index.flatten()))
        for p, y, of_bin in zip(*pieces, strict=True):
            scores, pit = self._scores(p.double() / p.double().sum(1, keepdim=True), y.double())
            counts = of_bin >= 0
            row = of_bin.clamp_min(0)
            self.sums.index_add_(1, row, scores.masked_fill(~counts, 0))
            place = (pit * self.pit_bins).long().clamp(0, self.pit_bins - 1)
            self.places.view(-1).index_add_(0, place * len(self.bins) + row, counts.double())

    def _scores(self, p: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The terms that each sample adds to the sums, (7, N), and the PIT of its label, (N,)."""
        knots = knots_of(self.bins, p, self.ends)
        tails = [(1 - self.level) / 2, (1 + self.level) / 2, self.quantile]
        lower, upper, z = quantiles_of(
            p, self.bins, torch.stack([p.new_full((), tail) for tail in tails]), self.ends
        ).unbind(1)
        below, share, width = cumulative_at(p, y, knots)
        outside = 2 / (1 - self.level) * ((lower - y).clamp_min(0) + (y - upper).clamp_min(0))
        pinball = torch.maximum(self.quantile * (y - z), (self.quantile - 1) * (y - z))
        log = width.log() - share.clamp_min(_LEAST).log()
        interval = upper - lower + outside
        spread = 12 * (below - 0.5).square()
        return torch.stack([torch.ones_like(y), crps_of(p, y, knots), log, pinball, interval, below, spread]), below

    def _sums_by_bin(self) -> dict[str, np.ndarray]:
        return dict(zip(_SUMS, self.sums.cpu().numpy()[:, None], strict=True))  # (1, B) each

    def pit(self, *, many: int = 100, few: int = 20) -> xr.Dataset:
        """The histogram of the probability integral transform (PIT), which is F at the label, in ``pit_bins`` equal
        bins from 0 to 1. For calibrated forecasts it is flat over all labels, but not within a region. A hump means
        that forecasts are too wide, and high ends mean that they are too narrow.

        Args:
            many, few: as in ``compute``.
        Returns:
            ``pit`` over (region, pit_bin), NaN where a region has no sample, and ``count`` over region.
        Raises:
            as ``compute``.
        """
        import xarray as xr

        self._check_refused()
        regions, places = self.density.regions(many=many, few=few), self.places.cpu().numpy()
        counts = np.stack([places.sum(1)] + [places[:, regions == name].sum(1) for name in REGIONS])
        with np.errstate(invalid="ignore"):
            shares = counts / counts.sum(1, keepdims=True)
        edges = np.linspace(0, 1, self.pit_bins + 1)
        return xr.Dataset(
            {
                "pit": (("region", "pit_bin"), shares, {"units": "1"}),
                "count": ("region", counts.sum(1).astype(np.int64), {"units": "1"}),
            },
            coords={
                "region": ["all", *REGIONS],
                "pit_low": ("pit_bin", edges[:-1], {"units": "1"}),
                "pit_high": ("pit_bin", edges[1:], {"units": "1"}),
            },
        )


def distribution_metrics(
    probabilities: Any,
    target: Any,
    density: Axis,
    counted: LabelDensity | None = None,
    *,
    level: float = 0.9,
    quantile: float = 0.9,
    ends: Ends = "closed",
    outside: Outside = "raise",
    missing: Missing = "raise",
    many: int = 100,
    few: int = 20,
) -> xr.Dataset:
    """:class:`DistributionMetrics` of one whole data set, with the arguments of the class, ``update`` and ``compute``
    except ``pit_bins``, since the result has no histogram."""
    (probabilities,) = as_tensors(probabilities=probabilities)
    check_some(probabilities=probabilities)
    metrics = DistributionMetrics(
        density, counted, level=level, quantile=quantile, ends=ends, outside=outside, missing=missing
    )
    metrics.update(probabilities, target)
    return metrics.compute(many=many, few=few)
