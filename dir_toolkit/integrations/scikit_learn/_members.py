"""An ensemble of perceptrons that are trained at the same time on different rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ...heads.linear import LinearHead


class Members(nn.Module):
    """A backbone of K perceptrons with the same widths.

    Attributes:
        side_by_side: whether to concatenate the members' features of a row.
    Shape:
        forward: (N, inputs), the same rows for all members, or (K, N, inputs). Returns (K * N, D), member by member, or
            side by side (N, K * D).
    """

    def __init__(self, members: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.side_by_side = False
        layers = [[nn.Linear(inputs, outputs) for _ in range(members)] for inputs, outputs in pairwise(widths)]
        self.weights = nn.ParameterList([_stacked([one.weight.T for one in layer]) for layer in layers])
        self.biases = nn.ParameterList([_end_to_end([one.bias for one in layer]) for layer in layers])
        self.members = members

    def forward(self, x: Tensor) -> Tensor:
        x = x.expand(self.members, *x.shape[-2:])
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = torch.baddbmm(bias.view(self.members, 1, -1), x, weight).relu()
        return (x.transpose(0, 1) if self.side_by_side else x).reshape(
            -1, x.shape[2] * (self.members**self.side_by_side)
        )


class MemberHead(nn.Module):
    """A linear head per member.

    Shape:
        forward: (K * N, D), member by member. Returns (K * N, outputs).
    """

    def __init__(self, members: int, num_features: int, outputs: int) -> None:
        super().__init__()
        heads = [LinearHead(num_features, outputs) for _ in range(members)]
        self.weight = _stacked([head.weight.T for head in heads])
        self.bias = _end_to_end([head.bias for head in heads])

    def forward(self, features: Tensor) -> Tensor:
        members, num_features, outputs = self.weight.shape
        bias = self.bias.view(members, 1, outputs)
        return torch.baddbmm(bias, features.view(members, -1, num_features), self.weight).view(-1, outputs)

    @torch.no_grad()
    def average(self) -> LinearHead:
        """A head over the members' concatenated features that returns the mean of the members' outputs."""
        members, num_features, outputs = self.weight.shape
        head = LinearHead(members * num_features, outputs).to(self.weight)
        head.weight.copy_(self.weight.permute(2, 0, 1).reshape(outputs, members * num_features) / members)
        head.bias.copy_(self.bias.view(members, outputs).mean(0))
        return head


def _stacked(tensors: Sequence[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.stack([tensor.detach() for tensor in tensors]).contiguous())


def _end_to_end(biases: Sequence[Tensor]) -> nn.Parameter:
    """Biases in one row, since parameters with one axis get no weight decay."""
    return nn.Parameter(torch.cat([bias.detach() for bias in biases]))
