"""Sharpness-aware minimization: gradients are computed at a nearby point with a higher loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import instance, number, require
from ..._numerics import wide_dtype

__all__ = ["BSAM", "uphill"]


@contextmanager
def uphill(parameters: Iterable[Tensor], rho: float, model: nn.Module | None = None) -> Iterator[None]:
    """A context in which parameters are moved by a step of length ``rho`` along their gradient. They are restored
    exactly.

    Args:
        model: its buffers, such as the statistics of BatchNorm, are restored, too.
    """
    moved = [p for p in parameters if p.grad is not None]
    buffers = [] if model is None else list(model.buffers())
    before = [value.detach().clone() for value in (*moved, *buffers)]
    with torch.no_grad():
        norms = [torch.linalg.vector_norm(p.grad, dtype=wide_dtype(p)).float() for p in moved]  # type: ignore[arg-type]
        scale = rho / (torch.stack(norms).norm() + torch.finfo(torch.float32).tiny) if moved else 0.0
        for p in moved:
            assert p.grad is not None
            p.add_((p.grad * scale).to(p.dtype))
    try:
        yield
    finally:
        with torch.no_grad():
            for value, old in zip((*moved, *buffers), before, strict=True):
                value.copy_(old)


class BSAM(torch.optim.Optimizer):
    r"""Balanced sharpness-aware minimization (BSAM), around any optimizer.

    .. math:: w \leftarrow \mathrm{base}\Big(w, \nabla L\Big(w + \rho \frac{\nabla L(w)}{\lVert \nabla L(w) \rVert}\Big)
              \Big), \qquad L = \frac1N \sum_i \frac{c}{\sqrt{n(y_i)}} \ell_i

    The closure computes the loss. With square-root inverse weights of a :class:`dir_toolkit.LDS` this is BSAM, and
    without weights it is SAM. Each step takes two passes::

        optimizer = BSAM(torch.optim.AdamW(model.parameters()), rho=0.05, model=model)

        def closure():
            optimizer.zero_grad()
            loss = weighted_l1(model(x), y, lds(y))
            loss.backward()
            return loss

        optimizer.step(closure)

    Layers with random numbers, such as dropout, draw new ones in the second pass.
    :func:`dir_toolkit.experiment.training.loop.fit` takes ``Optimization(sharpness=0.05)`` and ``weights=lds`` instead;
    there both passes draw the same.

    Args:
        base: an optimizer of the parameters. Its groups and its state are used, so that schedulers work.
        rho: the length of the step along the gradient, > 0, in the Euclidean norm of all parameters.
        model: its buffers, such as the statistics of BatchNorm, are updated in the first pass alone.
    Source:
        Liu et al. 2025 (arXiv:2508.16973); Foret et al. 2021 for SAM (arXiv:2010.01412).
    """

    def __init__(self, base: torch.optim.Optimizer, *, rho: float = 0.05, model: nn.Module | None = None) -> None:
        instance(torch.optim.Optimizer, base=base)
        self.rho = number("rho", rho, low=0, open_low=True)
        if model is not None:
            instance(nn.Module, model=model)
        self.base, self.model = base, model
        super().__init__(base.param_groups, base.defaults)
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one step and return the loss of the first pass. The closure clears the gradients, computes the loss,
        calls ``backward`` and returns the loss."""
        fix = "Call step(closure)."
        require(callable(closure), "closure must be a function that computes the loss", got=type(closure), fix=fix)
        assert closure is not None
        with torch.enable_grad():
            loss = closure()
            with uphill((p for group in self.param_groups for p in group["params"]), self.rho, self.model):
                closure()
        self.base.step()
        return loss

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (
            type(self),
            self.base,
            self.rho,
            self.model,
        )  # where torch would keep the groups and the state alone

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base.load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.base.param_groups, self.base.state


def _again(kind: type[BSAM], base: torch.optim.Optimizer, rho: float, model: nn.Module | None) -> BSAM:
    return kind(base, rho=rho, model=model)
