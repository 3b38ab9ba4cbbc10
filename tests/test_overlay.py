"""Colours over images: what is cold stays, what is warm is seen on any image."""

import numpy as np
import pytest

from npad.evaluation.overlay import color_map, draw_overlay

HEAT = np.linspace(0, 1, 101, dtype=np.float32)[None]


def grey(value):
    return np.full((*HEAT.shape, 3), value, np.uint8)


def change(value):
    """Largest change in any channel that the overlay makes, for each of HEAT."""
    return np.abs(draw_overlay(grey(value), HEAT).astype(int) - value).max(-1)[0]


@pytest.mark.parametrize("value", [0, 60, 128, 200, 255])
def test_what_is_hot_is_seen_on_any_image(value):
    assert change(value)[0] == 0
    assert change(value)[10] < 20  # a nominal place is not tinted
    assert (change(value)[40:] > 45).all()
    red, green, blue = draw_overlay(grey(value), HEAT)[0, 100].astype(int)
    assert min(red, green) > blue + 80  # the hottest is yellow


def test_heat_beyond_the_scale_is_clipped():
    wide = np.float32([[-5, 0, 1, 7]])
    picture = draw_overlay(np.full((1, 4, 3), 90, np.uint8), wide)
    assert (picture[0, 0] == 90).all()
    np.testing.assert_array_equal(picture[0, 2], picture[0, 3])
    np.testing.assert_array_equal(color_map(wide)[0, :2], color_map(wide)[0, [0, 0]])


def test_float_images_are_drawn_as_uint8_ones():
    pixels = np.random.default_rng(0).integers(0, 256, (*HEAT.shape, 3), np.uint8)
    before = pixels.copy()
    floating = draw_overlay(pixels / np.float32(255), HEAT)
    np.testing.assert_array_equal(floating, draw_overlay(pixels, HEAT))
    np.testing.assert_array_equal(pixels, before)
    assert floating.dtype == np.uint8


def test_color_map_gets_lighter_as_it_gets_hotter():
    assert (np.diff(color_map(HEAT).astype(int) @ [299, 587, 114]) >= 0).all()
    assert color_map(HEAT)[0, 0].max() < 10
