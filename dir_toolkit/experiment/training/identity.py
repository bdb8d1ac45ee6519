"""What tells one run from another: the settings of all that decides its numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from ..._checks import problem
from ..._settings import described, differing
from ...errors import CheckpointError, SettingsError

__all__ = ["check_same_run", "is_plain", "run_identity"]


def run_identity(
    parts: Mapping[str, object], *, model: nn.Module, loss: Callable[..., Any], fingerprint: Mapping[str, Any]
) -> dict[str, Any]:
    """Plain values, nested, by the names of the arguments of ``fit``.

    Args:
        parts: what else decides the numbers, by name.
        fingerprint: of the user; an entry takes the place of the part of that name, which is then not looked at.
    Raises:
        SettingsError: nothing but its place in memory tells a part from another, as with a lambda.
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
    """Refuse a checkpoint of other settings, and name those."""
    if got := differing(saved, now):
        raise problem(
            f"{path} must be of the same run",
            got=got,
            fix="Resume with the settings and as many processes as it was started with, or choose another folder.",
            error=CheckpointError,
        )


def _loss(loss: Callable[..., Any], model: nn.Module) -> Any:
    owner = getattr(loss, "__self__", None)
    if inspect.ismethod(loss) and any(owner is module for module in model.modules()):
        return f"{type(owner).__qualname__}.{loss.__name__}"  # the model's entry tells the rest
    return described("loss", loss)


def _network(model: nn.Module) -> dict[str, Any]:
    """The settings of modules that have them, the arguments of torch's own, and the class of each of the others."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    modules = {name or "itself": _module(f"model.{name}", module) for name, module in model.named_modules()}
    return {**modules, **({"frozen": frozen} if frozen else {})}


def _module(name: str, module: nn.Module) -> Any:
    if isinstance(getattr(module, "settings", None), Mapping):
        return described(name, module)
    kind = type(module).__qualname__  # without its module, which has another name where that is the program itself
    if not type(module).__module__.startswith("torch.nn."):
        return kind
    plain = {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_") and key != "training" and is_plain(value)
    }
    return {"is": kind, **described(name, plain)}


def is_plain(value: object) -> bool:
    """Whether a value, and all in it, is what JSON knows."""
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
