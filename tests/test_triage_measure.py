"""Measurements against what was drawn: midline, ventricles, lesion sizes; and what cannot be measured says why."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from edge.anatomy import load_anatomy
from edge.triage_models import TRIAGE, open_tools
from export.heads import Layout, Swelling, draw, fluid_atlas, lateral_ventricles
from export.measurements import fit_spread
from recon.errors import ModelError
from recon.head import make_head
from tests.fake_triage import head
from triage.brain import brain_masks
from triage.findings import Measurement
from triage.gate import Gate, describe_exam, fit_kind, gate_json, most_of_brain, read_gate
from triage.measure import (
    INDEX,
    SHIFT,
    VOLUME,
    Ruler,
    Spread,
    measure_brain,
    outline,
    read_levels,
    read_spreads,
    size_measurements,
)
from triage.midline import find_midline
from triage.preprocess import Planes, prepare
from triage.ventricles import FluidAtlas, find_ventricles

EXACT = Spread(1.0, 1.0, 0.0, 2.0)


def brain(shift_mm: float, n: int = 9) -> np.ndarray:
    """Planes of an ellipse with ventricles and a dark falx, pushed to the left (larger columns) between its ends."""
    y, x = np.mgrid[:224, :192].astype(float)
    y, x = y - 111.5, x - 95.5
    ease = np.clip((80 - np.abs(y)) / 30, 0, 1)
    moved = x - shift_mm * ease * ease * (3 - 2 * ease) * np.exp(-((x / 45) ** 2))
    image = np.where((y / 85) ** 2 + (x / 65) ** 2 <= 1, 1.0, 0.0)
    image = np.where((np.abs(moved) < 1.2) & (image > 0), 0.4, image)
    for side in (-1, 1):
        image = np.where(((y + 5) / 25) ** 2 + ((moved - 8 * side) / 5) ** 2 <= 1, 0.15, image)
    rng = np.random.default_rng(0)
    image = ndimage.gaussian_filter(image, 0.8)
    return np.array([image + 0.02 * rng.standard_normal(image.shape) for _ in range(n)], np.float32)


@pytest.mark.parametrize("shift_mm", [0.0, 3.0, -6.0, 8.0])
def test_the_midline_is_found_where_it_was_pushed(shift_mm: float) -> None:
    images = brain(shift_mm)
    found = find_midline(images, brain_masks(images), 5.0)
    assert found is not None
    assert found.shift_mm == pytest.approx(shift_mm, abs=1.0)


def test_no_midline_without_a_brain() -> None:
    images = np.zeros((5, 224, 192), np.float32)
    assert find_midline(images, images > 0, 5.0) is None


@pytest.fixture(scope="module")
def atlas() -> FluidAtlas:
    return fluid_atlas(load_anatomy())


def test_ventricles_of_a_simulated_head(atlas: FluidAtlas) -> None:
    anatomy = load_anatomy()
    layout = Layout(16, 7.0, 5.0, 2.0, tilt_deg=8, matrix=(120, 104))
    drawn = draw(make_head(anatomy, 5), lateral_ventricles(anatomy), layout, None, Swelling(0.2), ("flair",))
    planes = prepare(drawn.images["flair"], drawn.geometry)
    images = planes.inputs[:, 0]
    found = find_ventricles(images, brain_masks(images), planes.distance_mm, "flair", atlas)
    assert not isinstance(found, str)
    assert found.volume_ml == pytest.approx(drawn.volume_ml, rel=0.2)
    assert found.index == pytest.approx(drawn.index, abs=0.06)
    assert abs(drawn.shift_mm) < 4


def planes_of(n: int, orientation: str = "axial") -> Planes:
    planes = prepare(head(n).data, head(n).geometry)
    return replace(planes, plane=orientation)


def test_what_cannot_be_measured_says_why(atlas: FluidAtlas) -> None:
    ruler = Ruler(atlas, {SHIFT: {"flair": EXACT}, VOLUME: {"flair": EXACT}, INDEX: {"flair": EXACT}})
    few = measure_brain(planes_of(2), "flair", ruler, True)
    assert {each.value for each in few.values()} == {None}
    assert "2 slices" in few[SHIFT].reason
    assert "coronal" in measure_brain(planes_of(9, "coronal"), "flair", ruler, True)[VOLUME].reason
    assert "orientation" in measure_brain(planes_of(9), "flair", ruler, False)[INDEX].reason
    other = measure_brain(planes_of(9), "swi", ruler, True)
    assert "fluid does not stand out" in other[VOLUME].reason
    assert "not validated" in other[SHIFT].reason


def test_a_ball_has_its_volume_and_diameter() -> None:
    z, y, x = np.mgrid[:9, :224, :192]
    radius = 14.0
    away = np.sqrt(((z - 4) * 4.0) ** 2 + (y - 100.0) ** 2 + (x - 130.0) ** 2)
    maps = np.clip(radius + 0.5 - away, 0, 1).astype(np.float32)
    found = outline(maps, 4.0)
    assert found is not None
    assert found.volume_ml == pytest.approx(4 / 3 * np.pi * radius**3 / 1000, rel=0.05)
    assert found.diameter_mm == pytest.approx(2 * radius, abs=1.5)
    assert (found.side, found.key_plane) == ("left", 4)
    assert outline(np.zeros((2, 5, 5), np.float32), 4.0) is None


def test_sizes_have_intervals_where_their_scatter_is_known(atlas: FluidAtlas) -> None:
    found = outline(np.ones((3, 40, 40), np.float32) * np.tri(40, dtype=np.float32), 5.0)
    assert found is not None
    known = size_measurements(found, "mass", "t2", Ruler(atlas, {"mass_volume_ml": {"t2": EXACT}}), True)
    assert known["mass_volume_ml"].interval is not None
    assert known["mass_diameter_mm"].interval is None
    assert size_measurements(found, "mass", "t2", None, False)["mass_volume_ml"].side == ""


def test_faint_voxels_count_where_they_touch_what_is_sure() -> None:
    maps = np.zeros((2, 60, 60), np.float32)
    maps[:, 10:30, 10:30] = 0.15
    maps[0, 15:25, 15:25] = 0.9
    maps[:, 40:50, 40:50] = 0.15  # nowhere sure
    sure, wider = outline(maps, 4.0), outline(maps, 4.0, 0.1)
    assert sure is not None
    assert wider is not None
    assert (sure.volume_ml, sure.extent_mm) == (pytest.approx(0.4), 4.0)
    assert (wider.volume_ml, wider.extent_mm) == (pytest.approx(3.2), 8.0)
    assert wider.diameter_mm > sure.diameter_mm
    faint = outline(np.minimum(maps, 0.15), 4.0, 0.1)  # nothing is sure: what holds the peak counts
    assert faint is not None
    assert faint.volume_ml == pytest.approx(4.0)
    assert outline(np.minimum(maps, 0.15), 4.0) is None


def test_slices_that_err_together_widen_a_volumes_interval() -> None:
    spread = Spread(1.0, 0.0, 0.1, 2.0, floor_mm2=100.0)
    one, four = (spread.measurement(n * 2.0, 0.0, n * 5.0) for n in (1, 4))
    assert one.interval == pytest.approx((2.0 - 1.4, 2.0 + 1.4))
    assert four.interval == pytest.approx((8.0 - 4 * 1.4, 8.0 + 4 * 1.4))


def test_levels_are_read_and_out_of_range_refused(atlas: FluidAtlas) -> None:
    levels = read_levels({"levels": {"mass": {"t1ce": 0.05}}})
    ruler = Ruler(atlas, {}, levels)
    assert (ruler.level("mass", "t1ce"), ruler.level("mass", "t1"), ruler.level("infarct", "flair")) == (0.05, 0.5, 0.5)
    assert read_levels({}) == {}
    for wrong in (0, 0.6, "x"):
        with pytest.raises(ModelError, match=r"measurement\.json"):
            read_levels({"levels": {"mass": {"t1ce": wrong}}})


def test_a_spread_is_unbiased_and_holds_its_share() -> None:
    rng = np.random.default_rng(1)
    truth = rng.uniform(0, 30, 400)
    found = truth / 1.2 + rng.normal(0, 0.5, 400)
    spread = fit_spread(truth[:200], found[:200], 0.5)
    assert spread.scale == pytest.approx(1.2, rel=0.03)
    made: list[Measurement] = [spread.measurement(each) for each in found[200:]]
    held = [m.interval[0] <= t <= m.interval[1] for m, t in zip(made, truth[200:], strict=True) if m.interval]
    assert 0.9 <= np.mean(held) <= 1.0


def test_spreads_and_gate_are_read_back() -> None:
    content = {"spreads": {SHIFT: {"t1": {"scale": 1, "floor": 0.5, "slope": 0, "factor": 2}}}}
    assert read_spreads(content)[SHIFT]["t1"] == Spread(1, 0.5, 0, 2)
    shown = most_of_brain(prepare(head().data, head().geometry).inputs[:, 0])
    assert shown is not None
    numbers = describe_exam(*shown)
    rng = np.random.default_rng(0)
    near = fit_kind(numbers + 0.05 * rng.standard_normal((60, len(numbers))))
    far = fit_kind(numbers + 3 + 0.05 * rng.standard_normal((60, len(numbers))))
    gate = read_gate(gate_json(Gate({"flair": (near,), "t2": (far,)}, 1.0, 3.0)))
    planes = prepare(head().data, head().geometry)
    assert gate.look(planes, "flair") == ("", "")
    doubt = "labelled flair, and looks nearly as much like t2"
    beside = Gate({"flair": (near,), "t2": (near,)}, 1.0, 3.0)
    assert beside.look(planes, "flair") == ("", doubt)
    lead, rival = gate.lead("flair", numbers)
    assert rival == "t2"
    for more, said in ((-0.1, ""), (0.1, doubt)):
        asked = read_gate(gate_json(Gate(gate.kinds, 1.0, 3.0, sure={"flair": lead + more})))
        assert asked.look(planes, "flair") == ("", said)
    assert "unlike t2" in gate.refusal(planes, "t2")
    assert "cannot be checked" in gate.refusal(planes, "dwi")


def test_what_ships_can_be_read() -> None:
    tools, _ = open_tools()
    if not (TRIAGE / "gate.json").is_file():
        pytest.skip("the gate is not fitted yet")
    assert tools.gate is not None
    assert {"t1", "t2", "flair"} <= set(tools.gate.kinds)
