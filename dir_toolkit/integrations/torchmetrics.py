"""The metrics of this package as a ``torchmetrics.Metric``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import instance, missing_package, problem, require
from .._settings import shown
from ..metrics.classification import ClassificationMetrics
from ..metrics.regression import RegressionMetrics

try:
    from torchmetrics import Metric
except ImportError as error:
    raise missing_package("torchmetrics", error, "integrations") from error

__all__ = ["RegionMetric"]


class RegionMetric(Metric):
    """Errors by region of the training density as a ``torchmetrics.Metric``, for a ``MetricCollection`` or Lightning's
    ``log_dict``.

    The errors are those of :class:`RegressionMetrics` or :class:`ClassificationMetrics`. ``compute`` returns a dict of
    float64 numbers with keys such as ``"mae/all"``, ``"mae/few"``, ``"bmae/all"`` or ``"balanced_error/few"``, and
    ``"count/few"`` for the number of samples. A number is NaN if its region has no samples.

    Args:
        metrics: metrics whose settings are used. Their samples are not copied.
        keys: the keys that ``compute`` returns, as a list; None for all.
        many, few: the limits of the regions, as in :meth:`LabelDensity.regions`.
        options: those of ``torchmetrics.Metric``, such as ``dist_sync_on_step``.
    Shape:
        as ``metrics.update``.
    Raises:
        TypeError: ``metrics`` is neither of these. ValueError: a key is unknown; or, in ``compute``, sums of metrics
        with other settings were merged or loaded. Further errors are those of ``metrics.update``.

    >>> from dir_toolkit import Bins, LabelDensity, RegressionMetrics
    >>> bins = Bins.classes(2)
    >>> metric = RegionMetric(RegressionMetrics(LabelDensity(bins, [200, 5])), keys=["mae/all", "mae/few"])
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
        # A MetricCollection merges metrics with equal states after the first batch. The digest prevents this for
        # metrics with different settings.
        self.add_state("identity", _digest(self._metrics), dist_reduce_fx="max")
        require(not isinstance(keys, str), "keys must be a list of keys", got=repr(keys), fix=f"Use [{keys!r}].")
        known = list(_numbers(self._metrics, self._limits))
        self._keys = known if keys is None else list(keys)
        if unknown := [key for key in self._keys if key not in known]:
            raise problem(f"keys must be out of {', '.join(known)}", got=repr(unknown[0]))

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of the constructor, without the options of torchmetrics."""
        return {"metrics": self._metrics, "keys": self._keys, **self._limits}

    def extra_repr(self) -> str:
        return shown(self.settings)

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Add a batch, as ``metrics.update``."""
        metrics = self._seen()
        metrics.update(pred, target)
        for name in metrics.kept:
            setattr(self, name, getattr(metrics, name))

    def compute(self) -> dict[str, Tensor]:
        """The numbers of all samples so far, over all ranks, each () float64."""
        same = torch.equal(self.identity.cpu(), _digest(self._metrics))
        fix = "Merge metrics of the same axis and options."
        require(same, "all sums must be of metrics with the same settings", got="others", fix=fix)
        numbers = _numbers(self._seen(), self._limits)
        device = self.refused.device
        return {key: torch.tensor(numbers[key], dtype=torch.float64, device=device) for key in self._keys}

    def _seen(self) -> RegressionMetrics | ClassificationMetrics:
        metrics = self._metrics.fresh()
        for name in metrics.kept:
            setattr(metrics, name, getattr(self, name))
        return metrics

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
        """Move the sums with a module. Casting the module does not change their dtypes."""
        self._computed = None  # it would be cast
        super()._apply(fn, exclude_state=[*self._defaults, *exclude_state])
        for name, default in self._defaults.items():
            device = fn(default[:0]).device
            if device.type not in ("meta", "mps"):  # meta tensors have no values, and mps has no float64
                self._defaults[name] = default.to(device)
                setattr(self, name, getattr(self, name).to(device))
        return self


def _numbers(metrics: RegressionMetrics | ClassificationMetrics, limits: dict[str, int]) -> dict[str, float]:
    """The value of each metric in each region, as ``metric/region``."""
    result = metrics.compute(**limits)
    return {
        f"{name}/{region}": float(value.sel(region=region))
        for name, value in result.items()
        if value.dims == ("region",)
        for region in result.region.values
    }


def _digest(metrics: RegressionMetrics | ClassificationMetrics) -> Tensor:
    """A digest of the settings, as 32 numbers."""
    content = json.dumps([metrics.bins.to_dict(), getattr(metrics, "floor", None), metrics.outside, metrics.missing])
    return torch.tensor(list(hashlib.sha256(content.encode()).digest()), device="cpu")
