"""The first sentences of a report: who won, by how much, and at what price."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import xarray as xr

from ..._checks import one_of
from ...labels.density import REGIONS
from .comparison import paired_differences
from .schema import check_result
from .tables import BASELINE, decimals_of, shown_in_percent, title

__all__ = ["headline"]


def headline(ds: xr.Dataset, baseline: str | None = None, *, level: float = 0.95) -> str:
    """Who won, by how much and at what price; or that no difference exceeds noise.

    The winner has the least bMAE, or balanced error, over all. It is compared with the baseline and with the next best.
    The price is each region in which the winner is worse than the baseline beyond noise.

    Args:
        ds: a result.
        baseline: the method that the others are to improve; None takes the first.
        level: the level of the intervals, which are those of
            :func:`dir_toolkit.experiment.results.comparison.paired_differences`.
    Raises:
        ResultsError: ``ds`` is no result. ValueError: the baseline is unknown, or the level is out of range.
    """
    check_result(ds)
    metric = "bmae" if "mae" in ds else "balanced_error"
    methods = ds["method"].values.tolist()
    means = dict(zip(methods, ds[metric].sel(region="all").mean("seed").values.tolist(), strict=True))
    constant = means.pop(BASELINE, np.nan)
    baseline = next(iter(means), BASELINE) if baseline is None else baseline
    one_of("baseline", baseline, methods)
    ranked = sorted((name for name, mean in means.items() if np.isfinite(mean)), key=means.__getitem__)
    if not ranked:
        return "No method has a finished run."
    best, say = ranked[0], _Numbers(ds, metric)
    least = f"the least {title(metric)}, {say.value(means[best])}"
    lines = []
    if constant <= means[best]:
        lines.append(f"No method beats the constant predictor, whose {title(metric)} is {say.value(constant)}.")
    rivals = [name for name in dict.fromkeys([baseline, *ranked[1:2]]) if name in ranked[1:]]
    if not rivals:
        return " ".join(
            [*lines, f"{best} has the {title(metric)} {say.value(means[best])} and nothing to be compared with."]
        )
    shared = [rival for rival in rivals if _comparable(ds, best, rival)]
    pairs = {rival: _compared(ds, best, rival, metric, level) for rival in shared}
    pairs = {rival: pair for rival, pair in pairs.items() if pair["difference"][0] == 0 or _varies(pair)[0]}
    if rivals[0] not in pairs:
        why = f"no seed has {'predictions of ' * ('mae' in ds)}both"
        why = "more samples or seeds are needed" if rivals[0] in shared else why
        unknown = f"whether it is better than {rivals[0]} beyond noise is not known, since {why}"
        lines.append(f"{best} has {least}; {unknown}.")
    for rival, pair in pairs.items():
        difference, low, high = (float(pair[f"difference{end}"][0]) for end in ("", "_low", "_high"))
        step = say.change(difference)
        far = f"{step} than {rival}" if say.differs(difference) else f"the same as {rival} when rounded"
        if difference == 0:
            step, far = "exactly the same", f"exactly the same as {rival}"
        span = f"{100 * level:g} % interval: {say.change(low, high)}"
        if rival != rivals[0]:
            differs = "does not differ" if high >= 0 else "also differs" if rivals[0] in pairs else "differs"
            lines.append(f"It {differs} from the next best, {rival}, beyond noise ({step}; {span}).")
        elif high < 0:
            lines.append(f"{best} wins with {least}: {far}, or {100 - 100 * float(pair['ratio'][0]):.0f} % ({span}).")
            prices = list(_prices(ds, pair, best, say))
            free = f"No region is worse than with {rival} beyond noise."
            lines.append(f"The price: {'; '.join(prices)}." if prices else free)
        else:
            lines.append(f"Nobody wins beyond noise: {best} has {least}, {far} ({span}).")
    if any(int(pair["seeds"]) == 1 for pair in pairs.values()):
        lines.append("Of one seed, intervals hold the chance of the test samples alone.")
    return " ".join(lines)


class _Numbers:
    """Errors and their changes in words, with as many decimals as the table has."""

    def __init__(self, ds: xr.Dataset, metric: str) -> None:
        self.percent = shown_in_percent(metric)
        self.decimals = 1 if self.percent else decimals_of(ds[metric])
        units = "%" if self.percent else ds.attrs["label_units"]
        self.units = "" if units == "1" else f" {units}"

    def number(self, value: float) -> str:
        return f"{value * (100 if self.percent else 1):.{self.decimals}f}"

    def value(self, value: float) -> str:
        return self.number(value) + self.units

    def differs(self, difference: float) -> bool:
        """Whether a difference shows in the decimals."""
        return float(self.number(difference)) != 0

    def change(self, *ends: float) -> str:
        """One change, or an interval between two, which starts with the smaller change if both have one direction."""
        alike = max(ends) < 0 or min(ends) >= 0
        ends = tuple(sorted(ends, key=abs)) if alike else ends
        points = " points" * self.percent
        if not any(map(self.differs, ends)):
            return " to ".join(f"{self.number(0)}{points}" for _ in ends)
        words = [f"{self.number(abs(end))}{points} {'less' if end < 0 else 'more'}" for end in ends]
        return " to ".join([*(word.split()[0] for word in words[:-1]), words[-1]] if alike else words)


def _comparable(ds: xr.Dataset, best: str, rival: str) -> bool:
    """Whether two methods have a seed in common and, for continuous labels, predictions of it."""
    known = ds["completed"] == 1
    if "mae" in ds:
        known &= ds["prediction"].notnull().all("sample") if "prediction" in ds else False
    return bool(known.sel({"method": [best, rival]}).all("method").any())


def _compared(ds: xr.Dataset, best: str, rival: str, metric: str, level: float) -> xr.Dataset:
    """The differences of the best method to a rival, over all by ``metric`` and then by region."""
    regions = [region for region in REGIONS if bool((ds["count"].sel(region=region) > 0).any())]
    columns = [(metric, "all"), *(("mae" if metric == "bmae" else metric, region) for region in regions)]
    pair = ds.sel({"method": [best, rival]})
    return paired_differences(pair, rival, metrics=columns, level=level).sel({"method": best})


def _varies(pair: xr.Dataset) -> Any:
    """Whether the differences vary with the seeds or samples drawn, (C,). One seed and one sample per bin cannot."""
    return pair["difference_high"].values > pair["difference_low"].values


def _prices(ds: xr.Dataset, pair: xr.Dataset, best: str, say: _Numbers) -> Iterator[str]:
    """Each region in which the best method is worse beyond noise."""
    for j in range(1, pair.sizes["column"]):
        metric, region = (str(pair[name].values[j]) for name in ("metric", "region"))
        if pair["difference_low"].values[j] > 0 and _varies(pair)[j]:
            part: Any = ds[metric].sel({"region": region, "method": best}).mean("seed")
            ends = (float(pair[f"difference{end}"].values[j]) for end in ("_low", "_high"))
            rise = say.change(float(pair["difference"].values[j]))
            yield f"{title(metric)} {region} is {say.value(float(part))}, {rise} ({say.change(*ends)})"
