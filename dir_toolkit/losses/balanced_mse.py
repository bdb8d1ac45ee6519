r"""Balanced MSE: the squared error that undoes the pull of a long-tailed label distribution.

MSE is the likelihood of a Gaussian of standard deviation :math:`\sigma` around the prediction, and learns what is
likely under the distribution of the *training* labels, :math:`p(y)`. Balanced MSE takes the prediction :math:`\hat y`
for what would be likely if all labels occurred equally often, and brings :math:`p(y)` in by Bayes' rule to score it:

.. math:: L = \frac1N \sum_i w_i\, 2\sigma^2 \left[-\log \mathcal N(y_i; \hat y_i, \sigma^2 I)
          + \log \int \mathcal N(y'; \hat y_i, \sigma^2 I)\, p(y')\, dy'\right]

So :math:`\hat y` itself is the balanced prediction. The three forms differ in what stands for the integral: the labels
of the batch (:class:`BatchMCLoss`), a mixture of Gaussians (:class:`GaussianMixtureLoss`), or bins
(:class:`BinnedIntegrationLoss`). The factor :math:`2\sigma^2` gives the loss the scale of MSE. No gradient goes through
it, as in the paper's code, so that a learnt :math:`\sigma` follows the likelihood alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._checks import (
    finite,
    floats,
    instance,
    is_tensor,
    labels_array,
    length,
    not_empty,
    not_negative,
    number,
    one_of,
    problem,
    real,
    same_device,
    same_shape,
    whole,
    wide_dtype,
)
from .._ranks import summed
from ..errors import ShapeError
from ..labels.bins import Bins
from ..labels.density import LabelDensity
from ._reduce import Reduction, one_a_sample, present, reduce

__all__ = ["BatchMCLoss", "BinnedIntegrationLoss", "GaussianMixtureLoss"]

_MOST_ROUNDS = 500
_LEAST_GAIN = 1e-5  # of the mean log-likelihood, in nats


class _BalancedMSE(nn.Module, ABC):
    """What the three forms share: the noise, the checks and the likelihood."""

    log_sigma: Tensor
    sigma: Tensor

    def __init__(self, noise_sigma: float, learn: bool, label_shape: tuple[int, ...] | None) -> None:
        super().__init__()
        where = type(self).__name__
        # Its square, and what is divided by it, must fit into float32.
        self.initial_sigma = number(where, "noise_sigma", noise_sigma, low=1e-18, high=1e18)
        instance(where, bool, learn=learn)
        self.learn = learn
        self._label_shape = label_shape
        if learn:
            self.log_sigma = nn.Parameter(torch.tensor(math.log(self.initial_sigma)))
        else:
            self.register_buffer("sigma", torch.tensor(self.initial_sigma))

    @property
    def noise_sigma(self) -> Tensor:
        """The present standard deviation of the noise, (), in label units."""
        return self.log_sigma.exp() if self.learn else self.sigma

    def forward(
        self, pred: Tensor, target: Tensor, weight: Tensor | None = None, *, reduction: Reduction = "mean"
    ) -> Tensor:
        pred, target = self._checked(pred, target, weight, reduction)  # (N, D)
        sigma = self.log_sigma.to(pred.dtype).exp() if self.learn else self.sigma.to(pred.dtype)
        scale = 2 * sigma.square()
        values = (pred - target).square().sum(1) / scale + self._log_integral(pred, target, weight, scale)
        return reduce(values * scale.detach(), weight, reduction)

    @abstractmethod
    def _log_integral(self, pred: Tensor, target: Tensor, weight: Tensor | None, scale: Tensor) -> Tensor:
        """log of the integral of exp(-||y' - pred||² / scale) p(y'), (N,): the Gaussian's own factor cancels."""

    def _checked(self, pred: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> tuple[Tensor, Tensor]:
        """Predictions, those of weight zero as zeros, and labels, both (N, D) in at least float32."""
        where = type(self).__name__
        one_of(where, "reduction", reduction, ("none", "mean", "sum"))
        weights = {} if weight is None else {"weight": weight}
        is_tensor(where, pred=pred, target=target, **weights)
        floats(where, pred=pred)
        real(where, target=target, **weights)
        same_shape(where, pred=pred, target=target)
        if self._label_shape is None:
            fits, rule = pred.ndim in (1, 2), "(N,) or (N, D)"
        else:
            fits = pred.ndim > 0 and pred.shape[1:] == self._label_shape
            rule = str(("N", *self._label_shape)).replace("'", "")
        if not fits:
            raise problem(where, f"pred must be {rule}", got=f"shape {tuple(pred.shape)}", error=ShapeError)
        if weight is not None:
            one_a_sample(where, "weight", weight, len(pred), {})
        same_device(where, pred=pred, target=target, **weights)
        not_empty(where, pred=pred)
        finite(where, target=target, **weights)
        not_negative(where, **weights)
        wide = wide_dtype(pred, target)
        pred, target = pred.to(wide), target.detach().to(wide)
        if pred.ndim == 1:
            pred, target = pred[:, None], target[:, None]
        return present(pred, weight), target

    def extra_repr(self) -> str:
        return f"noise_sigma={self.initial_sigma:g}, learn={self.learn}"


class BatchMCLoss(_BalancedMSE):
    r"""Balanced MSE with the batch's labels in place of the integral (BMC): no density is needed beforehand.

    .. math:: L = \frac1N \sum_i w_i\, 2\sigma^2 \left[-\log
              \frac{\exp(-\lVert \hat y_i - y_i \rVert^2 / 2\sigma^2)}
              {\sum_j w_j \exp(-\lVert \hat y_i - y_j \rVert^2 / 2\sigma^2)}\right]

    That is the cross-entropy of telling a sample's own label among the batch's. As the labels are summed, and not
    averaged, it lies :math:`2\sigma^2 \log N` above the other forms. A label that occurs twice is drawn twice from
    p(y), and counts twice. A weight says how often a sample was seen, among the labels too: weight 2 is seen twice,
    weight 0 is absent, and labels that the weights have evened out are not balanced a second time.

    Args:
        noise_sigma: :math:`\sigma`, in label units, where it starts or stays: how far off predictions are.
        learn: whether the optimizer moves it, by its logarithm.
        gather: compare with the labels of all ranks, so that n ranks make the loss of one with the whole batch. All
            ranks must call the loss, each with at least one sample, but not all with as many. Costs an accelerator
            one host sync a step. Does nothing outside ``torch.distributed``.
    Attributes:
        log_sigma: (), a parameter, if learnt. sigma: (), a buffer, if not.
        noise_sigma: the present :math:`\sigma`, ().
    Shape:
        forward: pred, target: (N,) or (N, D), equal. weight: (N,). Returns (), or (N,) for ``reduction="none"``.
    Units:
        those of the label, squared.
    Raises:
        ShapeError: shapes do not fit. ValueError: there is only one label to compare with, that of the sample itself,
        so that the loss would be zero whatever is predicted; target or weight is not finite, a weight is negative, or
        there is no sample. A prediction that is not finite makes the loss NaN; training loops stop there. On
        accelerators values are not looked at. No gradient reaches target.
    Source:
        Ren et al. 2022 (arXiv:2203.16427).

    >>> loss = BatchMCLoss(noise_sigma=1.0)
    >>> round(loss(torch.zeros(2), torch.zeros(2)).item(), 4)  # 2 log 2, since nothing tells the two apart
    1.3863
    """

    def __init__(self, noise_sigma: float = 1.0, *, learn: bool = True, gather: bool = False) -> None:
        super().__init__(noise_sigma, learn, None)
        instance("BatchMCLoss", bool, gather=gather)
        self.gather = gather

    def _log_integral(self, pred: Tensor, target: Tensor, weight: Tensor | None, scale: Tensor) -> Tensor:
        share = torch.ones_like(target[:, 0]) if weight is None else weight.detach().to(target.dtype)
        drawn = torch.cat([target, share[:, None]], 1)  # (M, D + 1)
        if self.gather and dist.is_available() and dist.is_initialized():
            drawn = _of_all_ranks(drawn)
        if len(drawn) < 2:
            raise problem(
                "BatchMCLoss",
                "the batch must hold at least two samples, whose labels are compared",
                got="1",
                fix="Drop a last batch of one, or use GaussianMixtureLoss or BinnedIntegrationLoss.",
            )
        labels, share = drawn[:, :-1], drawn[:, -1]
        # Not by a matrix product, which may run in lower precision and cancels where labels are far from zero.
        distance = torch.cdist(pred, labels, compute_mode="donot_use_mm_for_euclid_dist")
        # Absent labels get the least number, since a row of nothing but -inf has no gradient.
        log_share = torch.where(share > 0, share.log(), torch.finfo(share.dtype).min / 4)
        return torch.logsumexp(log_share - distance.square() / scale, 1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gather={self.gather}"


class GaussianMixtureLoss(_BalancedMSE):
    r"""Balanced MSE with the integral in closed form, over a mixture of Gaussians for the training labels (GAI).

    .. math:: \int \mathcal N(y'; \hat y, \sigma^2 I)\, p(y')\, dy'
              = \sum_k \phi_k\, \mathcal N(\hat y; \mu_k, \Sigma_k + \sigma^2 I)

    Build one from labels by :meth:`fit`.

    Args:
        weights: :math:`\phi`, >= 0, summing to one. means: :math:`\mu`, in label units.
        variances: the diagonals of :math:`\Sigma`, >= 0, in label units squared; zero makes a label a spike.
        noise_sigma: :math:`\sigma`, in label units, where it starts or stays: how far off predictions are.
        learn: whether the optimizer moves it, by its logarithm.
    Attributes:
        weights, means, variances: buffers. log_sigma, sigma, noise_sigma: as in :class:`BatchMCLoss`.
    Shape:
        weights: (K,). means, variances: (K,) for labels that are numbers, (K, D) for labels of D numbers.
        forward: pred, target: (N,) or (N, D) accordingly. weight: (N,). Returns (), or (N,) for
        ``reduction="none"``.
    Units:
        those of the label, squared.
    Raises:
        ShapeError: shapes do not fit. ValueError: weights do not sum to one, a variance is negative, target or weight
        is not finite, a weight is negative, or there is no sample. A prediction that is not finite makes
        the loss NaN; training loops stop there. On accelerators values are not looked at.
    Source:
        Ren et al. 2022 (arXiv:2203.16427).

    >>> loss = GaussianMixtureLoss([1.0], [0.0], [3.0], noise_sigma=1.0)
    >>> round(loss(torch.tensor([2.0]), torch.tensor([2.0])).item(), 4)  # 2 (log N(2; 0, 4) - log N(0; 0, 1))
    -2.3863
    """

    weights: Tensor
    means: Tensor
    variances: Tensor

    def __init__(
        self, weights: Any, means: Any, variances: Any, *, noise_sigma: float = 1.0, learn: bool = True
    ) -> None:
        where = "GaussianMixtureLoss"
        given = {"weights": weights, "means": means, "variances": variances}
        parts = {name: labels_array(where, value, name).astype(np.float64) for name, value in given.items()}
        shapes = {name: part.shape for name, part in parts.items()}
        if len(shapes["weights"]) != 1:
            raise problem(where, "weights must be (K,)", got=f"shape {shapes['weights']}", error=ShapeError)
        not_empty(where, weights=parts["weights"])
        for name in ("means", "variances"):
            if len(shapes[name]) not in (1, 2) or shapes[name][:1] != shapes["weights"]:
                rule = f"{name} must be (K,) or (K, D), with one row for each of {shapes['weights'][0]} weights"
                raise problem(where, rule, got=f"shape {shapes[name]}", error=ShapeError)
        if shapes["means"] != shapes["variances"]:
            got = f"{shapes['means']} and {shapes['variances']}"
            raise problem(where, "means and variances must have the same shape", got=got, error=ShapeError)
        not_empty(where, means=parts["means"])
        buffers = {name: torch.from_numpy(part).to(torch.get_default_dtype()) for name, part in parts.items()}
        finite(where, **buffers)
        not_negative(where, weights=buffers["weights"], variances=buffers["variances"])
        _sums_to_one(where, "weights", parts["weights"])
        super().__init__(noise_sigma, learn, shapes["means"][1:])
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    @classmethod
    def fit(
        cls,
        labels: Any,
        *,
        components: int = 8,
        noise_sigma: float = 1.0,
        learn: bool = True,
        least_variance: float = 1e-4,
        seed: int = 0,
    ) -> GaussianMixtureLoss:
        """The loss for the mixture that expectation maximization finds in the training labels.

        It starts from labels far apart, as k-means++ draws them, and stops when a round gains next to nothing, at the
        latest after 500. Equal labels and seeds give equal mixtures.

        Args:
            components: of the mixture, at most as many as there are different labels.
            noise_sigma, learn: of the loss.
            least_variance: of a component, as a share of the labels' variance, > 0: keeps components from closing in
                on a label that occurs often.
            seed: of the start.
        Shape:
            labels: (N,) or (N, D).
        Raises:
            ShapeError: labels are neither. ValueError: a label is not finite, there is none, one of the label's
            numbers is the same in all, or there are more components than different labels.

        >>> loss = GaussianMixtureLoss.fit([0.0, 0.0, 1.0, 1.0, 20.0, 21.0], components=2)
        >>> sorted(round(mean, 3) for mean in loss.means.tolist())
        [0.5, 20.5]
        """
        where = "GaussianMixtureLoss.fit"
        components = length(where, "components", components)
        seed = whole(where, "seed", seed, low=0)
        least = number(where, "least_variance", least_variance, low=0, high=1e36, open_low=True)
        array = labels_array(where, labels).astype(np.float64)
        if array.ndim not in (1, 2):
            raise problem(where, "labels must be (N,) or (N, D)", got=f"shape {array.shape}", error=ShapeError)
        not_empty(where, labels=array)
        finite(where, labels=array)
        rows, counts = np.unique(array.reshape(len(array), -1), axis=0, return_counts=True)
        if (rows.min(0) == rows.max(0)).any():
            at = int((rows.min(0) == rows.max(0)).argmax())
            got = f"only {rows[0, at]:g}" + (f" in column {at}" if array.ndim == 2 else "")
            raise problem(where, "labels must hold at least two different values", got=got)
        if components > len(rows):
            rule = f"components must be at most the number of different labels, {len(rows)}"
            raise problem(where, rule, got=str(components))
        center, spread = np.average(rows, 0, counts), rows.max(0) - rows.min(0)
        spread = spread * np.sqrt(np.average(((rows - center) / spread) ** 2, 0, counts))
        weights, means, variances = _mixture((rows - center) / spread, counts / len(array), components, least, seed)
        shape = (components, *array.shape[1:])
        means, variances = (means * spread + center).reshape(shape), (variances * spread**2).reshape(shape)
        return cls(weights, means, variances, noise_sigma=noise_sigma, learn=learn)

    def _log_integral(self, pred: Tensor, target: Tensor, weight: Tensor | None, scale: Tensor) -> Tensor:
        means, variances = (x.to(pred.dtype).view(len(x), -1) for x in (self.means, self.variances))  # (K, D)
        total = variances + scale / 2
        squares = (pred[:, None] - means).square() / total  # (N, K, D)
        # log(total / sigma²), without the cancellation of the two where the noise is the larger part.
        widening = torch.log1p(2 * variances / scale).sum(1)
        return torch.logsumexp(self.weights.to(pred.dtype).log() - (widening + squares.sum(2)) / 2, 1)

    def extra_repr(self) -> str:
        return f"components={len(self.weights)}, {super().extra_repr()}"


class BinnedIntegrationLoss(_BalancedMSE):
    r"""Balanced MSE with a sum over bins in place of the integral (BNI), for labels that are numbers.

    .. math:: \int \mathcal N(y'; \hat y, \sigma^2)\, p(y')\, dy' \approx \sum_b p_b\, \mathcal N(c_b; \hat y, \sigma^2)

    A bin stands for its center :math:`c_b`. For labels that are whole numbers, on bins one wide, the sum is exact; for
    others bins must be narrower than :math:`\sigma`. Hand over a smoothed density to balance by the effective one.

    Args:
        bins: the label axis.
        density: of the training labels over these bins, or the share of labels in each bin.
        noise_sigma: :math:`\sigma`, in label units, where it starts or stays: how far off predictions are.
        learn: whether the optimizer moves it, by its logarithm.
    Attributes:
        centers, prior: (B,), buffers. log_sigma, sigma, noise_sigma: as in :class:`BatchMCLoss`.
    Shape:
        forward: pred, target, weight: (N,). Returns (), or (N,) for ``reduction="none"``.
    Units:
        those of the label, squared.
    Raises:
        ShapeError: shapes do not fit. TypeError: there is no density. ValueError: the density is over other bins, or
        holds no label; shares are negative or do not sum to one; bins are classes, which have no distances; target
        or weight is not finite, a weight is negative, or there is no sample. A prediction that is not finite
        makes the loss NaN; training loops stop there. On accelerators values are not looked at.
    Source:
        Ren et al. 2022 (arXiv:2203.16427).

    >>> bins = Bins.uniform(0, 2, width=1)
    >>> loss = BinnedIntegrationLoss(bins, LabelDensity.count([0.2, 0.4, 0.7, 1.9], bins))
    >>> loss.prior.tolist()
    [0.75, 0.25]
    >>> round(loss(torch.tensor([0.5]), torch.tensor([0.5])).item(), 4)  # 2 log(0.75 + 0.25 exp(-1/2))
    -0.2071
    """

    centers: Tensor
    prior: Tensor

    def __init__(
        self, bins: Bins, density: LabelDensity | Any, *, noise_sigma: float = 1.0, learn: bool = True
    ) -> None:
        where = "BinnedIntegrationLoss"
        instance(where, Bins, bins=bins)
        if bins.categorical:
            raise problem(
                where,
                "bins must cut a continuous label axis",
                got=repr(bins),
                fix="For classes use logit_adjusted_cross_entropy.",
            )
        prior = _shares(where, bins, density)
        super().__init__(noise_sigma, learn, ())
        self.bins = bins
        self.register_buffer("centers", torch.tensor(bins.centers, dtype=torch.get_default_dtype()))
        self.register_buffer("prior", torch.from_numpy(prior).to(torch.get_default_dtype()))

    def _log_integral(self, pred: Tensor, target: Tensor, weight: Tensor | None, scale: Tensor) -> Tensor:
        squares = (pred - self.centers.to(pred.dtype)).square()  # (N, B)
        return torch.logsumexp(self.prior.to(pred.dtype).log() - squares / scale, 1)

    def extra_repr(self) -> str:
        return f"bins={self.bins!r}, {super().extra_repr()}"


def _of_all_ranks(rows: Tensor) -> Tensor:
    """The rows of all ranks, by rank; ranks may hold different numbers of them."""
    rank = dist.get_rank()
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    sizes[rank] = len(rows)
    ends = summed(sizes)[0].cumsum(0).tolist()
    everyone = rows.new_zeros(ends[-1], rows.shape[1])
    everyone[ends[rank] - len(rows) : ends[rank]] = rows
    return summed(everyone)[0].to(rows.device)


def _shares(where: str, bins: Bins, density: Any) -> np.ndarray:
    if isinstance(density, LabelDensity):
        if density.bins != bins:
            raise problem(where, "density must be over the loss's own bins", got=f"{density.bins} for {bins}")
        if not density.counts.any():
            raise problem(where, "density must hold at least one label", got="none", fix="Count the training labels.")
        return density.prior()
    if density is None or isinstance(density, str):
        raise problem(
            where,
            "density must be a LabelDensity, or one share of labels a bin",
            got=type(density).__name__,
            fix="Use LabelDensity.count(train_labels, bins).",
            error=TypeError,
        )
    prior = labels_array(where, density, "density").astype(np.float64)
    if prior.shape != (len(bins),):
        rule = f"density must be ({len(bins)},), one share of labels a bin"
        raise problem(where, rule, got=f"shape {prior.shape}", error=ShapeError)
    finite(where, density=prior)
    not_negative(where, density=torch.from_numpy(prior))
    _sums_to_one(where, "density", prior)
    return prior


def _sums_to_one(where: str, name: str, shares: np.ndarray) -> None:
    if abs((total := shares.sum()) - 1) > 1e-4:
        raise problem(where, f"{name} must sum to one", got=f"a sum of {total:g}", fix="Divide by the sum.")


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
        starts = np.concatenate([starts, rows[[random.choice(len(rows), p=odds / odds.sum())]]])
        nearest = np.minimum(nearest, ((rows - starts[-1]) ** 2).sum(1))
    distances = np.stack([((rows - start) ** 2).sum(1) for start in starts], 1)
    belongs = np.eye(components)[distances.argmin(1)]  # (M, K), the share of each component in each row

    reached = -math.inf
    for _ in range(_MOST_ROUNDS):
        mass = belongs.T @ shares
        pull = (belongs * shares[:, None] / np.maximum(mass, np.finfo(np.float64).tiny)).T  # (K, M)
        means = pull @ rows
        variances = np.maximum(pull @ rows**2 - means**2, least)
        precision = 1 / variances
        squares = rows**2 @ precision.T - 2 * rows @ (means * precision).T + (means**2 * precision).sum(1)
        with np.errstate(divide="ignore"):  # a component that holds nothing any more
            joint = np.log(mass) - (squares + np.log(2 * math.pi * variances).sum(1)) / 2
        belongs = softmax(joint, axis=1)
        likelihood = float(shares @ logsumexp(joint, axis=1))
        if likelihood - reached < _LEAST_GAIN:
            break
        reached = likelihood
    return mass / mass.sum(), means, variances
