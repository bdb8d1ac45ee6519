"""Feature distribution smoothing: running statistics per bin, smoothed over bins, and the hook that uses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._checks import instance, interval, is_tensor, keys, label_problem, length, number, one_of, problem, warn, whole
from .._numerics import is_wrapped
from .._ranks import check_group, summed
from .._settings import shown
from .._state import pack, unpack
from ..errors import CheckpointError, ShapeError
from ..labels.bins import Bins, Outside
from ..labels.grid import AnyBins, BinGrid, Windows, chosen_windows, saved_bins
from ..labels.kernels import FOLDED_KERNEL, Edges, smooth_rows, smoothing_window, usual_kernel
from .calibration import Map
from .covariance import (
    BinCovariance,
    DiagonalCovariance,
    Float64Module,
    FullCovariance,
    LowRankCovariance,
    Settings,
    blend,
)
from .moments import BinMoments, SubspaceMoments
from .passes import Passes, in_backward

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["FDS"]

_LOAD = "FDS.load_state_dict"
_STATE = ("bins", "covariance", "counters", "unplaced", "moments")


class FDS(Float64Module):
    r"""Feature distribution smoothing.

    While a model trains, the features of each bin are carried from the bin's own mean and covariance to those smoothed
    over neighbouring bins, :math:`z' = A_b (z - \mu_b) + \mu'_b`; with variances alone, as is usual,
    :math:`A_b = \mathrm{diag}\sqrt{v'_b / v_b}`. Statistics are gathered in the same pass, from the features as they
    come, and used from the next epoch on. In eval mode, and outside :meth:`labels`, features pass untouched.

    .. code-block:: python

        fds = FDS(bins, num_features=512)
        fds.attach(model.fc, "input")
        for epoch in range(epochs):
            for x, y in loader:
                with fds.labels(y):
                    loss = criterion(model(x), y)
                loss.backward()
                ...
            fds.end_epoch()

    A bin without samples lends nothing to its neighbours and changes nothing; the window is renormalised over the bins
    that have statistics. A bin with one sample borrows the smoothed variance. Under ``torch.distributed`` the epoch's
    sums are merged over ranks in :meth:`end_epoch`. Under ``torch.compile``, attach before the first call.

    Activation checkpointing, which runs a part of the forward again in backward, works in any order and outside
    ``labels``: each forward that it may repeat is found again by its features and carried as it was. For this backward
    waits for an accelerator once per such run, must come before :meth:`end_epoch`, and is refused where two of the
    latest forwards had the same features and other labels.

    Args:
        bins: the label axis, or a grid of several, whose joint bins then have statistics of their own.
        num_features: D, the number of features or channels.
        kernel: window over bins, odd length; over a grid one for all continuous axes, or one per axis. ``"auto"`` is
            the window of the paper, but smooths nothing over classes, which have no neighbours, nor over fewer than
            five bins. None smooths nothing.
        momentum: weight of the *old* statistics when an epoch is folded in, in [0, 1): 0 keeps the last epoch only. A
            bin's first epoch is taken whole.
        covariance: ``"diagonal"``, a variance per feature; ``"full"``, a (D, D) matrix per bin; or ``"low_rank"``, a
            full one within the ``rank`` leading directions of the covariance pooled over bins, found anew each epoch,
            and one variance beyond them. The first epoch that low rank calibrates moves means only, as none before it
            had a subspace.
        map: how a covariance that is not diagonal is carried to the smoothed one, ``"paper"`` or ``"transport"``, as
            in :func:`dir_toolkit.features.calibration.covariance_map`.
        rank: r, of ``"low_rank"``, below D.
        clip: bounds of the ratio of variances, in any direction.
        start_epoch: number of epochs folded in before features are calibrated, at least 1.
        shrinkage: pseudo-samples that pull each bin's covariance towards the one pooled over all bins; steadies bins of
            a few samples. None takes 0 for a diagonal, D for full and r for low rank.
        count_weighted: smooth each bin's statistics in proportion to its number of samples rather than all bins alike.
        edges: what lies beyond the label axis, as in :func:`dir_toolkit.labels.kernels.smooth`.
        outside: what a label beyond the axis does, as in :meth:`Bins.index`; a dropped sample is neither counted nor
            calibrated, so give pixels without a label one beyond the axis. On an accelerator ``"raise"`` raises at
            :meth:`end_epoch`, to keep the step free of host syncs.
        group: the ``torch.distributed`` group whose ranks hold different samples; None for all ranks. Where some ranks
            hold the same samples, as with tensor, sequence or pipeline parallelism, pass the data-parallel group, since
            their samples would count once per rank.
    Attributes:
        settings: the arguments but ``group``, by name, ``kernel`` as the window that they chose.
        smoothing: (K,) float64, the window of the first axis, scaled to sum to one.
        epoch: how many epochs are folded in.
    Shape:
        features: (N, D), or maps (N, D, H, W). labels: (N,), or (N, H, W) for one label per pixel of a map; over a grid
        of K axes (N, K) or (N, H, W, K). Each pixel of a map counts as a sample.
    Units:
        labels in those of the axis; features any.
    Memory:
        statistics and maps are float64, so that they cannot live on Apple GPUs. When an epoch ends, full covariance
        takes up to 80 bytes times B * D^2, and low rank 165 times B * r^2, 80 times D^2 and 200 times B * D; besides,
        up to 8 million numbers of the latest batches are held, or with low rank twice as many. So much must be free
        when the FDS is made: on the host, or in its container, which is where it is looked for even if the statistics
        then follow the features to an accelerator.
        Full covariance waits for an accelerator once a step, low rank now and then. In a step low rank holds r^2
        numbers for each sample, or each pixel of a map, so that large maps want a small rank.
    Raises:
        ValueError: a setting is out of bounds, or covariances would take more memory than is free. TypeError: an
        argument is of another kind; ``group`` is one that this rank is not in.
    Source:
        Yang et al. 2021, section 3.2, equation 2 (arXiv:2102.09554). The low-rank form is ours: probabilistic PCA
        (Tipping and Bishop 1999) in a subspace that all bins share.
    """

    running_count: Tensor
    running_mean: Tensor

    def __init__(
        self,
        bins: AnyBins,
        num_features: int,
        *,
        kernel: Windows | Literal["auto"] | None = "auto",
        momentum: float = 0.9,
        covariance: Literal["diagonal", "full", "low_rank"] = "diagonal",
        map: Map = "transport",
        rank: int = 32,
        clip: tuple[float, float] = (0.1, 10.0),
        start_epoch: int = 1,
        shrinkage: float | None = None,
        count_weighted: bool = False,
        edges: Edges = "reflect",
        outside: Outside = "raise",
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        instance((Bins, BinGrid), bins=bins)
        instance(bool, count_weighted=count_weighted)
        one_of("covariance", covariance, ("diagonal", "full", "low_rank"))
        one_of("map", map, ("paper", "transport"))
        one_of("edges", edges, ("reflect", "mirror", "zero"))
        one_of("outside", outside, ("raise", "clip", "drop"))
        check_group(group)
        self.bins, self.outside = bins, outside
        self.num_features = length("num_features", num_features)
        self.momentum = number("momentum", momentum, low=0, high=1, open_high=True)
        clip = interval("clip", clip)
        rank = whole("rank", rank, low=1)
        if covariance == "low_rank" and rank >= self.num_features:
            rule = f"rank must be below num_features {self.num_features}"
            raise problem(rule, got=rank, fix='Pass covariance="full".')
        self.start_epoch = whole("start_epoch", start_epoch, low=1)
        if shrinkage is not None:
            shrinkage = number("shrinkage", shrinkage, low=0)
        self.count_weighted = count_weighted
        windows = chosen_windows(kernel, bins) or tuple(np.ones(1) for _ in bins.axes)
        if isinstance(kernel, str) and all(len(window) == 1 for window in windows):
            warn(
                f"nothing is smoothed over {bins!r}, whose bins have no neighbours or are fewer than five, so features "
                "pass unchanged. Pass a window as kernel= if neighbouring bins are alike, else leave FDS out.",
            )
        self._windows = tuple(smoothing_window(window, size) for window, size in zip(windows, bins.shape, strict=True))
        self._edges: Edges = edges
        self._settings = {
            "bins": bins,
            "num_features": self.num_features,
            "kernel": windows if isinstance(bins, BinGrid) else windows[0],
            "momentum": self.momentum,
            "covariance": covariance,
            "map": map,
            "rank": rank,
            "clip": clip,
            "start_epoch": self.start_epoch,
            "shrinkage": shrinkage,
            "count_weighted": count_weighted,
            "edges": edges,
            "outside": outside,
        }
        self._group = _Group(group)
        settings = Settings(self.momentum, shrinkage, clip, map)
        shape = (len(bins), self.num_features)
        self.covariance: BinCovariance
        if covariance == "diagonal":
            self.covariance = DiagonalCovariance(*shape, settings)
        elif covariance == "full":
            self.covariance = FullCovariance(*shape, settings)
        else:
            self.covariance = LowRankCovariance(*shape, settings, rank=rank)
        self._row: Tensor | None = None
        self._passes = Passes()
        self._maps_made = 0  # how often
        self.attached = False
        self._ran = False
        self._gathered_by: object = None
        self._said: set[str] = set()
        self._begin(torch.empty(0).device)

    @torch.inference_mode(False)  # whose tensors training could not use
    def _begin(self, device: torch.device) -> None:
        """As of no sample, on a device."""
        shape = (len(self.bins), self.num_features)
        self.register_buffer("running_count", torch.zeros(shape[0], dtype=torch.float64, device=device))
        self.register_buffer("running_mean", torch.full(shape, torch.nan, dtype=torch.float64, device=device))
        self.covariance.begin(device)
        self.epoch = 0
        self._last_seen: int | None = None
        self._forget_epoch()

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self._settings)

    @property
    def smoothing(self) -> Tensor:
        return torch.from_numpy(self._windows[0].copy())

    @classmethod
    def reference(
        cls,
        bins: AnyBins,
        num_features: int,
        *,
        kernel: Windows | Literal["auto"] | None = "auto",
        momentum: float = 0.9,
    ) -> FDS:
        """The settings of the public DIR code: folded window (not over classes), mirrored edges, labels beyond the axis
        clipped, no shrinkage. With every bin filled it calibrates as that code does.

        Args:
            bins, num_features, momentum: as of the class.
            kernel: as of the class; ``"auto"`` is ``gaussian(5, 2, folded=True)``, with the same exceptions.
        Source:
            github.com/YyzHarry/imbalanced-regression, ``fds.py``.
        """
        instance((Bins, BinGrid), bins=bins)
        if isinstance(kernel, str) and kernel == "auto" and (usual := usual_kernel(bins, FOLDED_KERNEL)) is not None:
            kernel = usual
        return cls(bins, num_features, kernel=kernel, momentum=momentum, edges="mirror", outside="clip")

    def attach(self, module: nn.Module, where: Literal["input", "output"]) -> RemovableHandle:
        """Gather from and calibrate a module's first input or its output whenever it runs.

        Returns:
            a handle; ``handle.remove()`` detaches, which ``torch.jit.script`` and ``torch.compile(fullgraph=True)``
            ask for.
        Raises:
            TypeError: ``module`` is no module. ValueError: ``where`` is neither. UsageError: this FDS is attached to it
            already.
        """
        if not isinstance(module, nn.Module):
            raise problem("module must be a torch.nn.Module", got=type(module).__name__, error=TypeError)
        one_of("where", where, ("input", "output"))
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if any(isinstance(hook, _Hook) and hook.fds is self for hook in hooks):
            raise problem(
                "module must have no hook of this FDS yet, since features would be counted and calibrated twice",
                got=f"a {type(module).__name__} that has one",
                fix="Call remove() on the handle that attach returned, or make another FDS.",
                error=RuntimeError,
            )
        self.attached = True
        if where == "input":
            return module.register_forward_pre_hook(_InputHook(self))
        return module.register_forward_hook(_OutputHook(self))

    @contextmanager
    def labels(self, labels: Tensor) -> Iterator[None]:
        """Within, attached modules run on samples with these labels; of several, the first to run is the one whose
        features are gathered and calibrated.

        Raises:
            LabelError: as :meth:`Bins.index`. ShapeError: labels are neither (N,) nor (N, H, W), over a grid followed
            by one axis of its dimensions.
        """
        outer, gathered_by, ran = self._row, self._gathered_by, self._ran
        self._row, self._gathered_by, self._ran = self._place(labels), None, False
        try:
            yield
            if self.attached and not self._ran:
                self._warn_once(
                    "idle",
                    "no attached module ran inside labels(). Attach before the first call of a compiled model, "
                    "and run the model inside `with fds.labels(y):`.",
                )
        finally:
            self._row, self._gathered_by, self._ran = outer, gathered_by, ran or self._ran

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Gather the statistics of features, without a hook. Features are not changed."""
        row = self._place(labels)
        self._check_features(features, row)
        self._gather(features, row)

    def calibrate(self, features: Tensor, labels: Tensor) -> Tensor:
        """Features carried to the smoothed statistics of their bins, without a hook; a new tensor of the same dtype.

        Before ``start_epoch`` epochs have ended, and in eval mode, the features themselves.
        """
        row = self._place(labels)
        self._check_features(features, row)
        return self._calibrate(features, row)

    @torch.inference_mode(False)  # whose tensors could not be written to in the next epoch
    @torch.no_grad()
    def end_epoch(self) -> None:
        """Fold the epoch's statistics, merged over the group's ranks, into the running ones, and smooth them again.

        Raises:
            LabelError: a label lay beyond the axis in this epoch, on an accelerator, under ``outside="raise"``.
            ValueError: features were not finite, or none were gathered. The running statistics are then as before, and
            the epoch's are dropped.
        """
        moments, seen = self._epoch_moments.all_reduce(self._group.of), self._seen
        (unplaced,) = summed(self._unplaced.to(moments.count.device), group=self._group.of)
        self._forget_epoch()
        if self.outside == "raise" and int(unplaced):
            raise label_problem(
                f"labels must lie on the label axis {self.bins!r}",
                got=f"{int(unplaced)} that do not",
                fix='Pass outside="clip" or outside="drop".',
            )
        if int(moments.count.sum()) == 0:
            raise problem(
                "features must be gathered before an epoch ends",
                got="none",
                fix="Run the model in training mode inside `with fds.labels(y):`.",
            )
        broken = ~moments.finite()
        if bool(broken.any()):
            raise problem(
                "features must be finite",
                got=f"NaN or infinity in bins {broken.nonzero().flatten().tolist()}",
                fix="Look at the loss and the learning rate.",
            )
        self._last_seen = seen
        self.to(moments.mean.device)
        self._fold(moments)
        del moments  # matrices, it may be, and the maps are about to need room
        self.epoch += 1
        self._refresh()

    def statistics(self) -> dict[str, Tensor]:
        """Running and smoothed statistics, float64 and NaN where unknown: ``mean``, ``variance`` (after shrinkage),
        ``smoothed_mean`` and ``smoothed_variance``, each (B, D); and ``count`` (B,). Besides, with full covariance,
        ``covariance`` and ``smoothed_covariance`` (B, D, D); with low rank these within the ``basis`` (D, r), so
        (B, r, r), and the variance beyond it, ``rest`` and ``smoothed_rest`` (B,)."""
        mean, count = self.running_mean, self.running_count
        weight = count if self.count_weighted else (count > 0).double()
        return {
            "count": count.clone(),
            "mean": mean.clone(),
            "smoothed_mean": self._smooth(mean, weight),
            **self.covariance.statistics(count, lambda values: self._smooth(values, weight)),
        }

    def _smooth(self, values: Tensor, weight: Tensor) -> Tensor:
        """Smooth over the bins whose values are known, the window renormalised; NaN where none is in reach."""
        known = values.isfinite()
        share = weight[:, None] * known
        return self._over_bins(values.nan_to_num() * share) / self._over_bins(share)

    def _over_bins(self, values: Tensor) -> Tensor:
        """(B, D), smoothed along each axis in turn, since a window over joint bins is their product."""
        values = values.unflatten(0, self.bins.shape)
        for k, window in enumerate(self._windows):
            if len(window) > 1:
                values = smooth_rows(values.movedim(k, 0), window, self._edges).movedim(0, k)
        return values.flatten(0, -2)

    def _fold(self, moments: BinMoments | SubspaceMoments) -> None:
        """running = momentum * running + (1 - momentum) * epoch, where the epoch has seen the bin."""
        present = moments.count > 0
        count = moments.count.double()
        self.running_mean = blend(self.running_mean, moments.mean, present, self.momentum)
        before = torch.where(self.running_count > 0, self.running_count, torch.nan)
        self.running_count = blend(before, count, present, self.momentum).nan_to_num()
        self.covariance.fold(moments, self._group.of)
        self._epoch_moments = self.covariance.moments()  # anew, since folding may have found another subspace

    @torch.inference_mode(False)
    @torch.no_grad()
    def _refresh(self) -> None:
        self._maps_made += 1
        if self.epoch >= self.start_epoch:
            self.covariance.refresh(self.statistics())

    @torch.inference_mode(False)
    def _forget_epoch(self) -> None:
        self._epoch_moments = self.covariance.moments()
        self._unplaced = torch.zeros((), dtype=torch.int64, device=self.running_count.device)
        self._seen = self._rounds = 0
        self._evaluated = False

    def _place(self, labels: Tensor) -> Tensor:
        is_tensor(labels=labels)
        grid = isinstance(self.bins, BinGrid)
        if labels.ndim not in ((2, 4) if grid else (1, 3)):
            one_channel = not grid and labels.ndim in (2, 4) and labels.shape[1] == 1
            k = len(self.bins.axes)
            shapes = f"(N, {k}), or (N, H, W, {k})" if grid else "(N,), or (N, H, W)"
            fix = "Use labels.squeeze(1)." if one_channel else ""
            raise problem(
                f"labels must be {shapes} for one label per pixel",
                got=tuple(labels.shape),
                fix=fix,
                error=ShapeError,
            )
        row = self.bins.rows(labels, self.outside)
        return row.clone() if row.is_inference() and not torch.is_inference_mode_enabled() else row

    def _check_features(self, features: Tensor, row: Tensor) -> None:
        if not isinstance(features, Tensor) or not features.is_floating_point():
            got = f"dtype {features.dtype}" if isinstance(features, Tensor) else type(features).__name__
            raise problem("features must be one tensor of floats", got=got, error=TypeError)
        is_tensor(features=features)
        _refuse_without_float64(features.device)
        if is_wrapped(features):
            raise problem(
                "features must not be under a transform of torch.func, since statistics are kept",
                got="such features",
                fix="Leave out the labels, use eval mode, or call remove() on the handle before.",
                error=RuntimeError,
            )
        if features.is_cuda and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise problem(
                "features must not be gathered while a CUDA graph is captured, which would not count its replays",
                got="a stream that is capturing",
                fix="Capture the parts before and after the attached module, each by itself.",
                error=RuntimeError,
            )
        if features.ndim not in (2, 4) or features.shape[1] != self.num_features:
            raise problem(
                f"features must be (N, {self.num_features}) or (N, {self.num_features}, H, W)",
                got=tuple(features.shape),
                error=ShapeError,
            )
        pixels = (features.shape[0], *features.shape[2:])
        if tuple(row.shape) not in (pixels, pixels[:1]):
            fix = ""
            if features.ndim == 4 and row.ndim == 3 and len(row) == pixels[0]:
                fix = (
                    f"Resize the labels to the maps: F.interpolate(labels[:, None], {pixels[1:]})[:, 0], whose "
                    "nearest pixel makes up no labels, or attach where maps have the size of the labels."
                )
                if isinstance(self.bins, BinGrid):
                    fix = f"Resize the labels to {pixels[1:]}, or attach where maps have the size of the labels."
            raise problem(
                "features and labels must have the same samples",
                got=f"{tuple(features.shape)} and {tuple(row.shape)}",
                fix=fix,
                error=ShapeError,
            )

    @torch.inference_mode(False)  # whose tensors could not be written to in the next step
    @torch.no_grad()
    def _gather(self, features: Tensor, row: Tensor) -> None:
        row = row.to(features.device)
        if features.ndim == 4:
            if row.ndim == 1:
                row = row[:, None, None].expand(features.shape[0], *features.shape[2:])
            features = features.detach().movedim(1, 3).flatten(0, 2)  # (N * H * W, D)
            row = row.flatten()
        self._epoch_moments._update(features, row)
        if self._unplaced.device != row.device:
            self._unplaced = self._unplaced.to(row.device)
        self._unplaced += (row == len(self.bins)).sum()
        self._seen += features.shape[0]
        if self._last_seen is not None and self._seen > 2 * self._last_seen:
            self._warn_forgotten_end()

    def _calibrate(self, features: Tensor, row: Tensor) -> Tensor:
        if self.epoch < self.start_epoch or not self.training:
            return features
        return self._carried(features, row)

    def _carried(self, features: Tensor, row: Tensor) -> Tensor:
        if self.running_count.device != features.device:
            self.to(features.device)
        return self.covariance.calibrate(features, row)

    def _run(self, hook: _Hook, module: nn.Module, features: Tensor) -> Tensor:
        """What a hook does: gather, then calibrate."""
        self._ran = True
        active = module.training and self.training
        if in_backward():
            return self._repeat(hook, features, must=active)
        if not active:
            self._evaluated = self._evaluated or self._seen > 0
            return features
        if self._row is None:
            if isinstance(features, Tensor) and features.is_floating_point():
                self._passes.keep(hook, features, None, None)
            self._warn_once(
                "labels",
                "a training pass ran without labels, so features were neither gathered nor calibrated. "
                "Run it inside `with fds.labels(y):`.",
            )
            return features
        self._check_features(features, self._row)
        if self._gathered_by not in (None, hook):
            self._passes.keep(hook, features, None, None)
            self._warn_once(
                "hooks",
                "two modules that this FDS is attached to ran within one labels(). The second one's features are "
                "neither gathered nor calibrated, so that none are twice. Call remove() on one of the two handles.",
            )
            return features
        self._gathered_by = hook
        if self._evaluated:
            self._evaluated = False
            self._rounds += 1
            if self._rounds > 1:
                self._warn_forgotten_end()
        self._gather(features, self._row)
        self._passes.keep(hook, features, self._row, self._maps_made if self.epoch >= self.start_epoch else None)
        return self._calibrate(features, self._row)

    def _repeat(self, hook: _Hook, features: Tensor, *, must: bool) -> Tensor:
        """Activation checkpointing runs the module again in backward: the same calibration, and nothing counted
        twice."""
        if not (isinstance(features, Tensor) and features.is_floating_point()):
            return features
        before = self._passes.find(hook, features, self._maps_made, must=must)
        if before is None or before.row is None or before.maps is None:
            return features
        if before.maps != self._maps_made:
            raise problem(
                "with activation checkpointing backward must run before end_epoch() and load_state_dict()",
                got="a forward before and its backward after",
                fix="Call fds.end_epoch() after the backward of the epoch's last step.",
                error=RuntimeError,
            )
        return self._carried(features, before.row)

    def _warn_forgotten_end(self) -> None:
        self._warn_once(
            "end",
            "more than one epoch has been gathered since the last end_epoch(). Call fds.end_epoch() once after "
            "each training epoch; features are not calibrated before.",
        )

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._said:
            self._said.add(key)
            warn(message)

    @torch.inference_mode(False)
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FDS:
        device = fn(self.running_count[:0]).device
        _refuse_without_float64(device)
        if self.running_count.is_meta and device.type != "meta":  # what it had seen is nowhere
            self._begin(device)
            return self
        super()._apply(fn)
        self._epoch_moments.to(device)
        self._unplaced = self._unplaced.to(device)
        return self

    def _unsaved(self) -> dict[str, Any]:
        """What is saved besides buffers. What changes while a model trains stands in tensors, so that the state of a
        diagonal form is of one length throughout."""
        meta = self.running_count.is_meta
        return {
            "bins": self.bins.settings,
            "covariance": self.covariance.form,
            "counters": torch.tensor(
                [self.epoch, self._seen, -1 if self._last_seen is None else self._last_seen], device="cpu"
            ),
            "unplaced": torch.zeros((), dtype=torch.int64, device="cpu") if meta else self._unplaced,
            "moments": None if meta else self._epoch_moments.state_dict(),
        }

    def get_extra_state(self) -> Tensor:
        return pack(self._unsaved())

    def set_extra_state(self, state: Tensor) -> None:
        self._take(*self._unpacked(state, self.running_count.device))

    def _unpacked(self, packed: object, device: torch.device) -> tuple[list[int], Tensor, Any]:
        """Counters, unplaced labels and moments, all checked."""
        state = unpack(packed)
        keys("the saved state", state, _STATE)
        saved = saved_bins(state["bins"])
        if saved != self.bins:
            rule = "the saved statistics must be over the same bins"
            raise problem(rule, got=f"{saved!r} for {self.bins!r}", error=CheckpointError)
        if state["covariance"] != self.covariance.form:
            rule = f"the saved statistics must be of covariance {self.covariance.form!r}"
            raise problem(rule, got=repr(state["covariance"]), error=CheckpointError)
        for name, shape in (("counters", (3,)), ("unplaced", ())):
            value = state[name]
            is_tensor(**{name: value})
            if value.dtype != torch.int64 or value.shape != shape:
                rule, got = f"{name} must be int64 of shape {shape}", f"{value.dtype} of shape {tuple(value.shape)}"
                raise problem(rule, got=got, error=CheckpointError)
        counters, unplaced = state["counters"].tolist(), state["unplaced"]
        if min(*counters[:2], counters[2] + 1, int(unplaced)) < 0:
            rule = "the saved counters must not be negative"
            raise problem(rule, got=f"{counters} and {int(unplaced)}", error=CheckpointError)
        moments = self.covariance.moments(device)
        if state["moments"] is not None:
            moments.load_state_dict(state["moments"])
        return counters, unplaced.to(device), moments

    def _take(self, counters: list[int], unplaced: Tensor, moments: Any) -> None:
        self.epoch, self._seen, last_seen = counters
        self._last_seen = None if last_seen < 0 else last_seen
        self._unplaced, self._epoch_moments = unplaced, moments

    @torch.inference_mode(False)
    @torch.no_grad()
    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """All that there is, covariances included, once all of it was checked."""
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        saved = {name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)}
        expected = {*(name for name, _, _ in self._persistent()), "_extra_state"}
        if prefix and not expected & saved.keys():  # of a model without FDS, which torch takes unless it is strict
            missing_keys += [prefix + name for name in sorted(expected)]
            return
        missing, unknown = sorted(expected - saved.keys()), sorted(saved.keys() - expected)
        if missing or unknown:
            rule = f"the saved state must have the keys {sorted(expected)}"
            raise problem(rule, got=f"missing {missing}, unknown {unknown}", error=CheckpointError)
        values = {
            name: _checked_buffer(name, saved[name], module._buffers[leaf]) for name, module, leaf in self._persistent()
        }
        device = self.running_count.device
        if device.type == "meta":
            device = values["running_count"].device
        taken = self._unpacked(saved["_extra_state"], device)
        if self.running_count.is_meta:
            self._begin(device)
        for name, module, leaf in self._persistent():
            module._buffers[leaf] = values[name].to(device, torch.float64, copy=True)
        self._take(*taken)
        self._refresh()

    def _persistent(self) -> list[tuple[str, nn.Module, str]]:
        """Buffers that are saved: name, the module that has it, and its name there."""
        return [
            (f"{prefix}{name}", module, name)
            for prefix, module in (("", self), ("covariance.", self.covariance))
            for name in module._buffers
            if name not in module._non_persistent_buffers_set
        ]

    def extra_repr(self) -> str:
        return shown(self.settings)


def _checked_buffer(name: str, value: object, own: Tensor | None) -> Tensor:
    """Running statistics that a file holds. They may be NaN, which is unknown."""
    assert own is not None
    is_tensor(**{name: value})
    assert isinstance(value, Tensor)
    if value.is_meta:
        raise problem(f"{name} must hold values", got="a tensor on the meta device", error=CheckpointError)
    if value.shape != own.shape or not value.is_floating_point():
        rule = f"{name} must be floats of shape {tuple(own.shape)}"
        raise problem(rule, got=f"{value.dtype} of shape {tuple(value.shape)}", error=ShapeError)
    if bool(value.isinf().any()) or (name == "running_count" and bool(value.isnan().any())):
        raise problem(f"{name} must be finite", got="infinity or NaN", error=CheckpointError)
    if not name.endswith(("mean", "running_covariance", "basis")) and bool((value < 0).any()):
        got = f"a minimum of {value.nan_to_num().min().item():g}"
        raise problem(f"{name} must not be negative", got=got, error=CheckpointError)
    return value


def _refuse_without_float64(device: torch.device) -> None:
    if device.type == "mps":
        raise problem(
            "statistics must be on a device that knows float64, in which they are kept",
            got=f"device {str(device)!r}",
            fix="Train on the CPU or a CUDA device, or without FDS.",
            error=RuntimeError,
        )


class _Group:
    """A process group, which copies of an FDS share and no file can hold."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self.of = group

    def __deepcopy__(self, memo: object) -> _Group:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.of is not None:
            fix = "Save its state_dict()."
            raise problem("an FDS must have no group, to be pickled", got=repr(self.of), fix=fix, error=TypeError)
        return _Group, (None,)


class _Hook:
    """A class, and no lambda, so that a hooked model can be pickled."""

    def __init__(self, fds: FDS) -> None:
        self.fds = fds
        self.__name__ = type(self).__name__.strip("_")

    @property
    def __globals__(self) -> dict[str, Any]:
        """What ``torch.jit.script``, and nothing else, asks hooks for: a hook that keeps statistics has no script."""
        raise problem(
            "a module must have no hook of an FDS when torch.jit.script compiles it",
            got="one that is attached",
            fix="Call remove() on the handle that attach returned, and script the trained model.",
            error=RuntimeError,
        )


class _InputHook(_Hook):
    @torch._disable_dynamo  # torch.compiler.disable imports the whole compiler at once, this when it is called
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not args:
            raise problem(
                "the attached module must get its features as first positional input",
                got="none",
                error=TypeError,
            )
        return (self.fds._run(self, module, args[0]), *args[1:])


class _OutputHook(_Hook):
    @torch._disable_dynamo
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.fds._run(self, module, output)
