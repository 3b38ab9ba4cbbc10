"""Folding of batch normalisation: the same features, and no layer folded that is used twice."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from npad.features.batch_norm import fold_batch_norm


def with_statistics(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias.data):
                tensor.uniform_(-0.5, 0.5)
            for tensor in (module.running_var, module.weight.data):
                tensor.uniform_(0.5, 1.5)
    return net.eval()


def norms(net: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("resnet18", 0),
        ("efficientnet_b0", 0),  # a normalisation that is followed by an activation in one layer
        ("hrnet_w18_small", 0),  # branches
        ("resnetv2_50", 16),  # normalises sums, and results that are also passed on
        ("densenet121", 62),  # the same results normalised again and again
        ("convnext_atto", 0),  # has none
    ],
)
def test_features_are_the_same(name: str, left: int) -> None:
    net = with_statistics(timm.create_model(name, features_only=True))
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = net(images)
        fold_batch_norm(net)
        features = net(images)
    assert norms(net) == left
    for a, b in zip(features, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.other = nn.BatchNorm2d(3, affine=False)


class ResultIsAFeature(Block):
    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.conv(x)
        return [x, self.bn(x)]


class ResultIsAdded(Block):
    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.conv(x)
        return [self.bn(x) + x]


class ConvolutionIsCalledTwice(Block):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.bn(self.conv(x)), self.conv(x)]


class NormIsCalledTwice(Block):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.bn(self.conv(x)), self.bn(x)]


class ResultIsChangedFirst(Block):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.bn(self.conv(x).relu_())]


@pytest.mark.parametrize(
    "kind",
    [ResultIsAFeature, ResultIsAdded, ConvolutionIsCalledTwice, NormIsCalledTwice,
     ResultIsChangedFirst],
)  # fmt: skip
def test_what_is_used_twice_stays(kind: type[Block]) -> None:
    net = with_statistics_of(kind())
    before = {key: value.clone() for key, value in net.state_dict().items()}
    fold_batch_norm(net)
    assert norms(net) == 2
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])


def with_statistics_of(net: Block) -> Block:
    for norm in (net.bn, net.other):
        assert norm.running_mean is not None
        norm.running_mean.uniform_(-0.5, 0.5)
    return net.eval()


class WithoutAffine(Block):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.other(self.conv(x))]


def test_without_scale_and_shift() -> None:
    net = with_statistics_of(WithoutAffine())
    images = torch.rand(2, 3, 9, 7)
    with torch.no_grad():
        (expected,) = net(images)
        fold_batch_norm(net)
        torch.testing.assert_close(net(images)[0], expected, rtol=1e-5, atol=1e-6)
    assert norms(net) == 1


def test_a_network_that_does_not_take_the_probe_is_left_alone() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(27, 2), nn.BatchNorm1d(2), nn.BatchNorm2d(2)).eval()
    fold_batch_norm(net)
    assert norms(net) == 1
