"""Every public name and method, fed with wrong arguments, one at a time: it works, or our own error names them."""

from __future__ import annotations

import functools
import inspect
import itertools
import os
import random
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial, wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dir_toolkit as dt
from dir_toolkit import _checks
from dir_toolkit.errors import DirToolkitError

Call = tuple[Callable[..., Any], dict[str, Any]]

KERNEL = {"kernel": dt.gaussian(3, 1)}
BINS, CLASSES = dt.Bins.uniform(0, 4, width=1), dt.Bins.classes(4)
LABELS = [0.5, 1.5, 2.5, 3.5, 0.25]
COUNTS = [5, 4, 2, 1]


with warnings.catch_warnings():  # torch no longer likes to make them, but there are some
    warnings.simplefilter("ignore")
    QUANTIZED = torch.quantize_per_tensor(torch.ones(5), 0.1, 0, torch.quint8)


def years() -> Tensor:
    return torch.tensor(LABELS)


def classes() -> Tensor:
    return torch.tensor([0, 1, 2, 3, 0])


def rows(columns: int = 4) -> Tensor:
    return torch.randn(5, columns, generator=torch.Generator().manual_seed(0))


def shares() -> Tensor:
    return rows().softmax(1)


def ones() -> Tensor:
    return torch.ones(5)


def prior() -> Tensor:
    return torch.tensor([0.4, 0.3, 0.2, 0.1])


def density(bins: dt.Bins = BINS) -> dt.LabelDensity:
    return dt.LabelDensity(bins, np.array(COUNTS))


def lds() -> dt.LDS:
    return dt.LDS(BINS, **KERNEL).fit(LABELS)


def model(**options: Any) -> dt.LongTailModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return dt.LongTailModel(nn.Linear(3, 3), 3, BINS, density=density(), **(options or {"sigma": 0.5}))


def target() -> dt.LongTailModel:
    return dt.LongTailModel(nn.Identity(), 3, BINS, density=density(), sigma=0.5)


def targets() -> dt.MultiTargetModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return dt.MultiTargetModel(nn.Linear(3, 3), [target()])


def voting() -> dt.longtail.VotingModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return dt.longtail.VotingModel(nn.Linear(3, 3), 3, BINS, density=density(), heads=2)


def linear() -> nn.Linear:
    return nn.Linear(3, 4)


def fds() -> dt.FDS:
    return dt.FDS(BINS, 3, **KERNEL)


def nearest() -> dt.heads.NearestMeanHead:
    head = dt.heads.NearestMeanHead(3, 4)
    head.update(rows(3), classes())
    head.finish()
    return head


def calibrated() -> dt.LongTailModel:
    made = model()
    made.calibrate_intervals(rows().repeat(20, 1), years().repeat(20))
    return made


def conformal_call(kind: Any, method: str, output: Callable[[], Tensor]) -> Call:
    """A call of the constructor, or of a method of what these forecasts have calibrated."""
    options = {"density": density(), "regions": ["many", "many", "few", "few"], "per_region": 0.5}
    if not method:
        return kind, options
    (calibration := kind(density())).update(output(), years())
    labelled = {"output": output(), "labels": years()}
    given = {".update": labelled, ".adapt": labelled, ".thresholds": {}, ".all_reduce": {}}
    return getattr(calibration, method[1:]), given.get(method, {"output": output()})


def metrics(kind: Any, bins: dt.Bins) -> Any:
    return kind(density(bins))


OVER_BINS: dict[str, Any] = {"bins": BINS}
SAMPLER = {"labels": LABELS, "bins": BINS, "num_samples": 4, "replacement": True, "seed": 0, "rank": 0, "world": 1}
LONG_TAIL = {
    "head": "linear",
    "loss": "cross_entropy",
    "sigma": 0.5,
    "label_kernel": "gaussian",
    "target_prior": [0.25] * 4,
    "tau": 1.0,
    "adjust": "after",
    "prior_kernel": dt.gaussian(3, 1),
    "temperature": 1.0,
    "decode": "median",
    "residual": True,
    "residual_weight": 0.1,
    "expectation_weight": 0.1,
}


def in_a_folder(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function in a folder that is gone afterwards, where "model" is a saved one."""

    @wraps(function)
    def inside(**arguments: Any) -> Any:
        before = Path.cwd()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                model().save("model")
                return function(**arguments)
            finally:
                os.chdir(before)

    return inside


# One valid call of each name, with every argument that is to be attacked; made anew for each attack.
VALID: dict[str, Callable[[], Call]] = {
    "AffinityHead": lambda: (dt.AffinityHead, {"num_features": 3, "num_classes": 4, "feature_scale": 1.0}),
    "AffinityHead.forward": lambda: (dt.AffinityHead(3, 4), {"features": rows(3)}),
    "BinGrid": lambda: (dt.labels.BinGrid, {"axes": BINS}),
    "BinGrid.index": lambda: (dt.labels.BinGrid(BINS, CLASSES).index, {"labels": [[0.5, 1], [1.5, 3]]}),
    "BinGrid.place": lambda: (dt.Bins.grid(BINS).place, {"labels": years()[:, None]}),
    "BinGrid.rows": lambda: (dt.Bins.grid(BINS).rows, {"labels": years()[:, None]}),
    "BinGrid.tally": lambda: (dt.Bins.grid(BINS).tally, {"labels": years()[:, None]}),
    "BinGrid.shares": lambda: (dt.Bins.grid(BINS).shares, {"probabilities": shares()}),
    "BinGrid.expectation": lambda: (dt.labels.BinGrid(BINS).expectation, {"probabilities": shares()}),
    "BinGrid.from_dict": lambda: (dt.labels.BinGrid.from_dict, {"values": dt.labels.BinGrid(BINS).to_dict()}),
    "BinSampler": lambda: (dt.BinSampler, {**SAMPLER, "q": 0.5}),
    "BinSampler, progressive": lambda: (dt.BinSampler, {**SAMPLER, "progressive_epochs": 3}),
    "BinSampler.order": lambda: (dt.BinSampler(LABELS, BINS).order, {"epoch": 0}),
    "BinSampler.set_epoch": lambda: (dt.BinSampler(LABELS, BINS).set_epoch, {"epoch": 0}),
    "BinSampler.start": lambda: (dt.BinSampler(LABELS, BINS).start, {"consumed": 0}),
    "BinSampler.load_state_dict": lambda: (
        dt.BinSampler(LABELS, BINS).load_state_dict,
        {"state": dt.BinSampler(LABELS, BINS).state_dict()},
    ),
    "Bins": lambda: (
        dt.Bins,
        {"edges": np.arange(5.0), "centers": np.arange(4) + 0.5, "categorical": False, "unbounded": False},
    ),
    "Bins.uniform": lambda: (dt.Bins.uniform, {"low": 0, "high": 4, "width": 1.0}),
    "Bins.uniform, by count": lambda: (dt.Bins.uniform, {"low": 0, "high": 4, "count": 4}),
    "Bins.from_edges": lambda: (dt.Bins.from_edges, {"edges": [0.0, 1.0, 2.0]}),
    "Bins.quantile": lambda: (dt.Bins.quantile, {"labels": LABELS, "n": 3}),
    "Bins.auto": lambda: (dt.Bins.auto, {"labels": LABELS}),
    "Bins.classes": lambda: (dt.Bins.classes, {"n": 4}),
    "Bins.grid": lambda: (dt.Bins.grid, {"axes": BINS}),
    "Bins.index": lambda: (BINS.index, {"labels": years()}),
    "Bins.index, of a list": lambda: (CLASSES.index, {"labels": [0, 3]}),
    "Bins.place": lambda: (BINS.place, {"labels": years()}),
    "Bins.rows": lambda: (BINS.rows, {"labels": years()}),
    "Bins.tally": lambda: (BINS.tally, {"labels": LABELS}),
    "Bins.shares": lambda: (BINS.shares, {"probabilities": shares()}),
    "Bins.tensor": lambda: (BINS.tensor, {"what": "edges", "like": years()}),
    "Bins.wide_dtype": lambda: (BINS.wide_dtype, {"tensors": years()}),
    "Bins.expectation": lambda: (BINS.expectation, {"probabilities": shares()}),
    "Bins.from_dict": lambda: (dt.Bins.from_dict, {"values": BINS.to_dict()}),
    "CalibrationMetrics": lambda: (dt.metrics.CalibrationMetrics, {"num_classes": 4}),
    "CalibrationMetrics.update": lambda: (
        dt.metrics.CalibrationMetrics(4).update,
        {"probabilities": shares(), "target": classes(), "weight": ones()},
    ),
    "CalibrationMetrics.merge": lambda: (
        dt.metrics.CalibrationMetrics(4).merge,
        {"other": dt.metrics.CalibrationMetrics(4)},
    ),
    "CalibrationMetrics.all_reduce": lambda: (dt.metrics.CalibrationMetrics(4).all_reduce, {}),
    "CalibrationMetrics.reliability": lambda: (dt.metrics.CalibrationMetrics(4).reliability, {"class_index": 1}),
    "ClassificationMetrics": lambda: (
        dt.ClassificationMetrics,
        {"density": density(CLASSES), "regions": ["many", "many", "few", "few"]},
    ),
    "ClassificationMetrics.update": lambda: (
        metrics(dt.ClassificationMetrics, CLASSES).update,
        {"pred": rows(), "target": classes()},
    ),
    "ClassificationMetrics.merge": lambda: (
        metrics(dt.ClassificationMetrics, CLASSES).merge,
        {"other": metrics(dt.ClassificationMetrics, CLASSES)},
    ),
    "ClassificationMetrics.compute": lambda: (metrics(dt.ClassificationMetrics, CLASSES).compute, {}),
    "ClassificationMetrics.all_reduce": lambda: (metrics(dt.ClassificationMetrics, CLASSES).all_reduce, {}),
    "FDS": lambda: (dt.FDS, {**OVER_BINS, "num_features": 3, **KERNEL}),
    "FDS.reference": lambda: (dt.FDS.reference, {**OVER_BINS, "num_features": 3, **KERNEL}),
    "FDS.forward": lambda: (fds(), {"features": rows(3), "labels": years()}),
    "FDS.attach": lambda: (fds().attach, {"module": linear(), "where": "input"}),
    "FDS.labels": lambda: (lambda labels: fds().labels(labels).__enter__(), {"labels": years()}),
    "FDS.update": lambda: (fds().update, {"features": rows(3), "labels": years()}),
    "FDS.calibrate": lambda: (fds().calibrate, {"features": rows(3), "labels": years()}),
    "FDS.load_merged_state": lambda: (fds().load_merged_state, {"state": fds().merged_state()}),
    "FDS.set_extra_state": lambda: (fds().set_extra_state, {"state": fds().get_extra_state()}),
    "GaussianMixtureLoss.fit": lambda: (
        dt.losses.GaussianMixtureLoss.fit,
        {"labels": LABELS, "components": 1, "noise_sigma": 1.0, "learn": True, "least_variance": 1e-4, "seed": 0},
    ),
    "IntervalMetrics": lambda: (dt.metrics.IntervalMetrics, {"density": density()}),
    "IntervalMetrics.update": lambda: (
        metrics(dt.metrics.IntervalMetrics, BINS).update,
        {"lower": years() - 1, "upper": years() + 1, "target": years()},
    ),
    "IntervalMetrics.merge": lambda: (
        metrics(dt.metrics.IntervalMetrics, BINS).merge,
        {"other": metrics(dt.metrics.IntervalMetrics, BINS)},
    ),
    "IntervalMetrics.compute": lambda: (metrics(dt.metrics.IntervalMetrics, BINS).compute, {}),
    "IntervalMetrics.all_reduce": lambda: (metrics(dt.metrics.IntervalMetrics, BINS).all_reduce, {}),
    "LDS": lambda: (dt.LDS, {**OVER_BINS, **KERNEL, "clip": (0.1, 10.0)}),
    "LDS.reference": lambda: (dt.LDS.reference, {**OVER_BINS, **KERNEL}),
    "LDS.fit": lambda: (dt.LDS(BINS, **KERNEL).fit, {"labels": LABELS}),
    "LDS.forward": lambda: (lds(), {"labels": years()}),
    "LDS.sample_weight": lambda: (lds().sample_weight, {"labels": LABELS}),
    "LDS.set_extra_state": lambda: (lds().set_extra_state, {"state": lds().get_extra_state()}),
    "LabelDensity": lambda: (dt.LabelDensity, {"bins": BINS, "counts": COUNTS}),
    "LabelDensity.count": lambda: (dt.LabelDensity.count, {"labels": LABELS, "bins": BINS}),
    "LabelDensity.smooth": lambda: (density().smooth, {**KERNEL, "edges": "reflect"}),
    "LabelDensity.prior": lambda: (density().prior, {}),
    "LabelDensity.regions": lambda: (density().regions, {}),
    "LabelDensity.weighted": lambda: (density().weighted, {"lds": lds()}),
    "LabelDensity.all_reduce": lambda: (density().all_reduce, {}),
    "LogitAdjuster": lambda: (dt.LogitAdjuster, {"prior": prior(), "target": prior()}),
    "LogitAdjuster.forward": lambda: (dt.LogitAdjuster(prior()), {"logits": rows()}),
    "LongTailModel": lambda: (
        dt.LongTailModel,
        {
            "backbone": nn.Linear(3, 3),
            "num_features": 3,
            "bins": BINS,
            "density": density(),
            "fds": fds(),
            "weights": lds(),
            **LONG_TAIL,
        },
    ),
    "LongTailModel.for_labels": lambda: (
        dt.LongTailModel.for_labels,
        {"backbone": nn.Linear(3, 3), "num_features": 3, "labels": LABELS, "for_metric": "mae"},
    ),
    "LongTailModel.forward": lambda: (model(), {"x": rows(3), "labels": years(), "weight": ones()}),
    "LongTailModel.forward, of a regressor": lambda: (
        model(head="regression"),
        {"x": rows(3), "labels": years(), "weight": ones()},
    ),
    "LongTailModel.read": lambda: (model().read, {"features": rows(3)}),
    "LongTailModel.criterion": lambda: (
        (m := model(residual=True, sigma=0.5)).criterion,
        {"output": m(rows(3)), "labels": years(), "weight": ones()},
    ),
    "LongTailModel.set_prior": lambda: (
        model().set_prior,
        {"target_prior": [0.25] * 4, "tau": 1.0, "kernel": None, "temperature": 1.0},
    ),
    "LongTailModel.choose_tau": lambda: (
        model().choose_tau,
        {"scores": rows(), "labels": years(), "by": "bmae", "taus": [0.0, 1.0], "most_mae": 2.0, "kernel": None},
    ),
    "LongTailModel.calibrate": lambda: (
        model().calibrate,
        {"scores_or_loader": rows(), "labels": years(), "by": "bmae", "most_mae": 2.0},
    ),
    "LongTailModel.calibrate_intervals": lambda: (
        model().calibrate_intervals,
        {"scores_or_loader": rows(), "labels": years(), "regions": ["many", "many", "few", "few"], "gamma": 0.5},
    ),
    "LongTailModel.sets": lambda: (calibrated().sets, {"output": shares(), "level": 0.9}),
    "LongTailModel.interval, calibrated": lambda: (calibrated().interval, {"output": shares(), "level": 0.9}),
    "LongTailModel.interval": lambda: ((m := model()).interval, {"output": m(rows(3)), "level": 0.9}),
    "LongTailModel.predict": lambda: (model().predict, {"inputs": rows(3), "level": 0.9}),
    "LongTailModel.save": lambda: (in_a_folder(model().save), {"path": "model"}),
    "MultiTargetModel": lambda: (dt.MultiTargetModel, {"backbone": nn.Linear(3, 3), "targets": [target()]}),
    "MultiTargetModel.for_labels": lambda: (
        dt.MultiTargetModel.for_labels,
        {"backbone": nn.Linear(3, 3), "num_features": 3, "labels": years()[:, None], "bins": [BINS]},
    ),
    "MultiTargetModel.forward": lambda: (targets(), {"x": rows(3), "labels": years()[:, None], "weight": ones()}),
    "MultiTargetModel.criterion": lambda: (
        (m := targets()).criterion,
        {"output": m(rows(3)), "labels": years()[:, None], "weight": ones()},
    ),
    "MultiTargetModel.of_targets": lambda: ((m := targets()).of_targets, {"output": m(rows(3))}),
    "MultiTargetModel.set_prior": lambda: (targets().set_prior, {"target_prior": [0.25] * 4, "tau": 1.0}),
    "MultiTargetModel.calibrate": lambda: (
        targets().calibrate,
        {"scores_or_loader": rows(), "labels": years()[:, None], "by": "mae", "most_mae": 2.0, "outside": "clip"},
    ),
    "MultiTargetModel.calibrate_intervals": lambda: (
        targets().calibrate_intervals,
        {"scores_or_loader": rows().repeat(20, 1), "labels": years().repeat(20)[:, None], "level": 0.9},
    ),
    "MultiTargetModel.interval": lambda: ((m := targets()).interval, {"output": m(rows(3)), "level": 0.9}),
    "MultiTargetModel.predict": lambda: (targets().predict, {"inputs": rows(3), "level": 0.9}),
    "MultiTargetModel.save": lambda: (in_a_folder(targets().save), {"path": "model"}),
    "LongTailModel.set_extra_state": lambda: (model().set_extra_state, {"state": model().get_extra_state()}),
    "NearestMeanHead.update": lambda: (
        dt.heads.NearestMeanHead(3, 4).update,
        {"features": rows(3), "labels": classes()},
    ),
    "NearestMeanHead.forward": lambda: (nearest(), {"features": rows(3)}),
    "DistributionMetrics": lambda: (
        dt.metrics.DistributionMetrics,
        {"density": density(), "level": 0.8, "quantile": 0.5, "pit_bins": 5},
    ),
    "DistributionMetrics.update": lambda: (
        metrics(dt.metrics.DistributionMetrics, BINS).update,
        {"probabilities": shares(), "target": years()},
    ),
    "DistributionMetrics.merge": lambda: (
        metrics(dt.metrics.DistributionMetrics, BINS).merge,
        {"other": metrics(dt.metrics.DistributionMetrics, BINS)},
    ),
    "DistributionMetrics.compute": lambda: (metrics(dt.metrics.DistributionMetrics, BINS).compute, {}),
    "DistributionMetrics.all_reduce": lambda: (metrics(dt.metrics.DistributionMetrics, BINS).all_reduce, {}),
    "DistributionMetrics.pit": lambda: (metrics(dt.metrics.DistributionMetrics, BINS).pit, {}),
    "Relevance.of": lambda: (dt.metrics.Relevance.of, {"density": density()}),
    "distribution_metrics": lambda: (
        dt.metrics.distribution_metrics,
        {"probabilities": shares(), "target": years(), "density": density(), "level": 0.8, "quantile": 0.5},
    ),
    "RegressionMetrics": lambda: (dt.RegressionMetrics, {"density": density(), "floor": 0.1}),
    "RegressionMetrics.update": lambda: (
        metrics(dt.RegressionMetrics, BINS).update,
        {"pred": years(), "target": years()},
    ),
    "RegressionMetrics.merge": lambda: (
        metrics(dt.RegressionMetrics, BINS).merge,
        {"other": metrics(dt.RegressionMetrics, BINS)},
    ),
    "RegressionMetrics.compute": lambda: (metrics(dt.RegressionMetrics, BINS).compute, {}),
    "RegressionMetrics.all_reduce": lambda: (metrics(dt.RegressionMetrics, BINS).all_reduce, {}),
    "ScaledHead": lambda: (dt.heads.ScaledHead, {"linear": linear()}),
    "ScaledHead.forward": lambda: (dt.heads.ScaledHead(linear()), {"features": rows(3)}),
    "VotingModel": lambda: (
        dt.longtail.VotingModel,
        {
            "backbone": nn.Linear(3, 3),
            "num_features": 3,
            "bins": BINS,
            "density": density(),
            "heads": 2,
            "kernel": dt.gaussian(3, 1),
        },
    ),
    "VotingModel.forward": lambda: (voting(), {"x": rows(3), "labels": years(), "weight": ones()}),
    "VotingModel.criterion": lambda: (
        (m := voting()).criterion,
        {"output": m(rows(3)), "labels": years(), "weight": ones()},
    ),
    "VotingModel.interval": lambda: ((m := voting()).interval, {"output": m(rows(3)), "level": 0.9}),
    "adjust_logits": lambda: (dt.adjust_logits, {"logits": rows(), "prior": prior(), "target": prior()}),
    "balanced_error": lambda: (dt.balanced_error, {"pred": rows(), "target": classes(), "num_classes": 4}),
    "c_mixup": lambda: (
        dt.labels.c_mixup,
        {"inputs": rows(3), "labels": years(), "bandwidth": 1.0, "alpha": 2.0, "generator": torch.Generator()},
    ),
    "calibration_metrics": lambda: (
        dt.metrics.calibration_metrics,
        {"probabilities": shares(), "target": classes(), "weight": ones(), "num_bins": 5},
    ),
    "choose_normalization": lambda: (
        dt.decoupling.choose_normalization,
        {"head": linear(), "features": rows(3), "labels": classes(), "taus": [0.0, 1.0]},
    ),
    "choose_tau": lambda: (
        dt.choose_tau,
        {"logits": rows(), "labels": classes(), "prior": prior(), "taus": [0.0, 1.0], "temperature": 1.0},
    ),
    "class_prior": lambda: (dt.class_prior, {"density_or_counts": COUNTS}),
    "classification_metrics": lambda: (
        dt.classification_metrics,
        {"pred": rows(), "target": classes(), "density": density(CLASSES), "many": 100, "few": 20},
    ),
    "decode": lambda: (dt.decode, {"probabilities": shares(), "bins": BINS}),
    "ensemble": lambda: (dt.longtail.ensemble, {"models": [model(), model()]}),
    "estimate_prior": lambda: (
        dt.estimate_prior,
        {
            "scores": rows(),
            "source": rows(),
            "labels": classes(),
            "bins": CLASSES,
            "features": rows(3),
            "source_features": rows(3),
        },
    ),
    "fit_temperature": lambda: (dt.fit_temperature, {"logits": rows(), "labels": classes(), "weight": ones()}),
    "freeze": lambda: (dt.decoupling.freeze, {"module": linear()}),
    "gaussian": lambda: (dt.gaussian, {"size": 5, "sigma": 2.0}),
    "gaussian_interval": lambda: (dt.losses.gaussian_interval, {"pred": rows(2)}),
    **{
        f"{kind.__name__}{method}": partial(conformal_call, kind, method, output)
        for kind, output in (
            (dt.conformal.PointConformal, years),
            (dt.conformal.GaussianConformal, lambda: rows(2)),
            (dt.conformal.BinsConformal, shares),
        )
        for method in ("", ".update", ".adapt", ".sets", ".interval", ".thresholds", ".all_reduce")
    },
    "conformal_interval": lambda: (
        dt.conformal.conformal_interval,
        {
            "pred": years(),
            "calibration_pred": years(),
            "calibration_labels": years(),
            "density": density(),
            "regions": ["many", "many", "few", "few"],
        },
    ),
    "interval_metrics": lambda: (
        dt.metrics.interval_metrics,
        {"lower": years() - 1, "upper": years() + 1, "target": years(), "density": density()},
    ),
    "interval": lambda: (dt.interval, {"probabilities": shares(), "bins": BINS}),
    "laplace": lambda: (dt.laplace, {"size": 5, "scale": 2.0}),
    "pointwise_mutual_information": lambda: (
        dt.priors.pointwise_mutual_information,
        {"logits": rows(), "prior": prior()},
    ),
    "bin_shares": lambda: (
        dt.labels.bin_shares,
        {"points": np.array([[3.0, 5.0], [4.0, 4.5]]), "cumulative": np.array([0.2, 0.9]), "bins": BINS},
    ),
    "quantiles": lambda: (dt.labels.quantiles, {"probabilities": shares(), "bins": BINS, "levels": [0.1, 0.5]}),
    "regression_metrics": lambda: (
        dt.regression_metrics,
        {"pred": years(), "target": years(), "density": density(), "floor": 0.1},
    ),
    "reinitialize": lambda: (dt.decoupling.reinitialize, {"module": linear()}),
    "soft_labels": lambda: (dt.soft_labels, {"labels": years(), "bins": BINS, "sigma": 1.0}),
    "stage_two": lambda: (dt.stage_two, {"model": model(), "method": "crt"}),
    "tau_normalized": lambda: (dt.heads.tau_normalized, {"linear": linear(), "tau": 1.0}),
    "triangular": lambda: (dt.triangular, {"size": 5}),
    "bin_probabilities": lambda: (dt.labels.bin_probabilities, {"density_or_counts": [4, 1], "q": 0.5}),
    "load": lambda: (in_a_folder(dt.load), {"path": "model", "backbone": nn.Linear(3, 3)}),
    "limits": lambda: (dt.labels.limits, {"bins": BINS, "like": torch.zeros(2)}),
    "progressive_probabilities": lambda: (
        dt.labels.progressive_probabilities,
        {"density_or_counts": [4, 1], "epoch": 0, "epochs": 2},
    ),
    "smooth": lambda: (dt.labels.smooth, {"values": np.ones(9), "kernel": dt.gaussian(5, 2)}),
    "smoothing_matrix": lambda: (dt.labels.smoothing_matrix, {"num_bins": 9, "kernel": dt.gaussian(5, 2)}),
}

# What the losses take, by name; their own entries are made of it. A loss whose options have other names adds them here.
FIRST: dict[str, list[Callable[[], Tensor]]] = {
    "pred": [lambda: years() + 0.5, lambda: rows(2)],
    "logits": [lambda: rows().tanh()],
    "affinities": [shares],
    "features": [lambda: rows(3)],
}
TARGETS: list[Callable[[], Tensor]] = [shares, years, classes]
OPTIONS: dict[str, Callable[[], Any]] = {
    "alpha": lambda: [1.0, 2.0, 3.0, 4.0],
    "beta": lambda: 0.5,
    "bins": lambda: BINS,
    "centers": lambda: rows(3)[:4],
    "counts": lambda: prior() * 10,
    "density": density,
    "drop": lambda: 0.5,
    "gamma": lambda: 2.0,
    "generator": torch.Generator,
    "margins": lambda: torch.zeros(4, 4),
    "means": lambda: [1.0, 2.0],
    "min_variance": lambda: 1e-6,
    "noise_sigma": lambda: 1.0,
    "num_classes": lambda: 4,
    "num_features": lambda: 3,
    "omega": lambda: 1.0,
    "points": lambda: rows(3),
    "pred": ones,
    "prior": prior,
    "push_weight": ones,
    "surrogate": lambda: rows(3)[:4],
    "threshold": lambda: 0.2,
    "variances": lambda: [1.0, 1.0],
    "weight": ones,
    "weights": lambda: [0.5, 0.5],
}
OUTPUTS: list[Callable[[], Any]] = [
    lambda: dt.LongTailOutput(None, years() + 0.5, years() + 0.5, rows(3), None, None),
    lambda: dt.LongTailOutput(None, rows().tanh(), years() + 0.5, rows(3), None, None),
    lambda: rows(2),
]


def options_of(function: Callable[..., Any]) -> dict[str, Any]:
    given = {name: OPTIONS[name]() for name in parameters_of(function) if name in OPTIONS}
    return {**given, "weights": lds()} if function is dt.losses.ConRLoss else given


@functools.cache
def rows_and_target(name: str) -> tuple[Callable[[], Any], Callable[[], Tensor]]:
    """What makes the first rows and target that a loss, or its module, takes."""
    kind, _, forward = name.partition(".")
    function = getattr(dt.losses, kind)
    function = function(**options_of(function)) if forward else function
    first = next(iter(parameters_of(function)))
    for pair in itertools.product(OUTPUTS if forward else FIRST[first], TARGETS):
        try:
            call(function, {**options_of(function), first: pair[0](), "target": pair[1]()})
        except DirToolkitError:
            continue
        return pair
    raise AssertionError(f"{name} needs an option that OPTIONS lacks, or other rows")


def loss_call(name: str) -> Call:
    """The first call of a loss, or of its module, that is valid."""
    kind, _, forward = name.partition(".")
    made = getattr(dt.losses, kind)
    if inspect.isclass(made) and not forward:
        return made, options_of(made)
    function = made(**options_of(made)) if forward else made
    rows_of, target = rows_and_target(name)
    return function, {**options_of(function), next(iter(parameters_of(function))): rows_of(), "target": target()}


def losses() -> list[str]:
    names = [name for name in dt.losses.__all__ if name != "gaussian_interval"]
    modules = [name for name in names if inspect.isclass(getattr(dt.losses, name))]
    with_options = [name for name in names if parameters_of(getattr(dt.losses, name))]
    return [*with_options, *(f"{name}.forward" for name in modules)]


# Names that take no arguments of their own to check.
NOT_CALLED = {
    "Frozen": "a context that freeze makes",
    "CCCLoss": "a module without options, whose function is called",
    "CoralLoss": "a module without options, whose function is called",
    "WeightedL1": "a module without options, whose function is called",
    "WeightedMSE": "a module without options, whose function is called",
    "Description": "a dataclass, which holds what LabelDensity.describe finds",
    "LongTailOutput": "a NamedTuple, which holds what the model puts there",
    "VotingOutput": "a NamedTuple, which holds what the model puts there",
    "PriorEstimate": "a dataclass, which holds what estimate_prior puts there",
    "BinsReadout": "made by LongTailModel, whose arguments are its own",
    "ClassReadout": "made by LongTailModel, whose arguments are its own",
    "GaussianReadout": "made by LongTailModel, whose arguments are its own",
    "PointReadout": "made by LongTailModel, whose arguments are its own",
    "Relevance": "a dataclass, which holds what its method of puts there",
    "TauChoice": "a NamedTuple or dataclass, which holds what the choice puts there",
}


# Names besides its own under which a call may raise: of what it is short for, or hands an argument on to unchanged.
SPEAKS_AS: dict[str, tuple[str, ...]] = {
    "BinGrid.from_dict": ("BinGrid", "Bins.from_dict"),
    "Bins.from_dict": ("Bins",),
    "Bins.grid": ("BinGrid",),
    "ClassificationMetrics.compute": ("LabelDensity.regions",),
    "FDS": ("smooth",),
    "FDS.reference": ("FDS",),
    "FDS.set_extra_state": ("FDS.load_state_dict", "BinMoments.load_state_dict", "Bins.from_dict"),
    "GaussianMixtureLoss.fit": ("GaussianMixtureLoss",),
    "LDS.fit": ("LabelDensity.count",),
    "LDS.reference": ("LDS",),
    "LDS.set_extra_state": ("LDS", "Bins.from_dict"),
    "LabelDensity.smooth": ("smooth",),
    "LongTailModel": ("LongTailModel.set_prior", "LongTailModel.criterion", "LinearHead", "weighted_l1"),
    "LongTailModel.for_labels": ("LongTailModel", "Bins.auto", "LabelDensity.count"),
    "LongTailModel.criterion": ("soft_cross_entropy", "soft_labels", "weighted_l1"),
    "LongTailModel.interval": ("interval",),
    "LongTailModel.read": ("LongTailModel", "LinearHead"),
    "LongTailModel.set_extra_state": ("LongTailModel.load_state_dict", "Bins.from_dict"),
    "RegressionMetrics.compute": ("LabelDensity.regions",),
    "VotingModel": ("LDS",),
    "calibration_metrics": ("CalibrationMetrics", "CalibrationMetrics.update"),
    "choose_normalization": ("LinearHead", "balanced_error"),
    "classification_metrics": ("ClassificationMetrics", "ClassificationMetrics.update", "LabelDensity.regions"),
    "DistributionMetrics.compute": ("LabelDensity.regions",),
    "DistributionMetrics.pit": ("LabelDensity.regions",),
    "DistributionMetrics.update": ("Bins.shares",),
    "distribution_metrics": ("DistributionMetrics", "DistributionMetrics.update", "LabelDensity.regions"),
    "regression_metrics": ("RegressionMetrics", "RegressionMetrics.update", "LabelDensity.regions"),
    "stage_two": ("reinitialize",),
}
SPEAKS_AS["LongTailModel"] += SPEAKS_AS["LongTailModel.criterion"]

# Words that stand for an argument where its own name does not.
KNOWN_AS: dict[tuple[str, str], tuple[str, ...]] = {
    ("ConRLoss", "target"): ("labels",),  # as its LDS calls them
    ("BinSampler", "world"): ("num_samples",),  # fewer of them than ranks
    ("Bins", "edges"): ("centers",),  # which must lie between them
    ("Bins.uniform", "high"): ("bins",),  # too many of them, or too narrow
    ("Bins.uniform", "width"): ("bins",),
    ("ClassificationMetrics.compute", "few"): ("many",),  # which must not be less
    ("FDS.set_extra_state", "state"): ("values",),  # of its bins
    ("LDS.set_extra_state", "state"): ("values",),
    ("IntervalMetrics.compute", "few"): ("many",),
    ("LabelDensity.regions", "few"): ("many",),
    ("LongTailModel.calibrate", "scores_or_loader"): ("scores", "batch"),
    ("LongTailModel.calibrate_intervals", "scores_or_loader"): ("scores", "batch"),
    ("LongTailModel.predict", "inputs"): ("backbone", "batch", "predictions"),
    ("LongTailModel", "labels"): ("target",),  # as every loss calls them, also one that the user chose
    ("LongTailModel", "prior_kernel"): ("kernel",),
    ("LongTailModel.criterion", "labels"): ("target",),
    ("LongTailModel.interval", "output"): ("probabilities",),  # which a tensor must be
    ("LongTailModel.set_extra_state", "state"): ("values",),
    ("MultiTargetModel.calibrate", "scores_or_loader"): ("scores", "batch"),
    ("MultiTargetModel.calibrate_intervals", "scores_or_loader"): ("scores", "batch"),
    ("MultiTargetModel.criterion", "labels"): ("target",),
    ("MultiTargetModel.predict", "inputs"): ("backbone", "batch", "predictions"),
    ("RegressionMetrics.compute", "few"): ("many",),
    ("DistributionMetrics.compute", "few"): ("many",),
    ("DistributionMetrics.pit", "few"): ("many",),
    ("choose_normalization", "features"): ("pred",),  # scores made of infinite ones
    ("choose_normalization", "labels"): ("target",),
    ("bin_probabilities", "density_or_counts"): ("counts", "bin"),
    ("class_prior", "density_or_counts"): ("counts",),
    ("progressive_probabilities", "density_or_counts"): ("counts", "bin"),
    ("classification_metrics", "few"): ("many",),
    ("distribution_metrics", "few"): ("many",),
    ("interval_metrics", "few"): ("many",),
    ("regression_metrics", "few"): ("many",),
}
STANDS_FOR = {"output": ("pred", "logits", "affinities", "features")}  # as each loss calls what it reads of it
# Arguments that are blamed when this one, of another shape, no longer fits them.
MUST_FIT: dict[str, tuple[str, ...]] = {
    "affinities": ("target",),
    "centers": ("target",),
    "features": ("labels", "target", "source_features"),
    "logits": ("labels", "target", "prior", "counts", "alpha", "margins"),
    "means": ("variances",),
    "scores": ("labels", "features"),
    "scores_or_loader": ("labels",),
    "target": ("pred", "logits"),
    "output": ("target", "weight"),
    "x": ("labels", "backbone", "features"),
}

# What may come out besides our own errors, and why.
NO_VALUES = "a tensor on the meta device has no values to look at or to copy, as torch's own sentence says"
BACKBONE = "what the backbone makes of its input is the backbone's own"
FILES = "errors of missing files and of folders are Python's own"
KEYWORD = "it is text that the package itself gives, by which messages call the labels"
MAY_RAISE: dict[tuple[str, str], str] = {
    ("BinGrid.place", "name"): KEYWORD,
    ("Bins.place", "name"): KEYWORD,
    ("Bins.index", "labels"): NO_VALUES,
    ("FDS.forward", "labels"): NO_VALUES,
    ("FDS.update", "labels"): NO_VALUES,
    ("LDS.sample_weight", "labels"): NO_VALUES,
    ("LogitAdjuster", "target"): NO_VALUES,
    ("LongTailModel.choose_tau", "labels"): NO_VALUES,
    ("LongTailModel.forward", "x"): BACKBONE,
    ("LongTailModel.predict", "inputs"): BACKBONE,
    ("LongTailModel.save", "path"): FILES,
    ("MultiTargetModel.forward", "x"): BACKBONE,
    ("MultiTargetModel.predict", "inputs"): BACKBONE,
    ("MultiTargetModel.save", "path"): FILES,
    ("VotingModel.forward", "x"): BACKBONE,
    ("adjust_logits", "prior"): NO_VALUES,
    ("dist_loss", "prior"): NO_VALUES,
    ("adjust_logits", "target"): NO_VALUES,
    ("load", "path"): FILES,
    ("pointwise_mutual_information", "prior"): NO_VALUES,
}


class Opaque:
    """An object that no function has heard of."""

    def __repr__(self) -> str:
        return "<Opaque>"


def wrong_values(valid: Any) -> Iterator[tuple[str, Any]]:
    """Values of other kinds, and the valid one made wrong in its own kind."""
    yield from {
        "None": None,
        "a word": "no such word",
        "an empty str": "",
        "bytes": b"1",
        "nan": float("nan"),
        "inf": float("inf"),
        "-inf": -float("inf"),
        "-1": -1,
        "-0.5": -0.5,
        "0": 0,
        "0.5": 0.5,
        "tiny": 5e-324,
        "1e308": 1e308,
        "2**62": 2**62,
        "10**400": 10**400,
        "True": True,
        "complex": 1j,
        "[]": [],
        "()": (),
        "{}": {},
        "rows of two lengths": [[1.0], [1.0, 2.0]],
        "nested": [[[0.5]], [[0.5]]],
        "strings": ["a", "b", "c", "d"],
        "Nones": [None, None, None, None],
        "a pair": (1, 2),
        "an object": Opaque(),
        "a class": Opaque,
        "a module": nn.ReLU(),
        "a function": len,
        "a set": {1.0},
        "a range": range(5),
        "an iterator": iter([1, 2]),
        "an array of words": np.array(["a", "b", "c", "d", "e"]),
        "NumPy nan": np.float64("nan"),
        "an array of objects": np.array([Opaque(), None], dtype=object),
        "an array of dates": np.array(["2020-01-01"], dtype="datetime64[D]"),
        "a scalar array": np.array(0.5),
        "an empty array": np.zeros(0),
        "an array with nan": np.array([0.5, np.nan, 0.5, 0.5]),
        "a masked array": np.ma.masked_array([0.5, 1.5, 2.5, 3.5], [True, False, False, False]),
        "a scalar tensor": torch.tensor(0.5),
        "an empty tensor": torch.zeros(0),
        "a complex tensor": torch.ones(5, dtype=torch.complex64),
        "a sparse tensor": torch.eye(4).to_sparse(),
        "a meta tensor": torch.ones(5, device="meta"),
        "a quantized tensor": QUANTIZED,
    }.items()
    if isinstance(valid, (list, np.ndarray)) and np.asarray(valid).dtype.kind in "if":
        for name, changed in changed_tensors(torch.tensor(np.asarray(valid), dtype=torch.float64)):
            if not changed.is_complex() and changed.dtype != torch.bfloat16:
                yield f"array {name}", changed.detach().numpy()
    if isinstance(valid, Tensor):
        yield "its list", valid.tolist()
        yield "its array", valid.detach().numpy()
        yield "on meta", valid.to("meta")
        yield "as a parameter", nn.Parameter(valid.float())
        yield from changed_tensors(valid)
    if isinstance(valid, dict):
        for key in valid:
            yield f"without {key}", {name: value for name, value in valid.items() if name != key}
            for wrong in (None, "no such word", -1, float("nan"), [], {}):
                yield f"{key} of {wrong!r}", {**valid, key: wrong}
        yield "one key more", {**valid, "more": 1}


def changed_tensors(valid: Tensor) -> Iterator[tuple[str, Tensor]]:
    for dtype in (torch.bool, torch.int8, torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.complex64):
        yield f"as {dtype}", valid.to(dtype)
    yield "one sample less", valid[:-1]
    yield "one sample more", torch.cat([valid, valid[:1]])
    yield "without samples", valid[:0]
    yield "one axis more", valid[:, None]
    yield "a leading axis more", valid[None]
    yield "a scalar", valid.flatten()[0]
    if valid.ndim > 1:
        yield "flat", valid.flatten()
        yield "without columns", valid[:, :0]
        yield "one column less", valid[:, :-1]
        yield "one column more", torch.cat([valid, valid[:, :1]], 1)
        yield "not contiguous", valid.t().contiguous().t()
    yield "strided", valid.repeat_interleave(2, 0)[::2]
    yield "negative", -valid - 1
    whole = not valid.is_floating_point()
    yield "huge", torch.full_like(valid, min(2**40, torch.iinfo(valid.dtype).max)) if whole else valid + 3e38
    yield "zero", torch.zeros_like(valid)
    if valid.is_floating_point():
        for name, wrong in (("nan", float("nan")), ("inf", float("inf")), ("-inf", -float("inf"))):
            changed = valid.detach().clone()
            changed.view(-1)[-1] = wrong
            yield f"{name} in its last place", changed
            yield f"{name} all over", torch.full_like(valid, wrong)
        yield "requires grad", valid.detach().clone().requires_grad_()


def parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    called = function.forward if isinstance(function, nn.Module) else function
    parameters = dict(inspect.signature(called).parameters)
    if function == dt.LongTailModel.for_labels:
        parameters.pop("options")
    if function is dt.longtail.VotingModel:
        parameters.pop("options")
    if function is dt.LongTailModel:  # whose options are those of its readout
        parameters.pop("options")
        of_readout = inspect.signature(dt.longtail.BinsReadout).parameters
        parameters |= {name: p for name, p in of_readout.items() if p.kind is p.KEYWORD_ONLY}
    return parameters


def call(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """With every argument by name, but for ``*axes`` and ``*tensors``."""
    several = [value for name, value in arguments.items() if name in ("axes", "tensors")]
    return function(*several) if several else function(**arguments)


def attacks(name: str) -> Iterator[tuple[str, str, Any]]:
    """Parameter, what is wrong with its value, and the value."""
    function, valid = VALID[name]()
    for parameter, text in parameters_of(function).items():
        if parameter not in valid and name.partition(",")[2]:
            continue  # those that the other variant attacks
        for label, value in wrong_values(valid.get(parameter, text.default)):
            yield parameter, label, value


def fault_of(name: str, parameter: str, value: Any) -> str | None:
    """What is wrong with the answer to one wrong argument; None where it works, or our error tells who and what."""
    function, valid = VALID[name]()
    named = name.partition(",")[0].removesuffix(".forward")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", dt.DirToolkitWarning)
            call(function, {**valid, parameter: value})
    except DirToolkitError as error:
        who, _, what = str(error).partition(": ")
        if who not in (named, *SPEAKS_AS.get(named, ())):
            return f"says it is {who!r}: {error}"
        usual = valid.get(parameter)
        words = [
            parameter,
            *STANDS_FOR.get(parameter, ()),
            *KNOWN_AS.get((named, parameter), ()),
            *(usual if isinstance(usual, dict) else ()),
        ]
        tensors = isinstance(value, Tensor) and isinstance(usual, Tensor)
        arrays = isinstance(value, np.ndarray) and isinstance(usual, list)
        if arrays or (tensors and value.shape != usual.shape):
            words += MUST_FIT.get(parameter, ())
        if not any(re.search(rf"\b{word}\b", what) for word in words):
            return f"does not name it: {error}"
    except Exception as error:
        reason = MAY_RAISE.get((name.partition(",")[0], parameter))
        if reason is None or (reason == NO_VALUES and "meta tensor" not in str(error)):
            return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def exported() -> dict[str, Any]:
    """Everything that ``dt`` and its rooms list, by name."""
    rooms = [value for name in dt.__all__ if inspect.ismodule(value := getattr(dt, name))]
    rooms += [dt.longtail, sys.modules["dir_toolkit.target_prior"]]
    listed = {name: getattr(home, name) for home in (dt, *rooms) for name in home.__all__}
    # Exceptions and warnings take any message.
    messages = {name for name, value in listed.items() if inspect.isclass(value) and issubclass(value, Exception)}
    return {name: value for name, value in listed.items() if callable(value) and name not in messages}


VALID.update({name: partial(loss_call, name) for name in losses()})


def head_calls() -> dict[str, Callable[[], Call]]:
    """Calls of each head that two sizes make, and of its forward, where no other call of it is named above."""
    calls: dict[str, Callable[[], Call]] = {}
    for name in dt.heads.__all__:
        kind = getattr(dt.heads, name)
        needed = [key for key, p in inspect.signature(kind).parameters.items() if p.default is p.empty]
        if needed == ["num_features", "num_classes"]:
            calls[name] = partial(lambda kind: (kind, {"num_features": 3, "num_classes": 4}), kind)
            calls[f"{name}.forward"] = partial(lambda kind: (kind(3, 4), {"features": rows(3)}), kind)
    return calls


VALID.update({name: call for name, call in head_calls().items() if name not in VALID})


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of expectation maximization, since no test here looks at its result."""
    monkeypatch.setattr("dir_toolkit.target_prior._STEPS", 20)


def test_the_table_covers_every_public_name_and_method() -> None:
    covered = {name.partition(",")[0] for name in VALID} | set(NOT_CALLED)
    missing = [name for name in exported() if name not in covered and name not in NOT_CALLED]
    for name, kind in exported().items():
        if not inspect.isclass(kind) or name in NOT_CALLED:
            continue
        for method in (method for method in dir(kind) if not method.startswith("_") or method == "forward"):
            value = inspect.getattr_static(kind, method)
            function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
            ours = inspect.isfunction(function) and function.__module__.startswith("dir_toolkit")
            # torch's own, told which kind of loading it is; it raises what torch raises for any module.
            ours = ours and not (method == "load_state_dict" and issubclass(kind, torch.nn.Module))
            if ours and len(inspect.signature(function).parameters) > (not isinstance(value, staticmethod)):
                missing += [f"{name}.{method}"] if f"{name}.{method}" not in covered else []
    assert not missing


@pytest.mark.filterwarnings("ignore::dir_toolkit.DirToolkitWarning")
@pytest.mark.parametrize("name", VALID)
def test_valid_arguments_stay_as_they_are_and_a_wrong_one_works_or_is_named(name: str, mutations: int) -> None:
    function, valid = VALID[name]()
    copies = {key: value.clone() for key, value in valid.items() if isinstance(value, Tensor)}
    call(function, valid)
    assert [key for key, copy in copies.items() if not torch.equal(valid[key], copy)] == []
    tried = list(attacks(name))
    assert len(tried) > 30
    random.Random(name).shuffle(tried)
    tried = tried[: mutations // 3]
    outcome = ((parameter, label, fault_of(name, parameter, value)) for parameter, label, value in tried)
    faults = [f"{parameter} = {label}: {fault}" for parameter, label, fault in outcome if fault]
    assert not faults, "\n".join(faults)
    print(f"{name}: {len(tried)} wrong arguments")


def test_a_fault_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(labels: Any, bins: Any) -> Any:
        if isinstance(bins, str):
            raise _checks.problem("it must be right", got=bins)
        if bins is None:
            raise _checks.problem("bins must be right", source="another")
        if bins == 0:
            raise _checks.problem("bins_of_it and labels must be right")
        return labels.shape

    monkeypatch.setitem(VALID, "dir_toolkit", lambda: (careless, {"labels": years(), "bins": BINS}))
    assert fault_of("dir_toolkit", "labels", ones()) is None
    assert fault_of("dir_toolkit", "labels", 1) == "AttributeError: 'int' object has no attribute 'shape'"
    assert fault_of("dir_toolkit", "bins", "b") == "does not name it: dir_toolkit: it must be right, got b."
    assert fault_of("dir_toolkit", "bins", 0) == "does not name it: dir_toolkit: bins_of_it and labels must be right."
    assert fault_of("dir_toolkit", "bins", None) == "says it is 'another': another: bins must be right."


def with_nan(valid: Any) -> Tensor | None:
    """An argument of one value or row a sample, the fourth of them NaN; None where it is no such argument."""
    broken = torch.tensor(valid) if valid is LABELS else valid
    if not isinstance(broken, Tensor) or not broken.is_floating_point() or len(broken) != len(LABELS):
        return None
    broken = broken.clone()
    broken[3] = float("nan")
    return broken


def is_finite(result: Any) -> bool:
    if isinstance(result, tuple):
        return all(map(is_finite, result))
    return result is None or isinstance(result, torch.dtype) or bool(torch.as_tensor(result).isfinite().all())


def fault_of_nan(name: str, parameter: str, broken: Tensor) -> str | None:
    """What is wrong with the answer to NaN in one sample; None where its index is named or the result is not finite."""
    function, arguments = VALID[name]()
    try:
        result = call(function, {**arguments, parameter: broken})
    except DirToolkitError as error:
        return None if re.search(r"index \[3[],]|row 3\b", str(error)) else f"does not tell which: {error}"
    return f"is passed over: {result}" if is_finite(result) else None


# Where NaN in one sample does not show at once, and why.
PASSED_OVER = {
    ("Bins.tensor", "like"): "its dtype and its device are read, and its values are not",
    ("Bins.wide_dtype", "tensors"): "their dtypes and devices are read, and their values are not",
    ("FDS.update", "features"): "it is told at the end of the epoch, so that no step waits for an accelerator",
    ("conr_loss", "pred"): "such a prediction is alike to none; the loss of the predictions, added to it, is NaN",
}


@pytest.mark.filterwarnings("ignore::dir_toolkit.DirToolkitWarning")
@pytest.mark.parametrize("name", VALID)
def test_nan_in_one_sample_is_named_by_its_index_or_comes_out(name: str) -> None:
    """Of predictions and features the loss is then NaN, where training stops."""
    for parameter, valid in VALID[name]()[1].items():
        if (broken := with_nan(valid)) is not None:
            fault = fault_of_nan(name, parameter, broken)
            passed = fault is not None and fault.startswith("is passed over")
            assert passed if (name, parameter) in PASSED_OVER else fault is None, f"{parameter}: {fault}"


def test_nan_that_is_passed_over_or_not_told_apart_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(pred: Tensor, labels: Tensor) -> Tensor:
        if labels.isnan().any():
            raise _checks.problem("labels must be finite", got="nan at index [33]")
        return pred.nanmean()

    monkeypatch.setitem(VALID, "dir_toolkit", lambda: (careless, {"pred": years(), "labels": years()}))
    broken = with_nan(LABELS)
    assert broken is not None
    assert str(fault_of_nan("dir_toolkit", "pred", broken)).startswith("is passed over: 1.")
    assert str(fault_of_nan("dir_toolkit", "labels", broken)).startswith("does not tell which: dir_toolkit: labels")


def test_nan_in_features_of_fds_is_told_when_the_epoch_ends() -> None:
    broken, smoothing = with_nan(rows(3)), fds()
    smoothing.update(broken, years())
    with pytest.raises(
        DirToolkitError, match=r"FDS.end_epoch: features must be finite, got NaN or infinity in bins \[3\]"
    ):
        smoothing.end_epoch()


def test_nan_in_a_prediction_makes_a_loss_with_conr_nan() -> None:
    output = dt.LongTailOutput(None, years(), with_nan(years()), rows(3), None, None)
    assert dt.losses.ConRLoss()(output, years()).isnan()
