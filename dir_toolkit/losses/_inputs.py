"""Checks of the arguments of losses. The package docstring holds the rules."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import (
    PLAIN,
    alike,
    class_indices,
    finite,
    floats,
    is_plain,
    is_tensor,
    labels_array,
    no_bad,
    not_empty,
    not_negative,
    one_of,
    positive_classes,
    prior_shares,
    problem,
    real,
    same_device,
    same_shape,
    shaped,
    warn,
)
from .._numerics import default_dtype, readable, wide_dtype
from ..labels.bins import Bins, Outside

_REDUCTIONS = ("none", "mean", "sum")
_warned_of_class_weights = False


def kinds(reduction: str, weight: Tensor | None, **tensors: Tensor) -> None:
    """Check that the reduction is known, that all are dense real tensors on one device, and that the first is
    floats."""
    given = tensors if weight is None else {**tensors, "weight": weight}
    one_of("reduction", reduction, _REDUCTIONS)
    (name, first), *others = given.items()
    floats(**{name: first})
    real(**dict(others))
    same_device(**given)


def pairs(pred: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> tuple[Tensor, Tensor]:
    """Predictions and labels of one shape, in at least float32, both zero where the weight is zero."""
    given = (pred, target) if weight is None else (pred, target, weight)
    if not (alike(*given) and _is_known(reduction)):
        kinds(reduction, weight, pred=pred, target=target)
        same_shape(pred=pred, target=target, **({} if weight is None else {"weight": weight}))
        not_empty(pred=pred)
        wide = wide_dtype(pred, target)
        pred, target = pred.to(wide), target.to(wide)
    return pred, target


def _is_known(reduction: object) -> bool:
    return isinstance(reduction, str) and reduction in _REDUCTIONS


def absent(weight: Tensor | None) -> Tensor | None:
    """The mask of samples with weight zero, or None if there are none. Checks that weights are finite and >= 0."""
    if weight is None:
        return None
    weight = weight if weight.dtype in PLAIN else weight.float()
    if readable(weight):
        least, most = weight.aminmax()
        low = least.item()
        if not (low >= 0 and most.item() < math.inf):
            finite(weight=weight)
            not_negative(weight=weight)
        if low > 0:
            return None
    return weight == 0


def present(values: Tensor, gone: Tensor | None) -> Tensor:
    """Values (N, ...) with zeros for the samples that are ``gone``, which then add nothing to the gradient either.

    It is applied before the loss, since zero times NaN or infinity is NaN.
    """
    if gone is None:
        return values
    return values.masked_fill(gone if values.ndim == gone.ndim else gone[:, None], 0.0)


def finite_target(target: Tensor, gone: Tensor | None, name: str = "target") -> None:
    """Check that no label is NaN or infinite, except those of samples that are gone."""
    # A finite sum has finite terms. The converse does not hold.
    if target.is_floating_point() and readable(target) and not math.isfinite(target.sum().item()):
        there = present(target.detach(), gone)
        fix = 'Remove or repair these samples first, or pass missing="drop", which leaves out what is NaN.'
        no_bad(f"{name} must be finite", there, ~there.isfinite(), fix=fix)


def one_per_sample(samples: int, **tensors: Tensor | None) -> None:
    """Check that each tensor is (N,)."""
    shaped((samples,), "one value per sample", **{name: x for name, x in tensors.items() if x is not None})


def are_shares(logits: Tensor, target: Tensor, reduction: str) -> bool:
    """Whether logits and shares (..., B) fit each other, so that the checks with detailed messages can be skipped."""
    return alike(logits, target) and logits.ndim > 0 and _is_known(reduction)


def matrix(name: str, rows: Tensor, shape: str, labels_name: str, labels: Tensor) -> None:
    """Check that ``rows`` have two dimensions and are not empty. The advice shows how to flatten others."""
    if rows.ndim != 2:
        fix, last = "", rows.ndim - 2
        if rows.ndim > 2:
            fix = f"Use {name}.flatten(1)."
            if labels.shape == rows.shape[:-1]:
                fix = f"Use {name}.flatten(0, {last}) and {labels_name}.flatten()."
            elif labels.shape == (rows.shape[0], *rows.shape[2:]):
                fix = f"Use {name}.movedim(1, -1).flatten(0, {last}) and {labels_name}.flatten()."
        raise problem(f"{name} must be {shape}", got=rows.shape, fix=fix)
    not_empty(**{name: rows})


def of_classes(
    rows: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    *,
    name: str = "logits",
    num_classes: int | None = None,
) -> Tensor:
    """``rows`` (N, C) in at least float32, with zeros where the weight is zero. Also checks classes and weights (N,).
    With ``num_classes`` the rows are features (N, D).
    """
    if weight is not None or not (_are_usual(rows, target) and _is_known(reduction)):
        _check_of_classes(rows, target, weight, reduction, name, num_classes)
    classes = rows.shape[1] if num_classes is None else num_classes
    class_indices("target", target, classes)
    gone = absent(weight)
    if weight is not None and len(rows) == classes:
        _warn_of_class_weights(target, weight)
    return present(rows.to(wide_dtype(rows)), gone)


def _are_usual(rows: Tensor, target: Tensor) -> bool:
    """Whether rows (N, C) and classes (N,) fit each other, so that the checks with detailed messages can be skipped."""
    if not (alike(rows) and is_plain(target)):
        return False
    return rows.ndim == 2 and target.shape == rows.shape[:1] and target.device == rows.device


def _check_of_classes(
    rows: Tensor, target: Tensor, weight: Tensor | None, reduction: str, name: str, num_classes: int | None
) -> None:
    kinds(reduction, weight, **{name: rows})
    is_tensor(target=target)
    shape = "(N, C), one column per class" if num_classes is None else "(N, D), one row per sample"
    matrix(name, rows, shape, "target", target)
    samples, classes = rows.shape[0], rows.shape[1] if num_classes is None else num_classes
    if target.shape == (samples, classes) and target.ndim == 2:
        raise _refusal("target", samples, target, _for_rows(target))
    if weight is not None and weight.shape == (classes,) != (samples,):
        raise _refusal("weight", samples, weight, "Use weight[target] for one weight per class.")
    one_per_sample(samples, target=target, weight=weight)
    same_device(**{name: rows}, target=target)


def _refusal(name: str, samples: int, value: Tensor, fix: str) -> Exception:
    return problem(f"{name} must be ({samples},), one value per sample", got=value.shape, fix=fix)


def _for_rows(target: Tensor) -> str:
    """Advice on targets with one column per class."""
    if readable(target) and bool(((target == 0) | (target == 1)).all() & (target.sum(1) != 1).any()):
        return "A softmax allows one class per sample: for several use torch's binary_cross_entropy_with_logits."
    return "Use target.argmax(1) on one-hot rows."


def _warn_of_class_weights(target: Tensor, weight: Tensor) -> None:
    """Warn once if weights may be per class, where the numbers of samples and classes are equal.

    Weights that depend on the label alone are equal for samples of one class. Weights per class that are passed as
    weights per sample hardly ever are.
    """
    global _warned_of_class_weights
    if _warned_of_class_weights or not (readable(target) and readable(weight)):
        return
    own, there = weight.detach().double(), (weight > 0).double()
    zeros = torch.zeros_like(own)
    mean = (zeros.index_add(0, target, own) / zeros.index_add(0, target, there).clamp_min(1))[target]
    off = (there > 0) & ((own - mean).abs() > 1e-4 * mean)
    if bool(off.any()):
        _warned_of_class_weights = True
        warn(
            f"weight must hold one value per sample, but may hold one per class: there are {len(target)} of both, and "
            f"two samples of class {int(target[off][0])} have different weights. For weights per "
            "class use weight[target]. If weights are per sample, ignore this warning."
        )


def of_features(
    features: Tensor, columns: dict[str, Tensor], weight: Tensor | None, reduction: str, *, several: bool = False
) -> tuple[Tensor, Tensor | None]:
    """``features`` (N, D) in at least float32, with zeros where the weight is zero, and the mask of these samples.
    Columns are real numbers (N,), or with ``several`` also (N, K). All except ``pred`` must be finite where the weight
    is not zero, and ``push_weight`` must not be negative.
    """
    kinds(reduction, weight, features=features, **columns)
    matrix("features", features, "(N, D), one row per sample", *next(iter(columns.items())))
    wide_ones = [
        name for name, column in columns.items() if several and column.ndim == 2 and len(column) == len(features)
    ]
    one_per_sample(len(features), **{name: c for name, c in columns.items() if name not in wide_ones}, weight=weight)
    not_empty(**columns)
    gone = absent(weight)
    for name, column in columns.items():
        if name != "pred":
            finite_target(column, gone, name)
        if name == "push_weight":
            not_negative(push_weight=column)
    return present(features.to(wide_dtype(features)), gone), gone


def counted(target: Tensor, weight: Tensor | None) -> Tensor | None:
    """Labels in which one that counts replaces those of weight zero, if values can be read; None if none counts."""
    if not (isinstance(weight, Tensor) and isinstance(target, Tensor) and weight.shape == target.shape):
        return target
    if not (readable(target) and readable(weight)):
        return target
    gone = weight == 0
    if not gone.any():
        return target
    return None if gone.all() else torch.where(gone, target[~gone][0], target)


def on_axis(target: Tensor, bins: Bins, weight: Tensor | None, outside: Outside) -> Tensor | None:
    """The weights. Labels beyond the axis get zero under ``"drop"``, and NaN under ``"raise"`` on an accelerator.

    Raises:
        LabelError: a label lies beyond the axis, under ``"raise"`` on the CPU.
    """
    looked_at = readable(target)
    if outside == "clip" and not looked_at:
        return weight
    there = counted(target, weight)
    if there is None:
        return weight
    target = there
    index = bins.index(target, outside if looked_at else "drop", name="target")
    if outside == "clip" or (looked_at and outside == "raise"):
        return weight
    weight = torch.ones_like(index, dtype=wide_dtype(target)) if weight is None else weight.to(wide_dtype(weight))
    return weight.masked_fill((index < 0) & (weight != 0), math.nan if outside == "raise" else 0.0)


def per_class(name: str, value: Any, logits: Tensor | None = None, *, positive: str = "") -> Tensor:
    """One finite number >= 0 per class, (C,), in at least float32, on the device of the logits (N, C).

    Args:
        positive: advice for zeros. If it is given, zeros raise an error.
    """
    values = _one_per_class(name, value, logits)
    if readable(values):
        finite(**{name: values})
        positive_classes(name, values, zeros=not positive, fix=positive)
    return values if logits is None else values.to(logits.device, non_blocking=True)


def checked_prior(prior: Any, logits: Tensor | None = None, *, zeros: bool = False) -> Tensor:
    """A prior (C,), > 0, or >= 0 with ``zeros``, summing to one, in at least float32, on the device of the logits."""
    values = _one_per_class("prior", prior, logits)
    prior_shares("prior", values, zeros=zeros)
    return values if logits is None else values.to(logits.device, non_blocking=True)


def _one_per_class(name: str, value: Any, logits: Tensor | None) -> Tensor:
    """Checked values of classes, (C,)."""
    if isinstance(value, Tensor):
        real(**{name: value})
        if logits is not None:
            same_device(logits=logits, **{name: value})
        values = value.to(wide_dtype(value) if logits is None else wide_dtype(value, logits))
    else:
        values = torch.from_numpy(labels_array(value, name).astype(np.float64, order="C"))
        values = values.to(default_dtype()) if logits is None else values
    shaped(("C" if logits is None else logits.shape[1],), "one value per class", **{name: values})
    return values
