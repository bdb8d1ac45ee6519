"""A step of every loss, head, model, FDS form, label tool and metric, for tests on devices of any kind."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import dir_toolkit as dt

N, D, C = 32, 6, 5
_STEPS = 5  # of an epoch, more than a job does in the next
BINS = dt.Bins.uniform(0, 12, width=1)
UNEVEN = dt.Bins.from_edges([0, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12])
CLASSES = dt.Bins.classes(C)
GRID = dt.Bins.grid(BINS, UNEVEN)

Data = SimpleNamespace
Job = tuple[list[nn.Module], Callable[[Data], Any]]
"""Modules that go along to the device, and a step, which returns a loss, or a tuple of tensors without gradients."""


def batch() -> dict[str, Tensor]:
    """Numbers for every kind of argument. Labels of all bins; gradients are asked of what a network would give."""
    with torch.device("cpu"):
        g = torch.Generator().manual_seed(0)
        y = 12 * torch.rand(N, generator=g)
        c = torch.arange(N) % C
        leaves = {
            "pred": y + torch.randn(N, generator=g),
            "pair": torch.randn(N, 2, generator=g),
            "pred2": torch.stack([y, y], 1) + 1,
            "scores": torch.randn(N, len(BINS), generator=g),
            "logits": torch.randn(N, C, generator=g),
            "cosines": 2 * torch.rand(N, C, generator=g) - 1,
            "affinities": torch.rand(N, C, generator=g).softmax(1),
            "features": torch.randn(N, D, generator=g),
            "centers": torch.randn(C, D, generator=g),
            "maps": torch.randn(4, D, 4, 2, generator=g),
        }
        others = {
            "x": torch.randn(N, D, generator=g),
            "y": y,
            "y2": torch.stack([y, y.flip(0)], 1),
            "pixels": y.view(4, 4, 2),
            "c": c,
            "w": torch.rand(N, generator=g),
            "spread": dt.soft_labels(y, BINS, 1.5),
            "prior": torch.full((C,), 1 / C),
            "counts": torch.arange(1, C + 1),
            "margins": torch.zeros(C, C),
        }
    return {**{name: value.requires_grad_() for name, value in leaves.items()}, **others}


def density(bins: Any) -> dt.LabelDensity:
    return dt.LabelDensity(bins, torch.arange(1, len(bins) + 1))


def lds(bins: Any, **settings: Any) -> dt.LDS:
    labels = batch()["y2" if bins is GRID else "c" if bins is CLASSES else "y"]
    return dt.LDS(bins, **settings).fit(labels)


def alone(step: Callable[[Data], Any]) -> Callable[[], Job]:
    return lambda: ([], step)


def of(make: Callable[[], nn.Module], step: Callable[[Any, Data], Any]) -> Callable[[], Job]:
    def job() -> Job:
        module = make()
        return [module], lambda d: step(module, d)

    return job


def measured(make: Callable[[], Any], *names: str) -> Callable[[], Job]:
    def job() -> Job:
        metrics = make()

        def step(d: Data) -> tuple[Tensor, ...]:
            metrics.update(*(getattr(d, name).detach() for name in names))
            return tuple(getattr(metrics, name) for name in getattr(metrics, "kept", ()))

        return [metrics] if isinstance(metrics, nn.Module) else [], step

    return job


LOSSES: dict[str, Callable[[], Job]] = {
    "affinity_loss": alone(lambda d: dt.affinity_loss(d.affinities, d.c, d.w)),
    "balanced_cross_entropy": alone(lambda d: dt.losses.balanced_cross_entropy(d.logits, d.c, d.w, prior=d.prior)),
    "BatchMCLoss": of(lambda: dt.losses.BatchMCLoss(), lambda m, d: m(d.pred, d.y, d.w)),
    "BatchMCLoss of rows": of(lambda: dt.losses.BatchMCLoss(learn=False), lambda m, d: m(d.pred2, d.y2, d.w)),
    "BinnedIntegrationLoss": of(
        lambda: dt.losses.BinnedIntegrationLoss(BINS, density(BINS)), lambda m, d: m(d.pred, d.y, d.w)
    ),
    "BinnedIntegrationLoss of uneven bins": of(
        lambda: dt.losses.BinnedIntegrationLoss(UNEVEN, density(UNEVEN)), lambda m, d: m(d.pred, d.y)
    ),
    "BinnedIntegrationLoss that drops": of(
        lambda: dt.losses.BinnedIntegrationLoss(BINS, density(BINS), outside="drop"), lambda m, d: m(d.pred, d.y)
    ),
    "CenterLoss": of(lambda: dt.losses.CenterLoss(D, C), lambda m, d: m(d.features, d.c, d.w)),
    "center_loss": alone(lambda d: dt.losses.center_loss(d.features, d.c, d.w, centers=d.centers)),
    "ConRLoss": of(
        lambda: dt.losses.ConRLoss(weights=lds(BINS), omega=1.0),
        lambda m, d: m(SimpleNamespace(prediction=d.pred, features=d.features), d.y, d.w),
    ),
    "ConRLoss by default": of(
        lambda: dt.losses.ConRLoss(), lambda m, d: m(SimpleNamespace(prediction=d.pred, features=d.features), d.y)
    ),
    "conr_loss": alone(lambda d: dt.losses.conr_loss(d.features, d.y, d.w, pred=d.pred, omega=1.0)),
    "crps": alone(lambda d: dt.crps(d.scores, d.y, d.w, bins=BINS)),
    "crps that drops": alone(lambda d: dt.crps(d.scores, d.y, d.w, bins=BINS, outside="drop")),
    "cross_entropy": alone(lambda d: dt.losses.cross_entropy(d.logits, d.c, d.w, label_smoothing=0.1)),
    "DistLoss": of(lambda: dt.losses.DistLoss(BINS, density(BINS).prior()), lambda m, d: m(d.pred, d.y, d.w)),
    "dist_loss": alone(
        lambda d: dt.losses.dist_loss(d.pred, d.y, d.w, bins=BINS, prior=d.spread.mean(0), squared=True)
    ),
    "equalization_loss": alone(lambda d: dt.losses.equalization_loss(d.logits, d.c, prior=d.prior, threshold=0.3)),
    "focal_loss": alone(lambda d: dt.losses.focal_loss(d.logits, d.c, d.w, alpha=d.prior)),
    "gaussian_nll": alone(lambda d: dt.losses.gaussian_nll(d.pair, d.y, d.w, beta=0.5)),
    "GaussianMixtureLoss": of(
        lambda: dt.losses.GaussianMixtureLoss([0.5, 0.5], [2.0, 8.0], [1.0, 1.0]), lambda m, d: m(d.pred, d.y, d.w)
    ),
    "ldam_loss": alone(lambda d: dt.losses.ldam_loss(d.cosines, d.c, d.w, counts=d.counts)),
    "logit_adjusted_cross_entropy": alone(lambda d: dt.logit_adjusted_cross_entropy(d.logits, d.c, d.prior)),
    "pairwise_cross_entropy": alone(
        lambda d: dt.losses.pairwise_cross_entropy(d.logits, d.c, margins=d.margins, alpha=d.prior)
    ),
    "RankNContrast": of(lambda: dt.losses.RankNContrast(), lambda m, d: m(d.features, d.y, d.w)),
    "rank_n_contrast": alone(lambda d: dt.losses.rank_n_contrast(d.features, d.y2)),
    "SRLLoss": of(
        lambda: dt.losses.SRLLoss(D, BINS),
        lambda m, d: m(SimpleNamespace(prediction=d.pred, features=d.features), d.y, d.w),
    ),
    "srl_loss": alone(lambda d: dt.losses.srl_loss(d.features, d.y, d.w, bins=BINS, points=d.x)),
    "soft_cross_entropy": alone(lambda d: dt.soft_cross_entropy(d.scores, d.spread, weight=d.w)),
    "squared_emd": alone(lambda d: dt.losses.squared_emd(d.scores, d.spread, d.w, bins=BINS)),
    "weighted_focal_l1": alone(lambda d: dt.losses.weighted_focal_l1(d.pred, d.y, d.w)),
    "weighted_focal_mse": alone(lambda d: dt.losses.weighted_focal_mse(d.pred, d.y, d.w, variant="reference")),
    "weighted_huber": alone(lambda d: dt.losses.weighted_huber(d.pred, d.y, d.w)),
    "weighted_l1": alone(lambda d: dt.weighted_l1(d.pred, d.y, d.w)),
    "weighted_mse": alone(lambda d: dt.weighted_mse(d.pred, d.y, d.w)),
}
# Of what dir_toolkit.losses offers: no loss, and two that copy their density to the device at each call.
NO_LOSSES = {"gaussian_interval", "gaussian_mixture_loss", "binned_integration_loss"}
OPTIONS: dict[str, Any] = {  # by which the others are made
    "bins": BINS,
    "density": density(BINS),
    "means": [2.0, 8.0],
    "noise_sigma": 1.0,
    "threshold": 0.3,
    "variances": [1.0, 1.0],
    "weights": [0.5, 0.5],
}


def loss_job(name: str) -> Callable[[], Job]:
    """A step of a loss or its module, of what its parameters are called; its target is the first that it takes."""

    def job() -> Job:
        loss, made = getattr(dt.losses, name), SimpleNamespace(**batch())
        is_module = inspect.isclass(loss)

        def options_of(function: Any, d: Data) -> dict[str, Any]:
            given = {k: p for k, p in inspect.signature(function).parameters.items() if p.default is p.empty}
            rest = [k for k in given if k not in ("output", "target", "weight")][0 if is_module else 1 :]
            return {k: OPTIONS[k] if k in OPTIONS else getattr(d, k).detach() for k in rest}

        def call(d: Data, place: tuple[str, str]) -> Tensor:
            rows, target = (getattr(d, k) for k in place)
            return loss(rows, target, **{"weight": d.w, **({} if is_module else options_of(loss, d))})

        if is_module:
            loss = loss(**options_of(loss, made))
            firsts = ["pred", "pair", "cosines", "scores", "features"]
        else:
            first = next(iter(inspect.signature(loss).parameters))
            firsts = {"pred": ["pred", "pair"], "logits": ["cosines", "scores"]}.get(first, [first])
        for place in itertools.product(firsts, ("spread", "y", "c")):
            try:
                call(made, place)
            except dt.DirToolkitError:
                continue
            return [loss] if is_module else [], partial(call, place=place)
        raise AssertionError(f"{name} needs a job of its own")

    return job


LOSSES |= {
    name: loss_job(name) for name in dt.losses.__all__ if name not in NO_LOSSES | {job.split()[0] for job in LOSSES}
}


def affinity(**settings: Any) -> Callable[[], nn.Module]:
    return lambda: dt.AffinityHead(D, C, 2, **settings)


def needs_sizes_alone(kind: Any) -> bool:
    """Whether a head is made of its two sizes, and all else has a default."""
    needed = [name for name, p in inspect.signature(kind).parameters.items() if p.default is p.empty]
    return needed == ["num_features", "num_classes"]


HEADS: dict[str, Callable[[], Job]] = {
    **{
        name: of(partial(kind, D, C), lambda m, d: m(d.features).square().mean())
        for name in dt.heads.__all__
        if needs_sizes_alone(kind := getattr(dt.heads, name))
    },
    "CosineHead learnt": of(
        lambda: dt.heads.CosineHead(D, C, learn_scale=True), lambda m, d: m(d.features).square().mean()
    ),
    "ScaledHead": of(lambda: dt.heads.ScaledHead(nn.Linear(D, C)), lambda m, d: m(d.features).square().mean()),
    "NearestMeanHead": of(lambda: nearest_mean(), lambda m, d: m(d.features).square().mean()),
    **{
        f"AffinityHead {settings}": of(affinity(**settings), lambda m, d: m(d.features).log().mean() + m.diversity())
        for settings in (
            {},
            {"distance": "l1", "similarity": "inverse"},
            {"sigma_mode": "learnt"},
            {"sigma_mode": "first_batch"},
        )
    },
}


def nearest_mean() -> nn.Module:
    head, d = dt.heads.NearestMeanHead(D, C), batch()
    head.update(d["features"].detach(), d["c"])
    head.finish()
    return head


def model_job(bins: Any, options: dict[str, Any], fds: str | None = None, weighted: bool = False) -> Callable[[], Job]:
    """A model's step, in training and then in eval mode."""

    def job() -> Job:
        given = dict(options)
        if fds:
            given["fds"] = dt.FDS(bins, D, covariance=fds, rank=2)  # type: ignore[arg-type]
        if weighted:
            given["weights"] = lds(bins)
        model = dt.LongTailModel(nn.Linear(D, D), D, bins, density=density(bins), **given)
        if model.fds is not None:
            d = batch()
            here = next(model.parameters()).device
            for _ in range(_STEPS):
                model(d["x"].to(here), d["y"].to(here))
            model.fds.end_epoch()

        def step(d: Data) -> Tensor:
            labels = d.c if bins is CLASSES else d.y
            model.train()
            loss = model(d.x, labels).loss
            if model.fds is not None:  # which would take each eval pass for the end of an epoch
                return loss
            model.eval()
            with torch.no_grad():
                model(d.x, labels)
            return loss

        return [model], step

    return job


MODELS: dict[str, Callable[[], Job]] = {
    f"{'classes' if bins is CLASSES else 'uneven' if bins is UNEVEN else 'even'} {options}": model_job(bins, options)
    for bins, several in (
        (
            BINS,
            [
                {},
                {"target_prior": "uniform", "tau": 0.5, "label_kernel": "triangular", "outside": "clip"},
                {"target_prior": "uniform", "adjust": "in_loss", "sigma": None},
                {"loss": "squared_emd"},
                {"decode": "expectation", "expectation_weight": 0.1},
                {"decode": "mode", "residual": True},
                {"head": "cosine"},
                {"head": "affinity"},
                {"head": "coral", "target_prior": "uniform"},
                {"head": "corn"},
                {"head": "gaussian", "within_axis": True, "outside": "clip"},
                {"outside": "drop", "residual": True, "expectation_weight": 0.1},
                {"loss": "crps", "outside": "drop"},
                {"head": "regression", "loss": "weighted_huber", "outside": "drop", "within_axis": True},
                *({"head": "regression", "loss": loss} for loss in ("balanced_mse", "ccc_loss")),
            ],
        ),
        (UNEVEN, [{"target_prior": "uniform", "residual": True}, {"head": "regression", "loss": "balanced_mse"}]),
        (
            CLASSES,
            [
                {},
                {"target_prior": "uniform", "adjust": "in_loss"},
                {"head": "cosine", "target_prior": "uniform"},
                {"head": "affinity"},
                {"head": "affinity", "loss": "cross_entropy"},
            ],
        ),
    )
    for options in several
}
MODELS |= {
    "with LDS": model_job(BINS, {}, weighted=True),
    "with LDS over uneven bins": model_job(UNEVEN, {"target_prior": "uniform"}, weighted=True),
    "classes with LDS": model_job(CLASSES, {"target_prior": "uniform"}, weighted=True),
    "with FDS": model_job(BINS, {}, fds="diagonal"),
    "of missing labels": model_job(BINS, {"missing": "drop"}, weighted=True),
    "with low-rank FDS": model_job(BINS, {"head": "regression"}, fds="low_rank", weighted=True),
}


def fds_job(form: str, data: str, labels: str, bins: Any = BINS, **settings: Any) -> Callable[[], Job]:
    def job() -> Job:
        fds = dt.FDS(bins, D, covariance=form, rank=2, **settings)  # type: ignore[arg-type]
        place = nn.Identity()
        fds.attach(place, "output")
        d = batch()
        for _ in range(_STEPS):
            fds.update(d[data].detach(), d[labels])
        fds.end_epoch()

        def step(d: Data) -> Tensor:
            with fds.labels(getattr(d, labels)):
                return place(getattr(d, data)).square().mean()

        return [fds, place], step

    return job


FEATURES: dict[str, Callable[[], Job]] = {
    "FDS": fds_job("diagonal", "features", "y"),
    "FDS in a forward": of(lambda: dt.FDS(BINS, D), lambda m, d: m(d.features, d.y).square().mean()),
    "FDS of maps": fds_job("diagonal", "maps", "pixels"),
    "FDS over a grid": fds_job("diagonal", "features", "y2", GRID),
    "FDS that drops": fds_job("diagonal", "features", "y", outside="drop"),
    "FDS of missing labels": fds_job("diagonal", "features", "y", missing="drop"),
    "FDS over classes": fds_job("diagonal", "features", "c", CLASSES, kernel=[1.0]),
    "low-rank FDS": fds_job("low_rank", "features", "y"),
    "low-rank FDS of maps": fds_job("low_rank", "maps", "pixels"),
}


def values(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What a step without gradients gives."""
    return tensors


def lds_job(outside: Any) -> Callable[[], Job]:
    return of(lambda: lds(BINS, outside=outside), lambda m, d: values(m(d.y)))


def spread_job(unit: Any) -> Callable[[], Job]:
    return alone(lambda d: values(dt.soft_labels(d.y, UNEVEN, 1.5, unit=unit, outside="clip")))


LABELS: dict[str, Callable[[], Job]] = {
    **{f"LDS {outside}": lds_job(outside) for outside in ("raise", "clip", "drop")},
    "LDS over a grid": of(lambda: lds(GRID), lambda m, d: values(m(d.y2))),
    "LDS over classes": of(lambda: lds(CLASSES), lambda m, d: values(m(d.c))),
    **{f"soft_labels {unit}": spread_job(unit) for unit in ("label", "bin")},
    "decode expectation": alone(lambda d: dt.decode(d.scores.softmax(1), BINS, "expectation").mean()),
    "decode median": alone(lambda d: dt.decode(d.scores.softmax(1), BINS, "median").mean()),
    "decode mode": alone(lambda d: values(dt.decode(d.scores.softmax(1), BINS, "mode"))),
    "quantiles": alone(lambda d: dt.labels.quantiles(d.scores.softmax(1), BINS, [0.1, 0.5]).mean()),
    "interval": alone(lambda d: dt.interval(d.scores.softmax(1), BINS)[0].mean()),
    "interval over uneven bins": alone(lambda d: dt.interval(d.scores[:, :9].softmax(1), UNEVEN)[0].mean()),
    "Bins.expectation": alone(lambda d: BINS.expectation(d.scores.softmax(1)).mean()),
    "Bins.index": alone(lambda d: values(BINS.index(d.y, "clip"), GRID.index(d.y2, "drop"))),
    "gaussian_interval": alone(lambda d: dt.losses.gaussian_interval(d.pair)[0].mean()),
    "LogitAdjuster of a prior there": alone(
        lambda d: dt.LogitAdjuster(d.prior, tau=0.5, temperature=2.0)(d.logits).logsumexp(1).mean()
    ),
    "LogitAdjuster": of(
        lambda: dt.LogitAdjuster(torch.full((C,), 1 / C), tau=0.5), lambda m, d: m(d.logits).logsumexp(1).mean()
    ),
    "adjust_logits": alone(lambda d: dt.adjust_logits(d.logits, d.prior).logsumexp(1).mean()),
}


def metrics_jobs(outside: Any) -> dict[str, Callable[[], Job]]:
    regression, distribution, grid, classes, calibration = (
        lambda: dt.RegressionMetrics(density(BINS), outside=outside),
        lambda: dt.metrics.DistributionMetrics(density(BINS), outside=outside),
        lambda: dt.RegressionMetrics(density(GRID), outside=outside),
        lambda: dt.ClassificationMetrics(density(CLASSES), outside=outside),
        lambda: dt.metrics.CalibrationMetrics(C, outside=outside),
    )
    return {
        f"RegressionMetrics {outside}": measured(regression, "pred", "y"),
        f"DistributionMetrics {outside}": measured(distribution, "spread", "y"),
        f"IntervalMetrics {outside}": measured(
            lambda: dt.metrics.IntervalMetrics(density(BINS), outside=outside), "y", "y", "y"
        ),
        f"RegressionMetrics over a grid {outside}": measured(grid, "pred2", "y2"),
        f"ClassificationMetrics {outside}": measured(classes, "logits", "c"),
        f"ClassificationMetrics of indices {outside}": measured(classes, "c", "c"),
        f"CalibrationMetrics {outside}": measured(calibration, "affinities", "c", "w"),
    }


METRICS = {name: job for option in ("raise", "clip", "drop") for name, job in metrics_jobs(option).items()}
JOBS = {**LOSSES, **HEADS, **MODELS, **FEATURES, **LABELS, **METRICS}
