from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

from dir_toolkit.backbones import ImageRegressor, small_resnet, timm_backbone
from dir_toolkit.errors import ShapeError


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
    model = ImageRegressor(small_resnet(width=4))
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
def test_small_resnet_refuses(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"{message} must be at least 1, got 0"):
        small_resnet(**settings)


def test_regressor_is_offset_plus_scale_times_head() -> None:
    backbone = nn.Flatten()
    backbone.num_features = 3  # type: ignore[assignment]
    model = ImageRegressor(backbone, offset=30.0, scale=2.0)
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([[1.0, 0.0, -1.0]]))
        model.head.bias.fill_(0.5)
    pred = model(torch.tensor([[[[5.0]], [[1.0]], [[2.0]]]]))
    assert pred.tolist() == [30 + 2 * (5 - 2 + 0.5)]
    assert {"offset", "scale"} <= set(dict(model.named_buffers()))


def test_regressor_keeps_float32_under_autocast() -> None:
    model = ImageRegressor(small_resnet(width=4), offset=100.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.zeros(2, 3, 32, 32)).dtype == torch.float32
    assert model.double()(torch.zeros(2, 3, 32, 32).double()).dtype == torch.float64


def test_regressor_refuses_what_is_no_backbone() -> None:
    with pytest.raises(TypeError, match=r"attribute num_features, got Flatten\. Set backbone\.num_features"):
        ImageRegressor(nn.Flatten())
    with pytest.raises(ValueError, match="scale must be > 0"):
        ImageRegressor(small_resnet(width=4), scale=0.0)
    backbone = nn.Flatten()
    backbone.num_features = 0  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"ImageRegressor: backbone\.num_features must be at least 1, got 0"):
        ImageRegressor(backbone)


def test_small_resnet_takes_float_images_only() -> None:
    backbone = small_resnet(width=4)
    with pytest.raises(TypeError, match=r"images must be floats, got dtype torch\.uint8\. Use .*to_float\(images\)"):
        backbone(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ShapeError, match=r"images must have shape \(N, C, H, W\), got \(3, 32, 32\)"):
        backbone(torch.zeros(3, 32, 32))
    with pytest.raises(TypeError, match=r"images must be a torch\.Tensor, got NoneType"):
        backbone(None)


def fake_timm() -> types.ModuleType:
    timm = types.ModuleType("timm")
    names = ["resnet18", "resnet50", "vit_tiny"]
    timm.is_model = lambda name: name in names  # type: ignore[attr-defined]
    timm.list_models = lambda: names  # type: ignore[attr-defined]

    def create_model(name: str, *, pretrained: bool, num_classes: int) -> nn.Module:
        assert num_classes == 0
        model = nn.Linear(2, 2)
        model.num_features = 2  # type: ignore[assignment]
        return model

    timm.create_model = create_model  # type: ignore[attr-defined]
    return timm


def test_timm_backbone_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", fake_timm())
    assert ImageRegressor(timm_backbone("resnet50")).head.in_features == 2


def test_timm_backbone_suggests_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
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
