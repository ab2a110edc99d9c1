"""Ghosts, stripes, clipping and exchanged directions, against heads that have none of them."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from scipy import ndimage

from recon.arrays import Array
from recon.errors import ModelError
from tests.fake_triage import head
from triage.artefacts import (
    CLIPPED,
    REPEATS,
    REVERSED,
    STRIPES,
    WORDS,
    Artefacts,
    artefacts_json,
    fit_weights,
    front_and_back,
    measure_artefacts,
    read_artefacts,
)
from triage.gate import Gate, fit_kind, most_of_brain
from triage.preprocess import prepare

Spoil = Callable[[Array], Array]


@pytest.fixture(scope="module")
def upright() -> tuple[Array, Array]:
    """Return planes and brains of a head whose front is narrower than its back."""
    data = head(8).data
    n_y = data.shape[1]
    scale = 1 + 0.5 * (np.arange(n_y) - n_y / 2) / n_y
    narrow = np.stack([_narrowed(each, scale) for each in data])
    shown = most_of_brain(prepare(narrow.astype(np.float32), head(8).geometry).inputs[:, 0])
    assert shown is not None
    return shown


def _narrowed(image: Array, scale: Array) -> Array:
    """Return an image whose rows are as wide as `scale` says."""
    at = np.arange(image.shape[1]) - (image.shape[1] - 1) / 2
    return np.stack([np.interp(at / each, at, row) for row, each in zip(image, scale, strict=True)])


def _spark(images: Array) -> Array:
    spectrum = np.fft.fft2(images)
    spectrum[:, 31, 22] += 0.2 * np.abs(spectrum).max(axis=(1, 2))
    return np.abs(np.fft.ifft2(spectrum))


SPOILED: dict[str, tuple[Spoil, ...]] = {
    REPEATS: (
        lambda images: images + 0.5 * np.roll(images, 70, axis=1),
        lambda images: sum(np.roll(images, k * 56, axis=1) for k in range(4)),
        lambda images: images + 0.6 * np.roll(images, 60, axis=2),
    ),
    STRIPES: (_spark,),
    CLIPPED: (lambda images: np.minimum(images, 0.8),),
    REVERSED: (lambda images: images[:, ::-1],),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_wrong_stands_out_and_nothing_else(name: str, upright: tuple[Array, Array]) -> None:
    images, brain = upright
    weights = fit_weights([np.stack([front_and_back(*each) for each in zip(images, brain, strict=True)])])
    clean = measure_artefacts(images, brain, weights)
    assert clean[REVERSED] < -0.5
    margin = {REPEATS: 0.08, STRIPES: 0.5, CLIPPED: 0.2, REVERSED: 0.5}  # a drawn head has few edges and even tissue
    half = {each: value + margin[each] for each, value in clean.items()}
    limits = Artefacts(weights, half, {"flair": half})
    assert limits.refusal(images, brain, "flair", True) == ""
    assert limits.refusal(ndimage.gaussian_filter(images, (0, 0.7, 0.7)), brain, "flair", False) == ""
    for spoil in SPOILED[name]:
        worse = np.asarray(spoil(images), np.float32)
        shown = brain[:, ::-1] if name == REVERSED else brain
        assert measure_artefacts(worse, shown, weights)[name] > half[name]
        assert limits.refusal(worse, shown, "flair", False)


def test_a_mirrored_plane_is_as_upright_and_a_reversed_one_is_its_opposite(upright: tuple[Array, Array]) -> None:
    image, brain = upright[0][3], upright[1][3]
    numbers = front_and_back(image, brain)
    np.testing.assert_allclose(front_and_back(image[:, ::-1], brain[:, ::-1]), numbers, atol=1e-6)
    np.testing.assert_allclose(front_and_back(image[::-1], brain[::-1]), -numbers, atol=0.2)


def test_the_gate_refuses_and_says_why(upright: tuple[Array, Array]) -> None:
    volume = head(8)
    planes = prepare(volume.data, volume.geometry)
    wide = fit_kind(100 * np.random.default_rng(0).standard_normal((60, 20)))
    none = Artefacts(np.zeros(len(front_and_back(*(each[0] for each in upright)))), dict.fromkeys(WORDS, 99.0), {})
    assert Gate({"flair": (wide,)}, 1.0, 3.0, none).refusal(planes, "flair") == ""
    strict = Artefacts(none.weights, {CLIPPED: 0.0}, {})
    assert "cut off" in Gate({"flair": (wide,)}, 1.0, 3.0, strict).refusal(planes, "flair")


def test_limits_are_read_back() -> None:
    made = Artefacts(np.arange(4.0), {REPEATS: 0.25}, {"t1": {REVERSED: 0.5}})
    read = read_artefacts(json.loads(json.dumps(artefacts_json(made))))
    assert (read.most, read.most_of_few) == (made.most, made.most_of_few)
    np.testing.assert_array_equal(read.weights, made.weights)
    with pytest.raises(ModelError, match="other numbers"):
        read_artefacts({"weights": [], "most": {"colour": 1}, "most_of_few": {}})
    with pytest.raises(ModelError, match="cannot be read"):
        read_artefacts({"weights": [], "most": {}})
