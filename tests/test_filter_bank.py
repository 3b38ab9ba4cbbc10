"""The fixed filter bank: what each channel sees, and what it must not see."""

from __future__ import annotations

import math

import pytest
import torch
from torch.overrides import TorchFunctionMode

from npad.features.filter_bank import N_ORIENTATIONS, FilterBank

AMPLITUDE = slice(0, 6)
MEAN = slice(6, 9)
CONTRAST = slice(9, 12)
SLOPE = slice(12, 17)
FLOOR = 1 / 255 / 0.2


def grating(angle: float, wavelength: float, size: int = 128, phase: float = 0.0) -> torch.Tensor:
    """Grey image (1, 3, size, size) that varies along `angle`."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    u = x * math.cos(angle) + y * math.sin(angle)
    wave = 0.5 + 0.2 * torch.sin(2 * math.pi * u / wavelength + phase)
    return wave.expand(1, 3, size, size).contiguous()


def inner(x: torch.Tensor) -> torch.Tensor:
    return x[..., 4:-4, 4:-4]


@pytest.mark.parametrize("size", [(128, 128), (97, 131), (64, 33)])
def test_shapes_and_reductions(size: tuple[int, int]) -> None:
    bank = FilterBank((1, 2, 3))
    assert bank.reductions == [4, 8, 16]
    for features, reduction in zip(bank(torch.rand(2, 3, *size)), bank.reductions, strict=True):
        grid = [math.ceil(side / reduction) for side in size]
        assert features.shape == (2, bank.n_channels, *grid)


def test_levels_can_be_chosen_alone() -> None:
    image = torch.rand(1, 3, 96, 96)
    together = FilterBank((1, 2, 3, 4))(image)
    for level in (1, 2, 3, 4):
        assert torch.equal(FilterBank((level,))(image)[0], together[level - 1])


def test_a_call_makes_no_tensor_of_numbers() -> None:
    """On a GPU each would be a copy for which the call waits, and which no CUDA graph records."""

    class NoNumbers(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            assert func not in (torch.tensor, torch.as_tensor)
            return func(*args, **kwargs or {})

    bank = FilterBank((1, 2))
    with NoNumbers():
        bank(torch.rand(1, 3, 32, 32))


def test_a_constant_image_has_no_edge_anywhere() -> None:
    """Borders included: a filter that saw the edge of the image would raise alarms there."""
    image = torch.tensor([0.7, 0.4, 0.2]).view(1, 3, 1, 1).expand(1, 3, 93, 70)
    for features in FilterBank((1, 2, 3))(image):
        assert features[:, AMPLITUDE].max() <= FLOOR * 1.001
        assert features[:, CONTRAST].max() <= FLOOR * 1.7
        assert features[:, SLOPE].abs().max() < 1e-4
        spread = features[:, MEAN].amax((2, 3)) - features[:, MEAN].amin((2, 3))
        assert spread.max() < 1e-5


@pytest.mark.parametrize("k", range(N_ORIENTATIONS))
@pytest.mark.parametrize("level", [1, 2])
def test_amplitude_is_tuned_to_its_orientation(k: int, level: int) -> None:
    wavelength = 5.0 * 2 ** (level - 1)
    features = FilterBank((level,))(grating(math.pi * k / N_ORIENTATIONS, wavelength))[0]
    response = inner(features)[0, AMPLITUDE].mean((1, 2))
    assert int(response.argmax()) == k
    across = response[(k + N_ORIENTATIONS // 2) % N_ORIENTATIONS]
    assert response[k] > 4 * across


def test_amplitude_does_not_depend_on_phase() -> None:
    """The quadrature pair: an aligned weave and a shifted one give the same amplitudes."""
    bank = FilterBank((1,))
    responses = [
        inner(bank(grating(0.0, 5.0, phase=p))[0])[0, 0] for p in (0.0, 0.7, math.pi / 2, 2.5)
    ]
    low, high = min(r.min() for r in responses), max(r.max() for r in responses)
    assert high / low < 1.05


def test_amplitude_prefers_its_own_scale() -> None:
    features = [f[0, 0].mean() for f in FilterBank((1, 2, 3))(grating(0.0, 5.0, size=256))]
    coarse = [f[0, 0].mean() for f in FilterBank((1, 2, 3))(grating(0.0, 20.0, size=256))]
    assert features[0] > 5 * features[2]
    assert coarse[2] > 2 * coarse[0]


def test_slopes_have_the_right_sign_and_axis() -> None:
    ramp = torch.linspace(0.2, 0.8, 128).expand(1, 3, 128, 128)
    dx, dy, dxx, dxy, dyy = inner(FilterBank((1,))(ramp)[0])[0, SLOPE].mean((1, 2))
    assert dx > 0.01
    assert max(abs(v) for v in (dy, dxx, dxy, dyy)) < 1e-4
    dx, dy, *_ = inner(FilterBank((1,))(ramp.mT.flip(2).contiguous())[0])[0, SLOPE].mean((1, 2))
    assert dy < -0.01
    assert abs(dx) < 1e-4


def test_colour_does_not_touch_luminance_channels() -> None:
    grey = torch.rand(1, 3, 64, 64).mean(1, keepdim=True).expand(1, 3, 64, 64) * 0.6 + 0.2
    shift = torch.tensor([0.05, 0.0, -0.05]).view(1, 3, 1, 1)
    plain, tinted = FilterBank((1,))(grey)[0], FilterBank((1,))(grey + shift)[0]
    for part in (AMPLITUDE, SLOPE, slice(6, 7), slice(9, 10)):
        torch.testing.assert_close(plain[:, part], tinted[:, part], rtol=0, atol=1e-3)
    assert (tinted[:, 7:9] - plain[:, 7:9]).mean((0, 2, 3)).abs().min() > 0.2


def test_cells_are_centred_on_their_pixels() -> None:
    """Flipping the image flips the features: no shift of a half pixel on any level."""
    image = torch.rand(1, 3, 128, 128)
    bank = FilterBank((1, 2, 3))
    for features, flipped in zip(bank(image), bank(image.flip(3)), strict=True):
        kept = [6, 7, 8, 9, 10, 11, 13, 14, 16, 0, 3]  # even under x -> -x
        torch.testing.assert_close(
            flipped.flip(3)[:, kept], features[:, kept], rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(flipped.flip(3)[:, 12], -features[:, 12], rtol=1e-3, atol=1e-3)
        mirrored = [0, 5, 4, 3, 2, 1]  # orientation k becomes pi - k
        torch.testing.assert_close(
            flipped.flip(3)[:, mirrored], features[:, AMPLITUDE], rtol=1e-3, atol=1e-3
        )


def test_channels_have_like_scales_on_a_photograph_spectrum() -> None:
    """Noise with a 1/f amplitude spectrum: no channel outweighs the rest in a distance."""
    size = 256
    f = torch.fft.fftfreq(size)
    radius = torch.hypot(f[:, None], f)
    radius[0, 0] = float("inf")
    noise = torch.fft.ifft2(torch.fft.fft2(torch.randn(8, 1, size, size)) / radius).real
    noise = 0.5 + 0.2 * noise / noise.std((2, 3), keepdim=True)
    for features in FilterBank((1, 2, 3))(noise.expand(8, 3, size, size)):
        power = features.square().mean((0, 2, 3)).sqrt()
        used = [*range(6), 9, *range(12, 17)]
        assert power[used].min() > 0.4
        assert power[used].max() < 2.5
