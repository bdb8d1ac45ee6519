"""What FDS checks of labels, of features and of saved states."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from .._checks import floats, is_tensor, keys, problem
from .._numerics import is_wrapped
from ..errors import CheckpointError, ShapeError
from ..labels.bins import Outside
from ..labels.grid import AnyBins, BinGrid


def placed(labels: Tensor, bins: AnyBins, outside: Outside) -> Tensor:
    """The row of each label in tables of B + 1 rows, (N,) or (N, H, W): its bin, or B where it has none."""
    is_tensor(labels=labels)
    grid, k = isinstance(bins, BinGrid), len(bins.axes)
    if labels.ndim not in ((2, 4) if grid else (1, 3)):
        shapes = f"(N, {k}), or (N, H, W, {k})" if grid else "(N,), or (N, H, W)"
        one_channel = not grid and labels.ndim in (2, 4) and labels.shape[1] == 1
        rule, fix = f"labels must be {shapes} for one label per pixel", "Use labels.squeeze(1)." if one_channel else ""
        raise problem(rule, got=tuple(labels.shape), fix=fix, error=ShapeError)
    rows = bins.rows(labels, outside)
    return rows.clone() if rows.is_inference() and not torch.is_inference_mode_enabled() else rows


def check_features(features: Tensor, rows: Tensor, num_features: int) -> None:
    """Refuse features of which no statistics can be taken. They must be (N, D), or maps (N, D, H, W), with as many
    samples as there are rows."""
    is_tensor(features=features)
    floats(features=features)
    require_float64(features.device)
    if is_wrapped(features):
        rule = "features must not be under a transform of torch.func, since statistics are kept"
        fix = "Leave out the labels, use eval mode, or call remove() on the handle before."
        raise problem(rule, got="such features", fix=fix, error=RuntimeError)
    if features.is_cuda and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        rule = "features must not be gathered while a CUDA graph is captured, since its replays would not count"
        fix = "Capture the parts before and after the attached module, each by itself."
        raise problem(rule, got="a stream that is capturing", fix=fix, error=RuntimeError)
    if features.ndim not in (2, 4) or features.shape[1] != num_features:
        rule = f"features must be (N, {num_features}) or (N, {num_features}, H, W)"
        raise problem(rule, got=tuple(features.shape), error=ShapeError)
    size = features.shape[2:]
    if tuple(rows.shape) not in ((len(features), *size), (len(features),)):
        resize = (
            f"Resize the labels to {tuple(size)} by their nearest pixel, as F.interpolate(labels[:, None], "
            f"{tuple(size)})[:, 0] does, or attach where maps have the size of the labels."
        )
        got, fix = f"{tuple(features.shape)} and {tuple(rows.shape)}", resize if size and rows.ndim == 3 else ""
        raise problem("features and labels must have the same samples", got=got, fix=fix, error=ShapeError)


def require_float64(device: torch.device) -> None:
    """Refuse a device on which statistics cannot be kept."""
    if device.type == "mps":
        rule = "statistics must be on a device that knows float64, in which they are kept"
        fix = "Train on the CPU or a CUDA device, or without FDS."
        raise problem(rule, got=f"device {str(device)!r}", fix=fix, error=RuntimeError)


@torch.inference_mode(False)
def saved_tensors(
    state: object, own: Mapping[str, Tensor], *, not_negative: Collection[str] = (), finite: bool = False
) -> dict[str, Tensor]:
    """Copies of the tensors of a saved state, on the device and in the dtype of the own tensors of the same names.

    They must have the shapes of these. Floats may have any precision, and may be NaN. With ``finite`` they must not be
    infinite.
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
