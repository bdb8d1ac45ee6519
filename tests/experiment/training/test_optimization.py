from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dir_toolkit.errors import SettingsError
from dir_toolkit.experiment.training.checkpoint import save_checkpoint
from dir_toolkit.experiment.training.optimization import Optimization, learning_rate, make_optimizer


def rates(steps: int, **settings: object) -> list[float]:
    optimization = Optimization(lr=1.0, **settings)  # type: ignore[arg-type]
    return [learning_rate(optimization, step, steps) for step in range(steps)]


def test_the_cosine_schedule_is_that_worked_out_by_hand() -> None:
    half = 2**-0.5
    assert rates(4, warmup=0.0) == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2], abs=1e-12)


def test_warmup_rises_to_the_highest_rate() -> None:
    assert rates(8, warmup=0.5, schedule="constant") == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]


def test_steps_divide_by_ten_at_each_milestone() -> None:
    expected = [1, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01]
    assert rates(10, warmup=0.0, schedule="steps", milestones=(0.5, 0.8)) == pytest.approx(expected)


@pytest.mark.parametrize("warmup", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("schedule", ["cosine", "steps", "constant"])
def test_every_rate_is_positive(schedule: str, steps: int, warmup: float) -> None:
    assert all(0 < rate <= 1 for rate in rates(steps, warmup=warmup, schedule=schedule))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 2.5}, "batch_size must be a whole number"),
        ({"lr": float("nan")}, "lr must be > 0"),
        ({"lr": "fast"}, "lr must be a number"),
        ({"optimizer": "adam"}, "optimizer must be one of 'adamw', 'sgd'"),
        ({"momentum": 1}, "momentum must be >= 0 and < 1"),
        ({"weight_decay": -1}, "weight_decay must be >= 0"),
        ({"schedule": "linear"}, "schedule must be one of"),
        ({"warmup": 1.0}, "warmup must be >= 0 and < 1"),
        ({"milestones": (0.8, 0.6)}, "milestones must rise and lie between 0 and 1"),
        ({"milestones": (0.5, 1.0)}, "milestones must rise and lie between 0 and 1"),
        ({"milestones": 0.5}, "milestones must be a tuple"),
        ({"clip_norm": 0}, "clip_norm must be > 0"),
    ],
)
def test_each_fault_is_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Optimization(**settings)  # type: ignore[arg-type]


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(SettingsError, match=r"3 settings are wrong:\n  epochs .*\n  lr .*\n  clip_norm"):
        Optimization(epochs=0, lr=0, clip_norm=-1)


def test_weight_decay_spares_biases_norms_and_frozen_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    model[2].requires_grad_(False)
    decayed, spared = make_optimizer(model, Optimization(weight_decay=0.1)).param_groups
    assert decayed["weight_decay"] == 0.1
    assert [p.shape for p in decayed["params"]] == [(2, 3)]
    assert spared["weight_decay"] == 0
    assert len(spared["params"]) == 3


def test_a_fused_optimizer_takes_the_same_steps() -> None:
    weights = []
    for fused in (None, True):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = make_optimizer(model, Optimization(lr=0.1, weight_decay=0.1), fused=fused)
        assert optimizer.defaults["fused"] is fused
        for _ in range(5):
            model(torch.ones(4, 3)).square().mean().backward()
            optimizer.step()
        weights.append(model.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_momentum_reaches_both_optimizers() -> None:
    model = nn.Linear(1, 1)
    adamw, sgd = (make_optimizer(model, Optimization(optimizer=name, momentum=0.8)) for name in ("adamw", "sgd"))
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.param_groups[0]["betas"][0] == 0.8
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.param_groups[0]["momentum"] == 0.8
    make_optimizer(model, Optimization(optimizer="sgd", momentum=0))


def test_settings_become_plain_values_that_a_checkpoint_can_hold(tmp_path: Path) -> None:
    given = Optimization(epochs=np.int64(3), lr=np.float32(0.5), milestones=[0.5, 0.75], clip_norm=np.float64(2))  # type: ignore[arg-type]
    assert given == Optimization(epochs=3, lr=0.5, milestones=(0.5, 0.75), clip_norm=2.0)
    save_checkpoint(tmp_path / "settings.pt", asdict(given))
