"""The hooks of an FDS on the modules that it is attached to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .._checks import problem
from .select import Select, picked, replaced

if TYPE_CHECKING:
    from .fds import FDS

__all__ = ["FDSHook", "FDSInputHook", "FDSOutputHook"]


class FDSHook:
    """A hook of an FDS on one module. It is a class, since a hooked model could not be pickled with a function."""

    def __init__(self, fds: FDS, select: Select) -> None:
        self.fds, self.select = fds, select
        self.__name__ = type(self).__name__

    def _part(self, module: nn.Module, whole: Any, select: Select) -> Any:
        """The inputs or the output of a module with calibrated features."""
        features = picked(whole, select)
        calibrated = self.fds._run(self, module, features)
        return whole if calibrated is features else replaced(whole, select, calibrated)

    @property
    def __globals__(self) -> dict[str, Any]:
        """Raises. Only ``torch.jit.script`` reads it, which cannot compile this hook."""
        raise problem(
            "a module must have no hook of an FDS when torch.jit.script compiles it",
            got="one that is attached",
            fix="Call remove() on the handle that attach returned, and script the trained model.",
            error=RuntimeError,
        )


class FDSInputHook(FDSHook):
    """A hook on a positional input of a module, the first unless another is selected, or on a keyword input."""

    @torch._disable_dynamo  # unlike torch.compiler.disable, it imports the compiler only when called
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if isinstance(self.select, str):
            return args, self._part(module, kwargs, self.select)
        return self._part(module, args, self.select or 0), kwargs


class FDSOutputHook(FDSHook):
    """A hook on the output of a module."""

    @torch._disable_dynamo
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self._part(module, output, self.select)
