"""Networks from images to features."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import instance, is_tensor, length, missing_package, problem, whole
from ..errors import ShapeError

__all__ = ["DigitCNN", "SmallResNet", "digit_cnn", "small_resnet", "timm_backbone"]


def small_resnet(*, width: int = 32, in_channels: int = 3) -> SmallResNet:
    """A residual CNN for images of 32 to 80 pixels. At width 32 it has 0.62 million parameters and 128 features.

    Args:
        width: the channels of the first stage. The others have 2, 4 and 4 times as many.
    Raises:
        ValueError: width or in_channels is below 1.

    >>> backbone = small_resnet(width=8)
    >>> backbone.num_features, backbone(torch.zeros(2, 3, 48, 48)).shape
    (32, torch.Size([2, 32]))
    """
    return SmallResNet(width=length("width", width), in_channels=length("in_channels", in_channels))


class SmallResNet(nn.Module):
    """The network of :func:`small_resnet`: a stem that halves the side, four residual blocks, and the mean over pixels.

    Weights and images use the channels-last layout, which is faster on a CPU.

    Attributes:
        num_features: the number of features in the output.
    Shape:
        forward: images (N, C, H, W), floats in [-1, 1]. Returns (N, num_features).
    Raises:
        ShapeError: images have another number of axes. TypeError: images are not floats.
    Source:
        He et al. 2016, "Deep residual learning" (arXiv:1512.03385); shortcuts average before they project, as in
        ResNet-D (He et al. 2019, arXiv:1812.01187).
    """

    def __init__(self, *, width: int, in_channels: int) -> None:
        super().__init__()
        self.num_features = 4 * width
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        self.blocks = nn.Sequential(
            _Block(width, width, stride=1),
            _Block(width, 2 * width, stride=2),
            _Block(2 * width, 4 * width, stride=2),
            _Block(4 * width, 4 * width, stride=2),
        )
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        _check_images(images)
        maps = self.blocks(self.stem(images.contiguous(memory_format=torch.channels_last)))
        return maps.mean((2, 3))


class _Block(nn.Module):
    """Two convolutions of 3×3 beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride, ceil_mode=True), nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, maps: Tensor) -> Tensor:
        change = F.relu(self.norm1(self.conv1(maps)), inplace=True)
        change = self.norm2(self.conv2(change))
        return F.relu(change + self.shortcut(maps))


def digit_cnn(num_features: int = 128, *, size: int = 28, in_channels: int = 1, activation: bool = True) -> DigitCNN:
    """The network of the affinity paper's MNIST studies: three 5×5 convolutions and one fully connected layer.

    Args:
        num_features: the outputs of the fully connected layer. Two features can be drawn as points in a plane.
        size: the side of the images in pixels, at least 8.
        activation: whether features pass a ReLU. Without it two features fill the whole plane.
    Raises:
        ValueError: a number is too small. TypeError: activation is not a bool.

    >>> backbone = digit_cnn()
    >>> backbone.num_features, backbone(torch.zeros(2, 1, 28, 28)).shape
    (128, torch.Size([2, 128]))
    """
    instance(bool, activation=activation)
    return DigitCNN(
        length("num_features", num_features),
        size=whole("size", size, low=8),
        in_channels=length("in_channels", in_channels),
        activation=activation,
    )


class DigitCNN(nn.Module):
    """The network of :func:`digit_cnn`: convolutions of 32, 64 and 128 channels, each with a ReLU and a pooling by two.

    Weights and images use the channels-last layout, which is faster on a CPU.

    Attributes:
        num_features: the number of features in the output.
    Shape:
        forward: images (N, C, size, size), floats in [-1, 1]. Returns (N, num_features).
    Raises:
        ShapeError: images have another number of axes or another side. TypeError: images are not floats.
    Source:
        Hayat et al. 2019, section 5 (arXiv:1901.07711).
    """

    def __init__(self, num_features: int, *, size: int, in_channels: int, activation: bool) -> None:
        super().__init__()
        self.num_features, self.size = num_features, size
        layers: list[nn.Module] = []
        for inputs, outputs in ((in_channels, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(inputs, outputs, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        self.convolutions = nn.Sequential(*layers)
        self.projection = nn.Linear(128 * (size // 8) ** 2, num_features)
        self.activation = nn.ReLU(inplace=True) if activation else nn.Identity()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        _check_images(images)
        if images.shape[2] != self.size or images.shape[3] != self.size:
            rule = f"images must have sides of {self.size}"
            fix = "Pass the size of the images to digit_cnn."
            raise problem(rule, got=tuple(images.shape), fix=fix, error=ShapeError)
        maps = self.convolutions(images.contiguous(memory_format=torch.channels_last))
        return self.activation(self.projection(maps.flatten(1)))


def _check_images(images: Tensor) -> None:
    is_tensor(images=images)
    if images.ndim != 4:
        raise problem("images must have shape (N, C, H, W)", got=tuple(images.shape), error=ShapeError)
    if not images.is_floating_point():
        fix = "Use dir_toolkit.experiment.data.augment.to_float(images)."
        raise problem("images must be floats", got=f"dtype {images.dtype}", fix=fix, error=TypeError)


def backbone_of(name: str) -> nn.Module:
    """:func:`small_resnet` by its name, or else :func:`timm_backbone`."""
    return small_resnet() if name == "small_resnet" else timm_backbone(name)


def timm_backbone(name: str, *, pretrained: bool = False) -> nn.Module:
    """A model of timm by its name, without the classifier. It has ``num_features``, as :func:`small_resnet` has.

    Args:
        name: the name of a model, such as ``"resnet50"``. ``timm.list_models()`` lists them all.
        pretrained: whether to download weights.
    Raises:
        ImportError: timm is not installed or cannot be loaded. ValueError: timm has no such model.
    """
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # a torchvision built for another torch raises RuntimeError
        raise missing_package("timm for this version of torch", error, "models") from error
    if not timm.is_model(name):
        near = difflib.get_close_matches(str(name), timm.list_models(), n=3)
        fix = f"Did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them."
        raise problem("name must be a model of timm", got=repr(name), fix=fix)
    model: Any = timm.create_model(name, pretrained=pretrained, num_classes=0)
    # Some models widen the pooled features. Their num_features is the width before; this is the width of the output.
    model.num_features = getattr(model, "head_hidden_size", model.num_features)
    return model
