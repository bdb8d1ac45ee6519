"""Affinity head: scores by distance to several prototypes per class."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._checks import gathered, length, number, one_of, require, same_device
from .._numerics import default_dtype, full_precision, squared_distances, wide_dtype
from .._ranks import summed
from .._state import SoundModule
from ..errors import NotFittedError
from ._features import checked_features

__all__ = ["AffinityHead"]

Distance = Literal["l2", "l1"]
Similarity = Literal["gaussian", "inverse"]
SigmaMode = Literal["fixed", "learnt", "first_batch"]

_START_DISTANCE = 10.0  # the mean distance between features and prototypes before training


class AffinityHead(SoundModule):
    r"""Scores in (0, 1]: the affinity of a feature to the nearest prototype of each class.

    .. math:: a_j = \max_t \exp\bigl(-d(s z, w_{t,j}) / \sigma\bigr) \quad\text{or}\quad
              a_j = \max_t \frac{1}{1 + d(s z, w_{t,j}) / \sigma}

    Train it with :func:`~dir_toolkit.affinity_loss`, and add :meth:`diversity`, which spreads the prototypes. Far from
    every prototype the gradient of a Gaussian vanishes, so initial distances should be near :math:`\sigma`. By default
    the mean initial distance is 10 for features of unit variance and any D. Normalize features of another scale, or set
    ``feature_scale``.

    Affinities are computed in at least float32 even under autocast. With ``"l2"`` the distances come from one matrix
    product. Their rounding error is about the dtype's resolution times :math:`\|s z\|^2`.

    Args:
        num_features: the number of features, D.
        num_classes: the number of classes, C.
        prototypes: m, the number of prototypes per class, at least 1.
        sigma: the width :math:`\sigma`, > 0, or its initial value if it is learned; not used with ``"first_batch"``.
        distance: ``"l2"``, the *squared* Euclidean distance, or ``"l1"``, the sum of absolute differences.
        similarity: ``"gaussian"`` or ``"inverse"``, the first and the second form above. The paper's inverse similarity
            is :math:`1 / (1 + d)`, which is ``sigma=1``.
        sigma_mode: ``"fixed"``; ``"learnt"``, as its logarithm; or ``"first_batch"``, the mean distance between all
            prototypes and the features of the first training batch of all ranks. Before that batch the head raises
            NotFittedError in eval mode.
        feature_scale: s > 0; 1 gives the paper's formula. None chooses :math:`\sqrt{5 / D}` for ``"l2"`` and :math:`5
            \sqrt\pi / D` for ``"l1"``.
    Attributes:
        weight: (C, m, D), the prototypes. feature_scale: ().
        sigma: (), NaN before a first batch sets it. log_sigma: (1,), instead of sigma if it is learned.
    Shape:
        forward: features (N, D). Returns (N, C).
    Source:
        Hayat et al. 2019, section 3 (arXiv:1901.07711).

    >>> head = AffinityHead(2, 2, prototypes=1, sigma=2.0, feature_scale=1.0)
    >>> with torch.no_grad():
    ...     _ = head.weight.copy_(torch.tensor([[[0.0, 0.0]], [[1.0, 1.0]]]))
    >>> [round(x, 4) for x in head(torch.tensor([[1.0, 1.0]]))[0].tolist()]
    [0.3679, 1.0]
    """

    weight: nn.Parameter
    feature_scale: Tensor
    sigma: Tensor
    log_sigma: nn.Parameter

    @torch.inference_mode(False)  # buffers must be usable in training
    def __init__(
        self,
        num_features: int,
        num_classes: int,
        prototypes: int = 5,
        sigma: float = 10.0,
        distance: Distance = "l2",
        similarity: Similarity = "gaussian",
        *,
        sigma_mode: SigmaMode = "fixed",
        feature_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.num_features = length("num_features", num_features)
        self.num_classes = length("num_classes", num_classes)
        self.num_prototypes = length("prototypes", prototypes)
        sigma = number("sigma", sigma, low=0, open_low=True, float32=True)
        one_of("distance", distance, ("l2", "l1"))
        one_of("similarity", similarity, ("gaussian", "inverse"))
        one_of("sigma_mode", sigma_mode, ("fixed", "learnt", "first_batch"))
        self.distance, self.similarity, self.sigma_mode = distance, similarity, sigma_mode
        self._given = {"sigma": sigma, "feature_scale": feature_scale}
        if feature_scale is None:
            feature_scale = self._start_std()
        feature_scale = number("feature_scale", feature_scale, low=0, open_low=True, float32=True)
        self.register_buffer("feature_scale", torch.tensor(feature_scale, dtype=default_dtype()))
        self._sigma_known = sigma_mode != "first_batch"
        self._start = math.log(sigma)
        if sigma_mode == "learnt":
            self.log_sigma = nn.Parameter(torch.tensor([self._start]))
        else:
            start = sigma if self._sigma_known else math.nan
            self.register_buffer("sigma", torch.tensor(start, dtype=default_dtype()))
        self.weight = nn.Parameter(torch.empty(self.num_classes, self.num_prototypes, self.num_features))
        self.reset_parameters()

    def _start_std(self) -> float:
        """The standard deviation of two normal vectors whose mean distance is ``_START_DISTANCE``."""
        if self.distance == "l2":
            return math.sqrt(_START_DISTANCE / 2 / self.num_features)
        return math.sqrt(math.pi) * _START_DISTANCE / 2 / self.num_features

    def reset_parameters(self) -> None:
        """Draw new prototypes and reset sigma to its initial value, or so that the next batch sets it."""
        nn.init.normal_(self.weight, std=self._start_std())
        if self.sigma_mode == "learnt":
            nn.init.constant_(self.log_sigma, self._start)
        elif self.sigma_mode == "first_batch":
            nn.init.constant_(self.sigma, math.nan)
            self._sigma_known = False

    def forward(self, features: Tensor) -> Tensor:
        checked_features(features, self.num_features)
        same_device(weight=self.weight, features=features)
        dtype = wide_dtype(features, self.weight)
        with full_precision(features.device):
            z, w = features.to(dtype) * self.feature_scale.to(dtype), self.weight.to(dtype)
            if not self._sigma_known:
                self._find_sigma(z.detach(), w.detach().flatten(0, 1))
            sigma = self.log_sigma.to(dtype).exp() if self.sigma_mode == "learnt" else self.sigma.to(dtype)
            if self.distance == "l2":
                # A compiler plans memory by itself and derives its own backward.
                squared = _nearest_squared if torch.compiler.is_compiling() else _NearestSquared.apply
                nearest = squared(z, w)[0].clamp_min(0)
            else:
                nearest = torch.cdist(z, w.flatten(0, 1), p=1.0).unflatten(1, w.shape[:2]).min(2).values
            return torch.exp(-nearest / sigma) if self.similarity == "gaussian" else sigma / (sigma + nearest)

    def diversity(self) -> Tensor:
        r"""The paper's diversity term: the variance of the squared distances between prototypes.

        .. math:: R = \frac{2}{P (P - 1)} \sum_{j < k} \bigl(\|w_j - w_k\|^2 - \mu\bigr)^2

        The sum is over all P = m C prototypes, and :math:`\mu` is the mean of the squared distances. These are
        Euclidean for both values of ``distance``. Memory is P D and min(P - 1, D)² numbers. More than D + 1 prototypes
        cannot reach zero. A single prototype gives zero.

        Shape:
            Returns ().
        Raises:
            UsageError: FSDP2 has sharded the head by itself.
        Source:
            Hayat et al. 2019, section 3.3 (arXiv:1901.07711).
        """
        gathered(self)
        count = self.num_classes * self.num_prototypes
        w = self.weight.to(wide_dtype(self.weight)).flatten(0, 1)
        if count == 1:
            return 0 * w.sum()
        # Relative to the mean the cross terms vanish, and sums of squares without cancellation remain: R P (P - 1) = 2
        # P sum (n - mean n)² + 4 (|G|² - t² / (P - 1)), n the squared norms, G = W W', t = trace G.
        with full_precision(w.device):
            w = w - w.mean(0)
            norms = w.square().sum(1)
            trace = norms.sum()
            uneven_norms = (norms - trace / count).square().sum()
            if count - 1 <= self.num_features:
                even = torch.eye(count, dtype=w.dtype, device=w.device) - 1 / count
                uneven_angles = (w @ w.t() - trace / (count - 1) * even).square().sum()
            else:
                size = self.num_features
                even = torch.eye(size, dtype=w.dtype, device=w.device)
                uneven_angles = (w.t() @ w - trace / size * even).square().sum()
                uneven_angles = uneven_angles + trace.square() * (1 / size - 1 / (count - 1))
            return (2 * count * uneven_norms + 4 * uneven_angles) / (count * (count - 1))

    @torch.no_grad()
    def _find_sigma(self, features: Tensor, prototypes: Tensor) -> None:
        """Set ``sigma`` from a first batch, unless a state or another module was copied into it."""
        if not bool(self.sigma.isnan()):
            self._sigma_known = True
            return
        rule, got = "sigma must be set before it is used in eval mode", "no batch in training mode yet"
        fix = "Run one batch in training mode, load a state_dict, or pass sigma_mode='fixed'."
        require(self.training, rule, got=got, fix=fix, error=NotFittedError)
        if self.distance == "l2":
            distances = squared_distances(features, prototypes)
        else:
            distances = torch.cdist(features, prototypes, p=1.0)
        (sums,) = summed(torch.stack([distances.sum(), distances.new_tensor(distances.numel())]))
        total, number_of_pairs = sums.tolist()
        if number_of_pairs == 0:
            return
        sigma = total / number_of_pairs
        rule = "the mean distance of the first batch from the prototypes must be positive and finite"
        fix = "Check its features, or pass sigma_mode='fixed'."
        require(0 < sigma < math.inf, rule, got=f"{sigma:g}", fix=fix)
        self.sigma.fill_(sigma)
        self._sigma_known = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.sigma_mode == "first_batch":
            self._sigma_known = self.sigma.device.type != "meta" and not bool(self.sigma.isnan())

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {
            "num_features": self.num_features,
            "num_classes": self.num_classes,
            "prototypes": self.num_prototypes,
            "sigma": self._given["sigma"],
            "distance": self.distance,
            "similarity": self.similarity,
            "sigma_mode": self.sigma_mode,
            "feature_scale": self._given["feature_scale"],
        }


def _nearest_squared(features: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance (N, C) from features (N, D) to the nearest prototype (C, m, D) of each class, and its index."""
    flat = prototypes.flatten(0, 1)
    norms = torch.linalg.vector_norm(flat, dim=1).square()
    partial = torch.addmm(norms, features, flat.t(), alpha=-2)
    nearest, which = partial.unflatten(1, prototypes.shape[:2]).min(2)  # (N, C, m) to (N, C)
    return nearest + features.square().sum(1, keepdim=True), which


class _NearestSquared(torch.autograd.Function):
    """:func:`_nearest_squared` with a backward that needs one tensor of the prototypes' size. Autograd needs three."""

    generate_vmap_rule = True

    @staticmethod
    def forward(features: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
        nearest, which = _nearest_squared(features, prototypes)
        return nearest, which.to(torch.uint8) if prototypes.shape[1] <= 256 else which

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, output[1])
        ctx.save_for_forward(*inputs, output[1])

    @staticmethod
    def jvp(ctx: Any, toward: Tensor | None, prototypes_toward: Tensor | None) -> tuple[Tensor, None]:  # type: ignore[override]
        features, prototypes, which = ctx.saved_tensors
        flat, count = prototypes.flatten(0, 1), prototypes.shape[:2]
        with full_precision(features.device):
            change = features.new_zeros(len(features), len(flat))
            if toward is not None:
                change = change + (features * toward).sum(1, keepdim=True) - toward @ flat.t()
            if prototypes_toward is not None:
                moved = prototypes_toward.flatten(0, 1)
                change = change + (flat * moved).sum(1) - features @ moved.t()
            change = change.unflatten(1, count).gather(2, which[..., None].long()).squeeze(2)
        return 2 * change, None

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        if grad is None:
            return None, None
        features, prototypes, which = ctx.saved_tensors
        flat = prototypes.flatten(0, 1)
        for_features = for_prototypes = None
        with full_precision(features.device):
            spread = grad.new_zeros(*which.shape, prototypes.shape[1])
            spread = spread.scatter_(2, which[..., None].long(), grad[..., None]).flatten(1)  # (N, C m)
            if ctx.needs_input_grad[0]:
                for_features = torch.addmm(features * grad.sum(1, keepdim=True), spread, flat, beta=2, alpha=-2)
            if ctx.needs_input_grad[1]:
                total = spread.sum(0)[:, None]
                for_prototypes = (spread.t() @ features).mul_(-2).addcmul_(flat, total, value=2)
                for_prototypes = for_prototypes.unflatten(0, prototypes.shape[:2])
        return for_features, for_prototypes
