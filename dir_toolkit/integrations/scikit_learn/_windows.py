"""From a number per row to a distribution over the bins of a label axis, as held-out rows show it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from ...labels.bins import Bins

_FEWEST = 8  # rows of the narrowest window; each other one is twice as wide as the one before
_GROUPS = 8192  # of rows that windows are made of, where rows are more
_PIECES = 200  # that the errors of forecasts are cut into
_ROWS = 1024  # that are answered at a time in training, few enough for the caches
_STEPS = 100  # of expectation-maximization


class Windows(nn.Module):
    """A head that estimates the label distribution given a forecast.

    A window holds the rows whose forecasts are nearest in rank: 8 of them, 16, 32, and so on up to all. Above 8,192
    rows it counts groups of neighbouring rows instead, of which there are at most 8,192. Each window gives two
    distributions: that of the labels of its rows, and that of the errors of their forecasts, moved to the new forecast.
    The result is a mixture of them. Mixture weights maximise the leave-one-out likelihood of the labels. With an
    uninformative forecast the labels in the window dominate, with a precise one its error distribution.

    Args:
        forecasts: (N,), out-of-sample predictions, in label units.
        labels, weight: (N,), those of the same rows; weights are positive.
        target: (N, B), the labels spread over bins.
        bins: the label axis, of B bins.
    Attributes:
        log_shares: (N, B), the leave-one-out result for the given forecasts.
    Shape:
        forward: forecasts (M, 1). Returns (M, B), log-probabilities of the bins.
    """

    forecasts: Tensor
    cumulative: Tensor
    errors: Tensor
    proportions: Tensor

    def __init__(self, forecasts: Tensor, labels: Tensor, weight: Tensor, target: Tensor, bins: Bins) -> None:
        super().__init__()
        self.bins = bins
        rows, order = len(forecasts), forecasts.argsort(stable=True)
        group = torch.arange(rows, device="cpu") // -(-rows // _GROUPS)  # of each row, in the order of forecasts
        groups = int(group[-1]) + 1
        self.register_buffer("forecasts", forecasts[order][group.diff(prepend=group.new_full((1,), -1)) > 0])
        self.sizes = [*(_FEWEST * 2**k for k in range(32) if _FEWEST * 2**k < groups), 2 * groups]

        error = labels - forecasts
        errors = np.quantile(error.numpy(), np.linspace(0, 1, _PIECES + 1))
        errors[[0, -1]] += np.array([-1, 1]) * max(np.ptp(errors) / 50, 1e-9 * float(np.ptp(bins.edges)))
        self.register_buffer("errors", torch.from_numpy(np.unique(errors)))
        piece = torch.searchsorted(self.errors[1:-1].contiguous(), error, right=True)
        pieces = nn.functional.one_hot(piece, len(self.errors) - 1)
        weight, target = (weight / weight.mean())[order], target[order]
        own = torch.cat([target, pieces.to(target)[order]], 1) * weight[:, None]
        sums = own.new_zeros(groups, own.shape[1]).index_add_(0, group, own)
        self.register_buffer("cumulative", nn.functional.pad(sums.cumsum(0), (0, 0, 1, 0)))

        parts = list(zip(*(values.split(_ROWS) for values in (forecasts[order], own, target)), strict=True))
        likely = torch.cat([torch.stack([(one * t).sum(1) for one in self._answers(f, o)]) for f, o, t in parts], 1)
        share = likely.new_full((len(likely),), 1 / len(likely))
        for _ in range(_STEPS):
            of_each = share[:, None] * likely
            # A row for each answer keeps all of them alive, and with them the rarest labels.
            share = (of_each / of_each.sum(0).clamp_min(1e-300)) @ weight + 1
            share = share / share.sum()
        self.register_buffer("proportions", share)
        self.log_shares = torch.cat([self._log_shares(f, o) for f, o, _ in parts])[order.argsort()]

    def forward(self, forecasts: Tensor) -> Tensor:
        return self._log_shares(forecasts[:, 0].contiguous(), None)

    def _log_shares(self, forecasts: Tensor, own: Tensor | None) -> Tensor:
        total = forecasts.new_zeros(len(forecasts), len(self.bins))
        for share, answer in zip(self.proportions, self._answers(forecasts, own), strict=True):
            total = total + share * answer
        return total.clamp_min(1e-12).log()

    def _answers(self, forecasts: Tensor, own: Tensor | None) -> Iterator[Tensor]:
        """The shares (N, B) of each distribution of each window, without what the rows themselves add to it."""
        left, right = (torch.searchsorted(self.forecasts, forecasts, right=right) for right in (False, True))
        groups, bins = len(self.forecasts), len(self.bins)
        error = self.bins.tensor("edges", forecasts)[1:-1] - forecasts[:, None]
        piece = torch.searchsorted(self.errors[1:-1].contiguous(), error, right=True)
        within = ((error - self.errors[piece]) / self.errors.diff()[piece]).clamp(0, 1)
        for size in self.sizes:
            low = ((left + right - size) // 2).clamp(0, groups - 1).minimum(left)
            high = ((left + right + size + 1) // 2).clamp(1, groups).maximum(right)
            inside = self.cumulative.index_select(0, high) - self.cumulative.index_select(0, low)
            inside = inside if own is None else (inside - own).clamp_min(0)
            yield _shares(inside[:, :bins])
            if size < groups:
                yield _moved(_shares(inside[:, bins:]), piece, within)


def _moved(shares: Tensor, piece: Tensor, within: Tensor) -> Tensor:
    """Shares of the errors, as shares of the bins around each forecast; the end bins hold what lies beyond.

    Args:
        piece, within: (N, B - 1), the piece of errors that reaches each inner edge, and the part of it below the edge.
    """
    below = nn.functional.pad(shares.cumsum(1), (1, 0))
    covered = below.gather(1, piece).lerp(below.gather(1, piece + 1), within)
    return nn.functional.pad(nn.functional.pad(covered, (1, 0)), (0, 1), value=1.0).diff(dim=1)


def _shares(sums: Tensor) -> Tensor:
    return sums / sums.sum(1, keepdim=True).clamp_min(1e-300)


class LogShares(nn.Module):
    """A head over shares of bins that returns their logarithms.

    The prior is mixed in, with weight 1 / (rows + 1), so that no bin is impossible.

    Args:
        prior: (B,), positive.
        rows: the number of held-out rows.
    Shape:
        forward: (N, B), shares, which need not sum to one. Returns (N, B), log-probabilities.
    """

    prior: Tensor

    def __init__(self, prior: Tensor, rows: int) -> None:
        super().__init__()
        self.register_buffer("prior", prior)
        self.share = 1 / (rows + 1)

    def forward(self, shares: Tensor) -> Tensor:
        return ((1 - self.share) * _shares(shares) + self.share * self.prior).log()
