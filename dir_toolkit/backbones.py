"""Networks from images to features, and the regressor around them."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._checks import is_tensor, number, problem, whole
from .errors import ShapeError

__all__ = ["ImageRegressor", "SmallResNet", "small_resnet", "timm_backbone"]


def small_resnet(*, width: int = 32, in_channels: int = 3) -> SmallResNet:
    """A residual CNN for images of 32 to 80 pixels: 0.62 million parameters and 128 features at width 32.

    Args:
        width: channels of the first stage; the others have 2, 4 and 4 times as many.
    Raises:
        ValueError: width or in_channels is below 1.

    >>> backbone = small_resnet(width=8)
    >>> backbone.num_features, backbone(torch.zeros(2, 3, 48, 48)).shape
    (32, torch.Size([2, 32]))
    """
    return SmallResNet(
        width=whole("small_resnet", "width", width, low=1),
        in_channels=whole("small_resnet", "in_channels", in_channels, low=1),
    )


class SmallResNet(nn.Module):
    """What :func:`small_resnet` makes: a stem that halves the side, four residual blocks, the mean over pixels.

    Weights and images are laid out channels last, which convolutions on a CPU like better.

    Attributes:
        num_features: of the output.
    Shape:
        forward: images (N, C, H, W), floats in [-1, 1]. Returns (N, num_features).
    Raises:
        ShapeError: images have another number of axes. TypeError: they are no floats.
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
        is_tensor("SmallResNet", images=images)
        if images.ndim != 4:
            raise problem(
                "SmallResNet", "images must have shape (N, C, H, W)", got=tuple(images.shape), error=ShapeError
            )
        if not images.is_floating_point():
            fix = "Use dir_toolkit.data.augment.to_float(images)."
            raise problem("SmallResNet", "images must be floats", got=f"dtype {images.dtype}", fix=fix, error=TypeError)
        maps = self.blocks(self.stem(images.contiguous(memory_format=torch.channels_last)))
        return maps.mean((2, 3))


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride, ceil_mode=True),
                nn.Conv2d(inputs, outputs, 1, bias=False),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, maps: Tensor) -> Tensor:
        change = F.relu(self.norm1(self.conv1(maps)), inplace=True)
        change = self.norm2(self.conv2(change))
        return F.relu(change + self.shortcut(maps))


def timm_backbone(name: str, *, pretrained: bool = False) -> nn.Module:
    """Any model of timm by name, without its classifier; has ``num_features``, as :func:`small_resnet` has.

    Args:
        name: such as ``"resnet50"``; ``timm.list_models()`` knows them all.
        pretrained: whether to download weights.
    Raises:
        ImportError: timm is not installed or cannot be loaded. ValueError: timm has no such model.
    """
    where = "timm_backbone"
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # a torchvision built for another torch raises RuntimeError
        raise problem(
            where,
            "timm must be importable",
            got=f"{type(error).__name__}: {error}",
            fix='Use pip install "dir_toolkit[models]".',
            error=ImportError,
        ) from error
    if not timm.is_model(name):
        near = difflib.get_close_matches(str(name), timm.list_models(), n=3)
        fix = f"Did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them."
        raise problem(where, "name must be a model of timm", got=repr(name), fix=fix)
    model: Any = timm.create_model(name, pretrained=pretrained, num_classes=0)
    return model


class ImageRegressor(nn.Module):
    """A backbone and a linear head: ``pred = offset + scale * head(backbone(images))``.

    With offset and scale near the labels' median and spread the head starts where labels are. :class:`dir_toolkit.FDS`
    attaches to ``model.head, "input"``.

    Args:
        backbone: from images to (N, backbone.num_features).
        offset, scale: in label units; scale > 0.
    Attributes:
        backbone, head: the two parts, head an ``nn.Linear(num_features, 1)``.
    Shape:
        forward: images (N, C, H, W). Returns (N,), in label units; float32 or wider, under autocast too.
    Raises:
        TypeError: the backbone does not tell its ``num_features``. ValueError: that is below 1, or scale not positive.

    >>> model = ImageRegressor(small_resnet(width=8), offset=30.0, scale=15.0)
    >>> model(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2])
    """

    offset: Tensor
    scale: Tensor

    def __init__(self, backbone: nn.Module, *, offset: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        where = "ImageRegressor"
        num_features = getattr(backbone, "num_features", None)
        if not isinstance(backbone, nn.Module) or num_features is None:
            raise problem(
                where,
                "backbone must be a module with an attribute num_features",
                got=type(backbone).__name__,
                fix="Set backbone.num_features to the number of its outputs.",
                error=TypeError,
            )
        num_features = whole(where, "backbone.num_features", num_features, low=1)
        self.backbone = backbone
        self.head = nn.Linear(num_features, 1)
        self.register_buffer("offset", torch.tensor(number(where, "offset", offset)))
        self.register_buffer("scale", torch.tensor(number(where, "scale", scale, low=0, open_low=True)))

    def forward(self, images: Tensor) -> Tensor:
        score = self.head(self.backbone(images)).squeeze(1)  # (N, 1) -> (N,)
        # A bfloat16 score must not pull the offset down to its eight bits.
        return self.offset + self.scale * score.to(self.offset.dtype)
