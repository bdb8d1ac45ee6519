"""The identity of a run: the settings of everything that influences its numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from ..._checks import require
from ..._settings import described, differing
from ...errors import CheckpointError, SettingsError

__all__ = ["check_same_run", "is_plain", "run_identity"]


def run_identity(
    parts: Mapping[str, object], *, model: nn.Module, loss: Callable[..., Any], fingerprint: Mapping[str, Any]
) -> dict[str, Any]:
    """The identity as nested plain values, with the argument names of ``fit``.

    Args:
        parts: the other arguments that influence the numbers, by name.
        fingerprint: the user's argument. An entry replaces the part of that name.
    Raises:
        SettingsError: a part cannot be identified, such as a lambda.
    """
    named: dict[str, Callable[[], Any]] = {
        "model": partial(_network, model),
        "loss": partial(_loss, loss, model),
        **{name: partial(described, name, value) for name, value in parts.items()},
    }
    identity = {}
    for name, describe in named.items():
        if name in fingerprint:
            continue
        try:
            identity[name] = describe()
        except SettingsError as error:
            raise SettingsError(f'{error} Or name it by hand: fingerprint={{"{name}": "..."}}.') from None
    return {**identity, **described("fingerprint", fingerprint)}


def check_same_run(path: object, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise if a checkpoint has other settings. The message names them."""
    differs = differing(saved, now)
    fix = "Resume with the settings and as many processes as it was started with, or choose another folder."
    require(not differs, f"{path} must be of the same run", got=differs, fix=fix, error=CheckpointError)


def _loss(loss: Callable[..., Any], model: nn.Module) -> Any:
    owner = getattr(loss, "__self__", None)
    if inspect.ismethod(loss) and any(owner is module for module in model.modules()):
        return f"{type(owner).__qualname__}.{loss.__name__}"  # the entry of the model has the rest
    return described("loss", loss)


def _network(model: nn.Module) -> dict[str, Any]:
    """The settings of modules that have them, the arguments of torch's modules, and the classes of all others."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    modules = {name or "itself": _module(f"model.{name}", module) for name, module in model.named_modules()}
    return {**modules, **({"frozen": frozen} if frozen else {})}


def _module(name: str, module: nn.Module) -> Any:
    """A module by its settings, or by its class and its plain attributes if it is one of torch."""
    if isinstance(getattr(module, "settings", None), Mapping):
        return described(name, module)
    kind = type(module).__qualname__  # without its module, whose name is __main__ in the defining program
    if not type(module).__module__.startswith("torch.nn."):
        return kind
    plain = {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_") and key != "training" and is_plain(value)
    }
    return {"is": kind, **described(name, plain)}


def is_plain(value: object) -> bool:
    """Whether JSON can represent a value and everything in it."""
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
