"""The calibrated intervals of a model, a submodule that is moved, copied and saved with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import number, require
from .._numerics import has_values
from .._state import Float64Module
from ..conformal import Conformal
from ..labels.bins import Bins


class CalibratedIntervals(Float64Module):
    """The result of a calibration: one threshold per bin, for one level.

    Attributes:
        thresholds: (B,), in at least float32 even if the model is cast.
        level: (1,). It is zero before the first calibration, and negative after the prior has changed.
    """

    thresholds: Tensor
    level: Tensor
    _level_read = 0.0  # for graphs, in which it cannot be read

    def __init__(self, bins: Bins, kind: type[Conformal]) -> None:
        super().__init__()
        self.bins, self.kind = bins, kind
        dtype = bins.wide_dtype(torch.zeros(()))
        self.register_buffer("thresholds", torch.zeros(len(bins), dtype=dtype))
        self.register_buffer("level", torch.zeros(1, dtype=dtype))

    def take(self, calibration: Conformal, level: float) -> None:
        self.thresholds.copy_(torch.from_numpy(calibration.thresholds(level)))
        self.set_level(level)

    def set_level(self, level: float) -> None:
        self.level.fill_(level)
        self._level_read = self.exact_level

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._level_read = self.exact_level

    @property
    def exact_level(self) -> float:
        """The level as a decimal, without float32 rounding. A graph takes the one that was read last. After a copy of
        buffers, as into an average of models, that may be another, with which an exported graph fails."""
        if has_values(self.level):
            self._level_read = float(f"{self.level.item():.6g}")
        elif torch.compiler.is_compiling():
            same = (self.level - self._level_read).abs().max() < 1e-6
            torch._assert_async(same, "intervals have a new level: call model.interval once, then export again")
        return self._level_read

    def known(self, level: Any) -> bool:
        """Whether intervals are calibrated. Raises if they are for another level or another prior."""
        own = self.exact_level
        rule, fix = "intervals must be calibrated under the prior of the predictions", "Call calibrate_intervals again."
        require(own >= 0, rule, got="a prior that was set afterwards", fix=fix, error=RuntimeError)
        if own and level is not None:
            off = abs(number("level", level, low=0, high=1, open_low=True, open_high=True) - own)
            rule, fix = f"level must be {own:g}, for which intervals are calibrated", "Calibrate for this one."
            require(off < 1e-6, rule, got=level, fix=fix)
        return own > 0

    def interval(self, output: Tensor) -> tuple[Tensor, Tensor]:
        return self.kind._interval_at(output, self.bins, self.thresholds)

    def sets(self, output: Tensor) -> Tensor:
        return self.kind._sets_at(output, self.bins, self.thresholds)
