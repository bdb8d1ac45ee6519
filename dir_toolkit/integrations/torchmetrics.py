"""The metrics of this package as a ``torchmetrics.Metric``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import instance, problem
from .._settings import shown
from ..metrics.classification import ClassificationMetrics
from ..metrics.regression import RegressionMetrics

try:
    from torchmetrics import Metric
except ImportError as error:
    raise problem(
        "torchmetrics must be installed",
        got=f"{type(error).__name__}: {error}",
        fix="pip install 'torchmetrics>=1.7'",
        error=ImportError,
    ) from error

__all__ = ["RegionMetric"]


class RegionMetric(Metric):
    """Errors by region of the training density: :class:`RegressionMetrics` or :class:`ClassificationMetrics` wherever a
    ``torchmetrics.Metric`` is taken, as in a ``MetricCollection`` or Lightning's ``log_dict``.

    ``compute`` returns a dict of float64 numbers with keys such as ``"mae/all"``, ``"mae/few"``, ``"bmae/all"`` or
    ``"balanced_error/few"``, and ``"count/few"``, the samples they stand on; NaN where a region has none.

    Args:
        metrics: whose settings are taken, not what it has seen.
        keys: of ``compute``, to return these alone; None returns all.
        many, few: limits of the regions, as in :meth:`LabelDensity.regions`.
        options: of ``torchmetrics.Metric``, such as ``dist_sync_on_step``.
    Shape:
        as ``metrics.update``.
    Raises:
        TypeError: ``metrics`` is neither. ValueError: a key is not known. And as ``metrics.update``.

    >>> from dir_toolkit import Bins, LabelDensity, RegressionMetrics
    >>> bins = Bins.classes(2)
    >>> metric = RegionMetric(RegressionMetrics(bins, LabelDensity(bins, [200, 5])), keys=["mae/all", "mae/few"])
    >>> metric.update(torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0.0, 0.0, 1.0]))
    >>> {key: value.item() for key, value in metric.compute().items()}
    {'mae/all': 1.0, 'mae/few': 2.0}
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    identity: Tensor
    refused: Tensor

    def __init__(
        self,
        metrics: RegressionMetrics | ClassificationMetrics,
        *,
        keys: Sequence[str] | None = None,
        many: int = 100,
        few: int = 20,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        instance((RegressionMetrics, ClassificationMetrics), metrics=metrics)
        self._metrics, self._limits = metrics.fresh(), {"many": many, "few": few}
        for name in self._metrics.kept:
            self.add_state(name, getattr(self._metrics, name), dist_reduce_fx="sum")
        # A MetricCollection lets metrics of equal states share one, after a first batch; it must not by chance.
        self.add_state("identity", _digest(self._metrics), dist_reduce_fx="max")
        known = list(_numbers(self._metrics, self._limits))
        self._keys = known if keys is None else list(keys)
        for key in self._keys:
            if key not in known:
                raise problem(f"keys must be out of {', '.join(known)}", got=repr(key))

    @property
    def settings(self) -> dict[str, Any]:
        """What it was made with, by argument; the options of torchmetrics apart."""
        return {"metrics": self._metrics, "keys": self._keys, **self._limits}

    def extra_repr(self) -> str:
        return shown(self.settings)

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Add a batch, as ``metrics.update`` does."""
        metrics = self._seen()
        metrics.update(pred, target)
        for name in metrics.kept:
            setattr(self, name, getattr(metrics, name))

    def compute(self) -> dict[str, Tensor]:
        """The numbers so far, over all ranks, each () float64."""
        numbers = _numbers(self._seen(), self._limits)
        device = self.refused.device
        return {key: torch.tensor(numbers[key], dtype=torch.float64, device=device) for key in self._keys}

    def _seen(self) -> RegressionMetrics | ClassificationMetrics:
        metrics = self._metrics.fresh()
        for name in metrics.kept:
            setattr(metrics, name, getattr(self, name))
        return metrics

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
        """Sums move with a module, and stay float64 and whole numbers whatever it is cast to."""
        self._computed = None  # would be cast
        super()._apply(fn, exclude_state=[*self._defaults, *exclude_state])
        for name, default in self._defaults.items():
            device = fn(default[:0]).device
            if device.type not in ("meta", "mps"):  # of which one has no numbers, and the other no float64
                self._defaults[name] = default.to(device)
                setattr(self, name, getattr(self, name).to(device))
        return self


def _numbers(metrics: RegressionMetrics | ClassificationMetrics, limits: dict[str, int]) -> dict[str, float]:
    result = metrics.compute(**limits)
    return {
        f"{name}/{region}": float(value.sel(region=region))
        for name, value in result.items()
        if value.dims == ("region",)
        for region in result.region.values
    }


def _digest(metrics: RegressionMetrics | ClassificationMetrics) -> Tensor:
    """What the sums depend on, as 32 numbers."""
    told = json.dumps([metrics.bins.to_dict(), getattr(metrics, "floor", None), metrics.outside])
    return torch.tensor(list(hashlib.sha256(told.encode()).digest()), device="cpu")
