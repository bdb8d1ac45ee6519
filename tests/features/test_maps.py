from typing import Any

import pytest
import scipy.linalg
import torch

from dir_toolkit.features.maps import covariance_map, diagonal_map


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_mapped_sample_has_the_smoothed_mean_and_variance() -> None:
    z = torch.randn(500, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scale, shift = diagonal_map(z.mean(0)[None], z.var(0)[None], column(3.0), column(2.0), clip=(0.1, 10))
    mapped = z * scale + shift
    torch.testing.assert_close(mapped.mean(), torch.tensor(3.0, dtype=torch.float64))
    torch.testing.assert_close(mapped.var(), torch.tensor(2.0, dtype=torch.float64))


def test_values_are_those_worked_out_by_hand() -> None:
    nan = float("nan")
    scale, shift = diagonal_map(
        mean=column(1, 1, 1, 1, 1, nan),
        variance=column(1, 1, 1, 0, nan, nan),
        smoothed_mean=column(5, 5, 5, 5, 5, 5),
        smoothed_variance=column(4, 1000, 1e-9, 2, 2, 2),
        clip=(0.1, 10.0),
    )
    ten = 10**0.5
    torch.testing.assert_close(scale, column(2, ten, 1 / ten, 1, 1, 1))
    torch.testing.assert_close(shift, column(3, 5 - ten, 5 - 1 / ten, 4, 4, 0))


def two_covariances(seed: int = 0, n: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = torch.randn(2, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    own = torch.eye(n, dtype=torch.float64)
    return a @ a.T + own, b @ b.T + own


def root(matrix: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(scipy.linalg.sqrtm(matrix.numpy()).real)


def test_covariance_maps_are_the_formulas() -> None:
    first, second = two_covariances()
    half = root(first)
    inverse = torch.linalg.inv(half)
    formulas = {"paper": root(second) @ inverse, "transport": inverse @ root(half @ second @ half) @ inverse}
    names: list[Any] = ["paper", "transport"]
    for name in names:
        matrix = covariance_map(first, second, clip=(0.0, 1e6), map=name)
        torch.testing.assert_close(matrix, formulas[name], rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(matrix @ first @ matrix.T, second, rtol=1e-7, atol=1e-7)
    assert not torch.allclose(formulas["paper"], formulas["transport"], rtol=1e-2)


@pytest.mark.parametrize("map", ["paper", "transport"])
def test_of_diagonal_covariances_it_is_the_diagonal_map(map: Any) -> None:
    variance = torch.tensor([[1.0, 2.0, 3.0, 1.0, 0.0, 0.0, 2.0, *[0.5] * 9]]).double()
    smoothed = torch.tensor([[2.0, 1.0, 90.0, 0.01, 2.0, 0.0, 0.0, *torch.linspace(0.1, 4, 9)]]).double()
    scale, _ = diagonal_map(variance, variance, smoothed, smoothed, clip=(0.1, 10.0))
    assert scale[0, 4] == scale[0, 5] == 1  # what does not vary keeps its scale
    matrix = covariance_map(variance[0].diag(), smoothed[0].diag(), clip=(0.1, 10.0), map=map)
    torch.testing.assert_close(matrix, scale[0].diag(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("map", ["paper", "transport"])
def test_clip_bounds_the_ratio_of_variances_in_every_direction(map: Any) -> None:
    first, second = two_covariances()
    matrix = covariance_map(first, second, clip=(0.5, 2.0), map=map)
    assert torch.linalg.svdvals(matrix).max() <= 2**0.5 + 1e-7
    assert torch.linalg.svdvals(matrix).min() >= 0.5**0.5 - 1e-7
    ratios = scipy.linalg.eigh((matrix @ first @ matrix.T).numpy(), first.numpy(), eigvals_only=True)
    before = scipy.linalg.eigh(second.numpy(), first.numpy(), eigvals_only=True)
    assert before.min() < 0.5  # else nothing was clipped
    assert ratios == pytest.approx(before.clip(0.5, 2.0), rel=1e-6)


@pytest.mark.parametrize("map", ["paper", "transport"])
def test_a_feature_that_does_not_vary_is_apart_from_the_others(map: Any) -> None:
    first, second = two_covariances()
    rest = covariance_map(first[1:, 1:], second[1:, 1:], clip=(0.1, 10.0), map=map)
    first[0] = first[:, 0] = 0
    matrix = covariance_map(first, second, clip=(0.1, 10.0), map=map)
    torch.testing.assert_close(matrix, torch.block_diag(torch.eye(1), rest).double(), rtol=1e-7, atol=1e-7)


def test_directions_without_variance_are_left_alone() -> None:
    flat = torch.zeros(3, 3, dtype=torch.float64)
    assert torch.equal(covariance_map(flat, flat, clip=(0.1, 10.0), map="paper"), torch.eye(3, dtype=torch.float64))
    first, second = flat.clone(), flat.clone()
    first[0, 0], second[0, 0] = 1.0, 4.0
    expected = torch.tensor([2.0, 1.0, 1.0]).double().diag()
    torch.testing.assert_close(covariance_map(first, second, clip=(0.1, 10.0), map="transport"), expected)
