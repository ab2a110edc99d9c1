"""The measures of a slice: each rises with its own fault, and what cannot be measured is left out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.ours import shipped_network
from recon.arrays import Array
from recon.consistency import SliceMeasures, measure_slice, snr_map
from recon.fourier import to_image, to_kspace
from recon.ghost import ghost_ratio
from recon.held_out import lines_to_hide
from recon.network import Network
from recon.novelty import FEATURES, features, novelty
from recon.scan import CoilMaps, KSpace
from recon.unrolled import reconstruct_unrolled
from tests.fake_network import FakeNetwork
from tests.slices import Made, make_slice

ALWAYS = {"coverage", "noise", "noise_known", "noise_level"}
QUICK = {*ALWAYS, "chi2", "misfit", "map_residual", *(f"feature_{i}" for i in range(len(FEATURES)))}
WITH_NETWORK = {"invented", "disagreement"}
THOROUGH = {"g_mean", "g_max", "snr", "inconsistency", "held_out", "held_out_chi2", "hidden"}


def make(seed: int, **settings: object) -> Made:
    return make_slice(np.random.default_rng(seed), **settings)  # type: ignore[arg-type]


def measure(made: Made, network: Network | None = None, thorough: bool = True) -> SliceMeasures:
    image = None
    if network is not None:
        image = reconstruct_unrolled(network, made.start.kspace, made.start.maps, made.start.image)
    return measure_slice(made.start, made.order, network, image, thorough=thorough)


def test_what_can_be_measured_is_there_and_finite() -> None:
    made = make(0)
    assert QUICK <= set(measure(made, thorough=False).values) <= {*QUICK, "ghost"}
    assert set(measure(made).values) >= QUICK | THOROUGH
    found = measure(made, FakeNetwork())
    assert set(found.values) >= QUICK | WITH_NETWORK | THOROUGH
    assert np.isfinite(list(found.values.values())).all()
    assert found.onset is None
    assert found.invented is not None
    assert found.invented.dtype == np.float32
    assert found.invented.shape == made.start.image.shape[1:]
    assert (
        measure(make(0, n_coils=1, step=1))
        .values.keys()
        .isdisjoint({"chi2", "misfit", "map_residual", "inconsistency"})
    )


def test_a_good_scan_measures_as_one() -> None:
    values = measure(make(1)).values
    assert values["chi2"] == pytest.approx(1, abs=0.15)
    assert values["map_residual"] < 0.01
    assert values["coverage"] == pytest.approx(0.44, abs=0.1)
    assert values["noise"] == pytest.approx(0.01, rel=0.2)
    assert values["noise_known"] == 1
    assert values["inconsistency"] < 0.01


def test_the_held_out_lines_tell_the_error() -> None:
    told, true = [], []
    for seed, (step, sigma) in enumerate([(1, 0.01), (2, 0.01), (4, 0.01), (4, 0.06), (6, 0.02)]):
        made = make(seed, step=step, sigma=sigma)
        told.append(measure(made).values["held_out"])
        inside = made.truth > 0.1 * made.truth.max()
        error = (np.abs(made.start.image[0]) - made.truth)[inside]
        true.append(float(np.linalg.norm(error) / np.linalg.norm(made.truth[inside])))
    assert (np.argsort(told) == np.argsort(true)).mean() >= 0.6
    assert 0.3 < np.median(np.array(told) / true) < 3


def test_maps_of_another_scan_explain_little() -> None:
    values = measure(make(2, other_maps=True)).values
    assert values["map_residual"] > 0.1
    assert values["chi2"] > 5


def test_lines_that_nothing_explains_raise_chi_squared() -> None:
    made = make(3)
    samples = made.start.kspace.samples.copy()
    line = np.flatnonzero(made.start.kspace.measured[0])[2]
    samples[:, :, line] += 30 * np.random.default_rng(0).standard_normal(samples[:, :, line].shape)
    spoiled = made._replace(start=replace(made.start, kspace=replace(made.start.kspace, samples=samples)))
    assert measure(spoiled).values["chi2"] > 3 * measure(made).values["chi2"]


def test_what_a_network_adds_is_invented() -> None:
    made = make(4)

    def dream(inputs: dict[str, Array]) -> Array:
        image: Array = inputs["classical"].copy()
        image[:, 0, 40:56, 30:42] += np.random.default_rng(0).standard_normal((16, 12))
        return image

    plain, dreamt = (measure(made, FakeNetwork(answer), thorough=False) for answer in (None, dream))
    assert plain.values["invented"] < 0.02
    assert dreamt.values["invented"] > 3 * plain.values["invented"]
    assert dreamt.values["disagreement"] > 0.02
    assert dreamt.invented is not None
    assert dreamt.invented[42:54, 32:40].mean() > 3 * dreamt.invented[:24].mean()


def test_the_shipped_network_is_judged() -> None:
    network = shipped_network()
    if network is None:
        pytest.skip("no trained network in this checkout")
    values = measure(make(12, shape=(128, 96), n_acs=24, n_coils=8), network).values
    network.close()
    assert set(values) >= QUICK | WITH_NETWORK | THOROUGH
    assert 0.001 < values["held_out"] < 0.3
    assert 0 < values["invented"] < 0.5


def test_hidden_lines_never_reach_the_network() -> None:
    made = make(5)
    network = FakeNetwork()
    measure(made, network)
    hidden = lines_to_hide(made.start.kspace)
    assert len(hidden) >= 3
    assert not (np.abs(hidden - 48) < 8).any()
    share = made.start.kspace.measured[0].mean() - len(hidden) / made.start.kspace.measured.shape[1]
    assert float(network.seen[-1]["measured"].ravel()[0]) == pytest.approx(share)


def test_a_half_field_ghost_is_measured() -> None:
    made = make(6, shape=(96, 72), step=1, n_acs=32)
    calibration = made.start.kspace.calibration
    assert calibration is not None
    small = KSpace(made.start.kspace.samples, made.start.kspace.averages, 1.0, True, _narrow(calibration))
    clean = ghost_ratio(small)
    assert clean is not None
    assert clean < 0.03
    assert small.calibration is not None
    uneven = small.calibration.copy()
    uneven[:, :, ::2] *= np.exp(0.4j)
    ghosted = ghost_ratio(replace(small, calibration=uneven))
    assert ghosted is not None
    assert ghosted == pytest.approx(np.tan(0.2), rel=0.4)


def _narrow(calibration: Array) -> Array:
    """Calibration lines of a head half as wide: only its middle is kept."""
    image = to_image(calibration, (2,))
    n = image.shape[2]
    window = np.abs(np.arange(n) - n // 2) < n // 5
    return to_kspace(image * window[:, None], (2,)).astype(np.complex64)


def test_snr_is_in_units_of_the_noise() -> None:
    made = make(7, step=1, sigma=0.02)
    found = snr_map(made.start)
    inside = made.truth > 0.2 * made.truth.max()
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.median(found[inside] / made.truth[inside]), 1, rtol=0.05)


def test_noise_alone_breaks_nothing() -> None:
    made = make(8)
    rng = np.random.default_rng(8)
    shape = made.start.kspace.samples.shape
    noise = (rng.standard_normal((*shape, 2)) @ [1, 1j] * 0.5**0.5).astype(np.complex64)
    samples = np.where(made.start.kspace.measured[:, None, :, None], noise, 0)
    centre = shape[2] // 2
    kspace = replace(made.start.kspace, samples=samples, calibration=samples[:, :, centre - 8 : centre + 8])
    nothing = replace(made.start, kspace=kspace, image=(made.start.maps.maps.conj() * noise).sum(1))
    assert np.isfinite(list(measure_slice(nothing, made.order, None, None, thorough=True).values.values())).all()


def test_a_scan_in_three_dimensions_gives_what_is_cheap() -> None:
    made = make(9)
    kspace = replace(made.start.kspace, slice_encoded=True)
    found = measure_slice(replace(made.start, kspace=kspace), None, None, None, thorough=True)
    assert set(found.values) == ALWAYS


def test_novelty_is_the_distance_from_the_familiar() -> None:
    familiar = np.stack([features(make(seed).start) for seed in range(12)])
    assert familiar.shape == (12, len(FEATURES))
    mean = familiar.mean(0)
    precision = np.linalg.inv(np.cov(familiar.T) + 1e-3 * np.eye(len(FEATURES)))
    usual = novelty(familiar[0], mean, precision)
    made = make(50)
    noise = np.random.default_rng(0).standard_normal((*made.start.image.shape, 2)) @ [1, 1j]
    strange = features(replace(made.start, image=noise.astype(np.complex64), maps=CoilMaps(made.start.maps.maps)))
    assert usual < 2
    assert novelty(strange, mean, precision) > 5 * usual
