"""Label distribution smoothing, and the weight schemes that read a density."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .._checks import instance, interval, keys, number, one_of, problem
from ..errors import CheckpointError, NotFittedError
from .bins import Bins, Outside
from .density import LabelDensity
from .grid import AnyBins, BinGrid, Windows, chosen_windows, saved_bins
from .kernels import FOLDED_KERNEL, Edges, smooth_axes

__all__ = ["LDS", "Scheme"]

Scheme = Literal["none", "inverse", "sqrt_inverse", "effective_number", "dense"]
Order = Literal["smooth_first", "scheme_first"]
_SCHEMES = ("none", "inverse", "sqrt_inverse", "effective_number", "dense")


class LDS(nn.Module):
    r"""Loss weights from a smoothed label density, so that rare labels count more.

    The effective density of bin b is :math:`q_b = \sum_{b'} \kappa(b, b') n_{b'}`; a label in b weighs
    :math:`c / g(q_b)`, with c such that weights average one over the fitted labels. ``kernel=None`` does not smooth,
    which leaves plain reweighting.

    ================== ==================================================================================
    scheme             weight before scaling
    ================== ==================================================================================
    none               1
    inverse            1 / q
    sqrt_inverse       1 / sqrt(q)
    effective_number   (1 - beta) / (1 - beta^q), Cui et al. 2019, equation 3 (arXiv:1901.05555)
    dense              max(1 - alpha * q', epsilon), q' being q scaled to [0, 1] over all bins; Steininger et al. 2021,
                       equation 4 (DenseWeight)
    ================== ==================================================================================

    Args:
        bins: the label axis, or a grid of several, whose joint bins are weighed.
        kernel: window over bins, odd length; None for none. Over a grid, one for each axis, or one for all of its
            continuous axes. ``"auto"`` is ``gaussian(5, 2)``, but nothing over classes, which have no neighbours, nor
            over an axis of fewer than five bins.
        edges: what the smoothing takes to lie beyond the axis; ``"zero"``, as in the public code, raises the weight of
            the labels at both ends.
        order: ``"smooth_first"`` smooths the counts and then applies the scheme, as the paper writes it;
            ``"scheme_first"`` smooths g(counts), as the public code does (not for ``dense``).
        clip: (low, high) bounds in labels a bin, applied to what enters the scheme; bounds the ratio of weights.
        outside: what a label beyond the axis does, as in :meth:`Bins.index`; with ``"drop"`` it weighs nothing.
        beta: of ``effective_number``, in [0, 1). alpha, epsilon: of ``dense``.
    Shape:
        forward: labels of any shape, such as (N,) or maps (N, H, W), in label units. Returns weights of that shape, on
        the labels' device, in the module's dtype (float32 unless it was cast). Over a grid of K axes labels are
        (..., K) and weights (...): a loss takes ``lds(y)[..., None].expand_as(y)``.
    Raises:
        NotFittedError: called before :meth:`fit`. LabelError: as :meth:`Bins.index`; on an accelerator labels are not
        looked at, and one that cannot be placed weighs NaN, which stops training at the next check of the loss.
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
        beta: float = 0.999,
        alpha: float = 1.0,
        epsilon: float = 1e-3,
    ) -> None:
        super().__init__()
        instance("LDS", (Bins, BinGrid), bins=bins)
        one_of("LDS", "scheme", scheme, _SCHEMES)
        one_of("LDS", "edges", edges, ("reflect", "mirror", "zero"))
        one_of("LDS", "order", order, ("smooth_first", "scheme_first"))
        one_of("LDS", "outside", outside, ("raise", "clip", "drop"))
        if scheme == "dense" and order == "scheme_first":
            raise problem("LDS", 'scheme "dense" is defined on a density, so it needs order="smooth_first"', got=order)
        self.bins, self.scheme, self.edges, self.order, self.outside = bins, scheme, edges, order, outside
        self.kernels = chosen_windows("LDS", kernel, bins)
        self.clip = None if clip is None else interval("LDS", "clip", clip)
        self.beta = number("LDS", "beta", beta, low=0, high=1, open_high=True)
        self.alpha = number("LDS", "alpha", alpha, low=0)
        self.epsilon = number("LDS", "epsilon", epsilon, low=0, open_low=True)
        self._public_integers = False
        # One weight a bin; the last is what index -1 finds: a label that could not be placed.
        self.table: Tensor
        self.register_buffer("table", torch.full((len(bins) + 1,), torch.nan))
        self._fitted = False

    @classmethod
    def reference(
        cls,
        bins: AnyBins,
        *,
        kernel: Windows | Literal["auto"] | None = "auto",
        scheme: Literal["inverse", "sqrt_inverse"] = "sqrt_inverse",
        outside: Outside = "clip",
    ) -> LDS:
        """The weights of the public DIR code: folded window, zero edges, scheme before smoothing, ``inverse`` from
        counts clipped to [5, 1000] and, as its integer array does, rounded down after smoothing.

        Source:
            github.com/YyzHarry/imbalanced-regression, ``_prepare_weights`` of its data sets.
        """
        one_of("LDS.reference", "scheme", scheme, ("inverse", "sqrt_inverse"))
        clip = (5, 1000) if scheme == "inverse" else None
        windows = chosen_windows("LDS.reference", kernel, bins, FOLDED_KERNEL)
        lds = cls(bins, kernel=None, scheme=scheme, edges="zero", order="scheme_first", clip=clip, outside=outside)
        lds.kernels = windows
        lds._public_integers = scheme == "inverse"
        return lds

    def fit(self, labels: Any) -> LDS:
        """Learn the weights from training labels (anything :meth:`LabelDensity.count` takes) or their density.

        Bins whose effective density is zero, where no training label can fall, get the largest weight of the others.

        Raises:
            ValueError: no label was counted, or a weight would not be finite. LabelError: as :meth:`Bins.index`.
        """
        if isinstance(labels, LabelDensity):
            density = labels
            if density.counts.dtype.kind == "f" and self.kernels is not None:
                raise problem(
                    "LDS.fit",
                    "the density must be as counted, since the kernel smooths it",
                    got=repr(density),
                    fix="Hand over the counted density, or kernel=None.",
                )
            if density.bins != self.bins:
                raise problem("LDS.fit", "the density must be over the same bins", got=f"{density.bins}, {self.bins}")
        else:
            density = LabelDensity.count(labels, self.bins, outside=self.outside)
        counts = density.counts.astype(np.float64)
        if counts.sum() == 0:
            raise problem("LDS.fit", "at least one label must lie on the label axis", got="none")
        weights = self._unscaled(counts)
        weights *= counts.sum() / (counts * weights).sum()
        last = 0.0 if self.outside == "drop" else np.nan
        self.table.copy_(torch.from_numpy(np.append(weights, last)))
        self._fitted = True
        return self

    def _unscaled(self, counts: np.ndarray) -> np.ndarray:
        """1 / g(q) a bin, where q = 0 taking the largest weight of the rest."""
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
        if not positive[counts > 0].all() or not np.isfinite(weights).all():
            raise problem(
                "LDS.fit",
                "every weight must be finite",
                got="a density of zero where labels lie",
                fix="Use a kernel with wider support, or clip from 1.",
            )
        weights[~positive] = weights.max()
        return weights

    def _divisor(self, density: np.ndarray) -> np.ndarray:
        if self.scheme == "sqrt_inverse":
            return np.sqrt(density)
        if self.scheme == "effective_number":
            if self.beta == 0:
                return (density > 0).astype(np.float64)
            return -np.expm1(density * np.log(self.beta)) / (1 - self.beta)
        return density

    def _smooth(self, values: np.ndarray) -> np.ndarray:
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
        if not self._fitted:
            raise _not_fitted("LDS")
        if not isinstance(labels, Tensor):
            raise problem(
                "LDS",
                "labels must be a torch.Tensor",
                got=type(labels).__name__,
                fix="Use lds.sample_weight(labels) for NumPy.",
                error=TypeError,
            )
        row = self.bins._row("LDS", labels, self.outside)
        return self.table.to(row.device).index_select(0, row.flatten()).view(row.shape)

    def sample_weight(self, labels: Any) -> np.ndarray:
        """Weights as float64 NumPy, for scikit-learn or gradient boosting: ``LDS(bins).fit(y).sample_weight(y)``."""
        if not self._fitted:
            raise _not_fitted("LDS.sample_weight")
        index = self.bins._place("LDS.sample_weight", labels, self.outside)
        index = index.cpu().numpy() if isinstance(index, Tensor) else index
        return self.table.detach().cpu().double().numpy()[index]

    def _of_bins(self, where: str, bins: AnyBins) -> np.ndarray:
        """The mean weight of labels that lie evenly in each of these bins, (B,) float64. A bin that reaches beyond the
        axis of a label that raises has NaN."""
        if not self._fitted:
            raise _not_fitted(where)
        table = self.table.detach().cpu().double().numpy()[:-1]
        if bins == self.bins:
            return table
        kinds = [[axis.categorical for axis in own.axes] for own in (bins, self.bins)]
        if kinds[0] != kinds[1]:
            raise problem(
                where,
                "lds must weigh the labels that the density counts",
                got=f"{self.bins} for {bins}",
                fix="Make the LDS over the bins of the density.",
            )
        means = table.reshape(self.bins.shape)
        for k, (own, other) in enumerate(zip(self.bins.axes, bins.axes, strict=True)):
            means = np.moveaxis(_means_over(np.moveaxis(means, k, 0), own, other, self.outside), 0, k)
        return means.ravel()

    def get_extra_state(self) -> dict[str, Any]:
        return {"fitted": self._fitted, "bins": self.bins.to_dict()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        keys("LDS", "the saved state", state, ("fitted", "bins"))
        if (saved := saved_bins(state["bins"])) != self.bins:
            raise problem(
                "LDS",
                "the saved weights belong to another label axis",
                got=f"{saved} for {self.bins}",
                error=CheckpointError,
            )
        self._fitted = bool(state["fitted"])

    def extra_repr(self) -> str:
        windows = [window.round(6).tolist() for window in self.kernels or ()]
        kernel = None if not windows else windows if isinstance(self.bins, BinGrid) else windows[0]
        return (
            f"{self.bins!r}, kernel={kernel}, scheme={self.scheme!r}, edges={self.edges!r}, order={self.order!r}, "
            f"clip={self.clip}, outside={self.outside!r}, fitted={self._fitted}"
        )


def _means_over(values: np.ndarray, own: Bins, other: Bins, outside: Outside) -> np.ndarray:
    """The means over each bin of ``other`` of a function that is one value, or row of values, in each bin of
    ``own``."""
    inside = (own.edges > other.edges[0]) & (own.edges < other.edges[-1])
    cuts = np.union1d(own.edges[inside], other.edges)  # between two of them lies a piece of one bin of each
    widths = np.diff(cuts)
    of_own = np.searchsorted(own.edges, cuts[:-1], side="right") - 1
    pieces = values[of_own.clip(0, len(own) - 1)]
    starts = np.searchsorted(cuts[:-1], other.edges[:-1])
    wholes = np.add.reduceat(widths, starts)
    if outside != "clip":
        of_other = np.searchsorted(other.edges, cuts[:-1], side="right") - 1
        beyond = ((of_own < 0) | (of_own >= len(own))) & (widths > 1e-9 * wholes[of_other])  # by more than rounding
        pieces[beyond] = 0.0 if outside == "drop" else np.nan
    wide = (-1, *[1] * (values.ndim - 1))
    return np.add.reduceat(pieces * widths.reshape(wide), starts) / wholes.reshape(wide)


def _not_fitted(where: str) -> Exception:
    fix = "Call lds.fit(training_labels) first."
    return problem(where, "weights are not known yet", fix=fix, error=NotFittedError)
