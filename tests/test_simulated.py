"""What the network is trained on: scans whose pieces fit together, with the faults that are meant."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from export.simulated import Draw, acquire, draw_coils, draw_image, draw_mask, draw_sample, insert_structures, see
from export.slices import Slice, load_slices
from recon.fourier import to_image

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def disc(n: int = 120) -> Slice:
    y, x = np.meshgrid(*[np.arange(n) - n // 2] * 2, indexing="ij")
    pixels = (150 + 60 * np.sin(x / 5)) * (np.hypot(y / 0.8, x) < 0.42 * n)
    return Slice(pixels.astype(np.uint8), (1.8, 1.8), "nobody", "T1w", "brain", 1.0)


PLAIN = Draw(
    sizes=(96,), n_columns=None, accelerations=(3,), sigma=(0.01, 0.01), coils=(4,), phantom_share=0, blank_share=0
)


def test_a_sample_is_its_truth_with_noise_and_missing_lines() -> None:
    for seed in range(4):
        sample = draw_sample(np.random.default_rng(seed), disc(), PLAIN)
        truth = sample.target * sample.prepared.scale[:, None, None]
        classical = np.linalg.norm(np.abs(sample.classical) - np.abs(truth)) / np.linalg.norm(truth)
        assert classical < 0.25
        assert 0.8 < np.percentile(np.abs(sample.target), 99.5) < 1.3
        assert sample.lesion.shape == truth.shape
        assert sample.acceleration == 3
        assert set(np.unique(sample.kspace.averages)) <= {0, 1}


def test_the_same_seed_gives_the_same_sample_and_a_shared_mask_is_shared() -> None:
    one, two = (draw_sample(np.random.default_rng(7), disc(), PLAIN) for _ in range(2))
    np.testing.assert_array_equal(one.kspace.samples, two.kspace.samples)
    three, four = (
        draw_sample(np.random.default_rng(seed), disc(), PLAIN, (96, 104), np.random.default_rng(1)) for seed in (8, 9)
    )
    np.testing.assert_array_equal(three.kspace.averages, four.kspace.averages)
    assert np.abs(three.kspace.samples[0, 0] - four.kspace.samples[0, 0]).max() > 1


def test_columns_are_cut_out_of_the_whole_without_change() -> None:
    rng = np.random.default_rng(3)
    image, _ = draw_image(rng, disc(), (96, 96))
    coils = draw_coils(rng, 4, image.shape)
    measured, _, _ = draw_mask(rng, 96, PLAIN, 4)
    whole = acquire(np.random.default_rng(1), image, coils, measured, 0.01)
    part = acquire(np.random.default_rng(1), image, coils, measured, 0.01, 40)
    assert part.kspace.samples.shape[3] == 40
    matches = [
        start
        for start in range(57)
        if np.array_equal(part.kspace.samples, whole.kspace.samples[..., start : start + 40])
    ]
    assert len(matches) == 1
    np.testing.assert_array_equal(part.maps.maps, whole.maps.maps[..., matches[0] : matches[0] + 40])


def test_coils_see_the_object_before_kspace_is_cut() -> None:
    rng = np.random.default_rng(5)
    image, _ = draw_image(rng, disc(), (48, 56))
    coils = draw_coils(rng, 3, image.shape)
    seen = see(image, coils)
    assert seen.shape == (3, 48, 56)
    fine = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(coils * image, axes=(1, 2)), norm="ortho"), axes=(1, 2))
    wanted = to_image(fine[:, 24:72, 28:84], (1, 2)) / 2
    np.testing.assert_allclose(seen, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("n_coils", [1, 2, 8])
def test_masks_stay_in_the_trained_range(n_coils: int) -> None:
    rng = np.random.default_rng(n_coils)
    for _ in range(60):
        measured, acceleration, n_acs = draw_mask(rng, 160, Draw(), n_coils)
        assert 1 <= acceleration <= {1: 3, 2: 5}.get(n_coils, 8)
        assert 12 <= n_acs <= 32
        assert measured[80 - n_acs // 2 : 80 - n_acs // 2 + n_acs].all()
        assert measured.sum() >= n_acs


def test_small_structures_are_as_small_as_they_are_said_to_be() -> None:
    image = np.full((235, 235), 1.0, np.float32)  # 1 mm voxels
    for seed in range(10):
        out, cover = insert_structures(np.random.default_rng(seed), image, 1)
        area = float((cover > 0.5).sum())
        assert np.pi * 1.5**2 * 0.5 < area < np.pi * 5**2 * 1.3
        assert np.abs(out - image)[cover > 0.9].max() > 0.05
        assert not np.abs(out - image)[cover == 0].any()


@pytest.mark.real_data
@pytest.mark.skipif(not DATA.exists(), reason="no real images here")
def test_no_subject_is_in_training_and_held_out() -> None:
    train, held_out = (load_slices(DATA, split, every=20) for split in ("train", "val"))
    assert not {s.subject for s in train} & {s.subject for s in held_out}
    assert {s.source for s in train} == {"brain", "stroke_flair", "tumour_t1c"}


def test_a_folder_without_images_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="brain"):
        load_slices(tmp_path, "train")
