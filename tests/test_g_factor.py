"""The noise of the classical image as worked out, against reconstructing noise again and again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from recon.arrays import Array
from recon.g_factor import noise_map
from recon.prior import SignalPrior, learn_prior
from recon.scan import CoilMaps, KSpace
from recon.sense import cg_sense
from tests.slices import make_slice

N_REPLICAS = 150  # the spread of a standard deviation is 4 %, of their mean over a column far less


def replicas(kspace: KSpace, maps: CoilMaps, prior: SignalPrior, rng: np.random.Generator) -> Array:
    """The standard deviation of reconstructed noise, (y, x): pseudo replicas, Robson et al., MRM 60:895 (2008)."""
    power = np.zeros(maps.maps.shape[2:])
    shape = kspace.samples.shape
    for _ in range(N_REPLICAS):
        noise = (rng.standard_normal((*shape, 2)) @ [1, 1j]) * 0.5**0.5
        noise = noise / np.sqrt(np.maximum(kspace.averages, 1))[:, None, :, None]
        noise = np.where(kspace.measured[:, None, :, None], noise, 0).astype(np.complex64)
        power += np.abs(cg_sense(replace(kspace, samples=noise), maps, prior, 40, 1e-4)[0]) ** 2
    return np.sqrt(power / N_REPLICAS)


@pytest.mark.parametrize(("step", "n_averages"), [(2, 1), (4, 1), (3, 2)])
def test_the_noise_of_the_classical_path_is_that_of_pseudo_replicas(step: int, n_averages: int) -> None:
    rng = np.random.default_rng([step, n_averages])
    start = make_slice(rng, (48, 24), step=step, n_acs=12).start
    prior = learn_prior(start.kspace, start.image)
    columns = np.arange(4, 20, 5)
    few = KSpace(start.kspace.samples[..., columns], start.kspace.averages * np.uint16(n_averages), 1.0, True)
    maps = CoilMaps(start.maps.maps[..., columns])
    prior = SignalPrior(prior.variance[..., columns], prior.spectrum)
    found = noise_map(few, maps, prior, np.arange(len(columns)))
    wanted = replicas(few, maps, prior, rng)
    bright = np.abs(start.image[0][:, columns])
    head = (bright > 0.1 * bright.max()) & (found > 0)
    assert head.sum() > 20
    np.testing.assert_allclose(found[head].mean(), wanted[head].mean(), rtol=0.02)
    assert np.median(np.abs(found[head] / wanted[head] - 1)) < 0.05


def test_without_undersampling_the_noise_is_that_of_the_samples() -> None:
    scan = make_slice(np.random.default_rng(0), (40, 20), step=1)
    kspace, maps = scan.start.kspace, scan.start.maps
    found = noise_map(kspace, maps, learn_prior(kspace, scan.start.image), np.array([10]))
    np.testing.assert_allclose(found[found > 0], 1, rtol=1e-4)
