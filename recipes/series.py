"""Series with a long-tailed label: rare hours of heavy smog, or engines near their end, read by a recurrent network.

    python recipes/series.py --root DIR                    # fine dust in Beijing from the weather of a day
    python recipes/series.py --root DIR --data cmapss      # cycles that a turbofan engine has left

DIR holds the series: the data cards ``beijing`` and ``cmapss`` say where to get them. Hours without a label are left
out and counted. ``--resume`` continues a run that was stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from command_line import parse, refuse, run, unfit_folder


@dataclass(frozen=True)
class Settings:
    root: Path
    """Folder of the series."""
    data: Literal["beijing", "cmapss"] = "beijing"
    """The label: fine dust of an hour, or remaining life of an engine."""
    methods: tuple[str, ...] = ("vanilla", "lds", "soft+tau")
    """The methods to train: vanilla, lds, fds, lds+fds or soft+tau (soft bins, adjusted by the prior)."""
    seeds: int = 3
    """The number of seeds per method: 0, 1, ..."""
    epochs: int = 8
    """Passes over the training windows."""
    resume: bool = False
    """Continue an earlier run in --out that was stopped."""
    out: Path | None = None
    """Folder of all results; by default runs/series/<data>."""


if __name__ == "__main__":
    SETTINGS = parse(Settings)  # --help is answered here, before torch is loaded

from comparing import compare
from torch import Tensor, nn

import dir_toolkit as dt
from dir_toolkit.experiment.data.images import Splits
from dir_toolkit.experiment.data.series import beijing, cmapss
from dir_toolkit.experiment.data.tables import standardized
from dir_toolkit.experiment.study import Task
from dir_toolkit.experiment.training.loop import Optimization


class Recurrent(nn.Module):
    """A network from windows (N, T, F) to features (N, 64), the state after the last step."""

    num_features = 64

    def __init__(self, splits: Splits) -> None:
        super().__init__()
        self.recurrent = nn.GRU(splits.train.inputs.shape[-1], self.num_features, batch_first=True)

    def forward(self, window: Tensor) -> Tensor:
        return self.recurrent(window)[0][:, -1]


def main(settings: Settings) -> None:
    out = settings.out or Path("runs/series") / settings.data
    refuse("recipes/series.py", unfit_folder("--out", out))
    air = settings.data == "beijing"
    splits = standardized(beijing(settings.root) if air else cmapss(settings.root))
    bins = dt.Bins.uniform(0, 1000, width=20) if air else dt.Bins.uniform(0, 126, width=3, integer=True)
    label = ("fine dust", "µg/m³") if air else ("remaining life", "cycles")
    task = Task(lambda _: splits, bins, Recurrent, "Air of Beijing" if air else "C-MAPSS FD001", *label)
    optimization = Optimization(epochs=settings.epochs, batch_size=256, lr=2e-3)
    compare("recipes/series.py", task, settings, out, loss="weighted_l1", optimization=optimization)


if __name__ == "__main__":
    run(main, SETTINGS)
