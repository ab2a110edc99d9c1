"""The fake of CuPy refuses what CuPy refuses, and leaves nothing behind."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from recon.arrays import array_module
from tests import fake_cupy


@pytest.fixture
def xp() -> Iterator[Any]:
    with fake_cupy.installed() as cupy:
        yield cupy


HOST = np.arange(4.0)


@pytest.mark.parametrize(
    "mix",
    [
        lambda xp, a: a + HOST,
        lambda xp, a: HOST * a,
        lambda xp, a: a @ HOST,
        lambda xp, a: HOST @ a,
        lambda xp, a: a < HOST,
        lambda xp, a: a.__iadd__(HOST),
        lambda xp, a: HOST.__iadd__(a),
        lambda xp, a: xp.where(HOST > 1, a, 0),
        lambda xp, a: xp.concatenate([a, HOST]),
        lambda xp, a: xp.einsum("i,i->", a, HOST),
        lambda xp, a: xp.sqrt(HOST),
        lambda xp, a: xp.maximum(a, HOST),
        lambda xp, a: a.__setitem__(slice(None), HOST),
        lambda xp, a: a[np.array([0, 1])],
        lambda xp, a: a[HOST > 1],
        lambda xp, a: a[[0, 1]],
        lambda xp, a: np.asarray(a),
        lambda xp, a: np.array(a, np.float32),
        lambda xp, a: HOST.__setitem__(slice(None), a),
        lambda xp, a: np.concatenate([a, a]),
        lambda xp, a: np.linalg.norm(a),
        lambda xp, a: np.maximum.reduce(a),
        lambda xp, a: ndimage.gaussian_filter(a, 1),
        lambda xp, a: a.sum(initial=3),
        lambda xp, a: xp.block([[a, a]]),
        lambda xp, a: xp.linalg.eig(xp.eye(2)),
        lambda xp, a: xp.vectorize(abs)(a),
        lambda xp, a: a.itemset(0, 1),
    ],
)
def test_what_cupy_refuses_is_refused(xp: Any, mix: Callable[[Any, Any], Any]) -> None:
    with pytest.raises((TypeError, IndexError, AttributeError)):
        mix(xp, xp.asarray(HOST))


def test_results_stay_on_the_device(xp: Any) -> None:
    array = xp.asarray(HOST)
    found = [
        array + 1,
        2 * array,
        np.float32(2) * array,
        array.sum(),
        array[0],
        abs(array),
        xp.vdot(array, array),
        -array,
    ]
    found += [array > 1, array.real, xp.linalg.eigh(xp.eye(2))[1], array[array > 1], array[xp.asarray([0, 2])], array.T]
    assert all(isinstance(each, xp.ndarray) for each in found)
    assert float(found[3]) == 6
    assert xp.asnumpy(array) is not HOST
    assert array_module(array) is xp
    assert xp.get_array_module(HOST, array) is xp
    assert array.data.ptr != HOST.__array_interface__["data"][0]


def test_views_share_memory_and_what_comes_from_the_host_does_not(xp: Any) -> None:
    host = HOST.copy()
    array = xp.asarray(host)
    array[1:] += 1
    array.reshape(2, 2)[0, 0] = 9
    np.testing.assert_array_equal(array.get(), [9, 2, 3, 4])
    np.testing.assert_array_equal(host, HOST)
    assert xp.asarray(array) is array


def test_it_is_gone_afterwards() -> None:
    before = sys.modules.get("cupy")
    with fake_cupy.installed() as cupy:
        assert sys.modules["cupy"] is cupy
    assert sys.modules.get("cupy") is before
