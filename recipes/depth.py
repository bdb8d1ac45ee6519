"""Depth maps, one label per pixel: what LDS and FDS do to the errors of far, rare depths.

    python recipes/depth.py          # rooms drawn by this recipe, no download

Pixels without a label hold 0, beyond the axis. ``outside="drop"`` leaves them out of counts, weights and FDS.
"""

from __future__ import annotations

from dataclasses import dataclass

from command_line import parse, refuse, run, too_low

METHODS = {"vanilla": (False, False), "lds": (True, False), "lds+fds": (True, True)}  # LDS weights, FDS
BATCH = 16  # pictures per step


@dataclass(frozen=True)
class Settings:
    scenes: int = 384
    """Pictures to train on."""
    size: int = 32
    """Side of the pictures in pixels, even."""
    epochs: int = 10
    """Passes over the pictures."""
    seeds: int = 2
    """The number of seeds per method: 0, 1, ..."""


if __name__ == "__main__":
    SETTINGS = parse(Settings)  # --help is answered here, before torch is loaded

import torch
import xarray as xr
from comparing import errors_by_region
from torch import nn

import dir_toolkit as dt


def draw(n: int, size: int, seed: int, *, even: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (n, 2, H, W) and metres (n, H, W): floor, wall and boxes in fog. Unless ``even`` most walls are near."""
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
    fog = 10 * (0.4 * torch.randn(n, 1, 1, generator=generator)).exp()  # it is unknown, so far depths are uncertain
    noise = 0.05 * torch.randn(2, n, size, size, generator=generator)
    clear = (-depth / fog).exp()
    image = torch.stack([shade * clear + noise[0], 1 - clear + noise[1] + 0.1 * (shade - 0.7)], 1)
    return image, depth.masked_fill(torch.rand(n, size, size, generator=generator) < 0.05, 0.0)


def main(settings: Settings) -> None:
    odd = [f"--size must be even, got {settings.size}."] * (settings.size % 2)
    refuse("recipes/depth.py", [*too_low(settings, scenes=1, size=2, epochs=1, seeds=1), *odd])
    bins = dt.Bins.uniform(0.5, 30, width=0.5)
    image, depth = draw(settings.scenes, settings.size, seed=1)
    test_image, test_depth = draw(128, settings.size, seed=2, even=True)
    density = dt.LabelDensity.count(depth, bins, outside="drop")
    pixels, lds = int(density.counts.sum()), dt.LDS(bins, outside="drop").fit(density)
    table: dict[str, list[xr.Dataset]] = {name: [] for name in METHODS}
    for name, (weighted, smoothed) in METHODS.items():
        for seed in range(settings.seeds):
            torch.manual_seed(seed)
            maps = [nn.Conv2d(2, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 1, 2, 2), nn.Conv2d(32, 32, 3, 1, 1)]
            layers = [layer for conv in maps for layer in (conv, nn.ReLU())]
            head = nn.Conv2d(32, 1, 1)  # it reads each pixel alone, so FDS calibrates its input
            model = nn.Sequential(*layers, nn.Upsample(scale_factor=2), head)
            fds = dt.FDS(bins, 32, outside="drop", momentum=0.5, start_epoch=1 if smoothed else settings.epochs)
            fds.attach(head, "input")
            optimizer = torch.optim.AdamW(model.parameters())
            steps = settings.epochs * -(-settings.scenes // BATCH)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
            for _ in range(settings.epochs):
                for batch in torch.randperm(settings.scenes).split(BATCH):
                    labels = depth[batch]
                    weight = lds(labels) if weighted else (labels > 0).float()
                    optimizer.zero_grad()
                    with fds.labels(labels):
                        pred = model(image[batch])[:, 0]
                    (dt.weighted_l1(pred, labels, weight, reduction="sum") / (labels > 0).sum()).backward()
                    optimizer.step()
                    schedule.step()
                fds.end_epoch()
            pred, valid = model.eval()(test_image)[:, 0].detach(), test_depth > 0
            many, few = pixels // 50, pixels // 200  # bins of over 2 % and under 0.5 % of the pixels
            table[name].append(dt.regression_metrics(pred[valid], test_depth[valid], density, many=many, few=few))
    print(f"MAE in metres, mean over {settings.seeds} seed(s); bins of 0.5 m by their share of the training pixels")
    print(errors_by_region(table))


if __name__ == "__main__":
    run(main, SETTINGS)
