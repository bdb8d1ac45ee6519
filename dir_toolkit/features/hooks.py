"""The hooks by which an FDS gathers and calibrates the features of the modules that it is attached to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._checks import problem

if TYPE_CHECKING:
    from .fds import FDS

__all__ = ["FDSHook", "FDSInputHook", "FDSOutputHook"]


class FDSHook:
    """A hook of an FDS on one module. It is a class rather than a function, so that a hooked model can be pickled."""

    def __init__(self, fds: FDS) -> None:
        self.fds = fds
        self.__name__ = type(self).__name__

    @property
    def __globals__(self) -> dict[str, Any]:
        """Only ``torch.jit.script`` asks a hook for this. A hook that keeps statistics has no script."""
        raise problem(
            "a module must have no hook of an FDS when torch.jit.script compiles it",
            got="one that is attached",
            fix="Call remove() on the handle that attach returned, and script the trained model.",
            error=RuntimeError,
        )


class FDSInputHook(FDSHook):
    """A hook on the first positional input of a module."""

    @torch._disable_dynamo  # torch.compiler.disable imports the whole compiler at once, and this when it is called
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not args:
            rule = "the attached module must get its features as first positional input"
            raise problem(rule, got="none", error=TypeError)
        return (self.fds._run(self, module, args[0]), *args[1:])


class FDSOutputHook(FDSHook):
    """A hook on the output of a module."""

    @torch._disable_dynamo
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.fds._run(self, module, output)
