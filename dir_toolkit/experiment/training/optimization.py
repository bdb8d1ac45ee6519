"""The settings of an optimization, the learning rate of each step, and the optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..._checks import number, one_of, problem, require, whole
from ...errors import SettingsError

__all__ = ["Optimization", "learning_rate", "make_optimizer"]


@dataclass(frozen=True)
class Optimization:
    """The settings of an optimization.

    Raises:
        SettingsError: one or several settings are wrong. All of them are named.

    >>> Optimization(lr=0, epochs=-1)
    Traceback (most recent call last):
    dir_toolkit.errors.SettingsError: Optimization: 2 settings are wrong:
      epochs must be at least 1, got -1.
      lr must be > 0, got 0.
    """

    epochs: int = 12
    """Passes over the training set."""
    batch_size: int = 128
    """Images per step, over all ranks together."""
    lr: float = 2e-3
    """Highest learning rate of the schedule."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Either AdamW, or SGD with Nesterov momentum."""
    momentum: float = 0.9
    """The momentum of SGD, or the first beta of AdamW, in [0, 1)."""
    weight_decay: float = 0.05
    """The weight decay of weight matrices and convolutions. Biases, norms and scales have none."""
    schedule: Literal["cosine", "steps", "constant"] = "cosine"
    """A cosine to zero, a division by ten at each milestone, or a constant."""
    warmup: float = 0.05
    """The share of all steps over which the learning rate rises linearly, in [0, 1)."""
    milestones: tuple[float, ...] = (0.6, 0.8)
    """The shares of all steps after which the schedule "steps" divides by ten. They rise, and lie in (0, 1)."""
    clip_norm: float | None = None
    """The longest gradient, by its Euclidean norm over all parameters; None sets no limit."""
    sharpness: float | None = None
    """How far uphill, in units of all parameters together, the gradient of each step is taken, with two passes per step
    (BSAM where the loss has weights, else SAM); None takes it where the parameters lie."""

    def __post_init__(self) -> None:
        faults = []
        # Checks return plain Python values, since a checkpoint cannot hold NumPy numbers.
        checks: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
            (whole, ("epochs", self.epochs), {"low": 1}),
            (whole, ("batch_size", self.batch_size), {"low": 1}),
            (number, ("lr", self.lr), {"low": 0, "open_low": True}),
            (one_of, ("optimizer", self.optimizer, ("adamw", "sgd")), {}),
            (number, ("momentum", self.momentum), {"low": 0, "high": 1, "open_high": True}),
            (number, ("weight_decay", self.weight_decay), {"low": 0}),
            (one_of, ("schedule", self.schedule, ("cosine", "steps", "constant")), {}),
            (number, ("warmup", self.warmup), {"low": 0, "high": 1, "open_high": True}),
            (_rising_shares, ("milestones", self.milestones), {}),
        ]
        for name in ("clip_norm", "sharpness"):
            if getattr(self, name) is not None:
                checks.append((number, (name, getattr(self, name)), {"low": 0, "open_low": True}))
        for check, arguments, options in checks:
            try:
                plain = check(*arguments, **options)
                if plain is not None:
                    object.__setattr__(self, arguments[0], plain)
            except (ValueError, TypeError) as error:
                faults.append(str(error).partition(": ")[2])  # without the name of the caller
        if faults:
            count = "1 setting is" if len(faults) == 1 else f"{len(faults)} settings are"
            raise SettingsError("\n  ".join([f"Optimization: {count} wrong:", *faults]))


def learning_rate(optimization: Optimization, step: int, steps: int) -> float:
    """The learning rate of a step, in closed form, so that it is not part of a checkpoint.

    Args:
        step: counted from 0 over all epochs.
        steps: the number of steps of the whole run.

    >>> [learning_rate(Optimization(lr=1.0, warmup=0.5), step, 4) for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    warm = round(optimization.warmup * steps)
    if step < warm:
        return optimization.lr * (step + 1) / warm
    if optimization.schedule == "cosine":
        return optimization.lr * (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2
    if optimization.schedule == "steps":
        passed = sum(step >= milestone * steps for milestone in optimization.milestones)
        return optimization.lr / 10**passed
    return optimization.lr


def make_optimizer(model: nn.Module, optimization: Optimization, *, fused: bool | None = None) -> torch.optim.Optimizer:
    """The optimizer of a model's trainable parameters. Parameters with two or more axes get weight decay.

    Args:
        fused: whether AdamW updates all parameters in one kernel, which is faster where they are small and rounds
            otherwise; None leaves it to torch.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optimization.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if optimization.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=optimization.lr, betas=(optimization.momentum, 0.999), fused=fused)
    nesterov = optimization.momentum > 0
    return torch.optim.SGD(groups, lr=optimization.lr, momentum=optimization.momentum, nesterov=nesterov)


def _rising_shares(name: str, value: object) -> tuple[float, ...]:
    if not isinstance(value, (tuple, list)) or not all(isinstance(share, (int, float)) for share in value):
        raise problem(f"{name} must be a tuple of numbers", got=repr(value), error=TypeError)
    rises = all(low < high for low, high in zip((0, *value), (*value, 1), strict=True))
    require(rises, f"{name} must rise and lie between 0 and 1", got=repr(value))
    return tuple(float(share) for share in value)
