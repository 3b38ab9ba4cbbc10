"""A fixed bank of oriented filters over several scales: a backbone that needs no download."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

N_LEVELS: Final = 4
N_ORIENTATIONS: Final = 6
REVISION: Final = 1  # part of the weights hash: raise it when the computation changes

_PIXEL_STD: Final = 0.2  # contrast of a typical photograph whose values lie in [0, 1]
_OPPONENT_GAIN: Final = 4.0  # photographs vary about four times less in colour than in luminance
_FLOOR: Final = 1 / 255 / _PIXEL_STD  # one grey level: an amplitude below it is noise
_BINOMIAL: Final = (1 / 8, 3 / 8, 3 / 8, 1 / 8)
_DOUBLE: Final[dict[str, Any]] = {"dtype": torch.float64, "device": "cpu"}


class FilterBank(nn.Module):
    """Amplitudes of oriented filters, means, contrasts and derivatives at each chosen scale.

    Level l has reduction r = 2^(l+1), as the levels 1 to 4 of a ResNet have, and 17 channels:

    - 6 amplitudes: quadrature pairs of a second Gaussian derivative and its Hilbert transform, six
      orientations, on luminance at stride r / 4; root of the mean energy around each cell;
    - 3 local means and 3 local standard deviations, of luminance and of two opponent colours;
    - 5 signed derivatives (x, y, xx, xy, yy) of luminance at stride r.

    Every step down averages with four taps centred between the pixels, so that cell (i, j) is
    centred on its own r x r pixels. Borders are reflected: they carry no edge of their own.
    Every channel is in units of what a photograph with a 1/f amplitude spectrum gives it; nothing
    depends on the data.

    Parameters
    ----------
    layers : levels to return, increasing, from 1 to 4.

    Notes
    -----
    Filters: Freeman and Adelson, *The design and use of steerable filters*, PAMI 1991 (G2, H2).
    """

    oriented: Tensor
    derivatives: Tensor
    colours: Tensor
    contrast_gain: Tensor
    binomial: Tensor

    def __init__(self, layers: Sequence[int]) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.reductions = [2 ** (level + 1) for level in self.layers]
        oriented, derivatives = _unit_response(_quadrature_pairs()), _unit_response(_derivatives())
        self.n_channels = N_ORIENTATIONS + 2 * 3 + len(derivatives)
        self.register_buffer("oriented", _rounded(oriented))
        self.register_buffer("derivatives", _rounded(derivatives))
        self.register_buffer("colours", _rounded(_opponent_colours()))
        self.register_buffer("contrast_gain", _rounded(_contrast_gain()))
        self.register_buffer("revision", torch.tensor(REVISION, device="cpu"))
        # Made here: made in a call, it would be copied to a GPU then, for which a call waits and
        # which no CUDA graph records. Not persistent: the weights hash is older than it.
        taps = torch.tensor(_BINOMIAL, dtype=torch.float32, device="cpu")
        self.register_buffer("binomial", taps, persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features of images (B, 3, H, W) in [0, 1]: one (B, 17, h, w) per chosen level."""
        pyramid = [F.conv2d(images, self.colours)]
        for _ in range(self.layers[-1] + 1):
            pyramid.append(self._halve(pyramid[-1]))
        return [self._level(pyramid[level - 1], pyramid[level + 1]) for level in self.layers]

    def _level(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Features on the grid of `coarse` (stride r) with the detail of `fine` (stride r / 4)."""
        response = _correlate(fine[:, :1], self.oriented).square()
        energy = response[:, :N_ORIENTATIONS] + response[:, N_ORIENTATIONS:]
        amplitude = (self._halve(self._halve(energy)) + _FLOOR**2).sqrt()
        mean_square = self._halve(self._halve(fine.square()))
        variance = (mean_square - coarse.square()).clamp_min(0)
        contrast = (variance + _FLOOR**2).sqrt() * self.contrast_gain
        slopes = _correlate(coarse[:, :1], self.derivatives)
        return torch.cat([amplitude, coarse, contrast, slopes], dim=1)

    def _halve(self, x: Tensor) -> Tensor:
        """Halve the resolution of x (B, C, H, W); an odd side is rounded up."""
        channels, height, width = x.shape[1:]
        kernel = torch.outer(self.binomial, self.binomial).expand(channels, 1, 4, 4)
        x = F.pad(x, (1, 1 + width % 2, 1, 1 + height % 2), mode="reflect")
        return F.conv2d(x, kernel, stride=2, groups=channels)


def _correlate(x: Tensor, kernels: Tensor) -> Tensor:
    pad = kernels.shape[-1] // 2
    return F.conv2d(F.pad(x, (pad, pad, pad, pad), mode="reflect"), kernels)


def _quadrature_pairs() -> Tensor:
    """G2 and H2 (Freeman and Adelson) at six orientations: (12, 1, 9, 9), even ones first."""
    axis = torch.arange(-4, 5, **_DOUBLE) * 0.67
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    envelope = torch.exp(-(x**2 + y**2))
    even, odd = [], []
    for k in range(N_ORIENTATIONS):
        angle = math.pi * k / N_ORIENTATIONS
        u = x * math.cos(angle) + y * math.sin(angle)
        g2 = 0.9213 * (2 * u**2 - 1) * envelope
        even.append(g2 - envelope * (g2.sum() / envelope.sum()))  # sampled, it would see the mean
        odd.append(0.9780 * (u**3 - 2.254 * u) * envelope)
    return torch.stack(even + odd)[:, None]


def _derivatives() -> Tensor:
    """Central differences d/dx, d/dy, d2/dx2, d2/dxdy, d2/dy2, smoothed across: (5, 1, 3, 3)."""
    smooth, first, second = torch.tensor([[1, 2, 1], [-1, 0, 1], [1, -2, 1]], **_DOUBLE)
    pairs = [(smooth, first), (first, smooth), (smooth, second), (first, first), (second, smooth)]
    return torch.stack([torch.outer(y, x) for y, x in pairs])[:, None]


def _opponent_colours() -> Tensor:
    """Luminance, red-green and yellow-blue of RGB, each of about unit variance: (3, 3, 1, 1)."""
    gain = _OPPONENT_GAIN
    rows = [[1 / 3, 1 / 3, 1 / 3], [gain / 2, -gain / 2, 0], [gain / 4, gain / 4, -gain / 2]]
    return torch.tensor(rows, **_DOUBLE)[..., None, None] / _PIXEL_STD


def _spectrum(size: int = 256) -> Tensor:
    """Power of a photograph of unit variance: 1 / f^2, so that every octave has the same share."""
    f = torch.fft.fftfreq(size, **_DOUBLE)
    power = 1 / (f[:, None] ** 2 + f**2).clamp_min(1 / size**2)
    power[0, 0] = 0
    spectrum: Tensor = power / power.sum()
    return spectrum


def _unit_response(kernels: Tensor) -> Tensor:
    """Scale each kernel so that its response to the spectrum has unit variance."""
    spectrum = _spectrum()
    gain = torch.fft.fft2(kernels, s=spectrum.shape).abs().square()
    scaled: Tensor = kernels / (gain * spectrum).sum((-2, -1), keepdim=True).sqrt()
    return scaled


def _contrast_gain() -> Tensor:
    """Reciprocal of the standard deviation that the spectrum has within one pooling window."""
    spectrum = _spectrum()
    taps = torch.tensor(_BINOMIAL, **_DOUBLE)
    spread = torch.zeros(7, **_DOUBLE)
    spread[::2] = taps  # the second step down sees every other pixel
    pooled = torch.fft.fft(taps, n=len(spectrum)) * torch.fft.fft(spread, n=len(spectrum))
    power = pooled.abs().square()
    return ((1 - torch.outer(power, power)) * spectrum).sum().rsqrt()


def _rounded(x: Tensor) -> Tensor:
    """Float32 with 20 binary places: the last bit of exp or cos on one machine changes nothing."""
    return ((x * 2**20).round() / 2**20).float()
