"""Labels of two dimensions, age and head pose: LDS over their joint bins beside LDS over age alone.

    python recipes/two_labels.py     # features drawn by this recipe, no download

Old faces are rare, and so are faces that are turned far to a side. Faces that are both hardly occur. Weights over a
grid of joint bins reflect that; weights over one axis do not.
"""

from __future__ import annotations

from dataclasses import dataclass

from command_line import parse, refuse, run, too_low


@dataclass(frozen=True)
class Settings:
    samples: int = 8000
    """Faces to train on."""
    epochs: int = 20
    """Passes over them."""
    batch_size: int = 128
    """Faces per step."""
    lr: float = 5e-3
    """The highest learning rate."""
    seeds: int = 3
    """The number of seeds per method: 0, 1, ..."""


if __name__ == "__main__":
    SETTINGS = parse(Settings)  # --help is answered here, before torch is loaded

import numpy as np
import torch
from torch import nn

import dir_toolkit as dt


def draw(n: int, seed: int, *, even: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (n, 16), and labels (n, 2): age in [0, 100] years and pose in [-90, 90] degrees.

    Both labels are long-tailed unless ``even``. Features are functions of the labels plus noise, which grows with them.
    """
    generator = torch.Generator().manual_seed(seed)
    age, pose = torch.rand(2, n, generator=generator)
    if even:
        age, pose = 100 * age, 180 * pose - 90
    else:
        age, pose = (-20 * (1 - age).log()).clamp(0, 100), (25 * torch.erfinv(1.998 * pose - 0.999)).clamp(-90, 90)
    looks = torch.stack([age, pose], 1) + torch.randn(n, 2, generator=generator) * torch.stack(
        [2 + 0.15 * age, 4 + 0.15 * pose.abs()], 1
    )
    basis = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    return (looks / torch.tensor([50.0, 60.0]) @ basis).sin(), torch.stack([age, pose], 1)


def main(settings: Settings) -> None:
    refuse("recipes/two_labels.py", too_low(settings, samples=1, epochs=1, batch_size=1, seeds=1))
    years, degrees = dt.Bins.uniform(0, 100, width=5), dt.Bins.uniform(-90, 90, width=10)
    grid = dt.Bins.grid(years, degrees)
    x, y = draw(settings.samples, seed=1)
    test_x, test_y = draw(8000, seed=2, even=True)
    density = dt.LabelDensity.count(y, grid)
    by_age, jointly = dt.LDS(years).fit(y[:, 0]), dt.LDS(grid).fit(density)
    weights = {"vanilla": torch.ones(len(y)), "lds of age": by_age(y[:, 0]), "lds of both": jointly(y)}
    scale = y.std(0)  # years and degrees share one loss
    table: dict[str, list[np.ndarray]] = {}
    for name, weight in weights.items():
        for seed in range(settings.seeds):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
            steps = settings.epochs * -(-settings.samples // settings.batch_size)
            optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=steps)
            for _ in range(settings.epochs):
                for batch in torch.randperm(settings.samples).split(settings.batch_size):
                    target = y[batch] / scale
                    loss = dt.weighted_l1(model(x[batch]), target, weight[batch, None].expand_as(target))
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
            with torch.no_grad():
                pred = model(test_x) * scale
            errors = dt.regression_metrics(pred, test_y, density)
            table.setdefault(name, []).append(errors.axis_mae.values)
    print(f"MAE in years / degrees, mean over {settings.seeds} seed(s), by the training samples of the joint bin")
    print(" " * 14 + "".join(f"{name:>15}" for name in errors.region.values))
    print(f"{'test samples':14}" + "".join(f"{count:15,}" for count in errors["count"].values))
    for name, rows in table.items():
        age, pose = np.mean(rows, 0)
        print(f"{name:14}" + "".join(f"{a:8.1f} /{p:5.1f}" for a, p in zip(age, pose, strict=True)))


if __name__ == "__main__":
    run(main, SETTINGS)
