import pytest
import torch

from dir_toolkit.errors import ShapeError
from dir_toolkit.features.calibration import diagonal_map


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_mapped_sample_has_the_smoothed_mean_and_variance() -> None:
    z = torch.randn(500, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scale, shift = diagonal_map(z.mean(0)[None], z.var(0)[None], column(3.0), column(2.0), clip=(0.1, 10))
    mapped = z * scale + shift
    torch.testing.assert_close(mapped.mean(), torch.tensor(3.0, dtype=torch.float64))
    torch.testing.assert_close(mapped.var(), torch.tensor(2.0, dtype=torch.float64))


def test_values_by_hand() -> None:
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


def test_statistics_are_never_broadcast_and_the_clip_is_a_range() -> None:
    one, two = column(1.0), column(1.0, 2.0)
    with pytest.raises(ShapeError, match=r"diagonal_map: mean and variance must have the same shape"):
        diagonal_map(two, one, two, two, clip=(0.1, 10))
    with pytest.raises(TypeError, match=r"diagonal_map: smoothed_mean must be a torch.Tensor, got NoneType"):
        diagonal_map(one, one, None, one, clip=(0.1, 10))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"diagonal_map: clip must be a pair .* got \(10, 0.1\)"):
        diagonal_map(one, one, one, one, clip=(10, 0.1))
