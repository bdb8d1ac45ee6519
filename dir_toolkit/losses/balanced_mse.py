r"""Balanced MSE: a squared error that corrects for a long-tailed label distribution.

MSE is the negative log-likelihood of a Gaussian with standard deviation :math:`\sigma` around the prediction. It learns
predictions for the distribution of the *training* labels, :math:`p(y)`. In balanced MSE :math:`\hat y` is the
prediction for uniformly distributed labels. Bayes' rule with :math:`p(y)` turns it into the likelihood of the training
label:

.. math:: L = \frac1N \sum_i w_i\, 2\sigma^2 \left[-\log \mathcal N(y_i; \hat y_i, \sigma^2 I)
          + \log \int \mathcal N(y'; \hat y_i, \sigma^2 I)\, p(y')\, dy'\right]

The three forms differ in how they compute the integral: from the labels of the batch (:func:`batch_mc_loss`), from a
mixture of Gaussians (:func:`gaussian_mixture_loss`), or from bins (:func:`binned_integration_loss`). Their modules can
learn :math:`\sigma`. The factor :math:`2\sigma^2` gives the loss the scale of MSE. It is detached, as in the authors'
code, so that a learned :math:`\sigma` follows the likelihood alone.

For a label outside the support of p(y) the likelihood would grow without bound as the prediction moves away. Mixtures
and bins therefore put a billionth of their mass into one Gaussian as wide as the labels. Labels at the ends of p(y)
still draw predictions a few :math:`\sigma` beyond it. Clip predictions to the axis: ``pred.clamp(low, high)``.

If the ``noise_sigma`` of a module is None, :math:`\sigma` starts at a tenth of the labels' standard deviation. With a
:math:`\sigma` as large as the range of the labels the loss approaches MSE.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import (
    finite,
    floats,
    instance,
    labels_array,
    not_empty,
    not_negative,
    number,
    one_of,
    prior_shares,
    problem,
    require,
    same_bins,
    shaped,
    warn,
    whole,
)
from .._numerics import default_dtype, is_wrapped, readable
from .._ranks import is_parallel, summed
from ..labels.bins import MISSING, Bins, Missing, Outside, continuous, lookup
from ..labels.density import LabelDensity
from ..labels.soft_labels import limits
from ._inputs import absent, finite_target, kinds, on_axis, one_per_sample, pairs, present
from ._loss import PointLoss, Reduction, drops_missing, part_of, reduce
from ._pairs import spread_of

__all__ = [
    "BatchMCLoss",
    "BinnedIntegrationLoss",
    "GaussianMixtureLoss",
    "batch_mc_loss",
    "binned_integration_loss",
    "gaussian_mixture_loss",
]

_NOISE = 0.1  # initial sigma, in standard deviations of the labels
_MOST_ROUNDED = 1e-3  # by which rounding may move a mean of a mixture, in widths of its component with the noise
_BACKGROUND = 1e-9  # the mass of the wide Gaussian in mixtures and bins
_NARROW = {torch.float64: 1e-5, torch.float32: 1e-2}  # width of a narrow bin, in units of sigma
_MOST_GAP = {torch.float64: 300.0, torch.float32: 80.0}  # whose exponential is still finite
_HALF_PEAK = 1 / math.sqrt(8 * math.pi)  # half the peak of the normal density
_MOST_ROUNDS = 500
_LEAST_GAIN = 1e-5  # of the mean log-likelihood per iteration, in nats


@drops_missing("row")
def batch_mc_loss(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    noise_sigma: float | Tensor,
    gather: bool = False,
    missing: Missing = "raise",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Balanced MSE by batch-based Monte Carlo (BMC), which needs no density beforehand.

    .. math:: L = \frac1N \sum_i w_i\, 2\sigma^2 \left[-\log
              \frac{\exp(-\lVert \hat y_i - y_i \rVert^2 / 2\sigma^2)}
              {\sum_j w_j \exp(-\lVert \hat y_i - y_j \rVert^2 / 2\sigma^2)}\right]

    This is a cross-entropy over the labels of the batch, with the sample's own label as the true class. Since the
    labels are summed and not averaged, the loss is :math:`2\sigma^2 \log N` larger than the other forms. Weights count
    samples in the sum, too, so that labels balanced by weights are not balanced a second time.

    A batch with one label has zero loss and zero gradient, and causes a warning. Labels with D dimensions, (N, D), are
    compared as vectors. For a series of T scalar labels pass ``pred.flatten()`` and ``target.flatten()``.

    Args:
        noise_sigma: :math:`\sigma`, in label units: the expected size of prediction errors. A tensor, (), may have a
            gradient.
        gather: whether to compare with the labels of all ranks. All ranks must then call the loss, each with at least
            one sample. It costs one host sync per step, and has no effect outside ``torch.distributed``.
    Shape:
        pred, target: (N,) or (N, D), equal. weight: (N,). Returns (), or (N,) for ``reduction="none"``.
    Units:
        those of the label, squared.
    Source:
        Ren et al. 2022 (arXiv:2203.16427).

    >>> round(batch_mc_loss(torch.zeros(2), torch.zeros(2), noise_sigma=1.0).item(), 4)  # 2 log 2
    1.3863
    """
    instance(bool, gather=gather)
    pred, target = _checked(pred, target, weight, reduction, None)
    log_ratio = partial(_among_labels, weight=weight, gather=gather)
    return _scored(pred, target, weight, _sigma(noise_sigma), reduction, log_ratio)


@drops_missing("row")
def gaussian_mixture_loss(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    weights: Any,
    means: Any,
    variances: Any,
    noise_sigma: float | Tensor,
    missing: Missing = "raise",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Balanced MSE by Gaussian-mixture analytical integration (GAI): training labels are modelled by a mixture.

    .. math:: \int \mathcal N(y'; \hat y, \sigma^2 I)\, p(y')\, dy'
              = \sum_k \phi_k\, \mathcal N(\hat y; \mu_k, \Sigma_k + \sigma^2 I)

    :meth:`GaussianMixtureLoss.fit` fits a mixture to labels. This function copies the mixture to the device of the
    labels at each call. The module keeps it there.

    Args:
        weights: :math:`\phi`, >= 0, summing to one.
        means: :math:`\mu`, in label units.
        variances: the diagonals of :math:`\Sigma`, >= 0, in label units squared. Zero is a point mass.
        noise_sigma: :math:`\sigma`, in label units: the expected size of prediction errors. A tensor, (), may have a
            gradient.
    Shape:
        pred, target: (N,) or (N, D), equal. weight: (N,). weights: (K,). means, variances: (K,) for scalar labels, (K,
            D) for labels with D dimensions. Returns (), or (N,) for ``reduction="none"``.
    Units:
        those of the label, squared.
    Source:
        Ren et al. 2022 (arXiv:2203.16427).

    >>> mixture = {"weights": [1.0], "means": [0.0], "variances": [3.0]}
    >>> loss = gaussian_mixture_loss(torch.tensor([2.0]), torch.tensor([2.0]), **mixture, noise_sigma=1.0)
    >>> round(loss.item(), 4)  # 2 (log N(2; 0, 4) - log N(0; 0, 1))
    -2.3863
    """
    parts = _mixture_parts(weights, means, variances)
    pred, target = _checked(pred, target, weight, reduction, parts["means"].shape[1:])
    tensors = (torch.from_numpy(part).to(target, non_blocking=True) for part in parts.values())
    return _scored(pred, target, weight, _sigma(noise_sigma), reduction, partial(_under_mixture, *tensors))


@drops_missing("row")
def binned_integration_loss(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    bins: Bins,
    density: LabelDensity | Any,
    noise_sigma: float | Tensor,
    outside: Outside = "clip",
    missing: Missing = "raise",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Balanced MSE by bin-based numerical integration (BNI), for scalar labels.

    .. math:: \int \mathcal N(y'; \hat y, \sigma^2)\, p(y')\, dy'
              = \sum_b \frac{p_b}{k_{b+1} - k_b} \left[\Phi\!\left(\frac{k_{b+1} - \hat y}{\sigma}\right)
              - \Phi\!\left(\frac{k_b - \hat y}{\sigma}\right)\right]

    The probability of a bin is spread uniformly between its limits :math:`k_b`
    (:func:`~dir_toolkit.labels.soft_labels.limits`). The paper puts it at the bin's center, which lets labels off the
    centers draw predictions away without bound. Pass a smoothed density to balance by the effective density. This
    function copies the density to the device of the labels at each call. The module keeps it there.

    Args:
        bins: the label axis. Classes are not allowed, since they have no distances.
        density: the density of the training labels over these bins, or the share of labels in each bin.
        noise_sigma: :math:`\sigma`, in label units: the expected size of prediction errors. A tensor, (), may have a
            gradient.
        outside: ``"clip"`` uses a label beyond the axis unchanged, ``"drop"`` gives it weight 0, and ``"raise"`` raises
            an error, or on an accelerator makes the loss NaN.
    Shape:
        pred, target, weight: (N,). Returns (), or (N,) for ``reduction="none"``.
    Units:
        those of the label, squared.
    Source:
        Ren et al. 2022 (arXiv:2203.16427), except for the uniform spreading.

    >>> bins = Bins.uniform(0, 2, width=1)
    >>> zero = torch.tensor([0.0])
    >>> loss = binned_integration_loss(zero, zero, bins=bins, density=[0.75, 0.25], noise_sigma=1.0)
    >>> round(loss.item(), 4)  # 2 log(sqrt(2 pi) (0.75 0.3413 + 0.25 0.1359))
    -0.638
    """
    prior = _axis_shares(bins, density, outside)
    pred, labels = _checked(pred, target, weight, reduction, ())
    weight = on_axis(target, bins, weight, outside)
    log_ratio = partial(_over_bins, bins, torch.from_numpy(prior).to(labels, non_blocking=True))
    return _scored(pred, labels, weight, _sigma(noise_sigma), reduction, log_ratio)


class _BalancedMSE(PointLoss):
    """The base of the three modules: a noise sigma, which can be learned."""

    log_sigma: Tensor
    sigma: Tensor
    missing: Missing

    def __init__(
        self,
        function: Callable[..., Tensor],
        noise_sigma: float | None,
        start: float,
        learn: bool,
        label_shape: tuple[int, ...] | None,
        **options: Any,
    ) -> None:
        start = _positive_sigma(start if noise_sigma is None else noise_sigma)
        instance(bool, learn=learn)
        super().__init__(function, **options)
        self.initial_sigma = None if noise_sigma is None else start
        self.learn = learn
        self._label_shape = label_shape
        with torch.inference_mode(False):
            if learn:
                self.log_sigma = nn.Parameter(torch.tensor([math.log(start)]))
            else:
                self.register_buffer("sigma", torch.tensor(start, dtype=default_dtype()))

    @property
    def noise_sigma(self) -> Tensor:
        """The present standard deviation of the noise, (), in label units."""
        return self.log_sigma.exp().reshape(()) if self.learn else self.sigma

    @property
    def settings(self) -> dict[str, Any]:
        """What the loss was made with."""
        return {**super().settings, "noise_sigma": self.initial_sigma, "learn": self.learn}

    def _reduced(self, output: Any, target: Tensor, weight: Tensor | None, reduction: Reduction) -> Tensor:
        pred = part_of(output, self.reads)
        return self._of_labels(pred, target, weight, missing=self.missing, reduction=reduction)

    @drops_missing("row")
    def _of_labels(
        self, pred: Tensor, target: Tensor, weight: Tensor | None, *, missing: Missing = "raise", reduction: Reduction
    ) -> Tensor:
        pred, labels = _checked(pred, target, weight, reduction, self._label_shape)  # (N, D)
        weight = self._counted(target, weight)
        sigma = self._noise(labels, weight)
        return _scored(pred, labels, weight, sigma, reduction, self._log_ratio(weight))

    def _counted(self, target: Tensor, weight: Tensor | None) -> Tensor | None:
        return weight

    def _noise(self, labels: Tensor, weight: Tensor | None) -> Tensor:
        """Sigma, (), in the dtype of the labels."""
        return self.log_sigma.to(labels.dtype).exp().reshape(()) if self.learn else self.sigma.to(labels.dtype)

    def _log_ratio(self, weight: Tensor | None) -> _LogRatio:
        raise NotImplementedError


class BatchMCLoss(_BalancedMSE):
    r""":func:`batch_mc_loss` as a module, which can learn :math:`\sigma`.

    Args:
        noise_sigma: the initial :math:`\sigma`, in label units. None takes a tenth of the standard deviation of the
            labels of all ranks, in the first training batch with different labels. All ranks must call the loss on that
            batch. Before it, each batch uses its own standard deviation.
        learn: whether the optimizer moves it, by its logarithm.
        gather: as in :func:`batch_mc_loss`.
    Attributes:
        log_sigma: (1,), a parameter, if it is learnt.
        sigma: (), a buffer, if it is not.
        unit: (), a buffer: the unit of ``log_sigma`` or ``sigma`` if ``noise_sigma`` was None; NaN before the first
            batch.
        noise_sigma: the present :math:`\sigma`, (), in label units.

    >>> loss = BatchMCLoss(noise_sigma=1.0)
    >>> round(loss(torch.zeros(2), torch.zeros(2)).item(), 4)  # 2 log 2, since both labels are equal
    1.3863
    """

    unit: Tensor
    gather: bool

    def __init__(
        self, noise_sigma: float | None = None, *, learn: bool = True, gather: bool = False, missing: Missing = "raise"
    ) -> None:
        instance(bool, gather=gather)
        super().__init__(batch_mc_loss, noise_sigma, 1.0, learn, None, gather=gather, missing=missing)
        self._unit_known = noise_sigma is not None
        if not self._unit_known:
            with torch.inference_mode(False):
                self.register_buffer("unit", torch.tensor(math.nan, dtype=default_dtype()))

    @property
    def noise_sigma(self) -> Tensor:
        r"""The current :math:`\sigma`, (), in label units; NaN before the first batch."""
        sigma = super().noise_sigma
        return sigma if self.initial_sigma is not None else sigma * self.unit

    def _noise(self, labels: Tensor, weight: Tensor | None) -> Tensor:
        sigma = super()._noise(labels, weight)
        return sigma if self.initial_sigma is not None else sigma * self._present_unit(labels, weight).to(sigma.dtype)

    def _log_ratio(self, weight: Tensor | None) -> _LogRatio:
        return partial(_among_labels, weight=weight, gather=self.gather)

    @torch.no_grad()
    def _present_unit(self, labels: Tensor, weight: Tensor | None) -> Tensor:
        """:attr:`unit`, set from these labels (N, D) if it is not set yet. It is one while all labels are equal."""
        if self._unit_known:
            return self.unit
        ranks = self.training and is_parallel()
        own = (_NOISE * spread_of(labels, weight, ranks=ranks)).to(self.unit.dtype)
        unit = torch.where(self.unit.isnan(), own, self.unit)
        if self.training and (torch.compiler.is_compiling() or not is_wrapped(unit)):
            self.unit.copy_(unit)
            self._unit_known = (ranks or readable(self.unit)) and not bool(self.unit.isnan())
        return unit.nan_to_num(1.0)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._unit_known = self.initial_sigma is not None


class GaussianMixtureLoss(_BalancedMSE):
    r""":func:`gaussian_mixture_loss` as a module, which can learn :math:`\sigma`. Build one from labels by :meth:`fit`.

    Args:
        weights: as in :func:`gaussian_mixture_loss`.
        means: as in :func:`gaussian_mixture_loss`.
        variances: as in :func:`gaussian_mixture_loss`.
        noise_sigma: the initial :math:`\sigma`, in label units. None takes a tenth of the standard deviation of the
            mixture, averaged over its D dimensions.
        learn: whether the optimizer moves it, by its logarithm.
    Attributes:
        weights, means, variances: buffers. log_sigma, sigma, noise_sigma: as in :class:`BatchMCLoss`.

    >>> loss = GaussianMixtureLoss([1.0], [0.0], [3.0], noise_sigma=1.0)
    >>> round(loss(torch.tensor([2.0]), torch.tensor([2.0])).item(), 4)  # 2 (log N(2; 0, 4) - log N(0; 0, 1))
    -2.3863
    """

    weights: Tensor
    means: Tensor
    variances: Tensor

    def __init__(
        self,
        weights: Any,
        means: Any,
        variances: Any,
        *,
        noise_sigma: float | None = None,
        learn: bool = True,
        missing: Missing = "raise",
    ) -> None:
        parts = _mixture_parts(weights, means, variances)
        spread = float(np.sqrt(_total_variance(*parts.values())[1].mean()))
        if spread == 0 and noise_sigma is None:
            fix = "Pass the expected size of prediction errors, in label units."
            raise problem("noise_sigma must be given where the mixture has no spread", got="None", fix=fix)
        start, means, dtype = _NOISE * spread, parts["means"], default_dtype()
        widths = np.hypot(np.sqrt(parts["variances"]), start if noise_sigma is None else _positive_sigma(noise_sigma))
        rounded = np.abs(torch.from_numpy(means).to(dtype).double().numpy() - means)
        far = bool((rounded > _MOST_ROUNDED * widths).any())  # from zero, beside which components are narrow
        dtype = torch.float64 if far else dtype
        buffers = {name: torch.tensor(part, dtype=dtype) for name, part in parts.items()}
        shape = parts["means"].shape[1:]
        super().__init__(gaussian_mixture_loss, noise_sigma, start, learn, shape, **buffers, missing=missing)
        self._bytes_kept = 8 if far else 4  # a mixture that needs float64 also needs it after a cast

    def _log_ratio(self, weight: Tensor | None) -> _LogRatio:
        return partial(_under_mixture, self.weights, self.means, self.variances)

    @classmethod
    def fit(
        cls,
        labels: Any,
        *,
        components: int = 8,
        noise_sigma: float | None = None,
        learn: bool = True,
        least_variance: float = 1e-4,
        seed: int = 0,
        missing: Missing = "raise",
    ) -> GaussianMixtureLoss:
        """The loss for a mixture fitted to the training labels by expectation maximization.

        The fit starts from means drawn as in k-means++. It stops when the likelihood no longer improves, or after 500
        iterations. Equal labels and seeds give equal mixtures.

        Args:
            components: the number of Gaussians, at most the number of different labels.
            noise_sigma, learn: as in the class.
            least_variance: the smallest variance of a component, as a share of the labels' variance, > 0. It keeps
                components from collapsing onto a repeated label.
            seed: the seed of the initial means.
            missing: as in the class; ``"drop"`` fits the mixture to the labels that are present.
        Shape:
            labels: (N,) or (N, D).
        >>> loss = GaussianMixtureLoss.fit([0.0, 0.0, 1.0, 1.0, 20.0, 21.0], components=2)
        >>> sorted(round(mean, 3) for mean in loss.means.tolist())
        [0.5, 20.5]
        """
        seed = whole("seed", seed, low=0)
        one_of("missing", missing, MISSING)
        least = number("least_variance", least_variance, low=0, high=1e36, open_low=True)
        array = labels_array(labels).astype(np.float64)
        require(array.ndim in (1, 2), "labels must be (N,) or (N, D)", got=array.shape)
        array = array[~np.isnan(array.reshape(len(array), -1)).any(1)] if missing == "drop" else array
        not_empty(labels=array)
        finite(labels=array)
        rows, counts = np.unique(array.reshape(len(array), -1), axis=0, return_counts=True)
        varies = rows.min(0) < rows.max(0)
        column = int(varies.argmin())
        got = f"only {rows[0, column]:g}" + f" in column {column}" * (array.ndim == 2)
        require(varies.all(), "labels must hold at least two different values", got=got)
        components = whole(
            "components", components, low=1, high=len(rows), fix="This is the number of different labels."
        )
        center, spread = np.average(rows, 0, counts), rows.max(0) - rows.min(0)
        spread = spread * np.sqrt(np.average(((rows - center) / spread) ** 2, 0, counts))
        weights, means, variances = _mixture((rows - center) / spread, counts / len(array), components, least, seed)
        shape = (components, *array.shape[1:])
        means, variances = (means * spread + center).reshape(shape), (variances * spread**2).reshape(shape)
        return cls(weights, means, variances, noise_sigma=noise_sigma, learn=learn, missing=missing)


class BinnedIntegrationLoss(_BalancedMSE):
    r""":func:`binned_integration_loss` as a module, which can learn :math:`\sigma`.

    Args:
        bins: as in :func:`binned_integration_loss`.
        density: as in :func:`binned_integration_loss`.
        noise_sigma: the initial :math:`\sigma`, in label units. None takes a tenth of the standard deviation of the
            density.
        learn: whether the optimizer moves it, by its logarithm.
        outside: as in :func:`binned_integration_loss`.
    Attributes:
        prior: (B,), a buffer. log_sigma, sigma, noise_sigma: as in :class:`BatchMCLoss`.

    >>> bins = Bins.uniform(0, 2, width=1)
    >>> loss = BinnedIntegrationLoss(bins, LabelDensity.count([0.2, 0.4, 0.7, 1.9], bins), noise_sigma=1.0)
    >>> loss.prior.tolist()
    [0.75, 0.25]
    """

    bins: Bins
    prior: Tensor
    outside: Outside

    def __init__(
        self,
        bins: Bins,
        density: LabelDensity | Any,
        *,
        noise_sigma: float | None = None,
        learn: bool = True,
        outside: Outside = "clip",
        missing: Missing = "raise",
    ) -> None:
        prior = _axis_shares(bins, density, outside)
        spread = float(np.sqrt(_total_variance(prior, bins.centers, np.diff(bins.edges) ** 2 / 12)[1]))
        shares = torch.tensor(prior, dtype=default_dtype())
        start = _NOISE * spread
        options = {"bins": bins, "prior": shares, "outside": outside, "missing": missing}
        super().__init__(binned_integration_loss, noise_sigma, start, learn, (), **options)

    @property
    def settings(self) -> dict[str, Any]:
        """What the loss was made with."""
        own = super().settings
        return {"bins": own.pop("bins"), "density": own.pop("prior"), **own}

    def _counted(self, target: Tensor, weight: Tensor | None) -> Tensor | None:
        return on_axis(target, self.bins, weight, self.outside)

    def _log_ratio(self, weight: Tensor | None) -> _LogRatio:
        return partial(_over_bins, self.bins, self.prior)


def _checked(
    pred: Tensor, target: Tensor, weight: Tensor | None, reduction: str, label_shape: tuple[int, ...] | None
) -> tuple[Tensor, Tensor]:
    """Checked predictions and labels, (N, D) in at least float32, with zeros where the weight is zero.

    Args:
        label_shape: the shape of one label; None allows () and (D,).
    """
    needs_gradient = isinstance(target, Tensor) and target.requires_grad
    if weight is not None:
        kinds(reduction, weight, pred=pred, target=target)
    pred, target = pairs(pred, target, None, reduction)
    require(pred.ndim in (1, 2) or label_shape is not None, "pred must be (N,) or (N, D)", got=pred.shape)
    shaped(("N", *(pred.shape[1:] if label_shape is None else label_shape)), pred=pred)
    one_per_sample(len(pred), weight=weight)
    swapped, got = needs_gradient and not pred.requires_grad, "one that requires it, and a pred that does not"
    require(not swapped, "target must hold labels, which have no gradient", got=got, fix="Pass pred first.")
    gone = absent(weight)
    finite_target(target, gone)
    pred, target = present(pred, gone), present(target.detach(), gone)
    return (pred[:, None], target[:, None]) if pred.ndim == 1 else (pred, target)


def _scored(
    pred: Tensor, target: Tensor, weight: Tensor | None, sigma: Tensor | float, reduction: str, log_ratio: _LogRatio
) -> Tensor:
    """The reduced loss, from a function that gives the log of the integral over the likelihood."""
    sigma = sigma.to(target) if isinstance(sigma, Tensor) else target.new_full((), sigma)
    error = (pred - target) / sigma
    # An infinite error gives NaN, whatever its sign.
    values = log_ratio(error, target, sigma) + 0 * error.sum(1)
    values = present(values, None if weight is None else weight == 0)  # A batch without a label has no ratio.
    return reduce(values * (2 * sigma.square()).detach(), weight, reduction)


def _positive_sigma(sigma: float) -> float:
    # Its square and its inverse must fit into float32.
    return number("noise_sigma", sigma, low=1e-18, high=1e18)


def _sigma(noise_sigma: float | Tensor) -> float | Tensor:
    if not isinstance(noise_sigma, Tensor):
        return _positive_sigma(noise_sigma)
    floats(noise_sigma=noise_sigma)
    shaped((), "or a number", noise_sigma=noise_sigma)
    return noise_sigma


# Each function returns log(integral of N(y'; pred, sigma²) p(y')) - log N(y; pred, sigma²), (N,), for the error (N, D)
# in units of sigma. Distances are relative to the label, since relative to the prediction two large squares would
# cancel.
_LogRatio = Callable[[Tensor, Tensor, Tensor], Tensor]


def _among_labels(error: Tensor, target: Tensor, sigma: Tensor, *, weight: Tensor | None, gather: bool) -> Tensor:
    """The log-ratio (N,) for an integral over the labels of the batch."""
    share = torch.ones_like(target[:, 0]) if weight is None else weight.detach().to(target.dtype)
    drawn = torch.cat([target, share[:, None]], 1)  # (M, D + 1)
    if gather and is_parallel():
        drawn = _of_all_ranks(drawn)
    if len(drawn) < 2:
        warn(
            "a batch of one label has no other label to compare with, and has zero loss. Drop a last batch of one "
            "(drop_last=True), or use GaussianMixtureLoss or BinnedIntegrationLoss."
        )
    labels, share = drawn[:, :-1], drawn[:, -1]
    # Absent labels get the smallest number, since the gradient of a row of -inf is NaN.
    log_share = torch.where(share > 0, share.log(), torch.finfo(share.dtype).min / 4)
    # Not by a matrix product, which may use lower precision, and cancels where labels are far from zero.
    beside = (labels - target[:, None]) / sigma  # (N, M, D)
    return torch.logsumexp(log_share + (beside * (error[:, None] - beside / 2)).sum(2), 1)


def _under_mixture(
    weights: Tensor, means: Tensor, variances: Tensor, error: Tensor, target: Tensor, sigma: Tensor
) -> Tensor:
    """The log-ratio (N,) for an integral over a Gaussian mixture."""
    shares, means, variances = (x.to(error.dtype) for x in (weights, means, variances))
    means, variances = means.view(len(means), -1), variances.view(len(means), -1)  # (K, D)
    middle, total = _total_variance(shares, means, variances)
    beside = (torch.cat([means, middle[None]]) - target[:, None]) / sigma  # (N, K + 1, D)
    widths = torch.cat([variances, (total + sigma.square())[None]]).sqrt() / sigma
    log_shares = torch.cat([(1 - _BACKGROUND) * shares, shares.new_full((1,), _BACKGROUND)]).log()
    noise = 1 / (1 + widths.square())  # the share of the variance that is noise
    own = error[:, None]
    exponents = own.square() * (noise * widths.square()) / 2 + noise * beside * (own - beside / 2)
    widening = torch.log1p(widths.square()) / 2
    return torch.logsumexp(log_shares + (exponents - widening).sum(2), 1)


def _over_bins(bins: Bins, prior: Tensor, error: Tensor, target: Tensor, sigma: Tensor) -> Tensor:
    """The log-ratio (N,) for an integral over the bins of the axis."""
    # In float64, since the difference of two tails loses digits where bins are narrow.
    wide = torch.float32 if error.device.type == "mps" else torch.float64
    error, target, scale = error.to(wide), target.to(wide), sigma.to(wide)
    knots, edges = limits(bins, error), bins.tensor("edges", error)
    # The first and the last bin hold labels up to their edges, even if their limits were moved inwards.
    knots = torch.cat([torch.minimum(knots[:1], edges[:1]), knots[1:-1], torch.maximum(knots[-1:], edges[-1:])])
    # From here on positions are in units of sigma from the lower end of the axis.
    start, knots = knots[0], (knots - knots[0]) / scale
    label = (target - start) / scale
    pred = label + error  # (N, 1)
    width, prior = knots.diff(), prior.to(wide)
    narrow = width < _NARROW[wide]
    height = torch.where(narrow, 0.0, prior) / torch.where(narrow, 1.0, width)
    height = F.pad(height, (1, 1))  # (B + 2,), zero beyond the axis
    away = knots - pred  # (N, B + 1)
    # The integral is the height at the prediction plus each change of height times the tail beyond it.
    side = torch.copysign(away.new_full((), math.sqrt(0.5)), away.detach())
    tails = torch.erfc(away * side) * side
    index = torch.searchsorted(knots.detach(), pred.detach())
    integral = lookup(height, index) + (tails @ (height.diff() * math.sqrt(0.5)))[:, None]
    if not readable(scale) or narrow.any():
        # For narrow bins the tails would cancel. Their density is taken in the middle of the bin.
        points = F.pad(torch.where(narrow, prior, 0.0), (1, 1))
        integral = integral + (torch.exp(-away.square() / 2) @ (points[1:] + points[:-1]))[:, None] * _HALF_PEAK
    # The background is as wide as the axis, and dominates where predictions are so far out that tails vanish.
    center, noise = knots[-1] / 2, 1 / (2 + knots[-1].square())
    log_noise = noise.log() / 2 + math.log(_BACKGROUND)
    beside = center - label
    wide_part = error.square() * (1 - noise) / 2 + noise * beside * (error - beside / 2) + log_noise
    gap = (noise * (pred - center).square() / 2 - log_noise).clamp_max(_MOST_GAP[wide])
    odds = integral.clamp_min(0) * gap.exp() * (1 - _BACKGROUND) * math.sqrt(2 * math.pi)
    return (wide_part + torch.log1p(odds)).squeeze(1).to(sigma.dtype)


def _total_variance(shares: Any, means: Any, variances: Any) -> tuple[Any, Any]:
    """The mean and the variance of a mixture, (D,) or () each, from arrays or tensors (K, D) or (K,)."""
    shares = shares.reshape(-1, *(1,) * (means.ndim - 1)) / shares.sum()
    middle = (shares * means).sum(0)
    return middle, (shares * (variances + (means - middle) ** 2)).sum(0)


def _of_all_ranks(rows: Tensor) -> Tensor:
    """The rows of all ranks, in rank order. Ranks may hold different numbers of rows."""
    rank = dist.get_rank()
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.int64, device="cpu")
    sizes[rank] = len(rows)
    ends = summed(sizes)[0].cumsum(0).tolist()
    everyone = rows.new_zeros(ends[-1], rows.shape[1])
    everyone[ends[rank] - len(rows) : ends[rank]] = rows
    return summed(everyone)[0]


def _mixture_parts(weights: Any, means: Any, variances: Any) -> dict[str, np.ndarray]:
    """The checked weights, means and variances of a mixture."""
    given = {"weights": weights, "means": means, "variances": variances}
    parts = {name: labels_array(value, name).astype(np.float64) for name, value in given.items()}
    shaped(("K",), weights=parts["weights"])
    rows = (len(parts["weights"]), *parts["means"].shape[1:2])
    shaped(rows, "one row for each of the weights", means=parts["means"], variances=parts["variances"])
    not_empty(**parts)
    with np.errstate(over="ignore"):
        finite(**{name: torch.from_numpy(part).to(default_dtype()) for name, part in parts.items()})
    not_negative(**{name: torch.from_numpy(parts[name]) for name in ("weights", "variances")})
    total = parts["weights"].sum()
    require(abs(total - 1) <= 1e-4, "weights must sum to one", got=f"a sum of {total:g}", fix="Divide by the sum.")
    return parts


def _axis_shares(bins: Bins, density: Any, outside: str) -> np.ndarray:
    """The checked probability of each bin, (B,)."""
    continuous(bins, "For classes use logit_adjusted_cross_entropy.")
    one_of("outside", outside, ("raise", "clip", "drop"))
    if isinstance(density, LabelDensity):
        same_bins("density", density, bins)
        return density.prior()
    numbers, fix = density is not None and not isinstance(density, str), "Use LabelDensity.count(labels, bins)."
    require(numbers, "density must be a LabelDensity, or one share of labels per bin", got=type(density), fix=fix)
    prior = labels_array(density, "density").astype(np.float64)
    shaped((len(bins),), "one share of labels per bin", density=prior)
    prior_shares("density", torch.from_numpy(prior), zeros=True)
    return prior


def _mixture(
    rows: np.ndarray, shares: np.ndarray, components: int, least: float, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights (K,), means (K, D) and variances (K, D) of a mixture for rows (M, D), all different, of variance one."""
    from scipy.special import logsumexp, softmax

    random = np.random.default_rng(seed)
    starts = rows[[random.choice(len(rows), p=shares)]]
    nearest = ((rows - starts) ** 2).sum(1)
    while len(starts) < components:
        odds = shares * nearest
        odds = odds if odds.sum() > 0 else shares  # squares of tiny distances are zero
        starts = np.concatenate([starts, rows[[random.choice(len(rows), p=odds / odds.sum())]]])
        nearest = np.minimum(nearest, ((rows - starts[-1]) ** 2).sum(1))
    distances = np.stack([((rows - start) ** 2).sum(1) for start in starts], 1)
    belongs = np.eye(components)[distances.argmin(1)]  # (M, K), the responsibility of each component for each row

    reached = -math.inf
    for _ in range(_MOST_ROUNDS):
        mass = belongs.T @ shares
        pull = (belongs * shares[:, None] / np.maximum(mass, np.finfo(np.float64).tiny)).T  # (K, M)
        means = pull @ rows
        variances = np.maximum(pull @ rows**2 - means**2, least)
        precision = 1 / variances
        squares = rows**2 @ precision.T - 2 * rows @ (means * precision).T + (means**2 * precision).sum(1)
        with np.errstate(divide="ignore"):  # a component without mass
            joint = np.log(mass) - (squares + np.log(2 * math.pi * variances).sum(1)) / 2
        belongs = softmax(joint, axis=1)
        likelihood = float(shares @ logsumexp(joint, axis=1))
        if likelihood - reached < _LEAST_GAIN:
            break
        reached = likelihood
    return mass / mass.sum(), means, variances
