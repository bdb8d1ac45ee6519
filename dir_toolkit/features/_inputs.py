"""Checks of labels, features and saved states for FDS."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from .._checks import floats, is_tensor, keys, problem
from .._numerics import is_wrapped
from ..errors import CheckpointError, ShapeError
from ..labels.bins import Missing, Outside
from ..labels.grid import AnyBins, BinGrid
from .rows import Channels


def placed(labels: Tensor, bins: AnyBins, outside: Outside, missing: Missing = "raise") -> Tensor:
    """The row of each label, (N, ...), from :meth:`Bins.rows`."""
    is_tensor(labels=labels)
    k = len(bins.axes)
    if labels.ndim < (2 if isinstance(bins, BinGrid) else 1):
        shapes = f"(N, {k}), or (N, ..., {k})" if isinstance(bins, BinGrid) else "(N,), or (N, ...)"
        rule = f"labels must be {shapes} for one label per step or pixel"
        raise problem(rule, got=tuple(labels.shape), error=ShapeError)
    rows = bins._rows(labels, outside, missing)
    if torch.compiler.is_compiling() or not rows.is_inference() or torch.is_inference_mode_enabled():
        return rows
    return rows.clone()


def check_features(features: Tensor, rows: Tensor, num_features: int, channels: Channels | None) -> list[Channels]:
    """The possible layouts of the features: (N, D, ...) or (N, ..., D). Raises if there is none, if N is not the number
    of rows, or if no statistics can be computed."""
    floats(features=features)
    require_float64(features.device)
    if is_wrapped(features):
        rule = "features must not be under a transform of torch.func, since statistics cannot leave it"
        fix = "Leave out the labels, use eval mode, or call remove() on the handle before."
        raise problem(rule, got="such features", fix=fix, error=RuntimeError)
    by_hand = features.is_cuda and not torch.compiler.is_compiling()  # replays of compiled graphs are counted
    if by_hand and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        rule = "features must not be gathered while a CUDA graph is captured, since its replays would not be counted"
        fix = "Capture the parts before and after the attached module separately."
        raise problem(rule, got="a stream that is capturing", fix=fix, error=RuntimeError)
    shape = tuple(features.shape)
    if shape == (*rows.shape, num_features) and len(shape) == 2:
        return ["first", "last"] if channels is None else [channels]
    sizes: dict[Channels, int] = {"first": shape[1], "last": shape[-1]} if len(shape) > 1 else {}
    layouts = [name for name, size in sizes.items() if size == num_features and channels in (None, name)]
    if not layouts:
        shapes = {"first": f"(N, {num_features}, ...)", "last": f"(N, ..., {num_features})"}
        rule = f"features must be {shapes[channels] if channels else ' or '.join(shapes.values())}"
        raise problem(rule, got=shape, error=ShapeError)
    steps = {"first": shape[2:], "last": shape[1:-1]}
    layouts = [name for name in layouts if tuple(rows.shape) in (shape[:1], (*shape[:1], *steps[name]))]
    if not layouts:
        size = steps["last" if shape[1] != num_features else "first"]
        fix = ""
        if size and rows.ndim == len(shape) - 1:
            fix = (
                f"Resize the labels to {size} by their nearest pixel, as F.interpolate(labels[:, None], {size})[:, 0] "
                "does, or attach where maps have the size of the labels."
            )
        elif rows.shape[1:2] == (1,):
            fix = "Use labels.squeeze(1)."
        got = f"{shape} and {tuple(rows.shape)}"
        raise problem("features and labels must have the same samples", got=got, fix=fix, error=ShapeError)
    return layouts


def require_float64(device: torch.device) -> None:
    """Raise if the device has no float64, which statistics need."""
    if device.type == "mps":
        rule = "statistics must be on a device with float64"
        fix = "Train on the CPU or a CUDA device, or without FDS."
        raise problem(rule, got=f"device {str(device)!r}", fix=fix, error=RuntimeError)


@torch.inference_mode(False)
def saved_tensors(
    state: object, own: Mapping[str, Tensor], *, not_negative: Collection[str] = (), finite: bool = False
) -> dict[str, Tensor]:
    """Checked copies of the tensors of a saved state, with the device and the dtype of ``own``.

    Shapes must be those of ``own``. Floats may have any precision and may be NaN. ``finite`` refuses infinity.
    """
    keys("the saved state", state, own, error=CheckpointError)
    assert isinstance(state, Mapping)
    is_tensor(**state)
    for name, like in own.items():
        value: Tensor = state[name]
        alike = value.dtype == like.dtype or (value.is_floating_point() and like.is_floating_point())
        if value.is_meta or value.shape != like.shape or not alike:
            rule = f"{name} must be {'floats' if like.is_floating_point() else like.dtype} of shape {tuple(like.shape)}"
            got = f"{value.dtype} of shape {tuple(value.shape)} on device {str(value.device)!r}"
            raise problem(rule, got=got, error=CheckpointError)
        if name in not_negative and bool((value < 0).any()):
            got = f"a minimum of {value.nan_to_num().min().item():g}"
            raise problem(f"{name} must not be negative", got=got, error=CheckpointError)
        if finite and bool(value.isinf().any()):
            raise problem(f"{name} must be finite", got="infinity", error=CheckpointError)
    return {name: state[name].to(like.device, like.dtype, copy=True) for name, like in own.items()}
