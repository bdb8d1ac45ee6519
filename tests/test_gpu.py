"""The accelerator's part of the tests: what runs there gives what it gives on the CPU.

    python -m pytest -m gpu -n 0 tests/test_gpu.py                    # on a CUDA device; without one it is skipped
    python -m pytest -m gpu -n 0 tests/test_gpu.py --device madeup    # on the device of tests/madeup.py

CI runs the second, in a stage of its own.

What the made-up device cannot do (autocast and compilation) runs on the CPU instead of on it.
"""

from __future__ import annotations

import os
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import madeup
import numpy as np
import pytest
import torch
import xarray as xr
from forked import load
from jobs import (
    BINS,
    CLASSES,
    FEATURES,
    GRID,
    HEADS,
    JOBS,
    LOSSES,
    MODELS,
    UNEVEN,
    Job,
    N,
    batch,
    density,
    fds_job,
    lds,
    model_job,
)
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import dir_toolkit as dt
from dir_toolkit import conformal, priors
from dir_toolkit.experiment.training.runtime import Runtime
from dir_toolkit.labels import c_mixup, quantiles

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::dir_toolkit.DirToolkitWarning")]

ALL = {
    **JOBS,
    "full FDS": fds_job("full", "features", "y"),
    "full FDS of maps": fds_job("full", "maps", "pixels"),
    "model with full FDS": model_job(BINS, {}, fds="full"),
}


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    name = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device; --device madeup runs these tests on one that is made up")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device(name, 0)


@pytest.fixture
def whole(device: torch.device) -> torch.device:
    """The device, or the CPU instead of one that is made up."""
    return device if device.type == "cuda" else torch.device("cpu")


def agree(given: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """The same but for the order of sums."""
    assert type(given) is type(expected)
    if isinstance(given, (list, tuple)):
        assert len(given) == len(expected)
        for a, b in zip(given, expected, strict=True):
            agree(a, b, tolerance)
    elif isinstance(given, (xr.Dataset, xr.DataArray)):
        xr.testing.assert_allclose(given, expected, rtol=tolerance, atol=tolerance)
    elif isinstance(given, Tensor):
        assert given.dtype == expected.dtype
        torch.testing.assert_close(given.cpu(), expected.cpu(), rtol=tolerance, atol=tolerance, equal_nan=True)
    else:
        np.testing.assert_allclose(given, expected, rtol=tolerance, atol=tolerance)


def outcome(
    job: Callable[[], Job], device: torch.device, wrap: Callable[[Any], Any] = lambda step: step
) -> list[Tensor]:
    """What two steps of a job give on the device, with gradients and buffers."""
    torch.manual_seed(0)
    modules, step = job()
    for module in modules:
        module.to(device)
    there = {k: v.detach().to(device).requires_grad_(v.requires_grad) for k, v in batch().items()}
    results: list[Tensor] = []
    step = wrap(step)
    for _ in range(2):
        result = step(SimpleNamespace(**there))
        if isinstance(result, Tensor):
            result.backward()
        results += [result] if isinstance(result, Tensor) else result
    results += [tensor.grad for tensor in there.values() if tensor.grad is not None]
    for module in modules:
        results += [p.grad for p in module.parameters() if p.grad is not None] + list(module.buffers())
    assert {tensor.device.type for tensor in results} <= {device.type}
    return [tensor.detach() for tensor in results]


@pytest.mark.parametrize("name", ALL)
def test_a_step_is_that_of_the_cpu(name: str, device: torch.device) -> None:
    expected = outcome(ALL[name], torch.device("cpu"))
    assert expected
    agree(outcome(ALL[name], device), expected)


@pytest.mark.parametrize("name", ALL)
def test_a_default_device_changes_nothing(name: str, device: torch.device) -> None:
    """Modules and arguments are made on it, too."""

    def made_there() -> Job:
        with device:
            return ALL[name]()

    def wrap(step: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def inside(d: Any) -> Any:
            with device:
                return step(d)

        return inside

    agree(outcome(made_there, device, wrap), outcome(ALL[name], torch.device("cpu")))


def trained() -> dt.LongTailModel:
    torch.manual_seed(0)
    return dt.LongTailModel(nn.Linear(6, 6), 6, BINS, density=density(BINS), target_prior="uniform").eval()


def calibrated(d: Any) -> list[Any]:
    """Everything a model does after training."""
    model = trained().to(d.x.device)
    scores = model(d.x).scores.detach()
    usual = model.calibrate(scores, d.y)
    choice = model.calibrate(scores, d.y, most_mae=None, bias=True)
    model.calibrate_intervals(scores, d.y)
    output = model(d.x)
    model.save(path := Path("model.safetensors"))
    again = dt.load(path, nn.Linear(6, 6).cpu())
    path.unlink()
    assert {p.device.type for p in again.parameters()} == {"cpu"}
    predicted = model.predict(d.x, level=0.9)
    xr.testing.assert_allclose(again.predict(d.x.cpu(), level=0.9), predicted, rtol=1e-4, atol=1e-4)
    return [usual.curves["bmae"], choice.curves["bmae"], *model.interval(output), output.prediction.detach(), predicted]


def voting(d: Any) -> list[Tensor]:
    torch.manual_seed(0)
    model = dt.longtail.VotingModel(nn.Linear(6, 6), 6, BINS, density=density(BINS), heads=2).to(d.x.device)
    model(d.x, d.y).loss.backward()
    output = model.eval()(d.x)
    return [output.prediction.detach(), *(side.detach() for side in model.interval(output))]


def averaged(d: Any) -> list[Any]:
    models = [trained().to(d.x.device) for _ in range(2)]
    mean = dt.longtail.ensemble(models)
    choice = mean.calibrate([(d.x, d.y)], most_mae=None, bias=False)
    assert mean.readout.bias.device == d.x.device  # type: ignore[union-attr]
    return [choice.curves["bmae"], mean(d.x).prediction.detach(), mean.predict(d.x)]


def several(d: Any) -> list[Any]:
    torch.manual_seed(0)
    model = dt.MultiTargetModel.for_labels(nn.Linear(6, 6), 6, d.y2, bins=GRID).to(d.x.device)
    loss = model(d.x, d.y2).loss
    loss.backward()
    output = model.eval()(d.x)
    model.calibrate(output.scores.detach(), d.y2, most_mae=None, bias=False)
    return [loss.detach(), model(d.x).prediction.detach(), model.predict(d.x)]


def conformed(d: Any) -> list[Any]:
    point, bins = conformal.PointConformal(density(BINS)), conformal.BinsConformal(density(BINS))
    pair = conformal.GaussianConformal(density(BINS))
    variances = torch.stack([d.pred, d.w + 1], 1).detach()
    for one, output in ((point, d.pred.detach()), (bins, d.spread), (pair, variances)):
        one.update(output, d.y)
        one.adapt(output[:5], d.y[:5])
    return [
        *point.interval(d.pred.detach(), 0.8),
        *bins.interval(d.spread, 0.8),
        bins.sets(d.spread, 0.8),
        *pair.interval(variances, 0.8),
        *conformal.conformal_interval(d.pred.detach(), d.pred.detach(), d.y, density(BINS), 0.8),
    ]


def fds_epochs(form: Any, d: Any) -> list[Tensor]:
    fds = dt.FDS(BINS, 6, covariance=form, rank=2).to(d.x.device)
    for _ in range(3):
        fds.update(d.features.detach(), d.y)
        fds.end_epoch()
    other = dt.FDS(BINS, 6, covariance=form, rank=2).cpu()
    other.load_state_dict(fds.state_dict())
    assert {value.device.type for value in other.statistics().values()} == {"cpu"}
    agree(list(other.statistics().values()), list(fds.statistics().values()))
    return [fds.statistics()[name] for name in ("mean", "variance", "count") if name in fds.statistics()]


def nearest_mean(d: Any) -> Tensor:
    head = dt.heads.NearestMeanHead(6, 5).to(d.x.device)
    head.update(d.features.detach(), d.c)
    head.finish()
    return head(d.features.detach())


def decoupled(d: Any) -> list[Any]:
    torch.manual_seed(0)
    head = nn.Linear(6, 5).to(d.x.device)
    choice = dt.decoupling.choose_normalization(head, d.features.detach(), d.c)
    with dt.decoupling.freeze(head):
        pass
    dt.decoupling.reinitialize(head)
    assert head.weight.device == d.x.device
    return [choice.curves[choice.by], dt.heads.tau_normalized(head, 0.5)(d.features.detach()).detach()]


def sampled(d: Any) -> list[int]:
    """The order of a sampler, by way of a DataLoader that keeps inputs on the device."""
    sampler = dt.BinSampler(d.y, BINS, q=0.5, seed=3)
    sampler.set_epoch(1)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(d.x, d.y), batch_size=8, sampler=sampler)
    return [y.tolist() for _, y in loader]


def mixed(d: Any) -> list[Tensor]:
    return list(c_mixup(d.x, d.y, bandwidth=1.0, generator=torch.Generator().manual_seed(0)))


def estimated(d: Any) -> list[Any]:
    scores, source = d.scores.detach(), d.scores.detach().flip(0)
    estimate = dt.estimate_prior(scores, source=source, labels=d.y.flip(0), bins=BINS)
    classes = dt.estimate_prior(d.logits.detach(), source=d.logits.detach(), labels=d.c)
    return [estimate.prior, classes.prior, estimate.gain]


def measures(d: Any) -> list[Any]:
    metrics = dt.metrics
    own = metrics.RegressionMetrics(density(BINS))
    own.update(d.pred.detach(), d.y)
    empty = own.fresh().merge(own)  # whose sums began on the CPU
    return [
        own.compute(),
        empty.compute(),
        dt.regression_metrics(d.pred.detach(), d.y, density(BINS)),
        dt.classification_metrics(d.logits.detach(), d.c, density(CLASSES)),
        metrics.calibration_metrics(d.affinities.detach(), d.c),
        metrics.distribution_metrics(d.spread, d.y, density(BINS)),
        metrics.interval_metrics(d.y - d.w, d.y + d.w, d.y, density(BINS)),
        dt.balanced_error(d.c, d.c.flip(0), 5),
    ]


def priors_of(d: Any) -> list[Any]:
    logits = d.logits.detach()
    choice = dt.choose_tau(logits, d.c, d.prior)
    return [
        dt.fit_temperature(logits, d.c),
        choice.curves[choice.by],
        priors.pointwise_mutual_information(logits, d.prior),
        dt.class_prior(d.counts.cpu()),
    ]


HOST: dict[str, Callable[[Any], Any]] = {
    "Bins of labels": lambda d: [dt.Bins.quantile(d.y, 4).edges, dt.Bins.from_edges(d.y.sort().values).edges],
    "Bins.auto": lambda d: dt.Bins.auto(d.y).edges,
    "Bins.tally": lambda d: BINS.tally(d.y),
    "LabelDensity.count": lambda d: [dt.LabelDensity.count(d.y, b).counts for b in (BINS, UNEVEN)],
    "LabelDensity.count over a grid": lambda d: dt.LabelDensity.count(d.y2, GRID).counts,
    "LDS.fit": lambda d: dt.LDS(BINS).fit(d.y).sample_weight(d.y),
    "LDS on the CPU": lambda d: lds(BINS)(d.y),
    "quantiles": lambda d: quantiles(d.spread, BINS, [0.1, 0.9]),
    "a model, calibrated, saved and loaded": calibrated,
    "VotingModel": voting,
    "ensemble": averaged,
    "MultiTargetModel": several,
    "conformal": conformed,
    **{f"epochs of {form} FDS": partial(fds_epochs, form) for form in ("diagonal", "low_rank", "full")},
    "NearestMeanHead": nearest_mean,
    "decoupling": decoupled,
    "BinSampler": sampled,
    "c_mixup": mixed,
    "estimate_prior": estimated,
    "metrics": measures,
    "priors": priors_of,
}


@pytest.mark.parametrize("name", HOST)
@pytest.mark.parametrize("default", [False, True], ids=["", "default device"])
def test_what_looks_at_values_takes_tensors_of_the_device(
    name: str, default: bool, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = HOST[name](SimpleNamespace(**batch()))
    there = SimpleNamespace(**{k: v.detach().to(device) for k, v in batch().items()})
    with device if default else torch.device("cpu"):
        agree(HOST[name](there), expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_label_beyond_the_axis_makes_the_loss_nan(name: str, device: torch.device) -> None:
    """Nothing looks at it, and no index is out of range, which would end a CUDA process."""
    modules, step = MODELS[name]()
    for module in modules:
        module.to(device)
    numbers = {**batch(), "y": batch()["y"].clone(), "c": batch()["c"].clone()}
    numbers["y"][3], numbers["c"][3] = 99.0, 77
    loss = step(SimpleNamespace(**{k: v.detach().to(device) for k, v in numbers.items()}))
    assert loss.isnan().item() == ("'clip'" not in name and "'drop'" not in name)


HALF = {name: ALL[name] for name in (*MODELS, *HEADS, *FEATURES, "full FDS")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HALF)
def test_steps_in_half_precision_stay_near(name: str, dtype: torch.dtype, whole: torch.device) -> None:
    """Under autocast; float16 with a scaler."""
    torch.manual_seed(0)
    modules, step = HALF[name]()
    parameters = [p for module in modules for p in module.to(whole).parameters()]
    scaler = torch.amp.GradScaler(whole.type, init_scale=2.0**8, enabled=dtype == torch.float16)
    optimizer = torch.optim.SGD(parameters or [torch.zeros(1, device=whole, requires_grad=True)], lr=1e-3)
    there = {k: v.detach().to(whole).requires_grad_(v.requires_grad) for k, v in batch().items()}
    full = step(SimpleNamespace(**there)).item()
    for turn in range(2):
        optimizer.zero_grad()
        with torch.autocast(whole.type, dtype=dtype):
            loss = step(SimpleNamespace(**there))
        assert turn or loss.item() == pytest.approx(full, rel=0.1, abs=0.02)
        scaler.scale(loss).backward()
        if any(p.grad is not None for p in parameters):
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    assert all(p.isfinite().all() and (p.grad is None or p.grad.isfinite().all()) for p in parameters)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which torch.compile looks at where a graph breaks
@pytest.mark.parametrize("name", ["with FDS", "classes {}", "the losses"])
def test_compiled_steps_are_the_plain_ones(name: str, whole: torch.device) -> None:
    """By Inductor on a GPU, and by the graph that Inductor would get elsewhere."""
    if whole.type == "cuda" and not (shutil.which("cc") or os.environ.get("CC")):
        pytest.skip("torch.compile for a GPU needs a C compiler, named cc or by CC")
    torch._dynamo.reset()

    def job() -> Job:
        if name in MODELS:
            return MODELS[name]()
        modules, steps = zip(*(LOSSES[loss]() for loss in COMPILED), strict=True)
        return [module for each in modules for module in each], lambda d: torch.stack([one(d) for one in steps]).sum()

    def compiled(step: Callable[[Any], Any]) -> Callable[[Any], Any]:
        backend = "inductor" if whole.type == "cuda" else "aot_eager"
        return torch.compile(step, backend=backend, fullgraph=name == "the losses")

    agree(outcome(job, whole, compiled), outcome(job, torch.device("cpu")), 1e-3)


COMPILED = ["weighted_l1", "crps", "logit_adjusted_cross_entropy", "gaussian_nll", "ldam_loss", "DistLoss"]


def test_a_cuda_graph_is_refused_where_fds_gathers(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("the made-up device captures no graphs; tests/features/test_fds_states.py feigns it")
    modules, step = FEATURES["FDS"]()
    for module in modules:
        module.to(device)
    there = SimpleNamespace(**{k: v.detach().to(device) for k, v in batch().items()})
    expected = step(there)

    def capture() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            there.x.add(1)  # since an empty graph is warned of
            step(there)

    with pytest.raises(dt.errors.UsageError, match="while a CUDA graph is captured"):
        capture()
    agree(step(there), expected)  # and training goes on


# Training and ranks

LOOP = Path(__file__).parent / "experiment" / "training" / "test_loop.py"


@pytest.mark.parametrize("trainer", ["train", "train_binned", "classify"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_fit_learns_as_on_the_cpu_and_goes_on_where_it_stopped(
    trainer: str, precision: Any, device: torch.device, whole: torch.device, tmp_path: Path
) -> None:
    loop = load(str(LOOP))
    place = device if precision == "float32" else whole
    settings: dict[str, Any] = {"random": False} if trainer != "classify" else {}
    run = partial(getattr(loop, trainer), **settings)
    runtime = Runtime(place, seed=3, precision=precision)
    model, *_, history = run(tmp_path / "whole", runtime)
    assert {p.device.type for p in model.parameters()} == {place.type}
    *_, expected = run(tmp_path / "cpu", Runtime(torch.device("cpu"), seed=3, precision=precision))
    error = next(name for name in history[-1] if name.startswith("val_"))
    for name in ("loss", error):
        near = pytest.approx(expected[-1][name], rel=0.02 if precision == "float32" else 0.2, abs=0.02)
        assert history[-1][name] == near, name
    with pytest.raises(KeyboardInterrupt), stopping_after(7):
        run(tmp_path / "stopped", runtime)
    again, *_, rest = run(tmp_path / "stopped", runtime, resume=True)
    assert rest[-1]["loss"] == pytest.approx(history[-1]["loss"], rel=1e-3)
    for a, b in zip(again.parameters(), model.parameters(), strict=True):
        agree(a.detach(), b.detach(), 1e-2)


@contextmanager
def stopping_after(steps: int) -> Iterator[None]:
    """Ctrl-C in one of the optimizer's steps."""
    taken = []

    def count(*_: Any) -> None:
        taken.append(None)
        if len(taken) == steps:
            signal.raise_signal(signal.SIGINT)

    handle = register_optimizer_step_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("estimator", ["LongTailRegressor", "LongTailClassifier"])
def test_the_estimators_of_scikit_learn_train_there(estimator: str, device: torch.device) -> None:
    scikit_learn = pytest.importorskip("dir_toolkit.integrations.scikit_learn")
    d = batch()
    x, y = d["x"].numpy(), d["y" if estimator == "LongTailRegressor" else "c"].numpy()

    def fitted(name: str) -> np.ndarray:
        made = getattr(scikit_learn, estimator)(random_state=0, epochs=3, device=name)
        return made.fit(x, y).predict(x)

    expected = fitted("cpu")
    with device:  # the default one
        agree(fitted("cpu"), expected)
    if device.type == "cuda":  # what other name they take
        assert np.isfinite(fitted("cuda")).all()


def on_ranks(rank: int) -> list[Tensor]:
    """Each rank has half of the samples, and in the last part rank 0 has all."""
    name = Path("device").read_text()
    if name == madeup.NAME:
        madeup.start()
    device = torch.device(name, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dt.DirToolkitWarning)
        d = {k: v.detach().to(device) for k, v in batch().items()}
        results = []
        for own in (slice(rank, None, 2), slice(0, None if rank == 0 else 0)):
            part = SimpleNamespace(**{k: v[own] for k, v in d.items()})
            results += shared(part, len(part.y))
        if device.type == "cuda":
            model = nn.parallel.DistributedDataParallel(trained().train().to(device), device_ids=[0])
            half = SimpleNamespace(**{k: v[rank::2] for k, v in d.items()})
            model(half.x, half.y).loss.backward()
            results.append(model.module.backbone.weight.grad)
    return [tensor.cpu() for tensor in results]


def shared(d: Any, samples: int) -> list[Tensor]:
    """What the ranks share: labels, metrics, statistics and a batch."""
    metrics, fds = dt.RegressionMetrics(density(BINS)), dt.FDS(BINS, 6).to(d.x.device)
    points = conformal.PointConformal(density(BINS))
    if samples:
        metrics.update(d.pred, d.y)
        points.update(d.pred, d.y)
    counted = dt.LabelDensity.count(d.y, BINS) if samples else dt.LabelDensity(BINS, [0] * len(BINS))
    fds.update(d.features, d.y)
    fds.end_epoch()
    parts = [torch.tensor(counted.all_reduce().counts), metrics.all_reduce().sums]
    parts += [fds.statistics()["mean"], torch.tensor(points.all_reduce().thresholds(0.8))]
    loss = dt.losses.BatchMCLoss(gather=True, learn=False).to(d.x.device)(d.pred, d.y) if samples == N // 2 else None
    return parts if loss is None else [*parts, loss]


def test_two_ranks_on_one_device_equal_one_process(
    two_ranks: Callable[..., list[Any]], device: torch.device, tmp_path: Path
) -> None:
    """By gloo, which sums on the CPU."""
    Path(tmp_path / "device").write_text(device.type)
    both = two_ranks(on_ranks, timeout=120)
    d = SimpleNamespace(**{k: v.detach() for k, v in batch().items()})
    *parts, loss = [*shared(d, N), dt.losses.BatchMCLoss(learn=False)(d.pred, d.y)]
    for values in both:
        agree(values[:4], parts)
        agree(values[5:9], parts)
    agree((both[0][4] + both[1][4]) / 2, loss)
    if device.type == "cuda":
        model = trained().train()
        model(d.x, d.y).loss.backward()
        for values in both:
            agree(values[9], model.backbone.weight.grad)
