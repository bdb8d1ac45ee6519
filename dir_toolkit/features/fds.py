"""Feature distribution smoothing: running statistics per bin, smoothed over bins, and the hook that uses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._checks import instance, interval, is_tensor, keys, label_problem, length, number, one_of, problem, warn, whole
from ..errors import CheckpointError, ShapeError
from ..labels.bins import Bins, Outside
from ..labels.grid import AnyBins, BinGrid, Windows, checked_windows, saved_bins
from ..labels.kernels import DEFAULT_KERNEL, Edges, gaussian, smoothing_matrix
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

__all__ = ["FDS"]

_FOLDED = gaussian(5, 2, folded=True)


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
    sums are merged over ranks in :meth:`end_epoch`. Under ``torch.compile``, attach before the first call. With
    activation checkpointing, run backward inside ``labels`` too.

    Args:
        bins: the label axis, or a grid of several, whose joint bins then have statistics of their own.
        num_features: D, the number of features or channels.
        kernel: window over bins, odd length. The smoothing is kept as a (B, B) matrix; over a grid, one an axis, and
            the window may be one for all axes or one an axis.
        momentum: weight of the *old* statistics when an epoch is folded in, in [0, 1): 0 keeps the last epoch only. A
            bin's first epoch is taken whole.
        covariance: ``"diagonal"``, a variance a feature; ``"full"``, a (D, D) matrix a bin; or ``"low_rank"``, a full
            one within the ``rank`` leading directions of the covariance pooled over bins, found anew each epoch, and
            one variance beyond them. The first epoch that low rank calibrates moves means only, as none before it
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
    Shape:
        features: (N, D), or maps (N, D, H, W). labels: (N,), or (N, H, W) for one label a pixel of a map; over a grid
        of K axes (N, K) or (N, H, W, K). Each pixel of a map counts as a sample.
    Units:
        labels in those of the axis; features any.
    Memory:
        statistics and maps are float64. When an epoch ends, full covariance takes up to 80 bytes times B * D^2, and low
        rank 165 times B * r^2, 80 times D^2 and 200 times B * D; besides, up to 8 million numbers of the latest batches
        are held, or with low rank twice as many. So much must be free when the FDS is made: on the host, or in its
        container, which is where it is looked for even if the statistics then follow the features to an accelerator.
        Full covariance waits for an accelerator once a step, low rank now and then. In a step low rank holds r^2
        numbers for each sample, or each pixel of a map, so that large maps want a small rank.
    Raises:
        ValueError: a setting is out of bounds, or covariances would take more memory than is free.
    Source:
        Yang et al. 2021, section 3.2, equation 2 (arXiv:2102.09554). The low-rank form is ours: probabilistic PCA
        (Tipping and Bishop 1999) in a subspace that all bins share.
    """

    smoothing: Tensor
    running_count: Tensor
    running_mean: Tensor

    def __init__(
        self,
        bins: AnyBins,
        num_features: int,
        *,
        kernel: Windows = DEFAULT_KERNEL,
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
    ) -> None:
        super().__init__()
        instance("FDS", (Bins, BinGrid), bins=bins)
        instance("FDS", bool, count_weighted=count_weighted)
        one_of("FDS", "covariance", covariance, ("diagonal", "full", "low_rank"))
        one_of("FDS", "map", map, ("paper", "transport"))
        one_of("FDS", "outside", outside, ("raise", "clip", "drop"))
        self.bins, self.outside = bins, outside
        self.num_features = length("FDS", "num_features", num_features)
        self.momentum = number("FDS", "momentum", momentum, low=0, high=1, open_high=True)
        clip = interval("FDS", "clip", clip)
        rank = whole("FDS", "rank", rank, low=1)
        if covariance == "low_rank" and rank >= self.num_features:
            rule = f"rank must be below num_features {self.num_features}"
            raise problem("FDS", rule, got=rank, fix='Pass covariance="full".')
        self.start_epoch = whole("FDS", "start_epoch", start_epoch, low=1)
        if shrinkage is not None:
            shrinkage = number("FDS", "shrinkage", shrinkage, low=0)
        self.count_weighted = count_weighted
        windows = checked_windows("FDS", kernel, bins)
        self.epoch = 0

        shape = (len(bins), self.num_features)
        for k, (size, window) in enumerate(zip(bins.shape, windows, strict=True)):
            matrix = torch.from_numpy(smoothing_matrix(size, window, edges=edges))
            self.register_buffer(_smoothing_name(k), matrix)
        self.register_buffer("running_count", torch.zeros(len(bins), dtype=torch.float64))
        self.register_buffer("running_mean", torch.full(shape, torch.nan, dtype=torch.float64))
        settings = Settings(self.momentum, shrinkage, clip, map)
        self.covariance: BinCovariance
        if covariance == "diagonal":
            self.covariance = DiagonalCovariance(*shape, settings)
        elif covariance == "full":
            self.covariance = FullCovariance(*shape, settings)
        else:
            self.covariance = LowRankCovariance(*shape, settings, rank=rank)
        self.register_load_state_dict_post_hook(_remake_maps)

        self._epoch_moments = self.covariance.moments()
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
            self._row, self._ran = outer, ran or self._ran

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

    @torch.inference_mode(False)  # whose tensors could not be written to in the next epoch
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
        broken = ~moments.finite()
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
        """(B, D) times the smoothing matrix of each axis in turn, since a window over joint bins is their product."""
        values = values.unflatten(0, self.bins.shape)
        for k in range(len(self.bins.shape)):
            matrix = self._buffers[_smoothing_name(k)]
            assert matrix is not None
            values = torch.tensordot(matrix, values, ([1], [k])).movedim(0, k)
        return values.flatten(0, -2)

    def _fold(self, moments: BinMoments | SubspaceMoments) -> None:
        """running = momentum * running + (1 - momentum) * epoch, where the epoch has seen the bin."""
        present = moments.count > 0
        count = moments.count.double()
        self.running_mean = blend(self.running_mean, moments.mean, present, self.momentum)
        before = torch.where(self.running_count > 0, self.running_count, torch.nan)
        self.running_count = blend(before, count, present, self.momentum).nan_to_num()
        self.covariance.fold(moments)
        self._epoch_moments = self.covariance.moments()  # anew, since folding may have found another subspace

    def _refresh(self) -> None:
        if self.epoch >= self.start_epoch:
            self.covariance.refresh(self.statistics())

    def _forget_epoch(self) -> None:
        self._epoch_moments = self.covariance.moments()
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
        if self.running_count.device != features.device:
            self.to(features.device)
        return self.covariance.calibrate(features, row)

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
        super()._apply(fn)
        self._epoch_moments.to(self.running_count.device)
        self._unplaced = self._unplaced.to(self.running_count.device)
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
        is_tensor("FDS.load_state_dict", unplaced=state["unplaced"])
        epoch, seen = (whole("FDS.load_state_dict", name, state[name], low=0) for name in ("epoch", "seen"))
        if (last_seen := state["last_seen"]) is not None:
            last_seen = whole("FDS.load_state_dict", "last_seen", last_seen, low=0)
        self._epoch_moments.load_state_dict(state["moments"])
        self._unplaced = state["unplaced"].to(self._unplaced.device, copy=True)
        self.epoch, self._seen, self._last_seen = epoch, seen, last_seen

    def extra_repr(self) -> str:
        return (
            f"{self.bins!r}, num_features={self.num_features}, momentum={self.momentum}, "
            f"start_epoch={self.start_epoch}, count_weighted={self.count_weighted}, outside={self.outside!r}"
        )


def _remake_maps(fds: FDS, incompatible_keys: object) -> None:
    """After a state was loaded, the running statistics in it included."""
    fds._refresh()


def _smoothing_name(axis: int) -> str:
    """The buffer of an axis; that of the first has the name that files of one axis know."""
    return f"smoothing_{axis}" if axis else "smoothing"


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


class _InputHook:
    """A class, and no lambda, so that a hooked model can be pickled."""

    def __init__(self, fds: FDS) -> None:
        self.fds = fds

    @torch._disable_dynamo  # torch.compiler.disable imports the whole compiler at once, this when it is called
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

    @torch._disable_dynamo
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.fds._run("FDS output hook", module, output, _in_backward())
