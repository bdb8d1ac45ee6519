"""Running statistics of features per bin: the current epoch, finished epochs, and saved states."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._checks import instance, is_tensor, keys, label_problem, problem, require, same_bins, warn
from .._ranks import check_group, is_parallel, summed
from .._state import Float64Module, pack, unpack
from ..errors import CheckpointError
from ..labels.bins import Outside
from ..labels.grid import AnyBins, saved_bins
from ._inputs import require_float64, saved_tensors
from .covariance import BinCovariance, blend, unknown
from .rows import as_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["RunningStatistics"]


class RunningStatistics(Float64Module):
    """Running statistics of features per bin. :meth:`end_epoch` updates them with the samples of the current epoch.

    Attributes:
        running_count: (B,) float64.
        running_mean: (B, D) float64.
    """

    running_count: Tensor
    running_mean: Tensor
    bins: AnyBins
    num_features: int
    momentum: float
    outside: Outside
    covariance: BinCovariance

    def __init__(self, group: ProcessGroup | None) -> None:
        super().__init__()
        check_group(group)
        self._group = _Group(group)
        self.warns_of_forgotten_end = True
        self._warned: set[str] = set()

    @torch.inference_mode(False)
    def _begin(self, device: torch.device) -> None:
        """Create empty buffers on a device."""
        self.register_buffer("running_count", torch.zeros(len(self.bins), dtype=torch.float64, device=device))
        self.register_buffer("running_mean", unknown(len(self.bins), self.num_features, device=device))
        self.covariance.begin(device)
        self.epoch = 0
        self._last_seen = 0
        self.drop_epoch()

    def _refresh(self) -> None:
        """Compute again what depends on the running statistics."""

    # ---- an epoch ----

    @property
    def has_open_epoch(self) -> bool:
        """Whether features were accumulated since the last epoch ended."""
        return self._all_seen() > 0

    def _all_seen(self) -> int:
        """The number of samples of this epoch, for which this waits for an accelerator."""
        return self._seen + (0 if self._seen_compiled.is_meta else int(self._seen_compiled))

    @torch.inference_mode(False)
    def drop_epoch(self) -> None:
        """Discard the features since the last epoch ended, for example after an aborted training."""
        self._moments = self.covariance.moments()
        self._unplaced = torch.zeros((), dtype=torch.int64, device=self.running_count.device)
        self._seen = 0  # without compiled steps, whose number of samples stays on the device
        self._seen_compiled = torch.zeros_like(self._unplaced)
        self._evaluated_at: set[int] = set()  # the number of samples seen before each evaluation

    @torch.inference_mode(False)
    @torch.no_grad()
    def _gather(self, features: Tensor, rows: Tensor, axis: int) -> None:
        """Add features to the moments of the current epoch. Warns if epochs are never ended."""
        self._accumulate(features, rows.to(features.device), axis)
        self._seen += len(features)
        if self._seen > 2 * self._last_seen > 0 or len(self._evaluated_at) > 1:
            self._warn_once(
                "end",
                "more than one epoch has been gathered since the last end_epoch(). Call fds.end_epoch() once after "
                "each training epoch. Features are not calibrated before.",
            )

    def _accumulate(self, features: Tensor, rows: Tensor, axis: int) -> None:
        flat, index, _ = as_rows(features.detach(), rows, axis)
        self._moments.update(flat, index.clamp_max(len(self.bins)))
        if self._unplaced.device != rows.device:
            self._unplaced = self._unplaced.to(rows.device)
        self._unplaced.add_((rows > len(self.bins)).sum())

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned and (key != "end" or self.warns_of_forgotten_end):
            self._warned.add(key)
            warn(message)

    @torch.inference_mode(False)
    @torch.no_grad()
    def end_epoch(self) -> None:
        """Update the running statistics with those of the epoch, and smooth them.

        Statistics are merged over the ranks of the group, which must all call this.

        Raises:
            LabelError: a label of this epoch on an accelerator was invalid. ValueError: features were not finite, or
                there were none. In all these cases the running statistics do not change, and those of the epoch are
                dropped.
        """
        moments, seen = self._moments.all_reduce(self._group.of), self._all_seen()
        (unplaced,) = summed(self._unplaced.to(moments.count.device), group=self._group.of)
        self.drop_epoch()
        if int(unplaced):
            rule, fix = f"labels must lie on the label axis {self.bins!r}", 'Pass outside="drop", and missing="drop".'
            raise label_problem(rule, got=f"{int(unplaced)} that do not", fix=fix)
        some, fix = int(moments.count.sum()) > 0, "Run the model in training mode inside `with fds.labels(y):`."
        require(some, "features must be gathered before an epoch ends", got="none", fix=fix)
        broken = ~moments.finite()
        if bool(broken.any()):
            got = f"NaN or infinity in bins {broken.nonzero().flatten().tolist()}"
            raise problem("features must be finite", got=got, fix="Check the loss and the learning rate.")
        self._last_seen = seen
        self.to(moments.mean.device)
        present, count = moments.count > 0, moments.count.double()
        self.running_mean = blend(self.running_mean, moments.mean, present, self.momentum)
        before = torch.where(self.running_count > 0, self.running_count, torch.nan)
        self.running_count = blend(before, count, present, self.momentum).nan_to_num()
        self.covariance.fold(moments, self._group.of)
        del moments  # frees matrices before the maps need memory
        self._moments = self.covariance.moments()  # the subspace may have changed
        self.epoch += 1
        self._refresh()

    # ---- device ----

    @torch.inference_mode(False)
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        device = fn(self.running_count[:0]).device
        require_float64(device)
        if self.running_count.is_meta and device.type != "meta":  # meta tensors hold no statistics
            self._begin(device)
            return self
        super()._apply(fn)
        self._moments.to(device)
        self._unplaced, self._seen_compiled = self._unplaced.to(device), self._seen_compiled.to(device)
        return self

    # ---- saved states ----

    def get_extra_state(self) -> Tensor:
        return self._packed(self._unplaced, None if self.running_count.is_meta else self._moments)

    def _packed(self, unplaced: Tensor, moments: Any) -> Tensor:
        """The state besides buffers. Values that change in training are tensors, so that the length of the state is
        constant for a diagonal covariance."""
        return pack(
            {
                "bins": self.bins.settings,
                "covariance": self.covariance.form,
                "counters": torch.tensor([self.epoch, self._all_seen(), self._last_seen], device="cpu"),
                "unplaced": torch.zeros_like(unplaced, device="cpu") if moments is None else unplaced,
                "moments": None if moments is None else moments.state_dict(),
            }
        )

    def set_extra_state(self, state: Tensor) -> None:
        """Load the statistics that are not buffers, after all of them were checked."""
        saved = unpack(state)
        keys("the saved state", saved, ("bins", "covariance", "counters", "unplaced", "moments"), error=CheckpointError)
        same_bins("the saved statistics", saved_bins(saved["bins"]), self.bins, error=CheckpointError)
        form, own_form = saved["covariance"], self.covariance.form
        rule = f"the saved statistics must have covariance {own_form!r}"
        require(form == own_form, rule, got=repr(form), error=CheckpointError)
        own = {"counters": torch.zeros(3, dtype=torch.int64, device="cpu"), "unplaced": self._unplaced}
        numbers = saved_tensors({name: saved[name] for name in own}, own, not_negative=own)
        moments = self.covariance.moments()
        if saved["moments"] is not None:
            moments.load_state_dict(saved["moments"])
        self.epoch, self._seen, self._last_seen = numbers["counters"].tolist()
        self._unplaced, self._moments = numbers["unplaced"], moments
        self._seen_compiled = torch.zeros_like(self._unplaced)

    def merged_state(self) -> dict[str, Any]:
        """``state_dict()`` with the current epoch merged over the ranks of the group, which must all call this.

        Use it for a checkpoint that one rank writes for all ranks, and load it by :meth:`load_merged_state`.
        """
        state = dict(self.state_dict())
        if is_parallel():
            (unplaced,) = summed(self._unplaced, group=self._group.of)
            state["_extra_state"] = self._packed(unplaced, copy.deepcopy(self._moments).all_reduce(self._group.of))
        return state

    def load_merged_state(self, state: dict[str, Any]) -> None:
        """Load the result of :meth:`merged_state` on each rank of a group of any size. The first rank gets the current
        epoch.

        Raises:
            CheckpointError: the state has other bins or another covariance, or is damaged. Then nothing changes.
                TypeError: it is not a dict.
        """
        instance(dict, state=state)
        self.load_state_dict(state)
        if is_parallel() and dist.get_rank(self._group.of) != 0:
            seen = self._seen
            self.drop_epoch()
            self._seen = seen  # every rank must call end_epoch

    @torch.inference_mode(False)
    @torch.no_grad()
    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *others: Any,
    ) -> None:
        """Load the whole state, including covariances."""
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing_keys, *others)
        saved = {name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)}
        expected = {*self._saved_buffers(), "_extra_state"}
        if (
            prefix and not expected & saved.keys()
        ):  # the state of a model without FDS, which torch handles by ``strict``
            missing_keys += [prefix + name for name in sorted(expected)]
            return
        keys("the saved state", saved, expected, error=CheckpointError)
        extra = saved.pop("_extra_state")
        if self.running_count.is_meta:
            is_tensor(running_count=saved["running_count"])
            self._begin(saved["running_count"].device)
        owners = self._saved_buffers()
        own = {name: owner.get_buffer(leaf) for name, (owner, leaf) in owners.items()}
        squares = [name for name in own if not name.endswith(("mean", "running_covariance", "basis"))]
        values = saved_tensors(saved, own, not_negative=squares, finite=True)
        if bool(values["running_count"].isnan().any()):
            raise problem("running_count must be finite", got="NaN", error=CheckpointError)
        self.set_extra_state(extra)
        for name, (owner, leaf) in owners.items():
            setattr(owner, leaf, values[name])
        self._refresh()

    def _saved_buffers(self) -> dict[str, tuple[nn.Module, str]]:
        """For each name in the saved state, the module of the buffer and the name of the buffer there."""
        return {
            prefix + leaf: (module, leaf)
            for prefix, module in (("", self), ("covariance.", self.covariance))
            for leaf in module._buffers
            if leaf not in module._non_persistent_buffers_set
        }


class _Group:
    """A process group, which copies of an FDS share, and which cannot be pickled."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self.of = group

    def __deepcopy__(self, memo: object) -> _Group:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.of is not None:
            fix = "Save its state_dict()."
            raise problem("an FDS must not have a group to be pickled", got=repr(self.of), fix=fix, error=TypeError)
        return _Group, (None,)
