"""Save and load models in safetensors files, which hold everything for predictions except code."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._checks import instance, is_distributed, missing_package, problem, require
from .._files import naming, write_atomically
from .._state import pack, unpack
from ..errors import CheckpointError, DirToolkitError, DirToolkitWarning
from ..heads.linear import LinearHead
from ..labels.bins import Bins
from ..labels.density import LabelDensity
from ..labels.kernels import LabelWindow
from ..labels.weights import LDS
from .model import LongTailModel
from .readouts import ScoreReadout, readout_for
from .several import MultiTargetModel

__all__ = ["load"]

_FORMAT = "dir_toolkit.LongTailModel 1"
_MADE_WITH = "made_with"  # the entry with the arguments of the model
_EXTRA = "_extra_state"
_OWN = ("head", "loss")  # what may be the user's own
_LITTLE = 10**7  # numbers that may be allocated though the file does not hold them


AnyModel = LongTailModel | MultiTargetModel


def save(model: AnyModel, path: str | os.PathLike[str]) -> None:
    try:
        from safetensors.torch import save as to_bytes
    except ImportError as error:
        raise missing_package("safetensors", error, "saving") from error
    instance((str, os.PathLike), path=path)
    without = _extra_states(model)
    state = {name: value for name, value in model.state_dict().items() if name not in without}
    for name, value in state.items():
        rule = f"the model must keep its state in tensors alone, also {name}"
        require(isinstance(value, Tensor), rule, got=type(value), error=TypeError)
    tensors = {name: _whole(value).cpu().contiguous().clone() for name, value in state.items()}
    if isinstance(model, MultiTargetModel):
        named = all(target._has_named_head and target.readout.loss_name for target in model.targets)
        fix = "Save each of model.targets by itself."
        require(named, "heads and losses must be named ones to be saved together", got="one's own", fix=fix)
        tensors[_MADE_WITH] = pack({"targets": [_made_with(target) for target in model.targets]})
    else:
        tensors[_MADE_WITH] = pack(_made_with(model))
    sharded = any(map(is_distributed, state.values()))
    try:
        if not sharded or dist.get_rank() == 0:
            blob = to_bytes(tensors, {"format": _FORMAT, "sha256": _digest(tensors)})
            with naming(path):
                write_atomically(path, lambda file: file.write(blob))
    finally:
        if sharded:
            dist.barrier()  # so that the file is there for every rank


def load(
    path: str | os.PathLike[str],
    backbone: nn.Module,
    *,
    head: nn.Module | None = None,
    loss: Callable[..., Tensor] | None = None,
) -> AnyModel:
    """Load a model saved by :meth:`dir_toolkit.LongTailModel.save` or :meth:`dir_toolkit.MultiTargetModel.save`.

    It is in eval mode, on the device of the backbone. On the same device predictions are bit-identical. No code from
    the file is run.

    Args:
        path: the file.
        backbone: a module with the architecture of the saved backbone. Its parameters and buffers are replaced.
        head, loss: required if the saved model had a custom head or loss, and not allowed otherwise.
    Raises:
        FileNotFoundError: there is no such file. CheckpointError: the file is damaged, its parts do not fit, it is of
        another kind or format, or the backbone or head has another architecture, or another dtype in a part of a
        layer. Backbone and head do not change then. ValueError: a custom head or loss is missing, or was not expected;
        or the backbone or head is lazy or on the meta device. ImportError: safetensors is not installed.
    """
    instance(nn.Module, backbone=backbone)
    state = _read(path)
    with _blaming(path):
        made_with = unpack(state.pop(_MADE_WITH, None))
        several = made_with.get("targets")
        every = dict.fromkeys(_OWN, "named ones of several targets") if several is not None else made_with
        every = {**every, "head": None} if made_with.get("replaced") else every
        names = [every[name] if every[name] is None else str(every[name]) for name in _OWN]
    for name, saved, own in zip(_OWN, names, (head, loss), strict=True):
        place = repr(os.fspath(path))
        rule = f"{name} must be {'left out' if saved else f'given, as in the model saved in {place}'}"
        got = "None" if own is None else f"one beside the saved {saved!r} in {place}"
        lws = name == "head" and not saved and "head.linear.weight" in state
        fix = "After stage_two(model, 'lws') it is ScaledHead(LinearHead(num_features, num_bins))." * lws
        require((own is None) == (saved is not None), rule, got=got, fix=fix)
    _check_same("backbone", backbone, state, path)
    if head is not None:
        _check_same("head", head, state, path)
    with (
        _blaming(path, besides=head is not None or loss is not None),
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", DirToolkitWarning)  # they were issued when the model was made
        if several is None:
            return _filled(_remade(made_with, state, "", backbone, head, loss), state)
        targets = [_remade(one, state, f"targets.{i}.", nn.Identity(), None, None) for i, one in enumerate(several)]
        return _filled(MultiTargetModel(backbone, targets), state)


def _whole(value: Any) -> Tensor:
    """A tensor of the state, detached, gathered from all ranks if it is sharded."""
    return (value.full_tensor() if is_distributed(value) else value).detach()


def _extra_states(model: nn.Module) -> list[str]:
    """The entries of the state with the axis and the statistics of FDS, which are not saved."""
    every = model.named_modules(remove_duplicate=False)
    models = [name for name, part in every if isinstance(part, LongTailModel)]
    return [f"{name}.{_EXTRA}" if name else _EXTRA for name in models]


def _made_with(model: LongTailModel) -> dict[str, Any]:
    """All that a file must hold to build the model again, without tensors of its state."""
    readout, density, weights = model.readout, model.density, model.weights
    prior = {**readout.prior_settings, "adjust": readout.adjust} if isinstance(readout, ScoreReadout) else {}
    options = {name: value for name, value in readout.settings.items() if name != "loss" and name not in prior}
    for name, value in options.items():
        if isinstance(value, LabelWindow):
            options[name] = value.over(model.bins)
    return {
        "num_features": model.num_features,
        "bins": model.bins.settings,
        "why": model.bins.why,
        "density": None if density is None else {"counts": density.counts, "of_rows": density._of_weighted_rows},
        "head": model._head,
        "replaced": model._head is not None and not model._has_named_head,
        "loss": readout.loss_name,
        "weights": None if weights is None else {**weights._arguments(), "bins": weights.bins.settings},
        "outside": model.outside,
        "missing": model.missing,
        "prior": prior,
        "options": options,
    }


def _remade(
    made_with: dict[str, Any], state: Mapping[str, Tensor], prefix: str, backbone: nn.Module, head: Any, loss: Any
) -> LongTailModel:
    """The model, built again from :func:`_made_with`. Its state, whose names begin with ``prefix``, is loaded later."""
    bins, counted, weighed = Bins.from_dict(made_with["bins"]), made_with["density"], made_with["weights"]
    bins.why = made_with["why"]
    _check_sizes(made_with, bins, {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)})
    density = weights = None
    if counted is not None:
        density = LabelDensity(bins, counted["counts"])
        density._of_weighted_rows = counted["of_rows"]
    if weighed is not None:
        public = weighed.pop("public_integers", False)
        weights = LDS(**{**weighed, "bins": Bins.from_dict(weighed["bins"])})
        weights._public_integers = public
        mine = f"{prefix}weights."  # a loss may be built on them
        weights.load_state_dict({key.removeprefix(mine): x for key, x in state.items() if key.startswith(mine)})
    model = LongTailModel(
        backbone,
        made_with["num_features"],
        bins,
        density=density,
        head=made_with["head"] or head,
        loss=made_with["loss"] or loss,
        weights=weights,
        outside=made_with["outside"],
        missing=made_with["missing"],
        **made_with["options"],
    )
    if made_with.get("replaced"):
        model.head = head
    if isinstance(model.readout, ScoreReadout):  # its buffers are in the state
        model.readout.adjust = made_with["prior"].pop("adjust")
        model.readout.prior_settings = made_with["prior"]
    return model


def _check_sizes(made_with: dict[str, Any], bins: Bins, state: Mapping[str, Tensor]) -> None:
    """Raise if the layers that are made here would have more numbers than the state, so that a small file takes little
    memory whatever number of features it names."""
    named, num_features = made_with["head"], made_with["num_features"]
    layers: list[Any] = [readout_for(named, bins).make_head(named, 1, bins)] if named else []
    layers += [LinearHead(1, len(bins))] if made_with["options"].get("residual") else []
    per_feature = sum(layer.weight.numel() for layer in layers)
    rule = f"the {per_feature} weights of each feature must be saved"
    most = sum(value.numel() for value in state.values())
    most += _LITTLE if made_with.get("replaced") else 0  # the head that took its place may be smaller
    got = f"{num_features} features and {most:,} numbers"
    require(per_feature * num_features <= most, rule, got=got, error=CheckpointError)


def _filled(model: AnyModel, state: dict[str, Tensor]) -> AnyModel:
    """The model in eval mode, on the device of its backbone, with the state and the dtypes of the file."""
    device = next((x.device for x in model.backbone.parameters()), torch.device("cpu"))
    model = model.to(device)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: value.data for name, value in tensors.items()}
    try:
        for name, value in tensors.items():
            value.data = value.data.to(state.get(name, value).dtype)
        own = model.state_dict()
        model.load_state_dict({**state, **{name: own[name] for name in _extra_states(model)}})
    except BaseException:
        for name, value in tensors.items():
            value.data = before[name]
        raise
    return model.eval()


def _read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of an intact file of this format."""
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise missing_package("safetensors", error, "saving") from error
    instance((str, os.PathLike), path=path)
    place = repr(os.fspath(path))
    require(Path(path).exists(), "path must be a saved model", got=f"no file {place}", error=FileNotFoundError)
    try:
        with safe_open(path, "pt") as file:
            notes: Mapping[str, str] = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
    except Exception as error:  # the library raises several types
        raise _foreign("path must be a whole safetensors file", f"{place}: {error}") from error
    if (saved := notes.get("format", "")) != _FORMAT:
        ours = saved.startswith("dir_toolkit")
        fix = "Load it with the release that saved it." if ours else "Only files from save of a model can be loaded."
        raise _foreign(f"path must be a file of the format {_FORMAT!r}", f"{saved!r} in {place}", fix)
    if notes.get("sha256") != _digest(tensors):
        raise _foreign("path must be a file as it was written", f"bytes that have changed in {place}")
    return tensors


@contextmanager
def _blaming(path: str | os.PathLike[str], *, besides: bool = False) -> Iterator[None]:
    """A context that turns errors of any kind into a CheckpointError that names the file. With ``besides``, for code
    that reads arguments besides the file, errors of the package stay as they are."""
    try:
        yield
    except Exception as error:
        if besides and isinstance(error, DirToolkitError):
            raise
        got = f"{os.fspath(path)!r}: {type(error).__name__}: {error}"
        raise _foreign("path must hold a model whose parts fit, as it was saved", got) from error


def _foreign(rule: str, got: str, fix: str = "Load an intact copy.") -> Exception:
    return problem(rule, got=got, fix=fix, error=CheckpointError)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()


def _check_same(name: str, module: nn.Module, state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Raise unless the module has the names and shapes of the saved state, and the dtypes of a cast."""
    without = _extra_states(module)
    values = {f"{name}.{key}": value for key, value in module.state_dict().items() if key not in without}
    for key, value in values.items():
        empty = isinstance(value, Tensor) and (nn.parameter.is_lazy(value) or value.is_meta)
        fix = "Make it on the CPU, and call it once if it is lazy."
        require(not empty, f"{name} must have values to replace, also {key}", got="none", fix=fix)
    own = {key: tuple(value.shape) if isinstance(value, Tensor) else None for key, value in values.items()}
    saved = {key: tuple(value.shape) for key, value in state.items() if key.startswith(f"{name}.")}
    faults = [f"no {key}" for key in saved if key not in own] + [f"{key} besides" for key in own if key not in saved]
    faults += [
        f"{key} of shape {own[key]}, saved as {saved[key]}" for key in own if own[key] != saved.get(key, own[key])
    ]
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        rule = f"{name} must be of the architecture that was saved in {os.fspath(path)!r}"
        fix = "Make it as it was made for that model."
        raise _foreign(rule, ", ".join(faults[:3]) + more, fix)
    for place, layer in module.named_modules():
        _check_alike(".".join(filter(None, (name, place))), layer, state, path)


def _check_alike(name: str, layer: nn.Module, state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Raise if numbers of a layer that have one dtype were saved in several, at which torch would raise later."""
    numbers: dict[str, Tensor] = dict(layer.named_parameters(recurse=False))
    if type(layer)._apply is nn.Module._apply:  # others may leave buffers out when they are cast
        numbers |= dict(layer.named_buffers(recurse=False))
    for dtype in {value.dtype for value in numbers.values() if value.is_floating_point()}:
        keys = [f"{name}.{key}" for key, value in numbers.items() if value.dtype == dtype]
        saved = {key: state[key].dtype for key in keys if key in state}
        if len(set(saved.values())) > 1:
            rule = f"{name} must have one dtype in {os.fspath(path)!r}, as in the module that is given"
            fix = "Save it after a cast of the whole layer, or give one whose dtypes differ, too."
            raise _foreign(rule, ", ".join(f"{value} in {key}" for key, value in saved.items()), fix)
