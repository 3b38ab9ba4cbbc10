"""The sample that is held out from a fit."""

import pytest
import torch

from npad.statistics import holdout
from npad.statistics.holdout import Reservoir


def split(n: int, fraction: float, seed: int = 0, batch: int = 7) -> tuple[list[int], list[int]]:
    """Numbers of the images kept and of those fitted, of n images in batches."""
    reservoir = Reservoir(fraction, seed)
    images = torch.arange(float(n)).reshape(n, 1, 1, 1)
    fitted = torch.cat([reservoir.take(part) for part in images.split(batch)])
    return [int(x) for x in reservoir.kept], fitted.flatten().int().tolist()


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("n", [1, 20, 500])
def test_every_image_is_kept_or_fitted_once(n: int, fraction: float) -> None:
    kept, fitted = split(n, fraction)
    assert sorted(kept + fitted) == list(range(n))
    assert len(kept) <= holdout.MAX_HELD_OUT
    assert (len(kept) > 0) == (fraction > 0)
    assert split(n, fraction) == (kept, fitted)


def test_the_sample_is_uniform_past_its_size() -> None:
    """Early images are as likely to stay as late ones; the first is always a candidate."""
    n = 4 * holdout.MAX_HELD_OUT
    kept = torch.tensor([number for seed in range(50) for number in split(n, 0.5, seed)[0]])
    quarters = torch.bincount(kept // holdout.MAX_HELD_OUT, minlength=4) / len(kept)
    torch.testing.assert_close(quarters, torch.full((4,), 0.25), rtol=0, atol=0.04)


def test_the_batches_do_not_change_the_sample() -> None:
    assert split(300, 0.3, batch=1)[0] == split(300, 0.3, batch=64)[0]
