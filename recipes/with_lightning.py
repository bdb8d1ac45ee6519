"""A Lightning training with LDS and FDS: both, and errors by region, are added to an existing module.

    python recipes/with_lightning.py     # ages drawn by this recipe, no download; needs lightning and torchmetrics

A callback drives FDS, the batches hold LDS weights, and Lightning logs the errors of rare ages as a metric.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from command_line import parse, run

METHODS = {"vanilla": (False, False), "lds": (True, False), "lds+fds": (True, True)}  # LDS weights, FDS
SHOWN = [f"mae/{region}" for region in ("all", "many", "medium", "few")] + ["bmae/all"]


@dataclass(frozen=True)
class Settings:
    samples: int = 4000
    """Persons to train on."""
    epochs: int = 10
    """Passes over them."""


if __name__ == "__main__":
    SETTINGS = parse(Settings)  # --help is answered here, before torch is loaded

import logging
import warnings

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dir_toolkit as dt
from dir_toolkit.integrations.lightning import FDSCallback
from dir_toolkit.integrations.torchmetrics import RegionMetric


def draw(n: int, seed: int, *, even: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (n, 16) of apparent ages, and ages (n,) in [0, 100] years, few of which are old unless ``even``."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(n, generator=generator)
    age = 100 * share if even else (-20 * (1 - share).log()).clamp(0, 100)
    looks = age + torch.randn(n, generator=generator) * (2 + 0.15 * age)
    waves = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    return (looks[:, None] / 25 * waves[0] + waves[1]).sin(), age


class Ages(pl.LightningModule):
    def __init__(self, metric: RegionMetric) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 1)
        self.metric = metric

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))[:, 0]

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return dt.weighted_l1(self(batch[0]), *batch[1:])

    def test_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.metric.update(self(batch[0]), batch[1])

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.metric.compute())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(settings: Settings) -> None:
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    bins = dt.Bins.uniform(0, 100, width=2)
    (x, age), test = draw(settings.samples, seed=1), TensorDataset(*draw(8000, seed=2, even=True))
    density = dt.LabelDensity.count(age, bins)
    weights = dt.LDS(bins).fit(density)(age)
    print(f"MAE in years by the training samples of a bin of two; {settings.epochs} epochs")
    print(" " * 8 + "".join(f"{name:>12}" for name in SHOWN))
    for name, (weighted, smoothed) in METHODS.items():
        torch.manual_seed(0)
        module = Ages(RegionMetric(dt.RegressionMetrics(density), keys=SHOWN))
        fds = dt.FDS(bins, 64, momentum=0.5, start_epoch=1 if smoothed else settings.epochs)
        fds.attach(module.head, "input")
        data = DataLoader(TensorDataset(x, age, weights if weighted else torch.ones_like(age)), 64, shuffle=True)
        options: dict[str, Any] = {"max_epochs": settings.epochs, "accelerator": "cpu", "logger": False}
        options |= {"callbacks": [FDSCallback(fds, labels_of=1)], "enable_checkpointing": False}
        trainer = pl.Trainer(**options, enable_progress_bar=False, enable_model_summary=False)
        trainer.fit(module, data)
        (logged,) = trainer.test(module, DataLoader(test, 1000), verbose=False)
        print(f"{name:8}" + "".join(f"{logged[key]:12.2f}" for key in SHOWN))


if __name__ == "__main__":
    run(main, SETTINGS)
