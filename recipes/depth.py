"""Depth maps, one label a pixel: what LDS and FDS do to the errors of far, rare depths.

    python recipes/depth.py          # rooms drawn by this recipe, no download

A small convolutional network reads the depth of each pixel off a picture. Pixels without a label, as sensors leave
them, hold 0, which lies beyond the axis: ``outside="drop"`` then neither counts nor weighs nor calibrates them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from command_line import run

if TYPE_CHECKING:  # torch and the toolkit load in main(), so that --help answers at once
    import torch

METHODS = {"vanilla": (False, False), "lds": (True, False), "lds+fds": (True, True)}  # LDS weights, FDS


@dataclass(frozen=True)
class Settings:
    """Depth maps, one label a pixel: what LDS and FDS do to the errors of far, rare depths."""

    scenes: int = 384
    """Pictures to train on."""
    size: int = 32
    """Side of the pictures in pixels, even."""
    epochs: int = 10
    """Passes over the pictures."""
    batch_size: int = 16
    """Pictures a step."""
    lr: float = 3e-3
    """Highest learning rate."""
    seeds: int = 2
    """How many seeds a method is trained with: 0, 1, ..."""


def draw(n: int, size: int, seed: int, *, even: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (n, 2, H, W) and depths in metres (n, H, W): a floor, a wall and boxes, in fog. Most walls are near,
    unless ``even``; one pixel in twenty has no label, 0."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(n, 1, 1, generator=generator)
    wall = (2 + 27 * share if even else (2 - 4 * (1 - share).log()).clamp(max=29)).expand(n, size, size)
    row, column = torch.arange(size).view(-1, 1) / size, torch.arange(size) / size
    floor = 0.6 / (row - 0.45).clamp(min=0.01)  # a camera at 0.6 m that looks ahead
    depth = torch.minimum(wall, floor).clamp(min=1)
    shade = 0.5 + 0.5 * torch.rand(n, 1, 1, generator=generator) * (depth == wall) + 0.2 * (floor < wall)
    for _ in range(3):
        where, gloss, near = torch.rand(3, n, 1, 1, generator=generator)
        away = 1 + (wall[:, :1, :1] - 1) * near
        inside = ((column - where).abs() < 0.5 / away) & ((row - 0.45 - 0.3 / away).abs() < 0.4 / away)
        depth, shade = torch.where(inside & (away < depth), away, depth), torch.where(inside, 0.3 + gloss, shade)
    sight = 10 * (0.4 * torch.randn(n, 1, 1, generator=generator)).exp()  # nobody tells, so far depths are uncertain
    clear = (-depth / sight).exp()
    noise = 0.05 * torch.randn(2, n, size, size, generator=generator)
    image = torch.stack([shade * clear + noise[0], 1 - clear + noise[1] + 0.1 * (shade - 0.7)], 1)
    return image, depth.masked_fill(torch.rand(n, size, size, generator=generator) < 0.05, 0.0)


def main(settings: Settings) -> None:
    import numpy as np
    import torch
    from torch import nn

    import dir_toolkit as dt

    bins = dt.Bins.uniform(0.5, 30, width=0.5)
    image, depth = draw(settings.scenes, settings.size, seed=1)
    test_image, test_depth = draw(128, settings.size, seed=2, even=True)
    valid = test_depth > 0
    density = dt.LabelDensity.count(depth, bins, outside="drop")
    pixels = int(density.counts.sum())
    many, few = pixels // 50, pixels // 200  # of the pixels a bin holds: more than 2 %, less than 0.5 %
    lds = dt.LDS(bins, outside="drop").fit(density)
    table: dict[str, list[np.ndarray]] = {name: [] for name in METHODS}
    for name, (weighted, smoothed) in METHODS.items():
        for seed in range(settings.seeds):
            torch.manual_seed(seed)
            encoder = nn.Sequential(nn.Conv2d(2, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 1, 2, 2), nn.ReLU())
            decoder = nn.Sequential(nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU(), nn.Upsample(scale_factor=2))
            head = nn.Conv2d(32, 1, 1)  # reads each pixel by itself, so FDS calibrates what enters it
            model = nn.Sequential(encoder, decoder, head)
            fds = dt.FDS(bins, 32, outside="drop", momentum=0.5)
            if smoothed:
                fds.attach(head, "input")
            steps = settings.epochs * -(-settings.scenes // settings.batch_size)
            optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=steps)
            for _ in range(settings.epochs):
                for batch in torch.randperm(settings.scenes).split(settings.batch_size):
                    labels = depth[batch]
                    weight = lds(labels) if weighted else (labels > 0).float()
                    with fds.labels(labels):
                        pred = model(image[batch])[:, 0]
                    loss = dt.weighted_l1(pred, labels, weight, reduction="sum") / (labels > 0).sum()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                if smoothed:
                    fds.end_epoch()
            with torch.no_grad():
                pred = model.eval()(test_image)[:, 0]
            errors = dt.regression_metrics(pred[valid], test_depth[valid], density, many=many, few=few)
            table[name].append(np.append(errors.mae, errors.bmae.sel(region="all")))
    print(f"MAE in metres, mean over {settings.seeds} seed(s); bins of 0.5 m by their share of the training pixels")
    print(" " * 12 + "".join(f"{name:>9}" for name in (*errors.region.values, "bMAE")))
    print(f"{'test pixels':12}" + "".join(f"{count:9,}" for count in errors["count"].values))
    for name, rows in table.items():
        print(f"{name:12}" + "".join(f"{value:9.2f}" for value in np.mean(rows, 0)))


if __name__ == "__main__":
    run(main, Settings)
