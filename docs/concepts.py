"""Draws the pictures of ``concepts.md`` from what the package does to generated labels and to scikit-learn's digits.

    OMP_NUM_THREADS=1 python docs/concepts.py             # all pictures, or name some: lds affinity

Each function draws the picture of its name. Seeds are fixed, and all that is seen was computed by the package.
``affinity`` also prints the errors of both heads over five seeds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tutorials import write

import dir_toolkit as dt
from dir_toolkit.experiment.data.digits import digits
from dir_toolkit.experiment.data.long_tail import exponential_profile
from dir_toolkit.experiment.results.drawing import PALETTE, look
from dir_toolkit.losses import BinnedIntegrationLoss

PLAIN, BALANCED_MSE, _, FDS, LDS, CRT, *_, REGIONS = PALETTE
COUNTS, INK = "#8c8c8c", "#222222"
COLORS = [PALETTE[8], PALETTE[6], PALETTE[7]]  # of classes


def labels(n: int) -> Tensor:
    """The labels of ``concepts.md``, of which few are large."""
    return (-8 * torch.rand(n).log()).clamp(max=60)


def inputs(y: Tensor) -> Tensor:
    """Two noisy measurements of each label, (N, 2)."""
    return torch.stack([y / 30 - 1, (y / 10).sin()], 1) + 0.3 * torch.randn(len(y), 2)


def train(loss: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, rows: Tensor, size: int) -> None:
    """One epoch over these rows, of which ``loss`` is given a batch at a time."""
    for batch in rows.split(size):
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()


def panels(rows: int = 1, columns: int = 1, **shared: object) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.8, 2.9), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **shared).flat)


def plain_legend(axes: Axes, **place: object) -> None:
    axes.legend(frameon=False, borderaxespad=0.2, labelspacing=0.3, **place)


@look()
def averages() -> Figure:
    """The error of a plain network by label, beside its mean over samples and over bins."""
    y, y_test = labels(4000), labels(100_000)
    x, x_test = inputs(y), inputs(y_test)
    axis = dt.Bins.uniform(0, 60, width=2)
    density = dt.LabelDensity.count(y, axis)
    backbone = nn.Sequential(nn.Linear(2, 64), nn.ReLU())
    model = dt.LongTailModel(backbone, 64, axis, density=density, head="regression")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(10):
        train(lambda rows: model(x[rows], y[rows]).loss, optimizer, torch.randperm(len(y)), 128)
    errors = dt.regression_metrics(model.predict(x_test).prediction, y_test, density)
    figure, (above, below) = panels(2, 1, sharex=True, height_ratios=[1, 2])
    above.stairs(density.counts, axis.edges, fill=True, color=COUNTS)
    above.set(ylabel="training\nlabels")
    below.stairs(errors.bin_mae, axis.edges, color=PLAIN, linewidth=2, baseline=None)
    for value, name, side in ((errors.mae, "MAE, over samples", "bottom"), (errors.bmae, "bMAE, over bins", "top")):
        mean = float(value.sel(region="all"))
        below.axhline(mean, color=INK, linewidth=1, linestyle="--")
        place = mean + (0.2 if side == "bottom" else -0.2)
        below.text(57, place, f"{name}: {mean:.1f}", ha="right", va=side, fontsize=9)
    below.set(xlabel="label", ylabel="absolute error", xlim=(0, 60), ylim=0)
    return figure


@look()
def bins() -> Figure:
    """The same labels, counted in bins that are too wide, as chosen, and too narrow."""
    y = labels(4000)
    figure, sides = panels(1, 3, sharex=True, sharey=True)
    axes = dt.Bins.uniform(0, 60, width=15), dt.Bins.auto(y), dt.Bins.uniform(0, 60, width=0.1)
    for side, axis, name in zip(sides, axes, ("too wide", "Bins.auto", "too narrow"), strict=True):
        density = dt.LabelDensity.count(y, axis)
        width = axis.edges[1] - axis.edges[0]
        side.stairs(density.counts / width, axis.edges, fill=True, color=COUNTS)
        side.plot([0, 60], 500 * np.exp([0, -60 / 8]), color=INK, linewidth=1)
        title = f"{name}:\n{len(axis)} bins of {width:g}"
        side.set(yscale="log", ylim=(0.5, 1000), xlim=(0, 60), title=title)
        side.tick_params(which="minor", length=0)
    sides[0].set_ylabel("labels per unit (log scale)")
    sides[1].set_xlabel("label")
    return figure


@look()
def lds() -> Figure:
    """Counts and their smoothed density, and the weights that follow from both."""
    y = labels(4000)
    axis = dt.Bins.auto(y)
    density = dt.LabelDensity.count(y, axis)
    seen = density.counts > 0
    centers = torch.tensor(axis.centers)
    figure, (above, below) = panels(2, 1, sharex=True)
    above.stairs(np.maximum(density.counts, 0.5), axis.edges, baseline=0.5, fill=True, color=COUNTS, label="counted")
    above.plot(axis.centers, density.smooth().counts, color=LDS, linewidth=2, label="smoothed")
    above.set(yscale="log", ylim=0.5, ylabel="training labels\n(log scale)")
    above.tick_params(which="minor", length=0)
    weights = dt.LDS(axis, kernel=None).fit(y)(centers)
    below.plot(axis.centers[seen], weights[seen], ".", color=PLAIN, markersize=4, label="from the counts")
    weights = dt.LDS(axis).fit(y)(centers)
    below.plot(axis.centers, weights, color=LDS, linewidth=2, label="LDS, from the smoothed ones")
    below.set(xlabel="label", ylabel="weight", xlim=(0, 60), ylim=0)
    plain_legend(above)
    plain_legend(below)
    return figure


@look()
def fds() -> Figure:
    """The mean of one feature in each bin, and what FDS makes of it."""
    y = labels(4000)
    x, axis = inputs(y), dt.Bins.auto(y)
    backbone, head = nn.Sequential(nn.Linear(2, 64), nn.ReLU()), nn.Linear(64, 1)
    smoothing = dt.FDS(axis, num_features=64)
    smoothing.attach(head, "input")
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=1e-2)

    def loss(rows: Tensor) -> Tensor:
        with smoothing.labels(y[rows]):
            return dt.weighted_l1(head(backbone(x[rows])).squeeze(1), y[rows])

    for _ in range(10):
        train(loss, optimizer, torch.randperm(len(y)), 128)
        smoothing.end_epoch()
    known = {name: values.numpy() for name, values in smoothing.statistics().items()}
    seen = known["count"] > 0
    centers, means = axis.centers[seen], known["mean"][seen]
    rises = (centers - centers.mean()) @ (means - means.mean(0)) / (means.std(0) + 1e-6)
    feature = rises.argmax()  # the one that follows the label best
    figure, (axes,) = panels()
    axes.plot(centers, means[:, feature], "o-", color=COUNTS, markersize=3, linewidth=0.8, label="mean of each bin")
    axes.plot(axis.centers, known["smoothed_mean"][:, feature], color=FDS, linewidth=2, label="FDS: smoothed")
    axes.set(xlabel="label", ylabel="one feature of 64", xlim=(0, 60))
    plain_legend(axes)
    return figure


@look()
def balanced_mse() -> Figure:
    """Curves that the same network fits by both losses to samples of which few have large labels."""
    x = 60 * torch.rand(100_000)
    y = x + 6 * torch.randn(len(x))
    kept = (torch.rand(len(x)) < torch.exp(-y / 8)) & (y > 0) & (y < 60)
    x, y = x[kept][:4000], y[kept][:4000]
    axis = dt.Bins.uniform(0, 60, width=1)
    balanced = BinnedIntegrationLoss(axis, dt.LabelDensity.count(y, axis))
    grid = torch.linspace(0, 60, 121)
    figure, (axes,) = panels()
    axes.plot(x, y, ".", color=COUNTS, markersize=1.5, label="training samples")
    axes.plot([0, 60], [0, 60], color=INK, linewidth=1, linestyle="--", label="before thinning")
    for name, loss, color in (("MSE", nn.MSELoss(), PLAIN), ("Balanced MSE", balanced, BALANCED_MSE)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
        optimizer = torch.optim.Adam([*model.parameters(), *loss.parameters()], lr=1e-2)

        def predicted(values: Tensor, model: nn.Module = model) -> Tensor:
            return 30 + 30 * model(values[:, None] / 30 - 1).squeeze(1)

        for _ in range(40):
            train(lambda rows: loss(predicted(x[rows]), y[rows]), optimizer, torch.randperm(len(y)), 256)  # noqa: B023
        axes.plot(grid, predicted(grid).detach(), color=color, linewidth=2, label=name)
    axes.set(xlabel="input", ylabel="label", xlim=(0, 60), ylim=(0, 60))
    plain_legend(axes, loc="upper left", markerscale=4)
    return figure


@look()
def decoupling() -> Figure:
    """The weights of each digit's output and the answers on balanced images, before and after stage two."""
    images = digits(shares=exponential_profile(10, 20))
    x, x_test = (
        torch.from_numpy(part.inputs[part.rows]).float().flatten(1) / 255 for part in (images.train, images.test)
    )
    y = torch.from_numpy(images.train.labels)
    axis = dt.Bins.classes(10)
    model = dt.LongTailModel.for_labels(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), 64, y, bins=axis)
    figure, (above, below) = panels(2, 1, sharex=True)

    def draw(name: str, color: str, place: float) -> None:
        answers = np.bincount(model.predict(x_test).prediction, minlength=10)
        norms = model.head.weight.detach().norm(dim=1).numpy()
        above.bar(np.arange(10) + place, norms, 0.4, color=color, label=name)
        below.bar(np.arange(10) + place, answers, 0.4, color=color)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(60):
        train(lambda rows: model(x[rows], y[rows]).loss, optimizer, torch.randperm(len(y)), 32)
    draw("as trained", PLAIN, -0.2)
    dt.stage_two(model, "crt")
    sampler = dt.BinSampler(y, axis, q=0)
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=1e-2)
    for epoch in range(20):
        sampler.set_epoch(epoch)
        train(lambda rows: model(x[rows], y[rows]).loss, optimizer, torch.tensor(list(sampler)), 32)
    draw("head trained again (cRT)", CRT, 0.2)
    above.set(ylabel="norm of\nweights", ylim=(0, 4))
    below.axhline(50, color=INK, linewidth=1, linestyle="--")
    ticks = [f"{digit}\n{count}" for digit, count in enumerate(y.bincount())]
    below.set_xticks(range(10), ticks)
    below.set(xlabel="digit, and how many training images it has", ylabel="times\nanswered")
    plain_legend(above, loc="upper right", ncols=2)
    return figure


def three_classes(*sizes: int) -> tuple[Tensor, Tensor]:
    """Samples of three classes in a plane, (N, 2), and their classes."""
    means = torch.tensor([[0.0, 1.4], [-1.5, -1.0], [1.5, -1.0]])
    y = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    return means[y] + 0.8 * torch.randn(len(y), 2), y


def softmax_and_affinity(x: Tensor, y: Tensor) -> dict[str, nn.Module]:
    """Both heads, trained on samples of a plane. Prototypes start at the means of the classes."""
    softmax, prototypes = nn.Linear(2, 3), dt.AffinityHead(2, 3, prototypes=1, sigma=1.0, feature_scale=1.0)
    prototypes.weight.data = torch.stack([x[y == k].mean(0, keepdim=True) for k in range(3)])

    def margin(scores: Tensor, target: Tensor) -> Tensor:
        return dt.affinity_loss(scores, target) + 0.003 * prototypes.diversity()

    for head, lr, loss in ((softmax, 0.05, F.cross_entropy), (prototypes, 0.02, margin)):
        optimizer = torch.optim.Adam(head.parameters(), lr=lr)
        for _ in range(40):
            train(lambda rows: loss(head(x[rows]), y[rows]), optimizer, torch.randperm(len(y)), 64)  # noqa: B023
    return {"softmax": softmax, "affinity": prototypes}


@look()
def affinity() -> Figure:
    """Samples of three classes in a plane, over the class that either head answers there."""
    x, y = three_classes(400, 20, 20)
    grid = torch.linspace(-4, 4, 400)
    figure, sides = panels(1, 2)
    for side, (name, head) in zip(sides, softmax_and_affinity(x, y).items(), strict=True):
        answers = head(torch.cartesian_prod(grid, grid).flip(1)).argmax(1).view(400, 400)
        side.imshow(answers.numpy(), ListedColormap(COLORS), alpha=0.25, origin="lower", extent=(-4, 4, -4, 4))
        for k, color in enumerate(COLORS):
            side.plot(*x[y == k].T, ".", color=color, markersize=3)
        if isinstance(head, dt.AffinityHead):
            side.plot(*head.weight[:, 0].detach().T, "*", color=INK, markersize=9)
        side.set(title=name, xticks=[], yticks=[], xlim=(-4, 4), ylim=(-4, 4))
    figure.supxlabel("top: 400 samples; left and right: 20 each", fontsize=9)
    return figure


def errors_of_affinity(seed: int) -> dict[str, list[float]]:
    """The shares of new samples of the common class and of the rare ones that either head gets wrong."""
    torch.manual_seed(seed)
    heads = softmax_and_affinity(*three_classes(400, 20, 20))
    x, y = three_classes(1000, 1000, 1000)
    wrong = {name: (head(x).argmax(1) != y).float() for name, head in heads.items()}
    return {name: [each[y == 0].mean().item(), each[y > 0].mean().item()] for name, each in wrong.items()}


@look()
def calibration() -> Figure:
    """Which share of new labels intervals hold in each region, and how wide they are."""
    truth = labels(101_000)
    forecast = truth + torch.randn(len(truth)) * (1 + truth / 10)
    density = dt.LabelDensity.count(train_labels := labels(4000), dt.Bins.auto(train_labels))
    new, old = slice(1000, None), slice(0, 1000)
    names = ["many", "medium", "few"]
    region = density.regions()[density.bins.index(truth[new], outside="clip")]
    figure, (left, right) = panels(1, 2)
    for name, place, regions, color in (
        ("one threshold", -0.2, ["one"] * len(density.bins), PLAIN),
        ("one per region", 0.2, None, REGIONS),
    ):
        given = forecast[new], forecast[old], truth[old], density, 0.9
        lower, upper = dt.conformal.conformal_interval(*given, regions=regions, outside="clip")
        held = ((lower <= truth[new]) & (truth[new] <= upper)).numpy()
        width = (upper - lower).numpy()
        left.bar(np.arange(3) + place, [100 * held[region == part].mean() for part in names], 0.4, color=color)
        middle = [np.median(width[region == part]) for part in names]
        right.bar(np.arange(3) + place, middle, 0.4, color=color, label=name)
    left.axhline(90, color=INK, linewidth=1, linestyle="--")
    left.set(ylabel="labels held in %", ylim=(0, 100))
    right.set(ylabel="median width")
    for side in (left, right):
        side.set_xticks(range(3), names)
    plain_legend(right)
    figure.supxlabel("region of the label", fontsize=9)
    return figure


PICTURES = {draw.__name__: draw for draw in (averages, bins, lds, fds, balanced_mse, decoupling, affinity, calibration)}


def picture(name: str) -> Image.Image:
    """The picture of this name, 960 pixels wide, drawn anew."""
    torch.manual_seed(0)
    buffer = BytesIO()
    PICTURES[name]().savefig(buffer, dpi=200)
    return Image.open(buffer).convert("RGB")


if __name__ == "__main__":
    for wanted in sys.argv[1:] or PICTURES:
        write(picture(wanted), Path(__file__).parent / "concepts" / f"{wanted}.png")
        for seed in range(5 if wanted == "affinity" else 0):
            errors = errors_of_affinity(seed).items()
            print(f"seed {seed}:", ", ".join(f"{name} {a:.1%} common, {b:.1%} rare" for name, (a, b) in errors))
