"""Decoupled training: learn features on the imbalanced data, then freeze them and rebalance the head.

================== ==========================================================================================
cRT                ``stage_two(model, "crt")``, then train with ``BinSampler(labels, bins, q=0)``
LWS                ``stage_two(model, "lws")``, then the same: one scale per class is learnt, the layer is frozen
RRT                ``stage_two(model, "rrt")``, then train a regressor with ``LDS(..., scheme="inverse")`` weights
NCM                no training: :class:`dir_toolkit.heads.nearest_mean.NearestMeanHead` on the frozen features
tau-normalization  no training: :func:`choose_normalization` on validation features
================== ==========================================================================================

Use any training loop for the second stage, with an optimizer over the parameters that require gradients, and with its
own learning rate, epochs and schedule. A head trained on class-balanced or inversely weighted samples has a uniform
prior. Do not adjust it by the prior of the training labels, which would correct twice.

Source:
    Kang et al. 2020, sections 3 and 4 (arXiv:1910.09217); Yang et al. 2021, appendix, for RRT (arXiv:2102.09554).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ._checks import instance, integers, is_tensor, one_of, problem, require, shaped, warn, whole
from ._numerics import has_values
from .heads.normalized import ScaledHead, tau_normalized
from .metrics.classification import balanced_error
from .priors import TauChoice, search_tau, warn_of_tau

__all__ = ["Frozen", "choose_normalization", "freeze", "reinitialize", "stage_two"]

Method = Literal["crt", "lws", "rrt"]


class Frozen:
    """The handle of :func:`freeze`. :meth:`remove`, or leaving a ``with`` block, undoes the freezing.

    A module that was frozen several times is free when all its handles were removed.
    """

    def __init__(self, module: nn.Module) -> None:
        # train() of the whole model also reaches the frozen part. A hook sets it back to eval mode before every call.
        holds = [(part, _Hold(part)) for part in module.modules()]
        self._held = [(part, hold, part.register_forward_pre_hook(hold)) for part, hold in holds]
        for parameter in module.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        _to_eval(module)

    def remove(self) -> None:
        """Restore gradients of parameters and modes of modules, unless another handle still freezes them."""
        for part, hold, hook in self._held:
            hook.remove()
            if _held(part) is None:
                hold.release(part)
        self._held = []

    def __enter__(self) -> Frozen:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


class _Hold:
    """The hook that keeps a module in eval mode. It stores the mode before, and is copied with the module."""

    def __init__(self, part: nn.Module) -> None:
        earlier = _held(part)
        self.training: bool = earlier.training if earlier else part.training
        required = [name for name, p in part.named_parameters(recurse=False) if p.requires_grad]
        self.required: list[str] = earlier.required if earlier else required

    def __call__(self, part: nn.Module, inputs: Any) -> None:
        _to_eval(part)

    def release(self, part: nn.Module) -> None:
        part.training = self.training
        for name, parameter in part.named_parameters(recurse=False):
            if name in self.required:
                parameter.requires_grad_(True)


def _held(part: nn.Module) -> _Hold | None:
    """A hook that freezes this module, or None."""
    return next((hook for hook in part._forward_pre_hooks.values() if isinstance(hook, _Hold)), None)


def _to_eval(module: nn.Module) -> None:
    for part in module.modules():
        part.training = False


def freeze(module: nn.Module) -> Frozen:
    """Freeze a module: parameters need no gradient, BatchNorm keeps its statistics, and dropout is off.

    The module stays frozen after calls of ``train()`` on it or on a model around it: each call of the module, or of one
    of its submodules, first returns to eval mode. Its gradients are dropped. Create the optimizer after freezing: an
    earlier optimizer with momentum or weight decay may still change these parameters.

    Copies of a frozen module are frozen, including pickled ones. A module that is frozen several times stays frozen
    until the last handle is removed. Freeze before a compiled model is first called.

    Returns:
        a handle. ``handle.remove()`` undoes the freezing.
    Raises:
        TypeError: it is not a module.

    >>> encoder = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    >>> handle = freeze(encoder)
    >>> output = encoder.train()(torch.randn(4, 2))
    >>> encoder[1].num_batches_tracked.item(), output.requires_grad
    (0, False)
    """
    instance(nn.Module, module=module)
    return Frozen(module)


def reinitialize(module: nn.Module, *, seed: int = 0) -> None:
    """Reinitialize every layer of a module by its own ``reset_parameters``, without changing the global random state.

    Raises:
        TypeError: a layer with parameters has no ``reset_parameters``; nothing changes then. ValueError: the module has
            no parameters, or the seed is not in 0 ... 2**63 - 1.
    """
    instance(nn.Module, module=module)
    seed = whole("seed", seed, low=0, high=2**63 - 1)
    some = next(module.parameters(), None) is not None
    require(some, "module must have parameters", got=type(module).__name__)
    # BatchNorm without parameters has statistics to reset.
    known = {part for part in module.modules() if callable(getattr(part, "reset_parameters", None))}
    layers = [p for p in module.modules() if p in known or next(p.parameters(recurse=False), None) is not None]
    for layer in layers:
        rule, fix = "every layer with parameters must have reset_parameters()", "Give it one, or a new layer."
        require(layer in known, rule, got=type(layer), fix=fix)
    devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach every accelerator
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        for layer in layers:
            layer.reset_parameters()  # type: ignore[operator]


def stage_two(model: nn.Module, method: Method, *, seed: int = 0) -> Frozen:
    """Prepare a trained model for the second stage: freeze ``model.backbone`` and make ``model.head`` trainable.

    Args:
        model: a model with ``backbone`` and ``head``, such as :class:`dir_toolkit.LongTailModel`. For other models use
            :func:`freeze` and :func:`reinitialize`.
        method: ``"crt"`` and ``"rrt"`` reinitialize the head. ``"lws"`` wraps a linear head in a
            :class:`dir_toolkit.heads.normalized.ScaledHead`; to load the saved model, pass
            ``head=ScaledHead(LinearHead(D, C))`` to :func:`dir_toolkit.load`. What is learnt in a readout or a loss,
            such as residuals or the noise of Balanced MSE, stays as it is, and trainable.
        seed: the seed for reinitializing the head.
    Returns:
        the handle of the frozen backbone. A warning is issued if the model adjusts its prior.
    Raises:
        TypeError: the model lacks a part, or its head has the wrong type. A ScaledHead is wrong for every method.
        ValueError: the method is unknown, or the seed is not in 0 ... 2**63 - 1.
    """
    instance(nn.Module, model=model)
    one_of("method", method, ("crt", "lws", "rrt"))
    backbone, head = getattr(model, "backbone", None), getattr(model, "head", None)
    if not isinstance(backbone, nn.Module) or not isinstance(head, nn.Module):
        fix = "Use freeze(encoder) and reinitialize(head)."
        raise problem("model must have modules named backbone and head", got=type(model), fix=fix)
    if method == "lws":
        if not isinstance(head, nn.Linear):
            raise problem('model.head must be an nn.Linear for "lws"', got=type(head))
        model.head = ScaledHead(head)
    else:
        if isinstance(head, ScaledHead):
            rule, fix = f'model.head must be trainable for "{method}"', "Set model.head = model.head.linear first."
            raise problem(rule, got="a ScaledHead, which learns scales alone", fix=fix, error=TypeError)
        reinitialize(head, seed=seed)
        head.requires_grad_(True)
    _warn_of_adjustment(getattr(model, "readout", None))
    return freeze(backbone)


def _warn_of_adjustment(readout: Any) -> None:
    """Warn if a model adjusts its scores by a prior, which the second stage does not change."""
    in_loss = getattr(readout, "adjust", None) == "in_loss"
    offset = readout.loss_offset if in_loss else getattr(getattr(readout, "adjuster", None), "offset", None)
    if not isinstance(offset, Tensor) or not has_values(offset) or offset.abs().max() < 1e-4:
        return
    fix = "Call model.calibrate after this stage, or model.set_prior(None)."
    warn(
        f"the model adjusts its prior {'in the loss' if in_loss else 'after training'}, and goes on to do so. With a "
        "sampler or weights that even out labels, rare ones are then corrected twice. "
        + ("Train a model without it." if in_loss else fix)
    )


def choose_normalization(
    head: nn.Linear, features: Tensor, labels: Tensor, *, taus: Sequence[float] | np.ndarray | None = None
) -> TauChoice:
    """Choose the tau for :func:`dir_toolkit.heads.normalized.tau_normalized` with the smallest validation error.

    Args:
        features, labels: validation data that were not used for training.
        taus: candidates, >= 0, rising; None means 0, 0.05, ... 2.
    Shape:
        features: (N, D). labels: (N,) class indices.
    Returns:
        the choice by balanced error, with its curve. Of several best taus it is the middle of their longest run.
    Raises:
        TypeError: the head is not linear, or labels are not integers. ShapeError: features and labels do not fit.
        ValueError: taus are empty, not rising or negative.
    Source:
        Kang et al. 2020, section 4.1 (arXiv:1910.09217).
    """
    instance(nn.Linear, head=head)
    is_tensor(features=features)
    integers(labels=labels)
    shaped(("N", head.in_features), features=features)
    shaped(features.shape[:1], "one per row of features", labels=labels)

    @torch.no_grad()
    def errors_at(tau: float) -> dict[str, float]:
        return {"balanced_error": balanced_error(tau_normalized(head, tau)(features), labels, head.out_features)}

    return warn_of_tau(search_tau(errors_at, taus, "balanced_error", samples=len(labels), most=2.0))
