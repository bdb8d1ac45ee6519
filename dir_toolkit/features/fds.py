"""Feature distribution smoothing: running statistics per bin, smoothed over bins, and the hook that uses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._checks import instance, interval, is_tensor, keys, label_problem, number, one_of, problem, warn, whole
from ..errors import CheckpointError, ShapeError
from ..labels.bins import Bins, Outside
from ..labels.grid import AnyBins, BinGrid, Windows, checked_windows, saved_bins
from ..labels.kernels import DEFAULT_KERNEL, Edges, gaussian, smoothing_matrix
from .calibration import diagonal_map
from .moments import BinMoments

__all__ = ["FDS"]

_FOLDED = gaussian(5, 2, folded=True)


class FDS(nn.Module):
    r"""Feature distribution smoothing.

    While a model trains, the features of each bin are shifted and scaled from the bin's own mean and variance to those
    smoothed over neighbouring bins, :math:`z' = \sqrt{v'_b / v_b}\,(z - \mu_b) + \mu'_b`. Statistics are gathered in
    the same pass, from the features as they come, and used from the next epoch on. In eval mode, and outside
    :meth:`labels`, features pass untouched.

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
    sums are merged over ranks in :meth:`end_epoch`. Under ``torch.compile``, attach before the first call. With
    activation checkpointing, run backward inside ``labels`` too.

    Args:
        bins: the label axis, or a grid of several, whose joint bins then have statistics of their own.
        num_features: D, the number of features or channels.
        kernel: window over bins, odd length. The smoothing is kept as a (B, B) matrix; over a grid, one an axis, and
            the window may be one for all axes or one an axis.
        momentum: weight of the *old* statistics when an epoch is folded in, in [0, 1): 0 keeps the last epoch only. A
            bin's first epoch is taken whole.
        covariance: ``"diagonal"``, a variance a feature.
        clip: bounds of the ratio of variances.
        start_epoch: number of epochs folded in before features are calibrated, at least 1.
        shrinkage: pseudo-samples that pull each bin's variance towards the one pooled over all bins; steadies bins of a
            few samples.
        count_weighted: smooth each bin's statistics in proportion to its number of samples rather than all bins alike.
        edges: what lies beyond the label axis, as in :func:`dir_toolkit.labels.kernels.smooth`.
        outside: what a label beyond the axis does, as in :meth:`Bins.index`; a dropped sample is neither counted nor
            calibrated, so give pixels without a label one beyond the axis. On an accelerator ``"raise"`` raises at
            :meth:`end_epoch`, to keep the step free of host syncs.
    Shape:
        features: (N, D), or maps (N, D, H, W). labels: (N,), or (N, H, W) for one label a pixel of a map; over a grid
        of K axes (N, K) or (N, H, W, K). Each pixel of a map counts as a sample.
    Units:
        labels in those of the axis; features any.
    Source:
        Yang et al. 2021, section 3.2, equation 2 (arXiv:2102.09554).
    """

    smoothing: Tensor
    running_count: Tensor
    running_mean: Tensor
    running_variance: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        bins: AnyBins,
        num_features: int,
        *,
        kernel: Windows = DEFAULT_KERNEL,
        momentum: float = 0.9,
        covariance: Literal["diagonal"] = "diagonal",
        clip: tuple[float, float] = (0.1, 10.0),
        start_epoch: int = 1,
        shrinkage: float = 0.0,
        count_weighted: bool = False,
        edges: Edges = "reflect",
        outside: Outside = "raise",
    ) -> None:
        super().__init__()
        instance("FDS", (Bins, BinGrid), bins=bins)
        instance("FDS", bool, count_weighted=count_weighted)
        one_of("FDS", "covariance", covariance, ("diagonal",))
        one_of("FDS", "outside", outside, ("raise", "clip", "drop"))
        self.bins, self.outside = bins, outside
        self.num_features = whole("FDS", "num_features", num_features, low=1)
        self.momentum = number("FDS", "momentum", momentum, low=0, high=1, open_high=True)
        self.clip = interval("FDS", "clip", clip)
        self.start_epoch = whole("FDS", "start_epoch", start_epoch, low=1)
        self.shrinkage = number("FDS", "shrinkage", shrinkage, low=0)
        self.count_weighted = count_weighted
        windows = checked_windows("FDS", kernel, bins)
        self.epoch = 0

        shape = (len(bins), self.num_features)
        for k, (size, window) in enumerate(zip(bins.shape, windows, strict=True)):
            matrix = torch.from_numpy(smoothing_matrix(size, window, edges=edges))
            self.register_buffer(_smoothing_name(k), matrix)
        self.register_buffer("running_count", torch.zeros(len(bins), dtype=torch.float64))
        self.register_buffer("running_mean", torch.full(shape, torch.nan, dtype=torch.float64))
        self.register_buffer("running_variance", torch.full(shape, torch.nan, dtype=torch.float64))
        # One row a bin, and a last one, for samples that have no bin, which leaves features alone.
        self.register_buffer("scale", torch.ones(len(bins) + 1, self.num_features, dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(len(bins) + 1, self.num_features, dtype=torch.float64))
        self._cast: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

        self._epoch_moments = BinMoments(*shape)
        self._unplaced = torch.zeros((), dtype=torch.int64)
        self._row: Tensor | None = None
        self._seen = 0
        self._last_seen: int | None = None
        self.attached = False
        self._ran = self._evaluated = False
        self._rounds = 0
        self._said: set[str] = set()

    @classmethod
    def reference(cls, bins: AnyBins, num_features: int, *, kernel: Windows = _FOLDED, momentum: float = 0.9) -> FDS:
        """The settings of the public DIR code: folded window, mirrored edges, labels beyond the axis clipped, no
        shrinkage. With every bin filled it calibrates as that code does.

        Source:
            github.com/YyzHarry/imbalanced-regression, ``fds.py``.
        """
        return cls(bins, num_features, kernel=kernel, momentum=momentum, edges="mirror", outside="clip")

    def attach(self, module: nn.Module, where: Literal["input", "output"]) -> RemovableHandle:
        """Gather from and calibrate a module's first input or its output whenever it runs.

        Returns:
            a handle; ``handle.remove()`` detaches.
        Raises:
            TypeError: ``module`` is no module. ValueError: ``where`` is neither.
        """
        if not isinstance(module, nn.Module):
            raise problem("FDS.attach", "module must be a torch.nn.Module", got=type(module).__name__, error=TypeError)
        one_of("FDS.attach", "where", where, ("input", "output"))
        self.attached = True
        if where == "input":
            return module.register_forward_pre_hook(_InputHook(self))
        return module.register_forward_hook(_OutputHook(self))

    @contextmanager
    def labels(self, labels: Tensor) -> Iterator[None]:
        """Within, attached modules run on samples with these labels.

        Raises:
            LabelError: as :meth:`Bins.index`. ShapeError: labels are neither (N,) nor (N, H, W), over a grid followed
            by one axis of its dimensions.
        """
        outer, ran = self._row, self._ran
        self._row, self._ran = self._place("FDS.labels", labels), False
        try:
            yield
            if self.attached and not self._ran:
                self._warn_once(
                    "idle",
                    "no attached module ran inside labels(). Attach before the first call of a compiled model, "
                    "and run the model inside `with fds.labels(y):`.",
                )
        finally:
            self._row, self._ran = outer, ran

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Gather the statistics of features, without a hook. Features are not changed."""
        row = self._place("FDS.update", labels)
        self._check_features("FDS.update", features, row)
        self._gather(features, row)

    def calibrate(self, features: Tensor, labels: Tensor) -> Tensor:
        """Features carried to the smoothed statistics of their bins, without a hook; a new tensor of the same dtype.

        Before ``start_epoch`` epochs have ended, and in eval mode, the features themselves.
        """
        row = self._place("FDS.calibrate", labels)
        self._check_features("FDS.calibrate", features, row)
        return self._calibrate(features, row)

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Fold the epoch's statistics, merged over all ranks, into the running ones, and smooth them again.

        Raises:
            LabelError: a label lay beyond the axis in this epoch, on an accelerator, under ``outside="raise"``.
            ValueError: features were not finite, or none were gathered. The running statistics are then as before, and
            the epoch's are dropped.
        """
        moments, seen = self._epoch_moments.all_reduce(), self._seen
        unplaced = self._unplaced.to(moments.count.device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(unplaced)
        self._forget_epoch()
        if self.outside == "raise" and int(unplaced):
            raise label_problem(
                "FDS.end_epoch",
                f"labels must lie on the label axis {self.bins!r}",
                got=f"{int(unplaced)} that do not",
                fix='Pass outside="clip" or outside="drop".',
            )
        if int(moments.count.sum()) == 0:
            raise problem(
                "FDS.end_epoch",
                "features must be gathered before an epoch ends",
                got="none",
                fix="Run the model in training mode inside `with fds.labels(y):`.",
            )
        broken = ~(moments.mean.isfinite() & moments.deviations.isfinite()).all(1)
        if bool(broken.any()):
            raise problem(
                "FDS.end_epoch",
                "features must be finite",
                got=f"NaN or infinity in bins {broken.nonzero().flatten().tolist()}",
                fix="Look at the loss and the learning rate.",
            )
        self._last_seen = seen
        self.to(moments.mean.device)
        self._fold(moments)
        self.epoch += 1
        if self.epoch >= self.start_epoch:
            self._refresh()

    def statistics(self) -> dict[str, Tensor]:
        """Running and smoothed statistics, each (B, D) float64 and NaN where unknown: ``mean``, ``variance`` (after
        shrinkage), ``smoothed_mean``, ``smoothed_variance``; and ``count`` (B,)."""
        mean, count = self.running_mean, self.running_count
        variance = self._shrunk_variance()
        weight = count if self.count_weighted else (count > 0).double()
        return {
            "count": count.clone(),
            "mean": mean.clone(),
            "variance": variance,
            "smoothed_mean": self._smooth(mean, weight),
            "smoothed_variance": self._smooth(variance, weight),
        }

    def _shrunk_variance(self) -> Tensor:
        if self.shrinkage == 0:
            return self.running_variance.clone()
        degrees = (self.running_count - 1).clamp_min(0)[:, None]
        variance = self.running_variance.nan_to_num()
        pooled = (degrees * variance).sum(0) / degrees.sum()
        shrunk = (degrees * variance + self.shrinkage * pooled) / (degrees + self.shrinkage)
        return torch.where(self.running_count[:, None] > 0, shrunk, torch.nan)

    def _smooth(self, values: Tensor, weight: Tensor) -> Tensor:
        """Smooth over the bins whose values are known, the window renormalised; NaN where none is in reach."""
        known = values.isfinite()
        share = weight[:, None] * known
        return self._over_bins(values.nan_to_num() * share) / self._over_bins(share)

    def _over_bins(self, values: Tensor) -> Tensor:
        """(B, D) times the smoothing matrix of each axis in turn, since a window over joint bins is their product."""
        values = values.unflatten(0, self.bins.shape)
        for k in range(len(self.bins.shape)):
            matrix = self._buffers[_smoothing_name(k)]
            assert matrix is not None
            values = torch.tensordot(matrix, values, ([1], [k])).movedim(0, k)
        return values.flatten(0, -2)

    def _fold(self, moments: BinMoments) -> None:
        """running = momentum * running + (1 - momentum) * epoch, where the epoch has seen the bin."""
        present = moments.count > 0
        count = moments.count.double()
        self.running_variance = self._blend(self.running_variance, moments.variance(), moments.count > 1)
        self.running_mean = self._blend(self.running_mean, moments.mean, present)
        before = torch.where(self.running_count > 0, self.running_count, torch.nan)
        self.running_count = self._blend(before[:, None], count[:, None], present)[:, 0].nan_to_num()

    def _blend(self, old: Tensor, new: Tensor, present: Tensor) -> Tensor:
        mixed = torch.where(old.isnan(), new, self.momentum * old + (1 - self.momentum) * new)
        return torch.where(present[:, None], mixed, old)

    def _refresh(self) -> None:
        s = self.statistics()
        scale, shift = diagonal_map(
            s["mean"], s["variance"], s["smoothed_mean"], s["smoothed_variance"], clip=self.clip
        )
        self.scale[:-1] = scale
        self.shift[:-1] = shift
        self._cast.clear()

    def _forget_epoch(self) -> None:
        self._epoch_moments = BinMoments(len(self.bins), self.num_features, device=self._epoch_moments.mean.device)
        self._unplaced = torch.zeros_like(self._unplaced)
        self._seen = self._rounds = 0
        self._evaluated = False

    def _place(self, where: str, labels: Tensor) -> Tensor:
        is_tensor(where, labels=labels)
        grid = isinstance(self.bins, BinGrid)
        if labels.ndim not in ((2, 4) if grid else (1, 3)):
            one_channel = not grid and labels.ndim in (2, 4) and labels.shape[1] == 1
            k = len(self.bins.axes)
            shapes = f"(N, {k}), or (N, H, W, {k})" if grid else "(N,), or (N, H, W)"
            fix = "Use labels.squeeze(1)." if one_channel else ""
            raise problem(
                where,
                f"labels must be {shapes} for one label a pixel",
                got=tuple(labels.shape),
                fix=fix,
                error=ShapeError,
            )
        return self.bins._row(where, labels, self.outside)

    def _check_features(self, where: str, features: Tensor, row: Tensor) -> None:
        if not isinstance(features, Tensor) or not features.is_floating_point():
            got = f"dtype {features.dtype}" if isinstance(features, Tensor) else type(features).__name__
            raise problem(where, "features must be one tensor of floats", got=got, error=TypeError)
        is_tensor(where, features=features)
        if features.ndim not in (2, 4) or features.shape[1] != self.num_features:
            raise problem(
                where,
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
                where,
                "features and labels must have the same samples",
                got=f"{tuple(features.shape)} and {tuple(row.shape)}",
                fix=fix,
                error=ShapeError,
            )

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
        if self.scale.device != features.device:
            self.to(features.device)
        dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
        if dtype not in self._cast:
            self._cast[dtype] = (self.scale.to(dtype), self.shift.to(dtype))
        flat = row.flatten().to(features.device)
        scale, shift = (table.index_select(0, flat) for table in self._cast[dtype])
        if features.ndim == 4:
            shape = (*row.shape, self.num_features) if row.ndim == 3 else (len(row), 1, 1, self.num_features)
            scale, shift = scale.view(shape).movedim(3, 1), shift.view(shape).movedim(3, 1)
            return torch.addcmul(shift, features.to(dtype), scale).to(features.dtype)
        # In place on the freshly gathered shift: one allocation less, which at 2,048 features is most of the time.
        return shift.addcmul_(features.to(dtype), scale).to(features.dtype)

    @torch.compiler.disable
    def _run(self, where: str, module: nn.Module, features: Tensor, repeated: bool) -> Tensor:
        """What a hook does: gather, then calibrate. ``repeated`` is activation checkpointing running the module again
        in backward: the same calibration, and nothing counted twice."""
        self._ran = True
        if not (module.training and self.training):
            self._evaluated = self._evaluated or self._seen > 0
            return features
        if self._row is None:
            if repeated and self._seen:
                raise problem(
                    where,
                    "with activation checkpointing backward must run inside labels()",
                    got="none active",
                    fix="Indent loss.backward() under `with fds.labels(y):`.",
                    error=RuntimeError,
                )
            self._warn_once(
                "labels",
                "a training pass ran without labels, so features were neither gathered nor calibrated. "
                "Run it inside `with fds.labels(y):`.",
            )
            return features
        self._check_features(where, features, self._row)
        if not repeated:
            if self._evaluated:
                self._evaluated = False
                self._rounds += 1
                if self._rounds > 1:
                    self._warn_forgotten_end()
            self._gather(features, self._row)
        return self._calibrate(features, self._row)

    def _warn_forgotten_end(self) -> None:
        self._warn_once(
            "end",
            "more than one epoch has been gathered since the last end_epoch(). Call fds.end_epoch() once after "
            "each training epoch; features are not calibrated before.",
        )

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._said:
            self._said.add(key)
            warn("FDS", message)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FDS:
        """Follow a module's ``.to(device)``; statistics stay float64 whatever dtype the module is cast to."""
        for name, buffer in self._buffers.items():
            assert buffer is not None
            self._buffers[name] = buffer.to(fn(buffer[:0]).device)
        self._epoch_moments.to(self.scale.device)
        self._unplaced = self._unplaced.to(self.scale.device)
        self._cast.clear()
        return self

    def get_extra_state(self) -> dict[str, Any]:
        return {
            "bins": self.bins.to_dict(),
            "epoch": self.epoch,
            "seen": self._seen,
            "last_seen": self._last_seen,
            "unplaced": self._unplaced.clone(),
            "moments": self._epoch_moments.state_dict(),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        expected = ("bins", "epoch", "seen", "last_seen", "unplaced", "moments")
        keys("FDS.load_state_dict", "the saved state", state, expected)
        saved = saved_bins(state["bins"])
        if saved != self.bins:
            raise problem(
                "FDS.load_state_dict",
                "the saved statistics must be over the same bins",
                got=f"{saved!r} for {self.bins!r}",
                error=CheckpointError,
            )
        self._epoch_moments.load_state_dict(state["moments"])
        self._unplaced = state["unplaced"].to(self._unplaced.device, copy=True)
        self.epoch, self._seen, self._last_seen = state["epoch"], state["seen"], state["last_seen"]
        self._cast.clear()

    def extra_repr(self) -> str:
        return (
            f"{self.bins!r}, num_features={self.num_features}, momentum={self.momentum}, clip={self.clip}, "
            f"start_epoch={self.start_epoch}, shrinkage={self.shrinkage}, count_weighted={self.count_weighted}, "
            f"outside={self.outside!r}"
        )


def _smoothing_name(axis: int) -> str:
    """The buffer of an axis; that of the first has the name that files of one axis know."""
    return f"smoothing_{axis}" if axis else "smoothing"


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


class _InputHook:
    """A class, and no lambda, so that a hooked model can be pickled."""

    def __init__(self, fds: FDS) -> None:
        self.fds = fds

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not args:
            raise problem(
                "FDS",
                "the attached module must get its features as first positional input",
                got="none",
                error=TypeError,
            )
        return (self.fds._run("FDS input hook", module, args[0], _in_backward()), *args[1:])


class _OutputHook:
    def __init__(self, fds: FDS) -> None:
        self.fds = fds

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.fds._run("FDS output hook", module, output, _in_backward())
