from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

from dir_toolkit.errors import ShapeError
from dir_toolkit.experiment.backbones import DigitCNN, digit_cnn, small_resnet, timm_backbone


@pytest.mark.parametrize("side", [32, 45, 48, 64, 80])
def test_small_resnet_takes_images_of_any_side(side: int) -> None:
    backbone = small_resnet(width=8)
    features = backbone(torch.randn(2, 3, side, side))
    assert features.shape == (2, backbone.num_features)


def test_small_resnet_has_its_promised_size() -> None:
    backbone = small_resnet()
    assert backbone.num_features == 128
    assert 0.3e6 < sum(p.numel() for p in backbone.parameters()) < 0.7e6
    assert small_resnet(in_channels=1, width=4)(torch.zeros(1, 1, 32, 32)).shape == (1, 16)


def test_memory_layout_of_the_images_does_not_matter() -> None:
    backbone = small_resnet(width=8).eval()
    images = torch.randn(2, 3, 32, 32)
    other = images.to(memory_format=torch.channels_last)
    assert torch.equal(backbone(images), backbone(other))


def test_every_parameter_of_small_resnet_learns() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(small_resnet(width=4), nn.Linear(16, 1), nn.Flatten(0))
    images, labels = torch.randn(8, 3, 32, 32), torch.linspace(-1, 1, 8)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = (model(images) - labels).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(("settings", "message"), [({"width": 0}, "width"), ({"in_channels": 0}, "in_channels")])
def test_small_resnet_refuses_wrong_arguments(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"{message} must be at least 1, got 0"):
        small_resnet(**settings)


def test_small_resnet_takes_float_images_only() -> None:
    backbone = small_resnet(width=4)
    with pytest.raises(TypeError, match=r"images must be floats, got dtype torch\.uint8\. Use .*to_float\(images\)"):
        backbone(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ShapeError, match=r"images must have shape \(N, C, H, W\), got \(3, 32, 32\)"):
        backbone(torch.zeros(3, 32, 32))
    with pytest.raises(TypeError, match=r"images must be a torch\.Tensor, got NoneType"):
        backbone(None)


@pytest.mark.parametrize("side", [8, 9, 15, 16, 28, 32])
def test_digit_cnn_takes_images_of_the_side_it_was_made_for(side: int) -> None:
    backbone = digit_cnn(16, size=side)
    assert isinstance(backbone, DigitCNN)
    assert (backbone.num_features, backbone.size) == (16, side)
    assert backbone(torch.zeros(3, 1, side, side)).shape == (3, 16)
    assert digit_cnn(16, size=side, in_channels=3)(torch.zeros(1, 3, side, side)).shape == (1, 16)


def test_digit_cnn_has_the_layers_of_the_paper() -> None:
    backbone = digit_cnn()
    convolutions = [part for part in backbone.modules() if isinstance(part, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, *c.kernel_size) for c in convolutions] == [
        (1, 32, 5, 5),
        (32, 64, 5, 5),
        (64, 128, 5, 5),
    ]
    assert backbone.num_features == 128
    expected = 26 * 32 + (25 * 32 + 1) * 64 + (25 * 64 + 1) * 128 + (128 * 9 + 1) * 128
    assert sum(p.numel() for p in backbone.parameters()) == expected


def test_digit_cnn_equals_its_layers_one_by_one() -> None:
    torch.manual_seed(0)
    backbone = digit_cnn(5, size=8).double()
    images = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    maps = images
    for layer in (layer for layer in backbone.modules() if isinstance(layer, nn.Conv2d)):
        maps = nn.functional.conv2d(maps, layer.weight.contiguous(), layer.bias, padding=2).clamp_min(0)
        n, c, side, _ = maps.shape
        maps = maps.reshape(n, c, side // 2, 2, side // 2, 2).amax((3, 5))
    expected = (maps.reshape(4, -1) @ backbone.projection.weight.t() + backbone.projection.bias).clamp_min(0)
    torch.testing.assert_close(backbone(images), expected, rtol=1e-12, atol=1e-12)
    other = images.to(memory_format=torch.channels_last)
    torch.testing.assert_close(backbone(other), expected, rtol=1e-12, atol=1e-12)


def test_two_features_fill_the_plane_without_a_relu_and_a_quarter_of_it_with_one() -> None:
    torch.manual_seed(0)
    images = 3 * torch.randn(400, 1, 8, 8)
    plane = digit_cnn(2, size=8, activation=False)
    features = plane(images).detach()
    centered = features - features.mean(0)  # random weights need not straddle the origin
    with torch.no_grad():
        plane.projection.bias -= features.mean(0)
    torch.testing.assert_close(plane(images).detach(), centered, rtol=1e-4, atol=1e-5)
    assert {(bool(x), bool(y)) for x, y in (plane(images) > 0).tolist()} == {
        (x, y) for x in (False, True) for y in (False, True)
    }
    quarter = digit_cnn(2, size=8)
    quarter.load_state_dict(plane.state_dict())
    torch.testing.assert_close(quarter(images).detach(), centered.clamp_min(0), rtol=1e-4, atol=1e-5)


def test_every_parameter_of_digit_cnn_learns() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(digit_cnn(32, size=8), nn.Linear(32, 2))
    images, labels = torch.randn(8, 1, 8, 8), torch.arange(8) % 2
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
    assert all(p.grad is not None for p in model.parameters())


def test_digit_cnn_refuses_wrong_arguments() -> None:
    settings = [
        ({"num_features": 0}, "num_features must be at least 1, got 0"),
        ({"size": 7}, "size must be at least 8, got 7"),
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"activation": 1}, "activation must be a bool, got int"),
        ({"size": 28.0}, r"size must be a whole number, got 28\.0"),
    ]
    for wrong, message in settings:
        with pytest.raises((TypeError, ValueError), match=f"^digit_cnn: {message}"):
            digit_cnn(**wrong)  # type: ignore[arg-type]
    backbone = digit_cnn(4, size=8)
    for shape in ((1, 1, 28, 28), (1, 1, 8, 9), (1, 1, 9, 8)):
        with pytest.raises(ShapeError, match=r"^DigitCNN: images must have sides of 8, got .* Pass the size"):
            backbone(torch.zeros(shape))
    with pytest.raises(ShapeError, match=r"^DigitCNN: images must have shape \(N, C, H, W\), got \(1, 8, 8\)"):
        backbone(torch.zeros(1, 8, 8))
    with pytest.raises(TypeError, match=r"^DigitCNN: images must be floats, got dtype torch\.uint8\. Use .*to_float"):
        backbone(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"^DigitCNN: images must be a torch\.Tensor, got list"):
        backbone([])


def flat_backbone(num_features: int = 4) -> nn.Module:
    backbone = nn.Flatten()
    backbone.num_features = num_features  # type: ignore[assignment]
    return backbone


def fake_timm() -> types.ModuleType:
    timm = types.ModuleType("timm")
    names = ["resnet18", "resnet50", "mobilenetv3"]
    timm.is_model = lambda name: name in names  # type: ignore[attr-defined]
    timm.list_models = lambda: names  # type: ignore[attr-defined]

    def create_model(name: str, *, pretrained: bool, num_classes: int) -> nn.Module:
        assert num_classes == 0
        model = nn.Linear(2, 2)
        model.num_features = 2  # type: ignore[assignment]
        if name == "mobilenetv3":  # which widens its features after pooling them
            model.num_features, model.head_hidden_size = 1, 2  # type: ignore[assignment]
        return model

    timm.create_model = create_model  # type: ignore[attr-defined]
    return timm


@pytest.mark.parametrize("name", ["resnet50", "mobilenetv3"])
def test_a_timm_backbone_is_given_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", fake_timm())
    backbone = timm_backbone(name)
    assert backbone.num_features == 2
    assert nn.Sequential(backbone, nn.Linear(2, 3))(torch.zeros(4, 2)).shape == (4, 3)


def test_an_unknown_timm_backbone_suggests_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", fake_timm())
    with pytest.raises(ValueError, match=r"got 'resnet5'\. Did you mean resnet50"):
        timm_backbone("resnet5")
    with pytest.raises(ValueError, match=r"timm\.list_models\(\) lists them"):
        timm_backbone("qqqqqqq")


def test_without_timm_the_install_line_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r'pip install "dir_toolkit\[models\]"'):
        timm_backbone("resnet50")


def test_a_timm_that_cannot_load_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *rest: object) -> None:
            if name == "timm":
                raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ImportError, match=r"torchvision::nms.*pip install"):
        timm_backbone("resnet50")
