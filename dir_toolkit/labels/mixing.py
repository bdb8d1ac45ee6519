"""Mix the samples of a batch with partners of similar labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from .._checks import floats, instance, is_tensor, not_empty, number, real, require, same_device
from .._numerics import wide_dtype
from ..errors import ShapeError

__all__ = ["c_mixup"]


def c_mixup(
    inputs: Any, labels: Tensor, *, bandwidth: float, alpha: float = 2.0, generator: torch.Generator
) -> tuple[Any, Tensor]:
    r"""A batch in which each sample is mixed with one of the batch whose label is near its own.

    .. math::
        \tilde x_i = \lambda_i x_i + (1 - \lambda_i) x_j, \quad \tilde y_i = \lambda_i y_i + (1 - \lambda_i) y_j, \qquad
        P(j \mid i) \propto e^{-\lVert y_i - y_j \rVert^2 / 2 h^2}, \quad \lambda_i \sim \mathrm{Beta}(\alpha, \alpha)

    The sample itself is among its own partners, so that a label without neighbors stays as it is. Labels of a mixed
    batch are labels of the axis like others: weights are ``lds(labels)`` of the mixed ones. With
    :func:`dir_toolkit.experiment.training.loop.fit` use ``mixing=functools.partial(c_mixup, bandwidth=2.0)``. A missing
    label, NaN, is no one's partner, and its sample stays as it is. Partners come from the batch, as in the paper's
    variant for large sets, and on each rank of a distributed run from its own.

    Args:
        inputs: a tensor, or tensors in tuples, lists or dicts, of floats. They may require gradients, as features do.
            Numbers that stand for words or classes cannot be mixed: mix their embeddings.
        bandwidth: h, > 0, in label units. Small ones mix little, and large ones make it plain mixup. The paper chooses
            it on validation data.
        alpha: > 0. Small ones keep most of the sample or of its partner, and large ones take half of each.
        generator: the only source of randomness, on the CPU or on the device of the labels. Two numbers per sample are
            drawn from it.
    Shape:
        inputs: (N, ...) each. labels: (N,) or (N, K). Returns both in the same shapes.
    Raises:
        ShapeError: the sizes of inputs and labels differ. TypeError: inputs are not floats. ValueError: a number is out
        of range, or there is no sample.
    Source:
        Yao et al. 2022 (arXiv:2210.05775).

    >>> x, y = torch.tensor([[0.0], [1.0], [50.0]]), torch.tensor([0.0, 1.0, 50.0])
    >>> mixed, labels = c_mixup(x, y, bandwidth=2.0, generator=torch.Generator().manual_seed(0))
    >>> bool((mixed[:, 0] == labels).all()), labels[2].item()
    (True, 50.0)
    """
    from scipy.special import betaincinv

    bandwidth = number("bandwidth", bandwidth, low=0, open_low=True)
    alpha = number("alpha", alpha, low=0, open_low=True)
    instance(torch.Generator, generator=generator)
    is_tensor(labels=labels)
    real(labels=labels)
    require(labels.ndim in (1, 2), "labels must be (N,) or (N, K)", got=labels.shape, error=ShapeError)
    not_empty(labels=labels)
    parts = [part for part in tree_leaves(inputs) if isinstance(part, Tensor)]
    require(bool(parts), "inputs must be a tensor, or hold tensors", got=type(inputs), error=TypeError)
    for part in parts:
        floats(inputs=part)
        rule = f"inputs must be ({len(labels)}, ...), one entry for each of the labels"
        require(part.shape[:1] == labels.shape[:1], rule, got=part.shape, error=ShapeError)
        same_device(inputs=part, labels=labels)
    y = labels.to(wide_dtype(labels))
    draws = torch.rand((2, len(y)), generator=generator, device=generator.device, dtype=torch.float64)
    partner = _partners(y.detach(), bandwidth, draws[0].to(y.device))
    share = torch.from_numpy(betaincinv(alpha, alpha, draws[1].cpu().numpy())).to(y.device)

    def mixed(part: Tensor) -> Tensor:
        own = share.to(part.dtype).reshape(-1, *[1] * (part.ndim - 1))
        other = part[partner]
        # What is infinite in both, as in masks, stays as it is.
        return torch.where((other == part) & part.isinf(), part, torch.lerp(other, part, own.expand_as(part)))

    return tree_map_only(Tensor, mixed, inputs), mixed(y)


def _partners(labels: Tensor, bandwidth: float, chance: Tensor) -> Tensor:
    """The partner of each sample, (N,), for chances (N,) that are even between zero and one."""
    rows = labels.reshape(len(labels), -1).double()  # (N, K)
    # By differences and not by products, which would round the distances of near neighbors away.
    distance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    score = (distance / bandwidth).square().nan_to_num(torch.inf).neg() / 2
    reach = score.fill_diagonal_(0.0).softmax(1).cumsum(1)
    return torch.searchsorted(reach / reach[:, -1:], chance[:, None], right=True).squeeze(1)
