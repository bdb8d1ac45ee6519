"""An exponential moving average of a model's weights, kept beside the training and put in to evaluate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._checks import instance, is_tensor, keys, number, problem, whole
from ..errors import CheckpointError

__all__ = ["WeightAverage"]


class WeightAverage:
    r"""A moving average of a model's parameters and float buffers, which often errs less than the last weights do.

    .. math:: \bar\theta_t = d_t\,\bar\theta_{t-1} + (1 - d_t)\,\theta_t, \qquad
              d_t = \min\!\left(d, \frac{t}{t + 9}\right), \quad t = 1, 2, \dots

    It starts from the weights that the model has when this is made; without ``warm``, :math:`d_t = d`. BatchNorm's
    running statistics are averaged alike, so that they suit the averaged weights. Integer buffers, and tensors that
    hold an infinity or NaN when this is made, have no mean: they stay the model's own. Parameters in half precision
    are averaged in float32. Averages follow the model to another device.

    It refers to the model and is no part of it: ``copy.deepcopy`` of both together keeps the pair. On several ranks
    all see equal parameters; buffers must be shared before an evaluation, as without an average.

    Args:
        model: on any device, every parameter initialized.
        decay: d in [0, 1): the share that the average keeps in a step, so that it reaches back about 1 / (1 - d) steps.
        warm: whether the decay rises from 0.1 to d, so that the first weights are soon forgotten.
    Raises:
        ValueError: the decay is out of range; the model has a parameter without values, or nothing to average.
        TypeError: an argument is of another kind.
    Source:
        Polyak and Juditsky 1992; the exponential kind in Tarvainen and Valpola 2017 (arXiv:1703.01780).

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> average = WeightAverage(model, decay=0.75, warm=False)
    >>> _ = nn.init.constant_(model.weight, 8.0)
    >>> average.update()
    >>> with average.applied():
    ...     model.weight.item()
    2.0
    >>> model.weight.item()
    8.0
    """

    # torch's AveragedModel reads its counter back from the device in each step, averages half precision in itself and
    # integers by truncation, makes NaN of infinite buffers, and deep-copies hooks together with what they refer to.

    def __init__(self, model: nn.Module, decay: float = 0.999, *, warm: bool = True) -> None:
        where = "WeightAverage"
        instance(where, nn.Module, model=model)
        instance(where, bool, warm=warm)
        self.model = model
        self.decay = number(where, "decay", decay, low=0, high=1, open_high=True)
        self.warm = warm
        self.updates = 0
        """Steps that were averaged."""
        self._applied = False
        self._average: dict[str, Tensor] = {}
        for name, value in _tensors(model).items():
            if is_lazy(value) or value.is_meta:
                fix = "Load the weights, or run a batch through the model, first."
                raise problem(where, "model must have values in all its parameters", got=f"none in {name!r}", fix=fix)
            is_tensor(where, **{f"model.{name}": value})
            dtype = _wide(value)
            if dtype is not None and bool(value.detach().isfinite().all()):
                self._average[name] = value.detach().to(dtype, copy=True)
        if not self._average:
            raise problem(where, "model must hold finite floats to average", got=f"none in {type(model).__name__}")

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model's present weights; call it after each step of the optimizer.

        Raises:
            RuntimeError: it is called while :meth:`applied`, or parameters of the model were added, removed or resized.
        """
        where = "WeightAverage.update"
        if self._applied:
            raise problem(
                where,
                "the model must have its own weights",
                got="the averaged ones",
                fix="Call it outside applied().",
                error=RuntimeError,
            )
        tensors = self._present(where)
        values = []
        for name, average in self._average.items():
            dtype = _wide(tensors[name])
            self._average[name] = average.to(tensors[name].device, dtype)
            values.append(tensors[name].detach().to(dtype))
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warm else self.decay
        torch._foreach_lerp_(list(self._average.values()), values, 1 - decay)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """Give the model the averaged weights, in place; at the end it gets its own back to the bit, buffers included.

        Raises:
            RuntimeError: it is in use already, or parameters of the model were added, removed or resized.
        """
        where = "WeightAverage.applied"
        if self._applied:
            raise problem(where, "it must not be nested", got="a model that has them already", error=RuntimeError)
        tensors = self._present(where)
        own = {name: value.detach().clone() for name, value in tensors.items()}
        self._applied = True
        try:
            _write(tensors, self._average)
            yield self.model
        finally:
            self._applied = False
            _write(self._present(where), own)

    def state_dict(self) -> dict[str, Any]:
        """Copies of what :meth:`load_state_dict` restores to the bit; a checkpoint can hold them."""
        return {"updates": self.updates, "average": {name: value.clone() for name, value in self._average.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` saved, on the model's device. The model itself is left as it is.

        Raises:
            CheckpointError: the state belongs to an average of another model. ValueError: it is no such state.
        """
        where = "WeightAverage.load_state_dict"
        keys(where, "state", state, ("updates", "average"))
        updates = whole(where, "updates", state["updates"], low=0)
        saved = state["average"]
        instance(where, Mapping, average=saved)
        for name in sorted({*saved, *self._average}, key=str):
            given, own = saved.get(name), self._average.get(name)
            if own is None or _described(given) != _described(own):
                rule = f"average must be of this model, with {name!r} {_described(own)}"
                raise problem(where, rule, got=_described(given), error=CheckpointError)
        for name, own in self._average.items():
            self._average[name] = saved[name].detach().to(own.device, copy=True)
        self.updates = updates

    def __repr__(self) -> str:
        return f"WeightAverage(decay={self.decay}, warm={self.warm}, updates={self.updates})"

    def _present(self, where: str) -> dict[str, Tensor]:
        """The model's tensors, of which those that are averaged are still what they were."""
        tensors = _tensors(self.model)
        for name, average in self._average.items():
            value = tensors.get(name)
            if value is None or value.shape != average.shape or not value.is_floating_point() | value.is_complex():
                raise problem(
                    where,
                    f"model must keep {name!r} {_described(average)}",
                    got=_described(value),
                    fix="Make a new WeightAverage after changing a model.",
                    error=RuntimeError,
                )
        return tensors


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Each parameter and buffer once, by the first of its names."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _wide(value: Tensor) -> torch.dtype | None:
    """The dtype to average in; None for what is copied."""
    if not value.is_floating_point() and not value.is_complex():
        return None
    return torch.float32 if value.itemsize < 4 else value.dtype


@torch.no_grad()
def _write(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        if name in tensors:
            tensors[name].copy_(value)


def _described(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "absent"
