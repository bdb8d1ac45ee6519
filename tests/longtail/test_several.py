"""Several targets: each is what a model of its own would be, on features that are shared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import net, seeded
from torch import Tensor, nn

import dir_toolkit as dt
from dir_toolkit.errors import ArgumentError, ArgumentTypeError, LabelError, ShapeError

X = torch.randn(200, 3, generator=torch.Generator().manual_seed(1))
AGES, CLASSES = dt.Bins.uniform(0, 20, width=1), dt.Bins.classes(3)


def labels(seed: int = 0) -> Tensor:
    """They follow from the inputs."""
    age, price, kind = (X[:, k].mul(1 + seed).sigmoid() for k in range(3))
    return torch.stack([20 * age**2, 1000 * price, (3 * kind**2).floor()], 1)


def several(y: Tensor | None = None, bins: Any = (AGES, None, CLASSES), **options: Any) -> dt.MultiTargetModel:
    y = labels() if y is None else y
    return seeded(lambda: dt.MultiTargetModel.for_labels(net(), 6, y, bins=bins, **options))


def trained(model: dt.MultiTargetModel, y: Tensor) -> dt.MultiTargetModel:
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(X, y).loss.backward()
        optimizer.step()
    return model.eval()


def mixed() -> dt.MultiTargetModel:
    """Targets with scores of all shapes: bins with residuals, one number, mean and variance, classes."""

    def made() -> dt.MultiTargetModel:
        density = dt.LabelDensity.count(labels()[:, 0], AGES)
        kinds: list[dict[str, Any]] = [{"residual": True}, {"head": "regression"}, {"head": "gaussian"}]
        parts = [dt.LongTailModel(nn.Identity(), 6, AGES, density=density, **kind) for kind in kinds]
        return dt.MultiTargetModel(net(), [*parts, dt.LongTailModel(nn.Identity(), 6, CLASSES)])

    return seeded(made)


def test_each_target_is_a_model_of_its_own_on_shared_features() -> None:
    model, y = several(), labels()
    out = model(X, y)
    features = model.backbone(X)
    losses = []
    for k, (target, own) in enumerate(zip(model.targets, model.of_targets(out), strict=True)):
        alone = target(features, y[:, k])
        losses.append(alone.loss)
        assert torch.equal(own.scores, alone.scores)
        assert torch.equal(own.prediction.double(), alone.prediction.double())
        assert torch.equal(own.distribution, alone.distribution)
    assert torch.allclose(out.loss, torch.stack(losses).mean(), rtol=1e-6, atol=0)
    assert torch.equal(model.criterion(model(X), y), out.loss)
    assert out.prediction.shape == (200, 3)
    assert torch.equal(out.features, features)


def test_targets_of_all_kinds_stand_beside_each_other_and_are_taken_apart() -> None:
    model = mixed()
    out = model(X)
    features = model.backbone(X)
    assert out.scores.shape == (200, 20 + 1 + 2 + 3)
    assert out.distribution.shape == (200, 20 + 3)
    assert out.residual.shape == (200, 20)
    for target, own in zip(model.targets, model.of_targets(out), strict=True):
        alone = target(features)
        for name in ("scores", "distribution", "residual", "features"):
            assert torch.equal(getattr(own, name), getattr(alone, name)), name
        assert own.prediction.dtype == (torch.int64 if target.bins.categorical else torch.float32)


def test_the_unit_of_a_target_does_not_weigh_it() -> None:
    """Times 1000 in labels and axis leaves the loss of one number the same."""
    y = labels()[:, :2]
    losses = []
    for unit in (1.0, 1000.0):
        scaled = y * torch.tensor([1.0, unit])
        axes = [AGES, dt.Bins.uniform(0, 1000 * unit, count=20)]
        losses.append(several(scaled, axes, head="regression")(X, scaled).loss)
    assert torch.allclose(*losses, rtol=1e-4)


def test_weights_count_for_all_targets_or_for_each() -> None:
    model, y = several(), labels()
    weight = torch.rand(200, generator=torch.Generator().manual_seed(2))
    alike = model(X, y, weight).loss
    assert torch.equal(model(X, y, weight[:, None].expand(-1, 3)).loss, alike)
    first = torch.stack([weight, 0 * weight, 0 * weight], 1)
    features = model.backbone(X)
    alone = model.targets[0](features, y[:, 0], weight).loss / 3
    assert torch.allclose(model(X, y, first).loss, alone, rtol=1e-6, atol=0)


def test_targets_of_each_step_are_no_steps_of_one_target() -> None:
    y = torch.stack([labels()[:, :2].unflatten(0, (50, 4))[..., k] for k in range(2)], -1)  # (N, T, K)
    model, steps = several(labels()[:, :2], [AGES, None]), X.unflatten(0, (50, 4))
    out, flat = model(steps, y), model(X, y.flatten(0, 1))
    assert out.prediction.shape == (50, 4, 2)
    assert torch.allclose(out.loss, flat.loss, rtol=1e-6, atol=0)
    assert torch.equal(out.prediction.flatten(0, 1), flat.prediction)
    assert model.interval(out)[0].shape == (50, 4, 2)


def test_missing_labels_of_one_target_cost_the_others_nothing() -> None:
    y = labels()
    holes = y.clone()
    holes[::3, 1] = torch.nan
    model = several(holes, missing="drop")
    loss = model(X, holes).loss
    there = torch.arange(200) % 3 != 0
    features = model.backbone(X)
    expected = [
        model.targets[0](features, y[:, 0]).loss,
        model.targets[1](features[there], y[there, 1]).loss,
        model.targets[2](features, y[:, 2]).loss,
    ]
    assert torch.allclose(loss, torch.stack(expected).mean(), rtol=1e-5, atol=0)
    assert model.targets[1].density.counts.sum() == there.sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(LabelError, match="must not be NaN"):
        several()(X, holes)


def test_calibration_is_that_of_each_target() -> None:
    y = labels()
    model = trained(several(), y)
    alone, scores = copy.deepcopy(model), model(X).scores
    choices = model.calibrate([(X, y)])
    assert [c.tau for c in copy.deepcopy(alone).calibrate(scores, y.numpy())] == [c.tau for c in choices]
    for k, choice in enumerate(choices):
        target = alone.targets[k]
        assert target.calibrate(target(model.backbone(X)).scores, y[:, k]).tau == choice.tau
        assert model.targets[k].settings["tau"] == choice.tau
    model.set_prior("uniform", 0.25)
    assert [target.settings["tau"] for target in model.targets] == [0.25] * 3


def test_by_default_each_axis_has_a_bound_of_its_own_and_classes_have_none() -> None:
    y = labels()[:, [0, 0, 2]]
    model = several(y, (AGES, AGES, CLASSES))
    free = copy.deepcopy(model)
    noise = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    parts = []
    for k, (target, spread) in enumerate(zip(model.targets, (6.0, 0.5, 1.0), strict=True)):
        off = (y[:, k] + spread * noise[:, k])[:, None] - torch.tensor(target.bins.centers)
        parts.append(torch.from_numpy(target.density.prior(floor=1.0)).log() - (off / spread).square() / 2)
    own, without = model.calibrate(torch.cat(parts, 1), y), free.calibrate(torch.cat(parts, 1), y, most_mae=None)
    assert [choice.bound for choice in own] == [1.1, None, None]
    assert own[0].after["mae"] <= 1.1 * own[0].before["mae"]
    assert without[0].after["mae"] > 1.1 * without[0].before["mae"]
    assert own[2].after["error"] > 1.1 * own[2].before["error"]
    assert list(map(str, own[1:])) == list(map(str, without[1:]))


def test_intervals_and_tables_have_one_column_per_target() -> None:
    y = labels()[:, :2]
    model = trained(several(y, None), y)
    model.calibrate_intervals(model(X).scores, y, 0.8)
    lower, upper = model.interval(model(X))
    assert lower.shape == upper.shape == (200, 2)
    held = ((lower <= y) & (y <= upper)).float().mean(0)
    assert (held >= 0.8).all()
    table = model.predict([X[:150], X[150:]])
    assert dict(table.sizes) == {"sample": 200, "target": 2}
    assert set(table) == {"prediction", "lower", "upper", "region"}
    assert np.array_equal(table.prediction.values, model(X).prediction.detach().numpy())
    assert np.array_equal(table.upper.values, upper.detach().numpy())
    assert set(mixed().predict(X)) == {"prediction", "region"}  # one number has no ends


def test_it_learns_both_targets() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 3)
    y = torch.stack([x[:, 0].exp(), 100 * x[:, 1]], 1)
    model = dt.MultiTargetModel.for_labels(nn.Sequential(nn.Linear(3, 32), nn.ReLU()), 32, y)
    optimizer = torch.optim.Adam(model.parameters(), 3e-2)
    for _ in range(80):
        optimizer.zero_grad()
        model(x, y).loss.backward()
        optimizer.step()
    error = (model(x).prediction - y).abs().mean(0)
    constant = (y - y.median(0).values).abs().mean(0)
    assert (error < 0.3 * constant).all()


def test_a_grid_gives_each_target_its_axis() -> None:
    y = labels()[:, [0, 2]]
    model = several(y, dt.Bins.grid(AGES, CLASSES))
    assert [target.bins for target in model.targets] == [AGES, CLASSES]


def test_a_joint_fds_calibrates_what_the_backbone_gives() -> None:
    grid = dt.Bins.grid(AGES, dt.Bins.uniform(0, 1000, count=20))
    y = labels()[:, :2]
    model, fds = several(y, grid), dt.FDS(grid, 6)
    fds.attach(model.neck, "output")
    with fds.labels(y):
        model(X, y).loss.backward()
    fds.end_epoch()
    with fds.labels(y):
        assert not torch.equal(model(X).scores, model.eval()(X).scores)


def test_a_saved_model_predicts_the_same_to_the_bit(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    for model in (several(), several(labels()[:, :2], None)):
        y = labels()[:, : len(model.targets)]
        trained(model, y).calibrate([(X, y)])
        model.save(tmp_path / "model.safetensors")
        loaded = dt.load(tmp_path / "model.safetensors", net())
        assert isinstance(loaded, dt.MultiTargetModel)
        assert torch.equal(loaded(X).prediction, model.eval()(X).prediction)
        assert str(loaded.settings) == str(model.settings)


def test_saving_refuses_a_head_of_ones_own(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    own = dt.MultiTargetModel(net(), [dt.LongTailModel(nn.Identity(), 6, AGES, head=nn.Linear(6, 20))])
    with pytest.raises(ArgumentError, match=r"Save each of model.targets by itself"):
        own.save(tmp_path / "model.safetensors")
    several().save(tmp_path / "model.safetensors")
    with pytest.raises(ArgumentError, match="head must be left out"):
        dt.load(tmp_path / "model.safetensors", net(), head=nn.Linear(6, 20))


def test_a_state_is_taken_up_whole_or_not_at_all() -> None:
    model, other = several(), several(labels() * torch.tensor([1.0, 2.0, 1.0]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(Exception, match="same bins"):
        model.load_state_dict(other.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    fresh = several()
    nn.init.zeros_(fresh.backbone[0].weight)
    fresh.load_state_dict(before)
    assert torch.equal(fresh(X).scores, model(X).scores)


def test_refusals_say_what_to_do() -> None:
    y, one = labels(), dt.LongTailModel(nn.Identity(), 6, AGES)
    with pytest.raises(ShapeError, match=r"labels must be \(N, K\), one column per target.*Use LongTailModel"):
        several(y[:, 0], None)
    with pytest.raises(ArgumentError, match="bins must hold one axis per column of labels, got 2 for 3"):
        several(y, [AGES, None])
    with pytest.raises(ArgumentError, match="targets must hold at least one"):
        dt.MultiTargetModel(net(), [])
    with pytest.raises(ArgumentTypeError, match=r"targets\[1\] must be a LongTailModel"):
        dt.MultiTargetModel(net(), [one, net()])  # type: ignore[list-item]
    with pytest.raises(ArgumentError, match=r"must not have their own FDS.*Bins.grid"):
        dt.MultiTargetModel(net(), [dt.LongTailModel(nn.Identity(), 6, AGES, fds=dt.FDS(AGES, 6))])
    with pytest.raises(ShapeError, match=r"labels must be \(\.\.\., 3\), one per target"):
        several()(X, y[:, :2])
    with pytest.raises(ArgumentError, match="weight needs labels"):
        several()(X, weight=torch.ones(200))
    with pytest.raises(ShapeError, match="scores must be"):
        several().calibrate(torch.zeros(4, 3), y[:4])
    with pytest.raises(ShapeError, match=r"labels must be \(200,\), one per sample, where MultiTargetModel takes"):
        dt.LongTailModel(net(), 6, AGES)(X, y)
    with pytest.raises(ArgumentTypeError, match="For several targets use MultiTargetModel"):
        dt.LongTailModel(net(), 6, dt.Bins.grid(AGES, AGES))  # type: ignore[arg-type]


def test_a_prior_is_refused_where_a_target_has_none() -> None:
    with pytest.raises(RuntimeError, match="have a prior"):
        mixed().set_prior("uniform", 1.0)


def test_a_weight_is_read_by_its_shape() -> None:
    y = labels()[:, :2]
    model = several(y, [AGES, None])
    x, y = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(3)), y[:4]
    of_all = y[:, None].expand(4, 5, 2)
    weight = torch.rand(4, 5, 2, generator=torch.Generator().manual_seed(4))

    def expected(first: Tensor, second: Tensor) -> Tensor:
        features = model.backbone(x)
        pairs = enumerate((first, second))
        return torch.stack([model.targets[k](features, y[:, k], own).loss for k, own in pairs]).mean()

    step, column = weight[..., 0], weight[:, 0]
    for own in (y, of_all):
        assert torch.equal(model(x, own, step).loss, expected(step, step))
        assert torch.equal(model(x, own, column).loss, expected(column[:, 0], column[:, 1]))
        assert torch.equal(model(x, own, weight).loss, expected(weight[..., 0], weight[..., 1]))
    for wrong in (weight[..., :1], torch.rand(4, 3), torch.rand(4, 1), torch.rand(5)):
        with pytest.raises(ShapeError, match="the shape of weight must be one of"):
            model(x, y, wrong)
    with pytest.raises(ShapeError, match="the shape of weight must be one of"):
        model(x[:, 0], y, torch.rand(4, 3))
    with pytest.raises(ShapeError, match="weight must be clearly for steps or for targets"):
        model(x[:, :2], of_all[:, :2], column)


def test_a_table_states_no_level_of_one_target_for_all() -> None:
    y = labels()[:, :2]
    model = several(y, [AGES, None])
    for levels in ((0.8, 0.8), (0.8, 0.9)):
        for k, level in enumerate(levels):
            model.targets[k].calibrate_intervals(model.of_targets(model(X))[k].scores, y[:, k], level)
        table = model.predict(X)
        assert table.lower.attrs.get("interval_level") == (0.8 if levels == (0.8, 0.8) else None)


def test_all_targets_change_or_none() -> None:
    def state(model: dt.MultiTargetModel) -> str:
        return str([model.settings, *(target.state_dict() for target in model.targets)])

    y = labels()[:, [0, 0, 0, 2]]
    model = trained(mixed(), y)
    before = state(model)
    with pytest.raises(RuntimeError, match="have a prior"):
        model.set_prior("uniform", 1.0)
    assert state(model) == before
    with pytest.raises(RuntimeError, match="have a prior"):
        model.calibrate(model(X).scores, y)
    assert state(model) == before
    with pytest.raises(ValueError, match="density"):
        model.calibrate_intervals(model(X).scores, y)  # the last target has none
    assert state(model) == before


def test_calibration_takes_sequences_of_any_length_and_labels_per_sequence() -> None:
    y = labels()[:, :2]
    model, x = trained(several(y, [AGES, None]), y), X[:40, None].expand(40, 5, 3)
    alone, uneven = copy.deepcopy(model), copy.deepcopy(model)
    plainly = {"most_mae": None, "bias": False}
    one = [choice.tau for choice in model.calibrate([(x, y[:40])], **plainly)]
    assert one == [choice.tau for choice in alone.calibrate(alone(x).scores, y[:40], **plainly)]
    of_steps = y[:40, None].expand(40, 5, 2)
    batches = [(x[:20], of_steps[:20]), (x[20:, :3], of_steps[20:, :3]), (x[20:, 3:], y[20:40])]
    assert one == [choice.tau for choice in uneven.calibrate(batches, **plainly)]
    with pytest.raises(ShapeError, match=r"labels must be \(\.\.\., 2\), one per target"):
        model.calibrate([(x, y[:40, 0])])


def test_an_empty_batch_has_outputs_of_the_same_form() -> None:
    assert mixed()(torch.randn(0, 3)).scores.shape == (0, 20 + 1 + 2 + 3)


# ---- two processes ----


def stepped(model: dt.MultiTargetModel, call: Any, share: slice) -> dict[str, Tensor]:
    """Losses, statistics, taus and predictions of three steps on a share of the rows, each an epoch by itself."""
    y = labels()[:, [0, 2]]
    fds = dt.FDS(dt.Bins.grid(*(target.bins for target in model.targets)), 6)
    fds.attach(model.neck, "output")
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.3), []
    for _ in range(3):
        optimizer.zero_grad()
        with fds.labels(y[share]):
            loss = call(X[share], y[share], 1 + y[share] / 20).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        fds.end_epoch()
    taus = [choice.tau for choice in model.calibrate([(X, y)])]
    taus += [choice.tau for choice in model.calibrate([(X, y)], most_mae=None, bias=False)]
    with torch.no_grad():
        prediction = model.eval()(X).prediction
    return {**fds.statistics(), "losses": torch.stack(losses), "taus": torch.tensor(taus), "prediction": prediction}


def rank_main(rank: int) -> dict[str, Tensor]:
    model = several(labels()[:, [0, 2]], (AGES, CLASSES))
    wrapped = nn.parallel.DistributedDataParallel(model)
    return stepped(model, wrapped, slice(100 * rank, 100 * rank + 100))


def test_two_ranks_equal_one_process(two_ranks: Callable[..., list[Any]]) -> None:
    model = several(labels()[:, [0, 2]], (AGES, CLASSES))
    expected = stepped(model, model, slice(None))
    states = two_ranks(rank_main)
    losses = torch.stack([state.pop("losses") for state in states]).mean(0)
    torch.testing.assert_close(losses, expected.pop("losses"), rtol=1e-5, atol=1e-6)
    for state in states:
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-4, equal_nan=True, msg=name)
