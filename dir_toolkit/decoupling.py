"""Decoupling: learn features from the labels as they come, then freeze them and balance the head alone.

================== ==========================================================================================
cRT                ``stage_two(model, "crt")``, then train with ``BinSampler(labels, bins, q=0)``
LWS                ``stage_two(model, "lws")``, then the same: one scale per class is learnt, all else is frozen
RRT                ``stage_two(model, "rrt")``, then train a regressor with ``LDS(..., scheme="inverse")`` weights
NCM                no training: :class:`dir_toolkit.heads.nearest_mean.NearestMeanHead` on the frozen features
tau-normalization  no training: :func:`choose_normalization` on validation features
================== ==========================================================================================

Any training loop will do for the second stage if its optimizer takes only parameters that require gradients. The
second stage has its own learning rate, epochs and schedule. A head that was trained again on evenly drawn or inversely
weighted samples has an even prior: an adjustment by the prior of the labels as they came would correct it twice.

Source:
    Kang et al. 2020, sections 3 and 4 (arXiv:1910.09217); Yang et al. 2021, appendix, for RRT (arXiv:2102.09554).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ._checks import instance, integers, is_tensor, one_of, problem, require, shaped, whole
from .heads.normalized import ScaledHead, tau_normalized
from .metrics.classification import balanced_error
from .priors import TauChoice, search_tau

__all__ = ["Frozen", "choose_normalization", "freeze", "reinitialize", "stage_two"]

Method = Literal["crt", "lws", "rrt"]


class Frozen:
    """What :func:`freeze` returns: undoes it by :meth:`remove`, or at the end of a ``with``.

    A part that was frozen several times is free when all its handles have been removed, in whatever order.
    """

    def __init__(self, module: nn.Module) -> None:
        # train() of a whole model reaches the frozen part as well; a hook sets it back before every pass, also of a
        # part that is called by itself.
        holds = [(part, _Hold(part)) for part in module.modules()]
        self._held = [(part, hold, part.register_forward_pre_hook(hold)) for part, hold in holds]
        for parameter in module.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        _to_eval(module)

    def remove(self) -> None:
        """Give parameters their gradients back, and modules the modes they had, where no other handle holds them."""
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
    """The hook that keeps a part in eval mode; it knows what the part was before, and goes along with its copies."""

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
    """One of the hooks that hold a part, if it is frozen."""
    return next((hook for hook in part._forward_pre_hooks.values() if isinstance(hook, _Hold)), None)


def _to_eval(module: nn.Module) -> None:
    for part in module.modules():
        part.training = False


def freeze(module: nn.Module) -> Frozen:
    """Freeze a module: its parameters do not move, BatchNorm keeps its statistics, and dropout drops nothing.

    The module stays frozen whatever calls ``train()`` on it or on a model around it. It is the same to the bit after
    any training that goes through ``requires_grad``. Gradients from before are dropped. Make the optimizer after
    freezing: an optimizer with momentum or weight decay that was made before moves these parameters even where their
    gradients are zero.

    A copy of a frozen module is frozen, too, and so is one that was pickled. A module that is frozen several times
    stays frozen until the last handle is removed. Freeze before a compiled model is first called, as with every hook.

    Returns:
        a handle; ``handle.remove()`` undoes the freezing.
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
    """Start every layer of a module afresh, by its own ``reset_parameters``; global random numbers are left alone.

    Raises:
        TypeError: a part holds parameters of its own and does not know how to reset them; nothing has changed then.
        ValueError: the module has no parameters, or the seed is not in 0 ... 2**63 - 1.
    """
    instance(nn.Module, module=module)
    seed = whole("seed", seed, low=0, high=2**63 - 1)
    some = next(module.parameters(), None) is not None
    require(some, "module must have parameters", got=type(module).__name__)
    # A BatchNorm without parameters has statistics to forget.
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
    """Make a trained model ready for its second stage: ``model.backbone`` frozen, ``model.head`` to be trained.

    Args:
        model: has ``backbone`` and ``head``, as :class:`dir_toolkit.LongTailModel` has; for others :func:`freeze` and
            :func:`reinitialize` serve.
        method: ``"crt"`` and ``"rrt"`` start the head afresh, all of it to learn; ``"lws"`` wraps it, which must be
            linear, in a :class:`dir_toolkit.heads.normalized.ScaledHead`.
        seed: of the head's new start.
    Returns:
        the handle of the frozen backbone.
    Raises:
        TypeError: the model lacks a part, or its head is of the wrong kind, as a ScaledHead is for every method.
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
            rule, fix = f'model.head must learn anew for "{method}"', "Set model.head = model.head.linear first."
            raise problem(rule, got="a ScaledHead, which learns scales alone", fix=fix, error=TypeError)
        reinitialize(head, seed=seed)
        head.requires_grad_(True)
    return freeze(backbone)


def choose_normalization(
    head: nn.Linear, features: Tensor, labels: Tensor, *, taus: Sequence[float] | np.ndarray | None = None
) -> TauChoice:
    """The tau for :func:`dir_toolkit.heads.normalized.tau_normalized` that errs least on validation features.

    Args:
        features, labels: of validation data that training has not seen.
        taus: candidates, >= 0, rising; None means 0, 0.05, ... 2.
    Shape:
        features: (N, D). labels: (N,) class indices.
    Returns:
        the choice by balanced error, with the curve; among equals the middle of the longest run.
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

    return search_tau(errors_at, taus, "balanced_error", samples=len(labels), most=2.0)
