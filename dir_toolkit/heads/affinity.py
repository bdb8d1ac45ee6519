"""Scores by nearness to prototypes, of which each class has several."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._checks import length, number, one_of, require, same_device
from .._numerics import full_precision, squared_distances, wide_dtype
from .._ranks import summed
from .._settings import shown
from .._state import SoundModule
from ..errors import NotFittedError
from ._features import checked_features

__all__ = ["AffinityHead"]

Distance = Literal["l2", "l1"]
Similarity = Literal["gaussian", "inverse"]
SigmaMode = Literal["fixed", "learnt", "first_batch"]

_START_DISTANCE = 10.0  # the mean distance between features and prototypes before training


class AffinityHead(SoundModule):
    r"""Scores in (0, 1] that say how near a feature is to the nearest prototype of each class.

    .. math:: a_j = \max_t \exp\bigl(-d(s z, w_{t,j}) / \sigma\bigr) \quad\text{or}\quad
              a_j = \max_t \frac{1}{1 + d(s z, w_{t,j}) / \sigma}

    Train it with a margin between affinities, and add :meth:`diversity`, which spreads the prototypes. Far from every
    prototype a Gaussian has no slope, so features and prototypes have to start at distances near :math:`\sigma`. By
    default they do, whatever D is: features of unit variance are scaled, and prototypes are drawn, so that their
    distances average 10. Features of another scale need a normalization before, or their own ``feature_scale``.

    Affinities are computed in at least float32 under autocast, too. With ``"l2"`` the distances come from one matrix
    product, and rounding leaves them uncertain by about the dtype's resolution times :math:`\|s z\|^2`.

    Args:
        num_features: D.
        num_classes: C.
        prototypes: m, how many each class has, at least 1.
        sigma: the width :math:`\sigma`, > 0, or where it starts if it is learnt; not used with ``"first_batch"``.
        distance: ``"l2"``, the *squared* Euclidean distance, or ``"l1"``, the sum of absolute differences.
        similarity: ``"gaussian"`` or ``"inverse"``, the first and the second form above. The paper's inverse similarity
            is :math:`1 / (1 + d)`. Here d is divided by sigma there, too, so ``sigma=1`` gives the paper's.
        sigma_mode: ``"fixed"``; ``"learnt"``, as its logarithm; or ``"first_batch"``, the mean distance between the
            first batch that is seen in training mode, on all ranks, and all prototypes. In eval mode a head that has
            seen none raises NotFittedError.
        feature_scale: s > 0; 1 gives the paper's formula as written. None chooses :math:`\sqrt{5 / D}` for ``"l2"``
            and :math:`5 \sqrt\pi / D` for ``"l1"``.
    Attributes:
        weight: (C, m, D), the prototypes. feature_scale: ().
        sigma: (), NaN until the first batch has set it. log_sigma: (1,), in place of sigma if it is learnt.
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

    @torch.inference_mode(False)  # what is kept must serve training, too
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
        self.register_buffer("feature_scale", torch.tensor(feature_scale))
        self._sigma_known = sigma_mode != "first_batch"
        self._start = math.log(sigma)
        if sigma_mode == "learnt":
            self.log_sigma = nn.Parameter(torch.tensor([self._start]))
        else:
            self.register_buffer("sigma", torch.tensor(sigma if self._sigma_known else math.nan))
        self.weight = nn.Parameter(torch.empty(self.num_classes, self.num_prototypes, self.num_features))
        self.reset_parameters()

    def _start_std(self) -> float:
        """The standard deviation of two normal vectors whose distance averages ``_START_DISTANCE``."""
        if self.distance == "l2":
            return math.sqrt(_START_DISTANCE / 2 / self.num_features)
        return math.sqrt(math.pi) * _START_DISTANCE / 2 / self.num_features

    def reset_parameters(self) -> None:
        """Draw the prototypes anew, and let sigma start again: as given, or as the next first batch says."""
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
                # A compiler plans memory by itself, and is spared a backward that it did not derive.
                squared = _nearest_squared if torch.compiler.is_compiling() else _NearestSquared.apply
                nearest = squared(z, w)[0].clamp_min(0)
            else:
                nearest = torch.cdist(z, w.flatten(0, 1), p=1.0).unflatten(1, w.shape[:2]).min(2).values
            return torch.exp(-nearest / sigma) if self.similarity == "gaussian" else sigma / (sigma + nearest)

    def diversity(self) -> Tensor:
        r"""How unevenly the prototypes are spread: the variance of their squared pair distances.

        .. math:: R = \frac{2}{P (P - 1)} \sum_{j < k} \bigl(\|w_j - w_k\|^2 - \mu\bigr)^2

        The sum is over all P = m C prototypes, and :math:`\mu` is the mean of the squared distances. These are
        Euclidean, whatever ``distance`` is. It takes P D and min(P - 1, D)² numbers, never one for each pair. More than
        D + 1 prototypes cannot all be equally far apart. For a single prototype it is zero, with the gradient zero.

        Shape:
            Returns ().
        Source:
            Hayat et al. 2019, section 3.3 (arXiv:1901.07711).
        """
        count = self.num_classes * self.num_prototypes
        w = self.weight.to(wide_dtype(self.weight)).flatten(0, 1)
        if count == 1:
            return 0 * w.sum()
        # About the centre the cross terms vanish, and what is left are sums of squares, from which nothing cancels:
        # R P (P - 1) = 2 P sum (n - mean n)² + 4 (|G|² - t² / (P - 1)), n the squared norms, G = W W', t = trace G.
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
        """Set ``sigma`` from a first batch, unless a state or another module has been copied into it."""
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
        rule = "the first batch must lie at a positive, finite mean distance from the prototypes"
        fix = "Look at its features, or pass sigma_mode='fixed'."
        require(0 < sigma < math.inf, rule, got=f"{sigma:g}", fix=fix)
        self.sigma.fill_(sigma)
        self._sigma_known = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.sigma_mode == "first_batch":
            self._sigma_known = self.sigma.device.type != "meta" and not bool(self.sigma.isnan())

    @property
    def settings(self) -> dict[str, Any]:
        """What the head was made with."""
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

    def extra_repr(self) -> str:
        return shown(self.settings)


def _nearest_squared(features: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance (N, C) from features (N, D) to the nearest of each class's prototypes (C, m, D), and which."""
    flat = prototypes.flatten(0, 1)
    norms = torch.linalg.vector_norm(flat, dim=1).square()
    partial = torch.addmm(norms, features, flat.t(), alpha=-2)
    nearest, which = partial.unflatten(1, prototypes.shape[:2]).min(2)  # (N, C, m) to (N, C)
    return nearest + features.square().sum(1, keepdim=True), which


class _NearestSquared(torch.autograd.Function):
    """:func:`_nearest_squared` with a backward that holds one tensor of the prototypes' size, their gradient, where
    autograd's own holds three."""

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
