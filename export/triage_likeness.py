"""What a network's inputs look like, so that run time can tell when it is asked about something else."""

from __future__ import annotations

from typing import Any

import numpy as np

from export.triage_augment import look
from export.triage_images import Plane
from export.triage_lesions import blob
from export.triage_onnx import run_triage
from export.triage_pool import is_training
from export.triage_validation import HEAD_CONTRASTS, made_of
from recon.arrays import Array
from recon.scan import Geometry
from triage.likeness import describe_images, distance
from triage.preprocess import SIZE, prepare

N_PLANES = 500
SHRINK = 0.05
HELD_OUT_KEPT = 0.99  # of held-out planes lie within the limit


def fit_likeness(
    session: Any,
    name: str,
    contrast: str,
    planes: list[Plane],
    held_out: Array,
    held_out_features: Array,
    arrays: dict[str, Array],
) -> dict[str, Any]:
    """Return the limit of likeness and what of foreign planes it keeps out; statistics go into `arrays`."""
    rng = np.random.default_rng(11)
    images = training_images(rng, contrast, planes)
    features = together(run_triage(session, images)[1], images)
    mean = features.mean(0)
    covariance = np.cov(features.T)
    covariance += SHRINK * np.diag(np.diag(covariance)) + 1e-6 * np.eye(len(mean))
    precision = np.linalg.inv(covariance)
    arrays[f"{contrast}.ood_mean"] = mean.astype(np.float32)
    arrays[f"{contrast}.ood_precision"] = precision.astype(np.float32)
    own = distance(together(held_out_features, held_out), mean, precision)
    limit = float(np.quantile(own, HELD_OUT_KEPT))
    shares = {}
    for kind, strange in foreign(rng, contrast, planes).items():
        found = distance(together(run_triage(session, strange)[1], strange), mean, precision)
        shares[kind] = round(float((found > limit).mean()), 3)
    return {
        "ood_limit": round(limit, 4),
        "ood": {"training_planes": len(images), "held_out_beyond": round(float((own > limit).mean()), 4),
                "foreign_beyond": shares},
    }  # fmt: skip


def together(features: Array, images: Array) -> Array:
    """Return a network's features and the images' statistics side by side, float64 (plane, number)."""
    return np.concatenate((features.astype(np.float64), describe_images(images)), 1)


def training_images(rng: np.random.Generator, contrast: str, planes: list[Plane]) -> Array:
    """Return training planes of a contrast, as they are or as the recipe makes them, float32 (n, y, x)."""
    own = [each for each in planes if is_training(each, "") and _is_of(each, contrast)]
    chosen = [own[i] for i in rng.choice(len(own), min(N_PLANES, len(own)), replace=False)]
    images = []
    for each in chosen:
        image = made_of(rng, contrast, each.label.contrast, each.image.astype(np.float32))
        images.append(look(rng, image) if contrast in ("swi", "dwi") else image)
    return np.stack(images)


def _is_of(plane: Plane, contrast: str) -> bool:
    label = plane.label
    if label.source == "heads":
        return label.contrast == HEAD_CONTRASTS.get(contrast)
    if contrast in ("swi", "dwi"):
        return label.source == "brain" and label.contrast in ("t1", "t2", "flair")
    return label.source in ("brain", "stroke_flair", "tumour_t1c") and label.contrast == contrast


def foreign(rng: np.random.Generator, contrast: str, planes: list[Plane]) -> dict[str, Array]:
    """Return planes that are not what the network was made for, float32 (n, y, x), by what they are."""
    found = {"noise": np.stack([np.abs(rng.normal(0, 1, SIZE)).astype(np.float32) for _ in range(20)])}
    found["phantom"] = np.concatenate([_phantom(rng) for _ in range(20)])
    for other in ("t1", "t2", "flair"):
        members = [each for each in planes if each.label.source == "brain" and each.label.contrast == other]
        if other == contrast or (other == "t1" and contrast == "t1ce") or not members:
            continue
        chosen = [members[i] for i in rng.choice(len(members), min(60, len(members)), replace=False)]
        found[f"{other} called {contrast}"] = np.stack([each.image for each in chosen]).astype(np.float32)
    return found


def _phantom(rng: np.random.Generator) -> Array:
    """Return a bottle or sphere with a few inserts, as a plane (1, y, x)."""
    image = np.clip(blob(rng, SIZE, np.array(SIZE) / 2, rng.uniform(55, 85), 0.0), 0, 1)
    for _ in range(int(rng.integers(0, 12))):
        spot = blob(rng, SIZE, rng.uniform((50, 40), (170, 150)), rng.uniform(2, 14), 0.0)
        image = np.where(spot > 0, rng.uniform(0, 2) * image, image)
    image = np.hypot(image + rng.normal(0, 0.03, SIZE), rng.normal(0, 0.03, SIZE))
    stack = Geometry.from_centres(np.zeros((1, 3)), (1, 0, 0), (0, 1, 0), SIZE, (5.0, 1.0, 1.0), 5.0)
    return prepare(image[None].astype(np.float32), stack).inputs[:, 0]
