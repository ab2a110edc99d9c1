"""Cases through the whole of triage: patients, volumes without an urgent finding, foreign input, simulated scans."""

from __future__ import annotations

import csv
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.diagnostic import proportion
from benchmarks.foreign import foreign, spoiled, spoiled_otherwise
from benchmarks.triage_scans import ACCELERATIONS, N_HEADS, SNRS, scan_heads
from edge.contrast_name import contrast_of_words
from edge.nifti import read_nifti
from export.measurements import CONTRASTS, cases_of
from export.slices import TUMOUR_FIELD_MM, tumour_splits
from recon.arrays import Array
from recon.scan import Geometry, Provenance, Volume
from triage.assess import Assessed, Site, Tools, assess_series
from triage.findings import State

LEAST_MM2 = 100  # a stroke slice counts as positive from here on, and as negative only without any lesion
TEST_SEEDS = 1000  # of heads that no fit has seen
AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))


@dataclass
class Runs:
    """The benchmark's parts that assess images.

    limit: cases of a kind at most. accelerations, snrs: of scans. cases, scanned: heads measured and scans made so far.
    """

    tools: Tools
    data: Path
    limit: int | None
    is_quick: bool
    cases: Path | None
    accelerations: tuple[int, ...] = ACCELERATIONS
    snrs: tuple[float, ...] = SNRS
    scanned: Path | None = None

    def patients(self) -> dict[str, Any]:
        """Return states of held-out stroke slices and tumour slices, single slices through the whole of triage."""
        site = Site()
        out: dict[str, Any] = {}
        for name, label, contrast, source in (
            ("stroke patients, FLAIR", "infarct", "flair", self._stroke()),
            ("tumour patients, T1w after contrast", "mass", "t1ce", self._tumours()),
        ):
            states: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
            reasons: Counter[str] = Counter()
            dice, hit = [], []
            for volume, mask, positive in source:
                assessed = assess_series(volume, contrast, self.tools, site)
                finding = next(each for each in assessed.findings.findings if each.label == label)
                states[positive][finding.state.value] += 1
                if finding.state is State.NOT_ASSESSED:
                    reasons[finding.reason.split(" (")[0]] += 1
                if positive and label in assessed.maps:
                    seen = assessed.maps[label][0]
                    hit.append(bool(mask.flat[int(seen.argmax())]))
                    dice.append(
                        2 * float((mask & (seen >= 0.5)).sum()) / max(float(mask.sum() + (seen >= 0.5).sum()), 1)
                    )
            n = {key: sum(of.values()) for key, of in states.items()}
            out[name] = {
                "states": {"with": dict(states[True]), "without": dict(states[False])},
                "sensitivity": proportion(states[True]["flagged"], n[True]),
                "specificity": proportion(states[False]["not flagged"], n[False]),
                "specificity_not_flagged_or_not_assessed": proportion(n[False] - states[False]["flagged"], n[False]),
                "not_assessed": dict(reasons.most_common(6)),
                "peak_inside": proportion(sum(hit), len(hit)),
                "median_dice": float(np.median(dice)) if dice else None,
            }
        return out

    def false_alarms(self) -> dict[str, Any]:
        """Return flags on volumes without an urgent finding: subjects with multiple sclerosis, and normal anatomy."""
        found: dict[str, Any] = {}
        for group, names in (("multiple sclerosis", ("msLong",)), ("normal anatomy", NORMAL)):
            rows: list[dict[str, Any]] = []
            for row, volume in self._brains(names):
                assessed = assess_series(volume, row["triage"], self.tools, Site(min_coverage_mm=60.0))
                rows.append({
                    "file": row["file"], "split": row["split"], "contrast": row["triage"],
                    "states": {each.label: each.state.value for each in assessed.findings.findings},
                    "why": sorted({each.reason.split(" (")[0] for each in assessed.findings.findings if each.reason}),
                })  # fmt: skip
            flagged = [row for row in rows if "flagged" in row["states"].values()]
            seen = [row for row in rows if set(row["states"].values()) & {"flagged", "not flagged"}]
            found[group] = {
                "volumes": len(rows),
                "assessed": len(seen),
                "flagged": proportion(len(flagged), len(seen)),
                "flagged_validation_subjects": proportion(
                    sum(row["split"] == "val" for row in flagged), sum(row["split"] == "val" for row in seen)
                ),
                "rows": rows,
            }
        return found

    def foreign(self) -> dict[str, Any]:
        """Return what is said of foreign and spoiled input, under every label that a network knows."""
        contrasts = sorted({name for model in self.tools.models for name in model.card.contrasts}) or ["flair"]
        by_kind: dict[str, Counter[str]] = defaultdict(Counter)
        rng = np.random.default_rng(5)
        for name, volume in foreign(rng):
            for contrast in contrasts[: 1 if self.is_quick else None]:
                by_kind[name].update(_states(assess_series(volume, contrast, self.tools, Site())))
        for row, head in self._spoilable():
            for name, volume in (*spoiled(head, rng), *spoiled_otherwise(head, rng)):
                by_kind[name].update(_states(assess_series(volume, row["triage"], self.tools, Site())))
        return _foreign_summary(by_kind)

    def labels(self) -> dict[str, Any]:
        """Return what is said of real volumes under every wrong label; T1w before and after contrast stand apart."""
        by_pair: dict[str, Counter[str]] = defaultdict(Counter)
        for row, volume in self._brains(("",)):
            for contrast in ("t1", "t1ce", "t2", "flair", "dwi", "swi"):
                if contrast != row["triage"]:
                    name = f"{row['triage']} called {contrast}"
                    by_pair[name].update(_states(assess_series(volume, contrast, self.tools, Site())))
        alike = ("t1 called t1ce", "t1ce called t1")
        return {
            "others": _foreign_summary({k: v for k, v in by_pair.items() if k not in alike}),
            "t1_and_t1ce": _foreign_summary({k: v for k, v in by_pair.items() if k in alike}),
        }

    def scans(self) -> dict[str, Any]:
        """Return findings of simulated scans through reconstruction, by R and SNR, and how often R turns them round."""
        n = 1 if self.is_quick else self.limit or N_HEADS
        if self.is_quick:
            return scan_heads(n, self.accelerations[:2], self.snrs[:1], True, None)
        return scan_heads(n, self.accelerations, self.snrs, False, self.scanned)

    def measurements(self) -> dict[str, Any]:
        """Return errors and coverage of intervals on heads that no fit has seen, by measurement and contrast."""
        if self.tools.ruler is None:
            return {}
        n = 1 if self.is_quick else self.limit or 40
        cases = cases_of([TEST_SEEDS + k for k in range(n)], self.cases)
        found: dict[str, Any] = {"evidence": "simulated", "heads": n}
        for name, of in self.tools.ruler.spreads.items():
            for contrast, spread in of.items():
                some = [c for c in cases if (c.name, c.contrast) == (name, contrast) and np.isfinite(c.found)]
                if not some or contrast not in CONTRASTS.values():
                    continue
                made = [(spread.measurement(c.found, least=0.0), c.truth) for c in some]
                errors = np.array([m.value - truth for m, truth in made if m.value is not None])
                held = [m.interval[0] <= truth <= m.interval[1] for m, truth in made if m.interval is not None]
                truth = np.array([c.truth for c in some])
                found[f"{name} on {contrast}"] = {
                    "cases": len(some), "mean_absolute_error": float(np.abs(errors).mean()),
                    "bias": float(errors.mean()), "relative_bias": float(errors.sum() / truth.sum()),
                    "largest_truth": float(truth.max()), "coverage": proportion(int(sum(held)), len(held)),
                }  # fmt: skip
        return found

    def cost(self) -> dict[str, Any]:
        """Return seconds that triage of an exam of 20 slices takes, measurements included."""
        volume = next((v for _, v in self._spoilable()), None) or next(v for _, v in foreign(np.random.default_rng(0)))
        n, given = len(volume.data), volume.geometry
        step = max(1, n // 20)
        k = (max(n - 20 * step, 0) // 2 + step * np.arange(20)) % n
        spacing = (step * given.spacing_mm[0], *given.spacing_mm[1:])
        geometry = replace(given, origin_mm=given.origin_mm[0] + np.arange(20)[:, None] * spacing[0] * given.normal,
                           spacing_mm=spacing)  # fmt: skip
        exam = Volume(volume.data[k], geometry, volume.provenance)
        times = []
        for _ in range(1 if self.is_quick else 5):
            wall, used = time.monotonic(), time.process_time()
            assessed = assess_series(exam, "flair", self.tools, Site())
            times.append((time.monotonic() - wall, time.process_time() - used))
        return {
            "slices": 20,
            "networks": len(self.tools.models),
            "states": dict(_states(assessed)),
            "why": sorted({each.reason for each in assessed.findings.findings if each.reason}),
            "wall_s": [w for w, _ in times],
            "cpu_s": [c for _, c in times],
        }

    def _stroke(self) -> Iterator[tuple[Volume, Array, bool]]:
        folder = self.data / "stroke_flair"
        if not folder.is_dir():
            return
        rows = [row for row in _rows(folder) if row["suggested_split"] == "val"]
        with np.load(folder / "axial.npz") as content:
            images, packed = content["image"], content["lesion"]
        masks = np.unpackbits(packed, axis=-1)[..., : images.shape[2]].astype(bool)
        for row in self._some(rows):
            image, mask = images[int(row["row"])], masks[int(row["row"])]
            if LEAST_MM2 > mask.sum() > 0:
                continue
            yield _slice(image, (1.0, 1.0)), mask, bool(mask.any())

    def _tumours(self) -> Iterator[tuple[Volume, Array, bool]]:
        folder = self.data / "tumour_t1c"
        if not folder.is_dir():
            return
        rows = _rows(folder)
        pairs = zip(rows, tumour_splits(rows), strict=True)
        for row in self._some([row for row, split in pairs if split == "val"]):
            image = np.asarray(Image.open(folder / row["file"]).convert("L"), np.float32)
            mask = np.asarray(Image.open(folder / row["mask_file"]).convert("L")) > 127
            step = TUMOUR_FIELD_MM / image.shape[0]
            yield _slice(image, (step, step)), mask, True

    def _brains(self, names: tuple[str, ...]) -> Iterator[tuple[dict[str, str], Volume]]:
        folder = self.data / "brain"
        if not folder.is_dir():
            return
        rows = [row for row in _rows(folder) if row["subject"].startswith(names)]
        for row in self._some([row for row in rows if row["split"] != "template"]):
            contrast = contrast_of_words(row["contrast"])
            yield {**row, "triage": contrast}, read_nifti(folder / row["file"])

    def _spoilable(self) -> Iterator[tuple[dict[str, str], Volume]]:
        wanted = [("msLong04_FLAIR",), ("dep13",), ("msLong04_T2w",), ("tcgaFG6692_T1w-Gd",)]
        for names in wanted[: 1 if self.is_quick else None]:
            for row, volume in self._brains((names[0].split("_")[0],)):
                if row["file"].startswith(names[0]):
                    yield row, volume

    def _some(self, rows: list[dict[str, str]]) -> list[dict[str, str]]:
        if self.limit is None or len(rows) <= self.limit:
            return rows
        return [rows[int(k)] for k in np.linspace(0, len(rows) - 1, self.limit).round()]


NORMAL = ("sagAnon", "studyforrest02", "uihA", "prisma51M", "ch2colin", "niimathT1", "dep", "synthsrFL", "mrGd")


def _rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "index.csv").read_text("utf-8").splitlines()))


def _slice(image: Array, step_mm: tuple[float, float]) -> Volume:
    geometry = Geometry.from_centres(np.zeros((1, 3)), *AXIAL, image.shape, (5.0, *step_mm), 5.0)
    return Volume(image[None].astype(np.float32), geometry, Provenance("unknown", "benchmark"))


def _states(assessed: Assessed) -> Counter[str]:
    return Counter(each.state.value for each in assessed.findings.findings)


def _foreign_summary(by_kind: dict[str, Counter[str]]) -> dict[str, Any]:
    total: Counter[str] = Counter()
    for of in by_kind.values():
        total.update(of)
    n = sum(total.values())
    names = [state.value for state in State]
    return {
        "not_assessed": proportion(total["not assessed"], n),
        "not_flagged": total["not flagged"],
        "flagged": total["flagged"],
        "by_kind": {
            kind: {name: of[name] / max(sum(of.values()), 1) for name in names} for kind, of in by_kind.items()
        },
    }
