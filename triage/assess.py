"""From a series to findings in three states, and from several series of one exam to one answer for each finding.

What a state needs:
- *flagged*: the probability is at or above the operating point, and the conformal set holds "present".
- *not flagged*: the probability is below it, and the conformal set is "absent" alone. It has to be earned.
- *not assessed*: everything else, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from recon.arrays import Array
from recon.errors import BackendError
from recon.scan import Geometry, Volume
from triage.card import Calibration, TriageCard
from triage.conformal import conformal_set, held_out
from triage.findings import ABSENT, LABELS, PRESENT, Box, Finding, Findings, Measurement, State
from triage.gate import Gate
from triage.likeness import describe, distance
from triage.measure import OUTLINE, Outline, Ruler, measure_brain, outline, size_measurements
from triage.preprocess import Planes, prepare
from triage.score import plane_scores, probabilities, read_both_ways

CONTRASTS = ("t1", "t1ce", "t2", "flair", "dwi", "adc", "swi")
BATCH = 8  # planes that a network is shown at once

# Which series of an exam answers first: the contrast on which the finding shows best.
BEST_FIRST: Mapping[str, tuple[str, ...]] = {
    "infarct": ("dwi", "flair", "adc", "t2", "t1", "swi", "t1ce"),
    "haemorrhage": ("swi", "flair", "t2", "t1", "dwi", "t1ce", "adc"),
    "mass": ("t1ce", "flair", "t2", "t1", "swi", "dwi", "adc"),
}
MEASURED_FIRST = ("t2", "t1", "t1ce", "flair", "dwi", "swi", "adc")  # by how little midline and ventricles scatter


class MapNetwork(Protocol):
    """A triage network, loaded and ready."""

    backend: str

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return "lesion" (plane, 1, y, x), logits, and "features" (plane, n) for "planes" (plane, 2, y, x)."""


@dataclass(frozen=True)
class TriageModel:
    """A network with its card, and by contrast the held-out cases that it was tried on."""

    card: TriageCard
    network: MapNetwork
    calibrations: Mapping[str, Calibration]

    @property
    def name(self) -> str:
        """What findings call it."""
        return f"{self.card.name} {self.card.version}"


@dataclass(frozen=True)
class Site:
    """What a site decides: the findings it wants, its α, and how much of a head must be seen for a *not flagged*."""

    labels: tuple[str, ...] = LABELS
    alpha: float = 0.1
    min_coverage_mm: float = 0.0


@dataclass(frozen=True)
class Tools:
    """What triage works with. gate: None lets everything through; ruler: None measures nothing but lesions."""

    models: Sequence[TriageModel]
    gate: Gate | None = None
    ruler: Ruler | None = None


@dataclass(frozen=True, eq=False)
class Assessed:
    """What was found in one series. maps: by finding that was flagged, its probabilities float32 (slice, y, x)."""

    contrast: str
    findings: Findings
    maps: Mapping[str, Array] = field(default_factory=dict)


def assess_series(volume: Volume, contrast: str, tools: Tools, site: Site) -> Assessed:
    """Return findings and measurements of one series; a volume that is not measured is refused by its type.

    contrast: one of CONTRASTS, or "" where it is not known.
    """
    if not volume.provenance.is_measured:
        return _refused(contrast, "the images are synthetic: detail was added that was never measured", site)
    if contrast not in CONTRASTS:
        return _refused(contrast, f"the contrast is not known; one of {', '.join(CONTRASTS)} is needed", site)
    if not np.isfinite(volume.data).all():
        return _refused(contrast, "some voxels are not finite numbers", site)
    planes = prepare(volume.data, volume.geometry)
    why, doubt = tools.gate.look(planes, contrast) if tools.gate is not None else (_no_head(planes), "")
    if why:
        return _refused(contrast, why, site)
    measured = {}
    if tools.ruler is not None:
        measured = measure_brain(planes, contrast, tools.ruler, volume.geometry.is_known)
    numbers = describe(planes)[planes.is_usable]
    findings, maps = [], {}
    for label in site.labels:
        finding, found, seen = _look_for(label, planes, numbers, volume, contrast, tools, site)
        if doubt and finding.state is State.NOT_FLAGGED:
            finding = replace(finding, state=State.NOT_ASSESSED, reason=doubt)
        if finding.state is State.FLAGGED and seen is not None:
            maps[label] = seen
            if found is not None:
                sizes = size_measurements(found, label, contrast, tools.ruler, volume.geometry.is_known)
                finding = replace(finding, volume_ml=sizes[f"{label}_volume_ml"].value)
                measured |= sizes
        findings.append(finding)
    return Assessed(contrast, Findings(tuple(findings), measured), maps)


def fuse(series: Sequence[Assessed], labels: tuple[str, ...] = LABELS) -> Findings:
    """Return one answer for each finding of an exam of one or more series.

    The best contrast that could be assessed answers (BEST_FIRST). A flag on another series stands beside it only where
    its conformal set is "present" alone: then it is the answer, so that no clear flag is lost to a silent series. Where
    none could be assessed the best contrast's reason is given, and the others' if it differs.
    Measurements come from the contrast on which they scatter least (MEASURED_FIRST), sizes from the flagging series.
    """
    findings = []
    sizes: dict[str, Measurement] = {}
    for label in labels:
        order = BEST_FIRST.get(label, CONTRASTS)
        ranked = sorted(series, key=lambda each: order.index(each.contrast) if each.contrast in order else len(order))
        chosen = _answer([(each, _of(each, label)) for each in ranked], label)
        findings.append(chosen[1])
        if chosen[0] is not None and chosen[1].state is State.FLAGGED:
            sizes |= {n: m for n, m in chosen[0].findings.measurements.items() if n.startswith(f"{label}_")}
    by_scatter = sorted(series, key=lambda s: MEASURED_FIRST.index(s.contrast) if s.contrast in MEASURED_FIRST else 99)
    measured: dict[str, Measurement] = {}
    for each in by_scatter:
        for name, value in each.findings.measurements.items():
            if not any(name.startswith(f"{label}_") for label in labels) and (
                name not in measured or (measured[name].value is None and value.value is not None)
            ):
                measured[name] = value
    return Findings(tuple(findings), measured | sizes)


def _answer(ranked: list[tuple[Assessed, Finding]], label: str) -> tuple[Assessed | None, Finding]:
    assessed = [pair for pair in ranked if pair[1].state is not State.NOT_ASSESSED]
    if assessed and assessed[0][1].state is State.FLAGGED:
        return assessed[0]
    for pair in assessed[1:]:
        if pair[1].state is State.FLAGGED and pair[1].conformal == (PRESENT,):
            return pair
    if assessed:
        return assessed[0]
    if not ranked:
        return None, Finding(label, State.NOT_ASSESSED, "no series was given")
    reasons = list(dict.fromkeys(f"{each.contrast or 'unknown'}: {finding.reason}" for each, finding in ranked))
    first = ranked[0]
    return first[0], first[1] if len(reasons) == 1 else replace(first[1], reason="; ".join(reasons))


def _of(series: Assessed, label: str) -> Finding:
    return next(
        (each for each in series.findings.findings if each.label == label),
        Finding(label, State.NOT_ASSESSED, "the site does not ask for it"),
    )


def _refused(contrast: str, why: str, site: Site) -> Assessed:
    found = tuple(Finding(label, State.NOT_ASSESSED, why, contrast=contrast) for label in site.labels)
    return Assessed(contrast, Findings(found))


def _no_head(planes: Planes) -> str:
    return "" if planes.is_usable.any() else "no head was found in the images"


def _look_for(
    label: str, planes: Planes, numbers: Array, volume: Volume, contrast: str, tools: Tools, site: Site
) -> tuple[Finding, Outline | None, Array | None]:
    """Return the finding, its outline on the planes and its map on the volume's own voxels.

    numbers: of the usable planes, by `triage.likeness.describe`.
    """
    blank = Finding(label, State.NOT_ASSESSED, contrast=contrast)
    models = [model for model in tools.models if model.card.finding == label]
    if not models:
        return replace(blank, reason=f"no network for {label} is installed"), None, None
    suited = next((model for model in models if contrast in model.card.contrasts), None)
    if suited is None:
        known = ", ".join(sorted({name for model in models for name in model.card.contrasts}))
        return replace(blank, reason=f"no suitable contrast: {label} is looked for on {known}"), None, None
    if planes.plane != suited.card.plane:
        why = f"slices are {planes.plane}; {suited.card.plane} ones are needed"
        return replace(blank, reason=why), None, None
    try:
        logits, features = _run(suited.network, planes)
    except BackendError as error:
        return replace(blank, reason=f"the network failed: {error.code}"), None, None
    level = OUTLINE if tools.ruler is None else tools.ruler.level(label, contrast)
    return _decide(blank, suited, planes, volume, logits, np.concatenate([features, numbers], axis=1), site, level)


def _run(network: MapNetwork, planes: Planes) -> tuple[Array, Array]:
    """Return logits (plane, 1, y, x) and features (plane, n) of the usable planes."""

    def run(inputs: Array) -> tuple[Array, Array]:
        answers = [network.run({"planes": inputs[start : start + BATCH]}) for start in range(0, len(inputs), BATCH)]
        return (
            np.concatenate([each["lesion"] for each in answers]),
            np.concatenate([each["features"] for each in answers]),
        )

    return read_both_ways(run, planes.inputs[planes.is_usable])


def _decide(
    blank: Finding,
    model: TriageModel,
    planes: Planes,
    volume: Volume,
    logits: Array,
    described: Array,
    site: Site,
    level: float,
) -> tuple[Finding, Outline | None, Array | None]:
    contrast = blank.contrast
    card, calibration = model.card.contrasts[contrast], model.calibrations[contrast]
    scores = plane_scores(logits)
    is_exam = len(scores) > 1
    decision = card.exam if is_exam else card.one_slice
    score = float(scores.max())
    probability = decision.probability(score)
    answers = conformal_set(score, held_out(calibration, is_exam), site.alpha)
    finding = replace(
        blank,
        probability=probability,
        conformal=answers,
        alpha=site.alpha,
        evidence=card.evidence,
        model=model.name,
        model_sha256=model.card.sha256,
        operating_point=f"{'exam' if is_exam else 'slice'} p >= {decision.threshold:.4g}",
    )
    away = float(np.median(distance(described, calibration.ood_mean, calibration.ood_precision)))
    reason = ""
    if away > card.ood_limit:
        reason = f"unlike the images that the network knows (distance {away:.2f}, {card.ood_limit:.2f} is the most)"
        return replace(finding, reason=reason, probability=None, conformal=()), None, None
    maps = np.zeros(planes.inputs[:, 0].shape, np.float32)
    maps[planes.is_usable] = probabilities(logits[:, 0])
    if probability >= decision.threshold and PRESENT in answers:
        return _located(replace(finding, state=State.FLAGGED), planes, volume, maps, level)
    if probability >= decision.threshold:
        reason = "above the operating point, and yet not like the cases with the finding"
    elif answers != (ABSENT,):
        reason = {
            (): "like neither the cases with the finding nor those without",
            (PRESENT,): "below the operating point, and yet like the cases with the finding alone",
        }.get(answers, "conformal set ambiguous at the site's α")
    else:
        reason = _too_little(planes, site)
        if not reason:
            return replace(finding, state=State.NOT_FLAGGED), None, None
    return replace(finding, reason=reason), None, None


def _too_little(planes: Planes, site: Site) -> str:
    covered = float(planes.is_usable.sum()) * planes.distance_mm
    if covered >= site.min_coverage_mm:
        return ""
    return f"only {covered:.0f} mm of the head were seen; {site.min_coverage_mm:.0f} mm are needed"


def _located(
    finding: Finding, planes: Planes, volume: Volume, maps: Array, level: float
) -> tuple[Finding, Outline | None, Array]:
    """Enter where the finding is: its box and the slice that shows it best."""
    native = planes.to_voxels(maps)
    found = outline(maps, planes.distance_mm, level)
    sure = native >= min(OUTLINE, float(native.max()))
    key = int(native.reshape(len(native), -1).max(axis=1).argmax())
    if found is not None:
        key = int((np.where(sure, native, 0)).sum(axis=(1, 2)).argmax())
    place = replace(
        finding,
        key_slice=key,
        box_mm=_box(sure, volume.geometry) if found is not None else None,
    )
    return place, found, native


def _box(inside: Array, geometry: Geometry) -> Box:
    """Return the least and the greatest corner (LPS mm) of the voxels (slice, y, x) that are True, their faces."""
    low, high = (f(np.argwhere(inside), axis=0) for f in (np.min, np.max))
    corners = []
    for z in (low[0], high[0]):
        for y in (low[1] - 0.5, high[1] + 0.5):
            for x in (low[2] - 0.5, high[2] + 0.5):
                corners.append(
                    geometry.origin_mm[z]
                    + np.asarray(geometry.row_dir) * x * geometry.spacing_mm[2]
                    + np.asarray(geometry.col_dir) * y * geometry.spacing_mm[1]
                )
    half = np.abs(np.asarray(geometry.normal)) * geometry.thickness_mm / 2
    least, most = np.min(corners, axis=0) - half, np.max(corners, axis=0) + half
    return (_triple(least), _triple(most))


def _triple(values: Array) -> tuple[float, float, float]:
    return float(values[0]), float(values[1]), float(values[2])
