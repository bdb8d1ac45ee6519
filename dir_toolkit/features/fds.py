"""Feature distribution smoothing (FDS): features are calibrated to statistics that are smoothed over bins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._checks import instance, interval, length, number, one_of, problem, require, warn, whole
from ..errors import ShapeError
from ..labels.bins import MISSING, Bins, Missing, Outside
from ..labels.grid import AnyBins, BinGrid, Windows, chosen_windows
from ..labels.kernels import FOLDED_KERNEL, Edges, smooth_rows, smoothing_window, usual_kernel
from ._inputs import check_features, placed
from .covariance import DiagonalCovariance, Settings
from .hooks import FDSHook, FDSInputHook, FDSOutputHook
from .maps import Map
from .matrix_covariance import FullCovariance, LowRankCovariance
from .passes import Passes, around_graph, in_backward
from .rows import Channels
from .running import RunningStatistics
from .select import Select

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["FDS"]

_FORMS: dict[str, type[DiagonalCovariance | FullCovariance | LowRankCovariance]] = {
    "diagonal": DiagonalCovariance,
    "full": FullCovariance,
    "low_rank": LowRankCovariance,
}


class FDS(RunningStatistics):
    r"""Feature distribution smoothing (FDS).

    In training, the features of each bin are mapped from the bin's own mean and covariance to those smoothed over
    neighbouring bins, :math:`z' = A_b (z - \mu_b) + \mu'_b`. With a diagonal covariance, the default, the map is
    :math:`A_b = \mathrm{diag}\sqrt{v'_b / v_b}`. The same forward pass accumulates the statistics of the features
    before the map, which are used from the next epoch on. In eval mode, and outside :meth:`labels`, features do not
    change.

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

    The smoothing window is renormalised over the bins that have samples. Features of a bin without samples are not
    calibrated. A bin with one sample uses the smoothed variance. :meth:`FDS.end_epoch` merges the statistics of the
    epoch over the ranks of ``torch.distributed``. Under ``torch.compile``, attach before the first call. A hook breaks
    the graph once. With a diagonal covariance ``fds(features, labels)`` in the model's forward does not.

    Activation checkpointing is supported. The forward that it repeats is recognised by its features, for which backward
    waits for an accelerator once. Backward must run before :meth:`FDS.end_epoch`. It raises an error if two recent
    forwards had the same features and different labels.

    Args:
        bins: the label axis, or a grid of several axes.
        num_features: the number of features or channels, D.
        kernel: the window over bins, of odd length. Over a grid it is one window for all continuous axes, or one per
            axis. ``"auto"`` is the window of the authors' code, ``gaussian(5, 2, folded=True)``. It does not smooth
            classes, which have no neighbours, nor axes of fewer than five bins. None does not smooth.
        momentum: the weight of the *old* running statistics in the update after each epoch, in [0, 1). With 0 only the
            last epoch is used. The first epoch of a bin is used without momentum.
        covariance: ``"diagonal"`` keeps one variance per feature, and ``"full"`` one (D, D) matrix per bin.
            ``"low_rank"`` keeps a full covariance within the ``rank`` leading principal directions of the pooled
            covariance, and one variance for all other directions. The directions are updated after each epoch. In the
            first calibrated epoch low rank calibrates means only.
        map: the map of a full or low-rank covariance to the smoothed one, ``"paper"`` or ``"transport"``, as in
            :func:`dir_toolkit.features.maps.covariance_map`.
        rank: r, the number of directions of ``"low_rank"``, below D.
        clip: the bounds of the ratio of variances in every direction.
        start_epoch: the number of epochs before features are calibrated, at least 1.
        shrinkage: the number of pseudo-samples that shrink the covariance of each bin towards the pooled covariance. It
            stabilises bins with few samples. None takes 0 for a diagonal, D for full and r for low rank.
        count_weighted: whether smoothing weights bins by their number of samples. Otherwise all bins have equal weight.
        edges: the values beyond the label axis, as in :func:`dir_toolkit.labels.kernels.smooth`.
        outside, missing: as in :meth:`Bins.index`. A dropped sample is neither counted nor calibrated. Use NaN for
            steps and pixels without a label. On an accelerator ``"raise"`` raises at :meth:`FDS.end_epoch`, so that no
            step waits.
        channels: the axis of the D channels: ``"first"`` after the samples, or ``"last"``. None takes the axis of
            length D. If both have length D, the axis of earlier features is used; without earlier features an error is
            raised.
        group: the ``torch.distributed`` group whose ranks hold different samples; None means all ranks. With tensor,
            sequence or pipeline parallelism pass the data-parallel group.
    Attributes:
        settings: the arguments by name, without ``group``, and with ``kernel`` resolved to a window.
        smoothing: (K,) float64, the window of the first axis, scaled to sum to one.
        epoch: the number of finished epochs.
        warns_of_forgotten_end: whether to warn if :meth:`FDS.end_epoch` seems to have been forgotten. Set it to False
            if evaluations run within an epoch, since each is taken for the end of an epoch.
    Shape:
        features: (N, D); sequences (N, T, D) or (N, D, T); maps and volumes (N, D, H, W, ...) or (N, H, W, ..., D).
        labels: (N,), or (N, T) or (N, H, W, ...) for one label per step or pixel; over a grid of K axes (N, ..., K).
        Each step or pixel is a sample.
    Units:
        labels are in label units; features have any unit.
    Memory:
        Statistics and maps are float64, which Apple GPUs do not have. At the end of an epoch, full covariance takes up
        to 80 bytes times B * D^2. Low rank takes up to 165 bytes times B * r^2, plus 80 times D^2, plus 200 times B *
        D. In addition up to 8 million numbers of recent batches are held, or twice as many with low rank. This memory
        must be free on the host when the FDS is created, even if the statistics then move to an accelerator. In each
        step full covariance waits for an accelerator once, and low rank occasionally. In a step low rank takes r^2
        numbers per sample, or per pixel of a map.
    Raises:
        ValueError: a setting is out of bounds, or covariances would take more memory than is free. TypeError: an
        argument has the wrong type, or this rank is not in ``group``.
    Source:
        Yang et al. 2021, section 3.2, equation 2 (arXiv:2102.09554). The low-rank form is not in the paper. It is
        probabilistic PCA (Tipping and Bishop 1999) in a subspace common to all bins.
    """

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
        missing: Missing = "raise",
        channels: Channels | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(group)
        instance((Bins, BinGrid), bins=bins)
        instance(bool, count_weighted=count_weighted)
        one_of("covariance", covariance, _FORMS)
        one_of("map", map, ("paper", "transport"))
        one_of("edges", edges, ("reflect", "mirror", "zero"))
        one_of("outside", outside, ("raise", "clip", "drop"))
        one_of("missing", missing, MISSING)
        self.bins, self.outside, self.missing, self.count_weighted = bins, outside, missing, count_weighted
        if channels is not None:
            one_of("channels", channels, ("first", "last"))
        self.channels: Channels | None = channels
        self.num_features = length("num_features", num_features)
        self.momentum = number("momentum", momentum, low=0, high=1, open_high=True)
        self.start_epoch = whole("start_epoch", start_epoch, low=1)
        clip, rank = interval("clip", clip), whole("rank", rank, low=1)
        fits = covariance != "low_rank" or rank < self.num_features
        require(fits, f"rank must be below num_features {self.num_features}", got=rank, fix='Pass covariance="full".')
        shrinkage = None if shrinkage is None else number("shrinkage", shrinkage, low=0)
        windows = chosen_windows(kernel, bins) or tuple(np.ones(1) for _ in bins.axes)
        if isinstance(kernel, str) and all(len(window) == 1 for window in windows):
            warn(
                f"nothing is smoothed over {bins!r}, since its bins are classes or fewer than five, so features "
                "do not change. Pass a window as kernel= if neighbouring bins are similar, else remove FDS."
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
            "missing": missing,
            "channels": channels,
        }
        of_form = Settings(self.momentum, shrinkage, clip, map, rank)
        self.covariance = _FORMS[covariance](len(bins), self.num_features, of_form)
        self.attached = False
        self._rows: Tensor | None = None
        self._gathered_by: FDSHook | FDS | None = None
        self._ran = False
        self._layout: Channels | None = None  # of the latest features with more than two axes
        self._passes = Passes()
        self._maps_made = 0  # the number of times that maps were computed
        self._begin(torch.empty(0).device)

    @classmethod
    def reference(
        cls,
        bins: AnyBins,
        num_features: int,
        *,
        kernel: Windows | Literal["auto"] | None = "auto",
        momentum: float = 0.9,
    ) -> FDS:
        """The settings of the authors' DIR code: a folded window, mirrored edges, labels beyond the axis clipped, and
        no shrinkage. If every bin has two samples or more in each epoch, the results equal those of that code, which
        takes the variance of one sample for 0.

        Args:
            bins, num_features, kernel, momentum: as in the class.
        Source:
            github.com/YyzHarry/imbalanced-regression, ``fds.py``.
        """
        instance((Bins, BinGrid), bins=bins)
        if isinstance(kernel, str) and kernel == "auto" and (usual := usual_kernel(bins, FOLDED_KERNEL)) is not None:
            kernel = usual
        return cls(bins, num_features, kernel=kernel, momentum=momentum, edges="mirror", outside="clip")

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self._settings)

    # ---- smoothing ----

    @property
    def smoothing(self) -> Tensor:
        return torch.from_numpy(self._windows[0].copy())

    def _smooth(self, values: Tensor, weight: Tensor) -> Tensor:
        """Values (B, K) smoothed over the bins in which they are known, by a renormalised window. They are NaN where no
        such bin is within the window."""
        known = values.isfinite()
        share = weight[:, None] * known
        return self._over_bins(values.nan_to_num() * share) / self._over_bins(share)

    def _over_bins(self, values: Tensor) -> Tensor:
        """Sums (B, K) under the window, along each axis in turn."""
        values = values.unflatten(0, self.bins.shape)
        for k, window in enumerate(self._windows):
            if len(window) > 1:
                values = smooth_rows(values.movedim(k, 0), window, self._edges).movedim(0, k)
        return values.flatten(0, -2)

    # ---- statistics ----

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Accumulate the statistics of features, without a hook. The features do not change."""
        rows = self._placed(labels)
        self._gather(features, rows, self._axis(features, rows))

    def statistics(self) -> dict[str, Tensor]:
        """Running and smoothed statistics, float64 and NaN where they are unknown.

        ``mean``, ``variance`` (after shrinkage), ``smoothed_mean`` and ``smoothed_variance`` are (B, D), and ``count``
        is (B,). Full covariance adds ``covariance`` and ``smoothed_covariance``, (B, D, D). Low rank has these within
        the ``basis`` (D, r), so that they are (B, r, r), and the variance beyond it, ``rest`` and ``smoothed_rest``
        (B,).
        """
        mean, count = self.running_mean, self.running_count
        weight = count if self.count_weighted else (count > 0).double()
        return {
            "count": count.clone(),
            "mean": mean.clone(),
            "smoothed_mean": self._smooth(mean, weight),
            **self.covariance.statistics(count, lambda values: self._smooth(values, weight)),
        }

    def _refresh(self) -> None:
        self._maps_made += 1
        if self.epoch >= self.start_epoch:
            self.covariance.refresh(self.statistics())
        elif isinstance(self.covariance, DiagonalCovariance):
            self.covariance.reset()

    # ---- calibration ----

    def calibrate(self, features: Tensor, labels: Tensor) -> Tensor:
        """Features mapped to the smoothed statistics of their bins, without a hook, as a new tensor of the same dtype.

        Before ``start_epoch`` epochs have ended, and in eval mode, the features themselves are returned.
        """
        rows = self._placed(labels)
        return self._calibrate(features, rows, self._axis(features, rows))

    def _calibrate(self, features: Tensor, rows: Tensor, axis: int) -> Tensor:
        if self.epoch < self.start_epoch or not self.training:
            return features
        return self._carried(features, rows, axis)

    def _carried(self, features: Tensor, rows: Tensor, axis: int) -> Tensor:
        if self.running_count.device != features.device:
            self.to(features.device)
        return self.covariance.calibrate(features, rows, axis)

    def _placed(self, labels: Any) -> Tensor:
        return placed(labels, self.bins, self.outside, self.missing)

    def _axis(self, features: Tensor, rows: Tensor) -> int:
        """The axis of the channels of checked features."""
        layouts = check_features(features, rows, self.num_features, self.channels)
        if features.ndim > 2 and len(layouts) == 1:
            self._layout = layouts[0]
        elif features.ndim > 2 and self._layout is None:
            rule = f"features must have {self.num_features} channels in either the second or the last axis"
            fix = 'Pass channels="first" or channels="last" to FDS.'
            raise problem(rule, got=tuple(features.shape), fix=fix, error=ShapeError)
        return features.ndim - 1 if self._layout == "last" else 1

    # ---- in a forward ----

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """Accumulate the statistics of features and calibrate them, as a hook does, for models that call FDS in their
        forward.

        With a diagonal covariance it does not break a compiled graph, so that ``torch.compile(fullgraph=True)`` takes
        it. The FDS must then be on the device of the features. A compiled step does not warn if :meth:`FDS.end_epoch`
        was forgotten.

        Activation checkpointing may be used inside a compiled graph. If a checkpoint runs a compiled graph instead,
        samples are counted once only if torch 2.8 or newer compiled the graph inside the checkpoint, which breaks it.
        Otherwise they are counted twice.

        Args:
            labels: in eval mode they are ignored, and may be None.
        Returns:
            the calibrated features, as a new tensor of the same dtype; in eval mode the features themselves.
        Raises:
            as :meth:`labels`; ShapeError: features do not fit. In a compiled graph invalid labels raise an error at
                :meth:`FDS.end_epoch`.
        """
        return self._step(features, self._placed(labels) if self.training else None)

    def _step(self, features: Tensor, rows: Tensor | None) -> Tensor:
        """:meth:`forward` for rows instead of labels."""
        if not self.training and torch.compiler.is_compiling():
            return features
        here = getattr(features, "device", None) == self.running_count.device
        traced = torch.compiler.is_compiling() and isinstance(self.covariance, DiagonalCovariance) and here
        if rows is None or not traced or around_graph():
            return self._eager_step(features, rows)
        axis = self._axis(features, rows)
        with torch.no_grad():
            self._accumulate(features, rows, axis)
            self._seen_compiled.add_(len(features))
        # Maps are the identity before start_epoch. A branch would compile the model twice.
        return self._carried(features, rows, axis)

    @torch._disable_dynamo  # unlike torch.compiler.disable, it imports the compiler only when called
    def _eager_step(self, features: Tensor, rows: Tensor | None) -> Tensor:
        with self._on_rows(rows):
            return self._run(self, self, features)

    # ---- the hook ----

    def attach(self, module: nn.Module, where: Literal["input", "output"], *, select: Select = None) -> RemovableHandle:
        """Calibrate a module's first input, or its output, whenever the module runs, and accumulate its statistics.

        A module may run several times within one :meth:`labels` context, for example on two views. Each run then has
        these labels, and its features are further samples. If the runs have different labels, use one context for each.

        Args:
            where: ``"input"`` or ``"output"``.
            select: selects the features if there are several values: the index or the name of an input, or the index,
                key or attribute of an output, as for LSTM, GRU and Hugging Face models. Other values do not change.
        Returns:
            a handle. ``handle.remove()`` detaches, which ``torch.jit.script`` and ``torch.compile(fullgraph=True)``
            need.
        Raises:
            TypeError: ``module`` is not a module, or later ``select`` selects no tensor. ValueError: ``where`` is
                neither word. UsageError: this FDS is attached to the module already.
        """
        instance(nn.Module, module=module)
        one_of("where", where, ("input", "output"))
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        twice = any(isinstance(hook, FDSHook) and hook.fds is self for hook in hooks)
        rule = "module must have no hook of this FDS yet, since features would be counted and calibrated twice"
        fix = "Call remove() on the handle that attach returned, or make another FDS."
        require(not twice, rule, got=f"a {type(module).__name__} that has one", fix=fix, error=RuntimeError)
        self.attached = True
        if where == "input":
            return module.register_forward_pre_hook(FDSInputHook(self, select), with_kwargs=True)
        return module.register_forward_hook(FDSOutputHook(self, select))

    def labels(self, labels: Tensor) -> AbstractContextManager[None]:
        """A context in which attached modules get samples with these labels.

        If several attached modules run in it, only the features of the first one are used.

        Raises:
            LabelError: as :meth:`Bins.index`. ShapeError: labels have no axis of samples, or over a grid no last axis
                of length K.
        """
        return self._on_rows(self._placed(labels))

    @contextmanager
    def _on_rows(self, rows: Tensor | None) -> Iterator[None]:
        """:meth:`labels` for rows instead of labels."""
        outer = self._rows, self._gathered_by, self._ran
        self._rows, self._gathered_by, self._ran = rows, None, False
        try:
            yield
            if self.attached and not self._ran:
                self._warn_once(
                    "idle",
                    "no attached module ran inside labels(). Attach before the first call of a compiled model, "
                    "and run the model inside `with fds.labels(y):`.",
                )
        finally:
            ran = self._ran
            self._rows, self._gathered_by, self._ran = outer
            self._ran = self._ran or ran

    def _run(self, hook: FDSHook | FDS, module: nn.Module, features: Tensor) -> Tensor:
        """The hook: accumulate the statistics of the features, then calibrate them."""
        self._ran = True
        trains = module.training and self.training
        if in_backward():
            return self._repeat(hook, features, must=trains)
        if not trains:
            if self._seen:
                self._evaluated_at.add(self._seen)
            return features
        if self._rows is None:
            if features.is_floating_point():
                self._passes.keep(hook, features, None, None)
            self._warn_once(
                "labels",
                "a training pass ran without labels, so features were neither gathered nor calibrated. "
                "Run it inside `with fds.labels(y):`.",
            )
            return features
        axis = self._axis(features, self._rows)
        if self._gathered_by not in (None, hook):
            self._passes.keep(hook, features, None, None)
            self._warn_once(
                "hooks",
                "two modules that this FDS is attached to ran within one labels(). The second one's features are "
                "neither gathered nor calibrated. Call remove() on one of the two handles.",
            )
            return features
        self._gathered_by = hook
        self._gather(features, self._rows, axis)
        self._passes.keep(hook, features, self._rows, self._maps_made if self.epoch >= self.start_epoch else None)
        return self._calibrate(features, self._rows, axis)

    def _repeat(self, hook: FDSHook | FDS, features: Tensor, *, must: bool) -> Tensor:
        """Calibrate features that activation checkpointing computes again in backward as in the forward, and do not
        count them again."""
        if not features.is_floating_point():
            return features
        before = self._passes.find(hook, features, self._maps_made, must=must)
        if before is None or before.rows is None or before.maps is None:
            return features
        rule = "with activation checkpointing, backward must run before end_epoch() and load_state_dict()"
        fix = "Call fds.end_epoch() after the backward of the epoch's last step."
        same = before.maps == self._maps_made
        require(same, rule, got="a forward before and its backward after", fix=fix, error=RuntimeError)
        return self._carried(features, before.rows, self._axis(features, before.rows))
