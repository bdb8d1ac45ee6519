"""Label distribution smoothing (LDS) and its weight schemes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from .._checks import instance, interval, keys, labels_array, number, one_of, problem, require, same_bins, warn
from .._numerics import default_dtype, has_values, keepable
from .._settings import described, differing, shown
from .._state import SoundModule, pack, unpack
from ..errors import CheckpointError, NotFittedError
from .bins import MISSING, OUTSIDE, Bins, Missing, Outside
from .chunks import chunked, in_dask
from .density import LabelDensity, to_shares
from .grid import AnyBins, BinGrid, Windows, chosen_windows, saved_bins
from .kernels import EDGES, FOLDED_KERNEL, Edges, smooth_axes

__all__ = ["LDS", "Scheme"]

Scheme = Literal["none", "inverse", "sqrt_inverse", "effective_number", "dense"]
Order = Literal["smooth_first", "scheme_first"]


class LDS(SoundModule):
    r"""Label distribution smoothing: loss weights from a smoothed label density, larger for rare labels.

    The effective density of bin b is :math:`q_b = \sum_{b'} \kappa(b, b') n_{b'}`. A label in b has the weight :math:`c
    / g(q_b)`, where c scales the weights to a mean of one over the fitted labels. ``kernel=None`` does not smooth,
    which is plain reweighting. Use it as ``loss(pred, y, lds(y))``.

    ================== ==================================================================================
    scheme             weight before scaling
    ================== ==================================================================================
    none               1
    inverse            1 / q^power
    sqrt_inverse       1 / sqrt(q)
    effective_number   (1 - beta) / (1 - beta^q), Cui et al. 2019, equation 3 (arXiv:1901.05555)
    dense              max(1 - alpha * q', epsilon), where q' is q scaled to [0, 1]; Steininger et al. 2021,
                       equation 4 (DenseWeight)
    ================== ==================================================================================

    Args:
        bins: the label axis, or a grid of several axes.
        kernel: a window over bins of odd length, or None for no smoothing. Over a grid it is one window per axis, or
            one for all continuous axes. ``"auto"`` is ``gaussian(5, 2)``. It does not smooth classes, which have no
            neighbours, nor axes of fewer than five bins.
        edges: the counts beyond the axis, as in :func:`smooth`. ``"zero"``, as in the authors' code, raises the weights
            at both ends.
        order: ``"smooth_first"`` smooths the counts and then applies the scheme, as in the paper. ``"scheme_first"``
            smooths g(counts), as in the authors' code (not for ``dense``).
        clip: (low, high), in labels per bin of mean width. They bound the density, and with it the ratio of weights.
        outside, missing: as in :meth:`Bins.index`. With ``"drop"`` such a label is not counted and has weight 0.
        power: the exponent of ``inverse``, in [0, 1]. 0 gives equal weights, and 1/2 is ``sqrt_inverse``.
        beta: the parameter of ``effective_number``, in [0, 1).
        alpha, epsilon: the parameters of ``dense``.
    Shape:
        forward: labels of any shape, such as (N,) or maps (N, H, W), in label units. Returns weights of that shape on
        the labels' device, in float32, or in float64 if the module was cast to it. Over a grid of K axes labels are
        (..., K) and weights (...). A loss takes ``lds(y)[..., None].expand_as(y)``.
    Raises:
        NotFittedError: called before :meth:`fit`. LabelError: as :meth:`Bins.index`. On an accelerator such a label has
            the weight NaN instead, which stops training at the next check of the loss.
    Source:
        Yang et al. 2021, section 3.1 (arXiv:2102.09554).

    >>> lds = LDS(Bins.classes(2), kernel=None, scheme="inverse").fit([0, 0, 0, 1])
    >>> lds(torch.tensor([0, 1])).tolist()
    [0.6666666865348816, 2.0]
    """

    def __init__(
        self,
        bins: AnyBins,
        *,
        kernel: Windows | Literal["auto"] | None = "auto",
        scheme: Scheme = "sqrt_inverse",
        edges: Edges = "reflect",
        order: Order = "smooth_first",
        clip: tuple[float, float] | None = None,
        outside: Outside = "raise",
        missing: Missing = "raise",
        power: float = 1.0,
        beta: float = 0.999,
        alpha: float = 1.0,
        epsilon: float = 1e-3,
    ) -> None:
        super().__init__()
        instance((Bins, BinGrid), bins=bins)
        one_of("scheme", scheme, get_args(Scheme))
        one_of("edges", edges, EDGES)
        one_of("order", order, get_args(Order))
        one_of("outside", outside, OUTSIDE)
        one_of("missing", missing, MISSING)
        self.missing: Missing = missing
        if scheme == "dense" and order == "scheme_first":
            raise problem('scheme "dense" is defined on a density, so it needs order="smooth_first"', got=order)
        self.bins, self.scheme, self.edges, self.order, self.outside = bins, scheme, edges, order, outside
        self.kernels = chosen_windows(kernel, bins)
        self.clip = None if clip is None else interval("clip", clip)
        self.power = number("power", power, low=0, high=1)
        self.beta = number("beta", beta, low=0, high=1, open_high=True)
        self.alpha = number("alpha", alpha, low=0)
        self.epsilon = number("epsilon", epsilon, low=0, open_low=True)
        self._public_integers = False
        # One weight per bin, and a last weight for labels without a bin.
        self.table: Tensor
        with torch.inference_mode(False):  # training could not use inference tensors
            self.register_buffer("table", torch.full((len(bins) + 1,), torch.nan, dtype=default_dtype()))
        self._fitted = False
        self._copy: tuple[Tensor, int, Tensor] | None = None

    @classmethod
    def reference(
        cls,
        bins: AnyBins,
        *,
        kernel: Windows | Literal["auto"] | None = "auto",
        scheme: Literal["inverse", "sqrt_inverse"] = "sqrt_inverse",
        outside: Outside = "clip",
    ) -> LDS:
        """The weights of the authors' DIR code: folded window, zero edges, and the scheme before smoothing. ``inverse``
        clips counts to [5, 1000] and rounds down after smoothing, as that code does.

        Args:
            kernel: as in the class, except that ``"auto"`` is ``gaussian(5, 2, folded=True)``.
            outside: as in the class. The authors' code clips.
        Source:
            github.com/YyzHarry/imbalanced-regression, ``_prepare_weights`` of its data sets.
        """
        one_of("scheme", scheme, ("inverse", "sqrt_inverse"))
        clip = (5, 1000) if scheme == "inverse" else None
        lds = cls(bins, kernel=None, scheme=scheme, edges="zero", order="scheme_first", clip=clip, outside=outside)
        lds.kernels = chosen_windows(kernel, bins, FOLDED_KERNEL)
        lds._public_integers = scheme == "inverse"
        return lds

    def fit(self, labels: Any) -> LDS:
        """Compute the weights from the training labels.

        A bin whose effective density is zero gets the largest weight of the others.

        A warning is issued if the effective sample size of the weights is below a tenth of the labels, or if the scheme
        gives equal weights to labels of different density.

        Args:
            labels: their :class:`LabelDensity`, or anything that :meth:`LabelDensity.count` takes.

        Raises:
            ValueError: no label was counted, or a weight would not be finite. LabelError: as :meth:`Bins.index`.
        """
        if isinstance(labels, LabelDensity):
            density = labels
            counted, fix = density.counts.dtype.kind != "f", "Pass the density as counted, in integers, or kernel=None."
            sound = counted or self.kernels is None
            require(sound, "the density must not be smoothed already", got=lambda: repr(density), fix=fix)
            same_bins("the density", density, self.bins)
        else:
            density = LabelDensity.count(labels, self.bins, outside=self.outside, missing=self.missing)
        counts = density.counts.astype(np.float64)
        require(counts.any(), "at least one label must lie on the label axis", got="none")
        weights = self._unscaled(density._per_width())
        counts = np.ldexp(counts, -np.frexp(counts.max())[1])  # by a power of two, so that large sums stay finite
        weights *= counts.sum() / (counts * weights).sum()
        _finite(weights.max() <= torch.finfo(torch.float32).max, f"a weight of {weights.max():.3g}")
        self._warn(density.counts.astype(np.float64), weights)
        self._set(torch.from_numpy(weights))
        return self

    @torch.inference_mode(False)
    def _set(self, weights: Tensor) -> None:
        with torch.no_grad():
            self.table[:-1].copy_(weights)
            self.table[-1] = 0.0 if self.outside == "drop" else torch.nan
        self._fitted = True

    def _warn(self, counts: np.ndarray, weights: np.ndarray) -> None:
        """Warn if few labels would dominate, or if all weights are equal."""
        effective = 1 / (to_shares(counts) * weights**2).sum()  # the mean weight is one
        if effective < 1 / 10:
            labels = counts.sum()
            warn(
                f"the weights reduce the effective sample size to {effective * labels:.3g} of {labels:.6g} labels, so "
                'that a few rare labels dominate the loss. Use scheme="sqrt_inverse", a wider kernel, '
                "or clip=(low, high), which bounds the ratio of weights."
            )
        held, weights = counts[counts > 0], weights[counts > 0]
        alike = held.max() / 2 > held.min() and weights.max() < 1.01 * weights.min()
        if self.scheme == "effective_number" and self.beta > 0 and alike:
            warn(
                f"beta={self.beta:g} is too small for {held.max():.6g} labels in a bin, so that all weights are equal. "
                f"Use a beta closer to one, such as {1 - 1 / held.max():.{2 + len(str(int(held.max())))}g}."
            )

    def _unscaled(self, counts: np.ndarray) -> np.ndarray:
        """1 / g(q) per bin. Bins where q is 0 get the largest weight of the others."""
        if self.scheme == "none":
            return np.ones_like(counts)
        bounds = self.clip or (0.0, np.inf)
        if self.order == "smooth_first":
            reached = self._smooth(counts)
            density = np.clip(reached, *bounds)
            if self.scheme == "dense":
                span = np.ptp(density)
                scaled = (density - density.min()) / span if span > 0 else np.zeros_like(density)
                return np.maximum(1 - self.alpha * scaled, self.epsilon)
            divisor = self._divisor(density)
        else:
            reached = divisor = self._smooth(self._divisor(np.clip(counts, *bounds)))
        positive = (reached > 0) & (divisor > 0)
        weights = np.zeros_like(divisor)
        with np.errstate(over="ignore"):
            weights[positive] = 1 / divisor[positive]
        _finite(positive[counts > 0].all() and np.isfinite(weights).all(), "a density of zero where labels lie")
        weights[~positive] = weights.max()
        return weights

    def _divisor(self, density: np.ndarray) -> np.ndarray:
        """The number by which the scheme divides the weights of a bin."""
        if self.scheme == "sqrt_inverse":
            return np.sqrt(density)
        if self.scheme == "effective_number":
            if self.beta == 0:
                return (density > 0).astype(np.float64)
            return -np.expm1(density * np.log(self.beta)) / (1 - self.beta)
        return density**self.power

    def _smooth(self, values: np.ndarray) -> np.ndarray:
        """Values of bins, smoothed along each axis."""
        if self.kernels is None:
            return values
        values = values.reshape(self.bins.shape)
        if self._public_integers:
            from scipy.ndimage import correlate1d

            for axis, window in enumerate(self.kernels):
                values = correlate1d(values, window / window.max(), axis=axis, mode="constant")
            return np.trunc(values).ravel()
        return smooth_axes(values, self.kernels, edges=self.edges).ravel()

    def forward(self, labels: Tensor) -> Tensor:
        index = self.bins.place(labels, self.outside, self.missing)
        weights = self._of_rows(torch.where(index < 0, len(self.bins), index))
        return weights if self.missing == "raise" else weights.masked_fill(index == -1, 0.0)

    def _check_fitted(self, known: bool) -> None:
        require(known, "weights are not fitted yet", fix="Call lds.fit(training_labels) first.", error=NotFittedError)

    def _of_rows(self, row: Tensor) -> Tensor:
        """The weights of these rows of the table."""
        self._check_fitted(self._fitted)
        return self._table_on(row.device).index_select(0, row.flatten()).view(row.shape)

    def _table_on(self, device: torch.device) -> Tensor:
        """The table on the device of the labels. It is copied there once, and again after each change."""
        if self.table.device == device or not has_values(self.table):
            return self.table.to(device)
        if self._copy is None or self._copy[0] is not self.table or self._copy[1] != self.table._version:
            self._copy = None
        if self._copy is None or self._copy[2].device != device:
            with torch.inference_mode(False):
                copy = self.table.to(device)
            if not keepable(copy):
                return copy
            self._copy = self.table, self.table._version, copy
        return self._copy[2]

    def sample_weight(self, labels: Any) -> Any:
        """Weights as a float64 NumPy array, for scikit-learn or gradient boosting:
        ``LDS(bins).fit(y).sample_weight(y)``. Labels in dask have their weights in dask, where nothing is computed yet.

        Args:
            labels: an array, a tensor, a list or a column; or a dask array or column, or an ``xarray.DataArray`` over
                an array, which may be larger than memory. Chunks may be of unknown size.
        Shape:
            labels: (...), or over a grid of K axes (..., K). Returns (...): for dask a dask array of the same chunks,
            and for a column, or over a grid a table, a column of the same index.
        Raises:
            NotFittedError: called before :meth:`fit`. LabelError: as :meth:`Bins.index`. In dask it is raised when the
            weights are computed, and names the chunk of an array.
        """
        own: dict[str, Any] = {
            "bins": self.bins,
            "outside": self.outside,
            "missing": self.missing,
            "table": self._known(),
        }
        if (lazy := in_dask(labels)) is None:
            return _looked_up(labels_array(labels), **own)
        on_grid = isinstance(self.bins, BinGrid)
        if hasattr(lazy, "to_dask_array") and lazy.ndim == 1 + on_grid:
            return lazy.map_partitions(partial(_of_partition, **own), meta=("weight", np.float64))
        lazy = chunked(lazy, self.bins)
        dropped = [lazy.ndim - 1] if on_grid and lazy.ndim > 0 else []
        meta = np.empty((0,) * (lazy.ndim - len(dropped)))
        return lazy.map_blocks(partial(_of_chunk, **own), drop_axis=dropped, dtype=np.float64, meta=meta)

    def _known(self) -> np.ndarray:
        self._check_fitted(self._fitted and not self.table.is_meta)
        return self.table.detach().cpu().double().numpy()

    def _of_bins(self, bins: AnyBins) -> np.ndarray:
        """The mean weight in each of these bins, (B,) float64, for labels spread uniformly within a bin. Under
        ``"raise"`` it is NaN for a bin that reaches beyond this axis."""
        table = self._known()[:-1]
        if bins == self.bins:
            return table
        kinds = [[axis.categorical for axis in own.axes] for own in (bins, self.bins)]
        got, fix = f"{self.bins} for {bins}", "Make the LDS over the bins of the density."
        require(kinds[0] == kinds[1], "lds must be of the same kind of labels as the density", got=got, fix=fix)
        means = table.reshape(self.bins.shape)
        for k, (own, other) in enumerate(zip(self.bins.axes, bins.axes, strict=True)):
            means = np.moveaxis(_means_over(np.moveaxis(means, k, 0), own, other, self.outside), 0, k)
        return means.ravel()

    @property
    def settings(self) -> dict[str, Any]:
        """The values that define these weights: the arguments and, once fitted, the weight of each bin."""
        return {**self._arguments(), "weights": self.table[:-1] if self._fitted and not self.table.is_meta else None}

    def _arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by which an LDS is saved and described."""
        grid = isinstance(self.bins, BinGrid)
        return {
            "bins": self.bins,
            "kernel": None if self.kernels is None else list(self.kernels) if grid else self.kernels[0],
            "scheme": self.scheme,
            "edges": self.edges,
            "order": self.order,
            "clip": self.clip,
            "outside": self.outside,
            "missing": self.missing,
            "power": self.power,
            "beta": self.beta,
            "alpha": self.alpha,
            "epsilon": self.epsilon,
            **({"public_integers": True} if self._public_integers else {}),
        }

    def get_extra_state(self) -> Tensor:
        # Settings hold only a digest of many bins, so that bins are saved again. "fitted" is a tensor, so that the
        # length of the state does not depend on it.
        fitted = torch.tensor([self._fitted], device="cpu")
        settings = described("settings", self._arguments())
        return pack({"settings": settings, "bins": self.bins.settings, "fitted": fitted})

    def set_extra_state(self, state: Any) -> None:
        """Refuse the state of other weights. ``load_state_dict`` itself sets the state together with the weights."""
        self._was_fitted(state)

    def _was_fitted(self, state: object) -> bool:
        """Whether the weights in this saved state were fitted."""
        values = unpack(state)
        try:
            keys("the saved state", values, ("settings", "bins", "fitted"))
            fitted, bins = bool(values["fitted"]), saved_bins(values["bins"])
        except (ValueError, TypeError, RuntimeError) as error:
            raise problem("the saved state must be that of an LDS", got=str(error), error=CheckpointError) from None
        same_bins("the saved weights", bins, self.bins, error=CheckpointError)
        differs = differing(values["settings"], described("settings", self._arguments()))
        require(not differs, "the saved weights must have the same settings", got=differs, error=CheckpointError)
        return fitted

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
        """Check everything before anything changes. Weights without settings, such as those exported alone, are
        accepted if they are complete."""
        name, assign = f"{prefix}table", local_metadata.get("assign_to_params_buffers", False)
        fitted = None
        if f"{prefix}_extra_state" in state_dict:
            fitted = self._was_fitted(state_dict[f"{prefix}_extra_state"])
        table, faults = state_dict.get(name), len(error_msgs)
        if known := isinstance(table, Tensor) and table.shape == self.table.shape:
            weights = table.detach()[:-1]
            known = bool((weights.isfinite() & (weights >= 0)).all()) if has_values(weights) else fitted is not False
            if not known and (fitted or not bool(weights.isnan().all())):
                raise problem("the saved weights must be finite and not negative", got="others", error=CheckpointError)
            if self.table.is_meta and not assign:
                error_msgs.append(f"LDS: {name} is on the meta device, which holds no weights. Pass assign=True.")
                return
            with torch.inference_mode(False):
                wide = torch.promote_types(table.dtype, torch.float32)
                state_dict = {**state_dict, name: table.detach().to(wide, copy=True)}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if isinstance(table, Tensor) and len(error_msgs) == faults:
            self._set(self.table[:-1].clone())
            self._fitted = known if fitted is None else fitted

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LDS:
        """Move the table with the module, but keep at least float32, since large weights overflow in half precision. A
        table from the meta device has no weights."""
        old = self.table
        with torch.inference_mode(False):
            super()._apply(fn, recurse)
            if self.table.dtype != old.dtype and self.table.itemsize < 4:
                self.table = old.to(self.table.device, torch.float32)
        if old.is_meta and not self.table.is_meta:
            with torch.no_grad():
                self.table.fill_(torch.nan)
            self._fitted = False
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = getattr(super(), "__getstate__", lambda: self.__dict__)()  # object's own from Python 3.11 on
        return {**state, "_copy": None}

    def extra_repr(self) -> str:
        return f"{shown(self._arguments())}, fitted={self._fitted}"


def _looked_up(
    labels: np.ndarray, bins: AnyBins, outside: Outside, missing: Missing, table: np.ndarray, name: str = "labels"
) -> np.ndarray:
    """The weights of labels from a table with one weight per bin."""
    index = bins.index(labels, outside, missing=missing, name=name)
    weights = np.asarray(table[index])  # of labels that are dropped, that of the last bin
    weights[index < 0] = 0.0
    return weights


def _of_chunk(chunk: Any, block_id: tuple[int, ...], **own: Any) -> np.ndarray:
    name = f"labels of chunk {block_id}"
    return _looked_up(labels_array(chunk, name), **own, name=name)


def _of_partition(part: Any, **own: Any) -> Any:
    """The weights of a pandas column, index or table, as a column."""
    part = part if hasattr(part, "index") else part.to_series()
    column, name = part if part.ndim == 1 else part.iloc[:, 0], "labels of a partition"
    weights = _looked_up(labels_array(part, name), **own, name=name)
    return type(column)(weights, index=part.index, name="weight")


def _means_over(values: np.ndarray, own: Bins, other: Bins, outside: Outside) -> np.ndarray:
    """The mean over each bin of ``other`` of a function that is constant in each bin of ``own``. Its values are numbers
    or rows."""
    inside = (own.edges > other.edges[0]) & (own.edges < other.edges[-1])
    cuts = np.union1d(own.edges[inside], other.edges)  # between adjacent cuts lies a part of one bin of each axis
    widths = np.diff(cuts)
    of_own = np.searchsorted(own.edges, cuts[:-1], side="right") - 1
    pieces = values[of_own.clip(0, len(own) - 1)]
    starts = np.searchsorted(cuts[:-1], other.edges[:-1])
    wholes = np.add.reduceat(widths, starts)
    if outside != "clip" and not own.unbounded:
        of_other = np.searchsorted(other.edges, cuts[:-1], side="right") - 1
        beyond = ((of_own < 0) | (of_own >= len(own))) & (widths > 1e-9 * wholes[of_other])  # more than rounding
        pieces[beyond] = 0.0 if outside == "drop" else np.nan
    wide = (-1, *[1] * (values.ndim - 1))
    return np.add.reduceat(pieces * widths.reshape(wide), starts) / wholes.reshape(wide)


def _finite(sound: bool | np.bool_, came: str) -> None:
    require(sound, "every weight must be finite", got=came, fix="Use a wider kernel, or clip=(1, ...).")
