"""What losses and metrics cost, against their plain counterparts within one run.

    python benchmarks/losses.py

Prints forward and backward of each loss against the plain one on the same predictions, a training step of a model
against a plain one on a ResNet, and an update of the metrics by region against a mean absolute error. Takes two minutes
on two CPU cores.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timing import Report, medians, milliseconds
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError

import dir_toolkit as dt
from dir_toolkit.experiment.backbones import small_resnet

BATCH, NUM_BINS, NUM_FEATURES = 256, 100, 128
IMAGES = {"small_resnet": 64, "resnet18": 32}  # of 64 pixels in the batch of a training step
ROUNDS = 60
BINS = dt.Bins.uniform(0, NUM_BINS, width=1)


def backward(loss: Callable[[Tensor], Tensor], start: Tensor) -> Callable[[], None]:
    """Forward and backward to a prediction."""

    def step() -> None:
        leaf = start.detach().requires_grad_()
        loss(leaf).backward()

    return step


def of_predictions(report: Report, labels: Tensor, density: dt.LabelDensity, generator: torch.Generator) -> None:
    pred = labels + torch.randn(BATCH, generator=generator)
    weights = dt.LDS(BINS).fit(density)
    batch, mixture = dt.losses.BatchMCLoss(), dt.losses.GaussianMixtureLoss.fit(labels)
    binned = dt.losses.BinnedIntegrationLoss(BINS, density)
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "F.l1_loss": lambda p: F.l1_loss(p, labels),
        "weighted_l1 with LDS weights": lambda p: dt.weighted_l1(p, labels, weights(labels)),
        "weighted_huber": lambda p: dt.losses.weighted_huber(p, labels),
        "weighted_focal_l1": lambda p: dt.losses.weighted_focal_l1(p, labels),
        "gaussian_nll": lambda p: dt.losses.gaussian_nll(torch.stack([p, p], 1), labels),
        "BatchMCLoss": lambda p: batch(p, labels),
        "GaussianMixtureLoss": lambda p: mixture(p, labels),
        "BinnedIntegrationLoss": lambda p: binned(p, labels),
    }
    compare(report, losses, pred)


def overhead(report: Report, labels: Tensor, generator: torch.Generator) -> None:
    """What the checks of a loss cost where the loss itself costs next to nothing: forward passes alone."""
    pred, weight = labels + torch.randn(BATCH, generator=generator), torch.rand(BATCH, generator=generator) + 0.5
    runs: dict[str, Callable[[], object]] = {
        "F.l1_loss": lambda: F.l1_loss(pred, labels),
        "weighted_l1": lambda: dt.weighted_l1(pred, labels),
        "F.l1_loss times weights": lambda: (F.l1_loss(pred, labels, reduction="none") * weight).mean(),
    }
    for function in (dt.weighted_l1, dt.losses.weighted_mse, dt.losses.weighted_huber, dt.losses.weighted_focal_l1):
        runs[f"{function.__name__} with weights"] = partial(function, pred, labels, weight)
    times = medians(runs, repeats=4000)
    plain, *others = times
    for name in others:
        goal = "<= 1.3" if "weighted_l1" in name else ""
        detail = milliseconds({plain: times[plain], name: times[name]})
        report.add(f"{name} / {plain}, batch {BATCH}, forward", times[name] / times[plain], goal, detail)


def of_scores(report: Report, labels: Tensor, density: dt.LabelDensity, generator: torch.Generator) -> None:
    logits = torch.randn(BATCH, NUM_BINS, generator=generator)
    index, prior, counts = BINS.index(labels), density.prior(floor=1), density.counts.clip(1)
    soft, offset = dt.soft_labels(labels, BINS, 2.0), torch.as_tensor(prior).log().float()
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "F.cross_entropy": lambda s: F.cross_entropy(s, index),
        "logit_adjusted_cross_entropy": lambda s: dt.logit_adjusted_cross_entropy(s, index, prior),
        "ldam_loss": lambda s: dt.losses.ldam_loss(s / 10, index, counts=counts),
        "focal_loss": lambda s: dt.losses.focal_loss(s, index),
        "equalization_loss": lambda s: dt.losses.equalization_loss(s, index, prior=prior, threshold=1e-3),
        "affinity_loss": lambda s: dt.affinity_loss(s.sigmoid(), index),
        "soft_cross_entropy": lambda s: dt.soft_cross_entropy(s, soft),
        "crps": lambda s: dt.crps(s, labels, bins=BINS),
        "squared_emd": lambda s: dt.losses.squared_emd(s, soft),
    }
    compare(report, losses, logits)
    own = {
        "F.cross_entropy of adjusted logits": lambda s: F.cross_entropy(s + offset, index),
        "logit_adjusted_cross_entropy": losses["logit_adjusted_cross_entropy"],
    }
    compare(report, own, logits, "<= 1.3")
    own = {
        "F.cross_entropy of soft": lambda s: F.cross_entropy(s, soft),
        "soft_cross_entropy": losses["soft_cross_entropy"],
    }
    compare(report, own, logits, "<= 1.3")


def of_model(report: Report, labels: Tensor, density: dt.LabelDensity, generator: torch.Generator) -> None:
    """A step of a model against its backbone and the plain cross-entropy of hard bins."""
    x, index = torch.randn(BATCH, NUM_FEATURES, generator=generator), BINS.index(labels)
    net = torch.nn.Sequential(torch.nn.Linear(NUM_FEATURES, NUM_FEATURES), torch.nn.ReLU())
    plain = torch.nn.Sequential(net, torch.nn.Linear(NUM_FEATURES, NUM_BINS))
    model = dt.LongTailModel(net, NUM_FEATURES, BINS, density=density)
    hard = dt.LongTailModel(net, NUM_FEATURES, dt.Bins.classes(NUM_BINS))
    runs: dict[str, Callable[[], object]] = {
        "backbone and F.cross_entropy": lambda: F.cross_entropy(plain(x), index).backward(),
        "LongTailModel over classes": lambda: hard(x, index).loss.backward(),
        "LongTailModel over soft bins": lambda: model(x, labels).loss.backward(),
    }
    times = medians(runs, repeats=200)
    first, *others = times
    for name in others:
        detail = milliseconds({first: times[first], name: times[name]})
        report.add(f"{name} / {first}, batch {BATCH}, forward and backward", times[name] / times[first], "", detail)


def of_step(report: Report, density: dt.LabelDensity, generator: torch.Generator) -> None:
    """A whole training step, with the optimizer, against that of a plain head on the same backbone of usual size."""
    backbones: dict[str, Callable[[], nn.Module]] = {"small_resnet": small_resnet}
    try:
        from torchvision.models import resnet18

        backbones["resnet18"] = lambda: resnet18(num_classes=NUM_FEATURES)
    except (ImportError, RuntimeError):  # a torchvision built for another torch raises RuntimeError
        report.leave_out("torchvision for this version of torch")
    weights = dt.LDS(BINS).fit(density)
    for name, make in backbones.items():
        images = torch.randn(IMAGES[name], 3, 64, 64, generator=generator)
        labels = NUM_BINS * torch.rand(len(images), generator=generator) ** 2
        runs = steps(make, images, labels, density, weights)
        halves = [medians(runs, repeats=ROUNDS // 2) for _ in range(2)]
        for ours, plain in (
            ("LongTailModel", "F.cross_entropy"),
            ('LongTailModel, head="regression", LDS weights', "F.l1_loss"),
        ):
            first, second = (half[ours] / half[plain] for half in halves)
            each = milliseconds({key: halves[0][key] for key in (plain, ours)})
            detail = f"{each}; medians of {ROUNDS // 2} rounds, twice: {first:.3f} and {second:.3f}"
            what = f"step of {ours} / of {name} and {plain}, batch {len(images)}"
            report.add(what, (first + second) / 2, "<= 1.05", detail)


def steps(
    make: Callable[[], nn.Module], images: Tensor, labels: Tensor, density: dt.LabelDensity, weights: dt.LDS
) -> dict[str, Callable[[], None]]:
    """Training steps by name. Each has a backbone of its own."""
    index = BINS.index(labels)

    def step(head: int | dict[str, Any], loss: Callable[[Any], Tensor]) -> Callable[[], None]:
        model: nn.Module
        if isinstance(head, int):
            model = nn.Sequential(make(), nn.Linear(NUM_FEATURES, head))
        else:
            model = dt.LongTailModel(make(), NUM_FEATURES, BINS, density=density, **head)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

        def run() -> None:
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()

        return run

    def own(model: Any) -> Tensor:
        return model(images, labels).loss

    regression = {"head": "regression", "weights": weights}
    return {
        "F.cross_entropy": step(NUM_BINS, lambda model: F.cross_entropy(model(images), index)),
        "LongTailModel": step({}, own),
        "F.l1_loss": step(1, lambda model: F.l1_loss(model(images).squeeze(1), labels)),
        'LongTailModel, head="regression", LDS weights': step(regression, own),
    }


def of_features(report: Report, labels: Tensor, generator: torch.Generator) -> None:
    """Contrastive losses look at all pairs of a batch, so one distance matrix is what they are held against."""
    features = torch.randn(BATCH, NUM_FEATURES, generator=generator)
    pred = labels + 10 * torch.randn(BATCH, generator=generator)
    center, index = dt.losses.CenterLoss(NUM_FEATURES, NUM_BINS), BINS.index(labels)
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "distances of all pairs": lambda z: torch.cdist(z, z).mean(),
        "conr_loss": lambda z: dt.losses.conr_loss(z, labels, pred=pred),
        "rank_n_contrast": lambda z: dt.losses.rank_n_contrast(z, labels),
        "CenterLoss": lambda z: center(z, index),
    }
    compare(report, losses, features)


def compare(report: Report, losses: dict[str, Callable[[Tensor], Tensor]], start: Tensor, goal: str = "") -> None:
    """All against the first."""
    times = medians({name: backward(loss, start) for name, loss in losses.items()}, repeats=100)
    plain, *others = times
    for name in others:
        detail = milliseconds({plain: times[plain], name: times[name]})
        report.add(f"{name} / {plain}, batch {BATCH}, forward and backward", times[name] / times[plain], goal, detail)


def metrics(report: Report, labels: Tensor, density: dt.LabelDensity) -> None:
    pred = labels + 1
    seen = dt.RegressionMetrics(density)
    plain = MeanAbsoluteError()

    def update_and_add() -> None:
        for _ in range(64):
            seen.update(pred, labels)
        _ = seen.sums  # since small batches wait to be added together

    def repeated(step: Callable[[], object]) -> Callable[[], object]:
        return lambda: [step() for _ in range(64)]

    runs: dict[str, Callable[[], object]] = {
        "mean absolute error": repeated(lambda: float((pred - labels).abs().mean())),
        "update of torchmetrics' MeanAbsoluteError": repeated(lambda: plain.update(pred, labels)),
        "RegressionMetrics.update": update_and_add,
    }
    times = {name: seconds / 64 for name, seconds in medians(runs, repeats=100).items()}
    own, detail = times.pop("RegressionMetrics.update"), milliseconds(times)
    for name, goal in zip(times, ("", "<= 2"), strict=True):
        report.add(f"RegressionMetrics.update / {name}, batch {BATCH}", own / times[name], goal, detail)


def main(report: Report) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = NUM_BINS * torch.rand(BATCH, generator=generator) ** 2
    density = dt.LabelDensity.count(NUM_BINS * torch.rand(20_000, generator=generator) ** 2, BINS)
    of_predictions(report, labels, density, generator)
    overhead(report, labels, generator)
    of_scores(report, labels, density, generator)
    of_model(report, labels, density, generator)
    of_step(report, density, generator)
    of_features(report, labels, generator)
    metrics(report, labels, density)


if __name__ == "__main__":
    main(Report())
