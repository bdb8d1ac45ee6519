"""What the losses share: the checks of samples, class indices and one value a class, and the reduction."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .._checks import (
    finite,
    floats,
    is_tensor,
    label_problem,
    labels_array,
    not_empty,
    not_negative,
    one_of,
    prior_shares,
    problem,
    real,
    same_device,
)
from .._numerics import readable, wide_dtype
from .._ranks import summed
from ..errors import ShapeError
from ..labels.bins import Bins, Outside

__all__ = [
    "Reduction",
    "checked_prior",
    "checked_rows",
    "checked_samples",
    "field",
    "one_a_sample",
    "pairs_of",
    "per_class",
    "present",
    "reduce",
]

Reduction = Literal["none", "mean", "sum"]


def reduce(values: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """Values times weights, then as they are, their mean over all of them, or their sum."""
    if weight is not None:
        values = values * weight.to(values.dtype)
    return values if reduction == "none" else values.mean() if reduction == "mean" else values.sum()


def present(values: Tensor, weight: Tensor | None) -> Tensor:
    """Values (N, ...) with zeros for samples of weight zero, which so leave no trace, in gradients either.

    Before the loss, since zero times what is not finite is NaN, forward or backward.
    """
    if weight is None:
        return values
    absent = weight.to(values.dtype) == 0
    return values.masked_fill(absent if values.ndim == weight.ndim else absent[:, None], 0.0)


def finite_targets(weight: Tensor | None, **targets: Tensor) -> None:
    """No label is NaN or infinite whose weight is above zero, and no weight. Accelerator tensors are not looked at."""
    if weight is not None:
        finite(weight=weight)
    for name, target in targets.items():
        if target.is_floating_point() and readable(target) and not bool(target.isfinite().all()):
            finite(**{name: present(target.detach(), weight)})


def weight_on_axis(name: str, labels: Tensor, bins: Bins, weight: Tensor | None, outside: Outside) -> Tensor | None:
    """The weights, with zeros for labels beyond the axis under ``"drop"``, and on an accelerator NaN under ``"raise"``.

    Raises:
        LabelError: a label lies beyond the axis, under ``"raise"``, where values may be looked at.
    """
    looked_at = readable(labels)
    if outside == "clip" and not looked_at:
        return weight
    if looked_at and weight is not None and bool((absent := weight == 0).any()):
        if bool(absent.all()):
            return weight
        labels = torch.where(absent, labels[~absent][0], labels)
    index = bins.index(labels, outside if looked_at else "drop", name=name)
    if outside == "clip" or (looked_at and outside == "raise"):
        return weight
    weight = torch.ones_like(index, dtype=wide_dtype(labels)) if weight is None else weight.to(wide_dtype(weight))
    return weight.masked_fill((index < 0) & (weight != 0), math.nan if outside == "raise" else 0.0)


def spread_of(labels: Tensor, weight: Tensor | None, *, ranks: bool = False) -> Tensor:
    """The standard deviation of labels (N,) or (N, D), over their D numbers the mean one, (); NaN if all are equal."""
    labels = labels.reshape(len(labels), -1)
    share = torch.ones_like(labels[:, :1]) if weight is None else weight.to(labels.dtype)[:, None]
    labels = present(labels, weight)

    def mean(values: Tensor) -> Tensor:
        sums = torch.cat([(share * values).sum(0), share.sum()[None]])
        sums = summed(sums)[0] if ranks else sums
        return sums[:-1] / sums[-1]

    variance = mean((labels - mean(labels)).square()).mean()
    return torch.where(variance > 0, variance, math.nan).sqrt()


def checked_rows(
    name: str,
    rows: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    *,
    num_classes: int | None = None,
) -> Tensor:
    """``rows`` (N, C) in at least float32, once they, the classes (N,), the weights and the reduction are checked.

    With ``num_classes`` the rows are no scores but features (N, D). Those of weight zero are zero.
    """
    one_of("reduction", reduction, ("none", "mean", "sum"))
    weights = {} if weight is None else {"weight": weight}
    is_tensor(**{name: rows}, target=target, **weights)
    floats(**{name: rows})
    if rows.ndim != 2:
        shape = "(N, C), one column a class" if num_classes is None else "(N, D), one row a sample"
        fix = flattening(rows, name, target, "target")
        raise problem(f"{name} must be {shape}", got=f"shape {tuple(rows.shape)}", fix=fix, error=ShapeError)
    not_empty(**{name: rows})
    samples, classes = rows.shape[0], rows.shape[1] if num_classes is None else num_classes
    fixes: dict[tuple[int, ...], str] = {(samples, classes): _for_rows_of_classes(target)} if target.ndim == 2 else {}
    one_a_sample("target", target, samples, fixes)
    if target.dtype != torch.int64:
        raise problem(
            "target must hold class indices as int64",
            got=f"dtype {target.dtype}",
            fix="Use target.long().",
            error=TypeError,
        )
    if weight is not None:
        one_a_sample("weight", weight, samples, {(classes,): "Use weight[target] for one weight a class."})
        real(weight=weight)
    same_device(**{name: rows}, target=target, **weights)
    if readable(target):
        _classes_exist(target, classes)
    finite(**weights)
    not_negative(**weights)
    return present(rows.to(wide_dtype(rows)), weight)


def flattening(rows: Tensor, name: str, labels: Tensor, labels_name: str) -> str:
    """What to do about rows of more than two dimensions."""
    if rows.ndim < 3:
        return ""
    if labels.shape == rows.shape[:-1]:
        last = rows.ndim - 2
        return f"Use {name}.flatten(0, {last}) and {labels_name}.flatten()."
    if labels.shape == (rows.shape[0], *rows.shape[2:]):
        return f"Use {name}.movedim(1, -1).flatten(0, {rows.ndim - 2}) and {labels_name}.flatten()."
    return f"Use {name}.flatten(1)."


def _for_rows_of_classes(target: Tensor) -> str:
    if readable(target) and bool(((target == 0) | (target == 1)).all() & (target.sum(1) != 1).any()):
        return "Samples of several classes at once are not for a softmax: use torch's binary_cross_entropy_with_logits."
    return "Use target.argmax(1) on one-hot rows."


def checked_samples(
    features: Tensor,
    columns: dict[str, Tensor],
    weight: Tensor | None,
    reduction: str,
    *,
    several: bool = False,
) -> Tensor:
    """``features`` (N, D) in at least float32, zero where the weight is, once all arguments of the loss are checked.

    Args:
        columns: real numbers (N,) by their names, of which only ``pred`` may be other than finite where the weight is
            above zero, and ``push_weight`` must not be negative.
        several: whether they may be (N, K), too.
    """
    one_of("reduction", reduction, ("none", "mean", "sum"))
    if weight is not None:
        columns = {**columns, "weight": weight}
    is_tensor(features=features, **columns)
    floats(features=features)
    if features.ndim != 2:
        name, first = next(iter(columns.items()))
        fix = flattening(features, "features", first, name)
        rule = "features must be (N, D), one row a sample"
        raise problem(rule, got=f"shape {tuple(features.shape)}", fix=fix, error=ShapeError)
    not_empty(features=features)
    real(**columns)
    for name, column in columns.items():
        if not (several and name != "weight" and column.ndim == 2 and len(column) == len(features)):
            one_a_sample(name, column, len(features), {})
    same_device(features=features, **columns)
    not_empty(**columns)
    finite_targets(weight, **{name: c for name, c in columns.items() if name not in ("pred", "weight")})
    not_negative(**{name: columns[name] for name in ("push_weight", "weight") if name in columns})
    return present(features.to(wide_dtype(features)), weight)


def pairs_of(features: Tensor, weight: Tensor | None) -> Tensor:
    """Which two of N samples make a pair, (N, N): two different ones, both of a weight above zero."""
    samples = len(features)
    pairs = ~torch.eye(samples, dtype=torch.bool, device=features.device)
    if weight is None:
        return pairs
    there = weight > 0
    return pairs & there & there[:, None]


def field(output: Any, name: str) -> Tensor:
    """What a model's output holds under ``name``."""
    value = getattr(output, name, None)
    if value is None:
        raise problem(
            f"output must have an attribute {name}",
            got=type(output).__name__,
            fix="Let the model return its features, too.",
            error=TypeError,
        )
    is_tensor(**{f"output.{name}": value})
    return value


def per_class(name: str, value: Any, scores: Tensor, *, positive: str = "") -> Tensor:
    """One finite number >= 0 a class, (C,), in at least float32 on the device of the scores (N, C).

    Args:
        positive: what to do about a zero; given, zeros are refused.
    """
    values = _one_a_class(name, value, scores)
    if readable(values):
        finite(**{name: values})
        bad = values <= 0 if positive else values < 0
        if bool(bad.any()):
            first = int(bad.to(torch.uint8).argmax())
            rule = f"{name} must be positive" if positive else f"{name} must not be negative"
            raise problem(rule, got=f"{values[first].item():g} for class {first}", fix=positive)
    return values.to(scores.device, non_blocking=True)


def checked_prior(prior: Any, scores: Tensor) -> Tensor:
    """Shares > 0 of the classes, (C,), summing to one, in at least float32 on the device of the scores (N, C)."""
    values = _one_a_class("prior", prior, scores)
    prior_shares("prior", values)
    return values.to(scores.device, non_blocking=True)


def _one_a_class(name: str, value: Any, scores: Tensor) -> Tensor:
    classes = scores.shape[1]
    if isinstance(value, Tensor):
        is_tensor(**{name: value})
        real(**{name: value})
        same_device(logits=scores, **{name: value})
        values = value.to(wide_dtype(value, scores))
    else:
        values = torch.from_numpy(labels_array(value, name).astype(np.float64, order="C"))
    if values.shape != (classes,):
        raise problem(
            f"{name} must be ({classes},), one value a class",
            got=f"shape {tuple(values.shape)}",
            error=ShapeError,
        )
    return values


def one_a_sample(name: str, value: Tensor, samples: int, fixes: dict[tuple[int, ...], str]) -> None:
    shape = tuple(value.shape)
    if shape == (samples,):
        return
    fixes = {**fixes, (samples, 1): f"Use {name}.squeeze(1)."}
    fix = fixes.get(shape, "Labels are never broadcast: bring both to one length.")
    rule = f"{name} must be ({samples},), one value a sample"
    raise problem(rule, got=f"shape {shape}", fix=fix, error=ShapeError)


def _classes_exist(target: Tensor, classes: int) -> None:
    bad = (target < 0) | (target >= classes)
    if bool(bad.any()):
        first = int(bad.to(torch.uint8).argmax())
        raise label_problem(
            f"target must hold class indices from 0 to {classes - 1}",
            got=f"{int(target[first])} at index [{first}] ({int(bad.sum())} such values)",
            fix="Count classes from zero, and give the model one output for each.",
        )
