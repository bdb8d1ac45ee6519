from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from dir_toolkit import Bins, LabelDensity
from dir_toolkit.labels.decoding import quantiles
from dir_toolkit.metrics import DistributionMetrics, distribution_metrics

EDGES = [0.0, 1.0, 1.5, 4.0, 6.0]
BINS = Bins.from_edges(EDGES)
DENSITY = LabelDensity(BINS, [500, 20, 250, 5])  # regions by counts per label unit: many, medium, many, few
SCORES = ("crps", "log_score", "pinball", "interval_score", "pit_mean", "pit_spread")


def forecasts(n: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(n, 4, generator=generator, dtype=torch.float64).mul(2).softmax(1)
    return p, 6 * torch.rand(n, generator=generator, dtype=torch.float64)


def naive(p: np.ndarray, y: float, *, level: float, quantile: float) -> dict[str, float]:
    """Each score of one label, from the cumulative distribution and by numerical integration."""
    cumulative = np.concatenate([[0.0], p.cumsum()])

    def place(q: float) -> float:
        return float(np.interp(q, cumulative, EDGES))

    def distance(t: float) -> float:
        return float((np.interp(t, EDGES, cumulative) - (t >= y)) ** 2)

    knots = sorted({*EDGES, y})
    crps = sum(quad(distance, a, b - 1e-14 * b, epsabs=1e-13)[0] for a, b in pairwise(knots))
    b = min(int(np.searchsorted(EDGES, y, side="right")) - 1, 3)
    lower, upper, z = place((1 - level) / 2), place((1 + level) / 2), place(quantile)
    missed = 2 / (1 - level) * (max(lower - y, 0) + max(y - upper, 0))
    pit = float(np.interp(y, EDGES, cumulative))
    return {
        "crps": crps,
        "log_score": -math.log(p[b] / (EDGES[b + 1] - EDGES[b])),
        "pinball": quantile * (y - z) if y >= z else (1 - quantile) * (z - y),
        "interval_score": upper - lower + missed,
        "pit": pit,
        "pit_mean": pit,
        "pit_spread": 12 * (pit - 0.5) ** 2,
    }


@pytest.mark.parametrize(("level", "quantile"), [(0.9, 0.9), (0.5, 0.05)])
def test_every_score_is_the_mean_of_naive_ones_in_each_region(level: float, quantile: float) -> None:
    p, y = forecasts()
    result = distribution_metrics(p, y, DENSITY, level=level, quantile=quantile)
    by_sample = [naive(a, b, level=level, quantile=quantile) for a, b in zip(p.numpy(), y.tolist(), strict=True)]
    of_bin = np.array(["many", "medium", "many", "few"])[BINS.index(y).numpy()]
    for region in ("all", "many", "medium", "few"):
        inside = [row for row, name in zip(by_sample, of_bin, strict=True) if region in ("all", name)]
        assert result["count"].sel(region=region) == len(inside) > 0
        for score in SCORES:
            expected = math.fsum(row[score] for row in inside) / len(inside)
            assert result[score].sel(region=region).item() == pytest.approx(expected, rel=1e-10)
    assert result.crps.sel(region="unseen").isnull()
    assert distribution_metrics(p.numpy(), y.tolist(), DENSITY, level=level, quantile=quantile).identical(result)
    metrics = DistributionMetrics(DENSITY, pit_bins=4)
    metrics.update(p, y)
    pit = metrics.pit()
    places = np.histogram([row["pit"] for row in by_sample], bins=4, range=(0, 1))[0]
    assert pit.pit.sel(region="all").values.tolist() == pytest.approx((places / 60).tolist())
    assert pit.pit.sel(region=["many", "medium", "few"]).sum("pit_bin").values.tolist() == pytest.approx([1, 1, 1])
    assert pit.pit.sel(region="unseen").isnull().all()
    assert pit["count"].values.tolist() == result["count"].values.tolist()


def test_scores_are_those_of_scoringrules() -> None:
    rules = pytest.importorskip("scoringrules")
    p, y = forecasts()
    result = distribution_metrics(p, y, DENSITY, level=0.8, quantile=0.3)
    lower, upper, z = quantiles(p, BINS, [0.1, 0.9, 0.3]).T.numpy()
    expected = {
        "pinball": rules.quantile_score(y.numpy(), z, 0.3),
        "interval_score": rules.interval_score(y.numpy(), lower, upper, 0.2),
    }
    for name, values in expected.items():
        assert result[name].sel(region="all").item() == pytest.approx(values.mean(), rel=1e-10)
    # All mass in one bin is a uniform distribution.
    for b, (low, high) in enumerate(pairwise(EDGES)):
        one = distribution_metrics(torch.eye(4, dtype=torch.float64)[[b] * 60], y, DENSITY)
        values = rules.crps_uniform(y.numpy(), low, high)
        assert one.crps.sel(region="all").item() == pytest.approx(values.mean(), rel=1e-10)
        within = y[(y >= low) & (y < high)]
        inside = distribution_metrics(torch.eye(4, dtype=torch.float64)[[b] * len(within)], within, DENSITY)
        log = rules.logs_uniform(within.numpy(), low, high)
        assert inside.log_score.sel(region="all").item() == pytest.approx(log.mean(), rel=1e-10, abs=1e-12)


def test_calibrated_forecasts_have_a_flat_pit_and_narrow_ones_stand_up_at_the_ends() -> None:
    generator = torch.Generator().manual_seed(0)
    bins = Bins.uniform(0, 1, count=20)
    p = torch.randn(4000, 20, generator=generator).softmax(1)
    y = (torch.multinomial(p, 1, generator=generator)[:, 0] + torch.rand(4000, generator=generator)) / 20
    metrics = DistributionMetrics(LabelDensity(bins, [9] * 20), pit_bins=5)
    metrics.update(p, y)
    assert metrics.pit().pit.sel(region="all").values.tolist() == pytest.approx([0.2] * 5, abs=0.03)
    narrow = metrics.fresh()
    narrow.update((p * 0 + 1e-9).index_fill(1, torch.tensor([10]), 1.0).float(), y)
    histogram = narrow.pit().pit.sel(region="all").values
    assert histogram[[0, -1]].min() > 0.3


def test_open_ends_reach_beyond_the_axis_and_whole_numbers_lie_in_the_middle() -> None:
    bins = Bins.uniform(0, 2, width=1)
    p, y = torch.tensor([[1.0, 0.0]]), torch.tensor([0.0])
    closed = distribution_metrics(p, y, LabelDensity(bins, [5, 5])).crps.values[0]
    opened = distribution_metrics(p, y, LabelDensity(bins, [5, 5]), ends="open").crps.values[0]
    assert (closed, opened) == (pytest.approx(1 / 3), pytest.approx(2 * 2 * (1 / 8) / 3))
    whole = Bins.uniform(0, 2, width=1, integer=True)
    metrics = DistributionMetrics(LabelDensity(whole, [5, 5]), pit_bins=1000)
    metrics.update(p, y)
    assert metrics.pit().pit.sel(region="all").values.argmax() == 500


def test_a_clipped_target_keeps_its_distance() -> None:
    p = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    result = distribution_metrics(p, torch.tensor([9.0]), DENSITY, outside="clip")
    assert result.crps.values[0] == pytest.approx(
        9 - 5 - 2 / 6
    )  # the distance of a uniform one's middle, less a sixth of its width
    assert result.log_score.values[0] == pytest.approx(math.log(2))
    assert result.bin_count.values.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"level": 1}, ValueError, r"^DistributionMetrics: level must be > 0 and < 1, got 1"),
        ({"quantile": 0}, ValueError, "quantile must be > 0 and < 1, got 0"),
        ({"pit_bins": 0}, ValueError, "pit_bins must be at least 1, got 0"),
        ({"ends": "ajar"}, ValueError, "ends must be one of 'closed', 'open'"),
        ({"density": LabelDensity(Bins.classes(2), [1, 2])}, ValueError, "density must be over a continuous axis"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        DistributionMetrics(**{"density": DENSITY, **settings})


def test_batches_that_are_refused_add_nothing() -> None:
    metrics = DistributionMetrics(DENSITY)
    p, y = forecasts(3)
    for batch, match in (
        ((p[:2], y), r"update: probabilities must be \(\.\.\., 4\) and target \(\.\.\.\), got \(2, 4\) and \(3,\)"),
        ((p * 2, y), "probabilities must sum to one along the last axis"),
        ((p * math.nan, y), "probabilities must be finite"),
        ((p, y + 6), "target must"),
    ):
        with pytest.raises(ValueError, match=match):
            metrics.update(*batch)
    assert not metrics.sums.any()
    assert not metrics.places.any()
