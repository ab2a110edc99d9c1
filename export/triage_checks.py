"""Does a network see the finding, or the traces of how its training images were made?

Blanked: the outline and what lies around it are filled from further out, in slices with the finding and, at another
patient's outline, in slices without one. Whoever still tells the two apart saw something else. Rim: values inside
another patient's outline are stored again, as drawing an outline once did to the data; nothing should come of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import ndimage

from export.triage_augment import brain_of, decoy
from export.triage_onnx import run_triage
from export.triage_statistics import auc, words
from export.triage_validation import Case
from recon.arrays import Array
from triage.likeness import describe_images
from triage.score import plane_scores

MARGIN = 4  # pixels around an outline that are filled too
SPREAD = 5.0
N_TRIALS = 30
RIDGE = 1.0


def check(session: Any, cases: list[Case], seed: int = 3) -> dict[str, Any]:
    """Return what is left to tell slices with the finding from those without, as a card has it."""
    rng = np.random.default_rng(seed)
    real = [each for each in cases if not each.is_exam and not each.is_simulated and each.factor == 0]
    images = np.stack([each.images[0] for each in real])
    masks = np.stack([each.masks[0] for each in real])
    is_positive: Array = masks.any((1, 2))
    if is_positive.all() or not is_positive.any():
        return {}
    outlines = masks[is_positive]
    borrowed = outlines[rng.integers(len(outlines), size=len(real))]
    filled_at = np.where(is_positive[:, None, None], masks, borrowed & np.stack([brain_of(i) for i in images]))
    blanked = np.stack([blank(rng, image, mask) for image, mask in zip(images, filled_at, strict=True)])
    plain = plane_scores(run_triage(session, images)[0])
    score = plane_scores(run_triage(session, blanked)[0])
    stored = np.stack([decoy(rng, each, outlines[rng.integers(len(outlines))]) for each in images[~is_positive]])
    shift = plane_scores(run_triage(session, stored)[0]) - plain[~is_positive]
    return {
        "slices": [int(is_positive.sum()), int((~is_positive).sum())],
        "auc_as_published": words(auc(plain[is_positive], plain[~is_positive])),
        "auc_blanked": words(auc(score[is_positive], score[~is_positive])),
        "auc_blanked_of_image_statistics": round(_told_by_statistics(rng, blanked, is_positive), 3),
        "rim_score_shift": [round(float(v), 3) for v in np.percentile(shift, (5, 50, 95))],
        "in_words": "blanked: outline and 4 mm around it filled from further out, in both classes; statistics: ridge "
        "regression on brightness, edges and symmetry, cross-validated; rim: logit added to slices without a finding "
        "by storing values inside another patient's outline again, 5, 50 and 95 %",
    }


def blank(rng: np.random.Generator, image: Array, mask: Array) -> Array:
    """Return a plane filled, at an outline and around it, with smoothed brightness from further out and its texture."""
    hole = ndimage.binary_dilation(mask, iterations=MARGIN)
    kept = (~hole & (image > 0.3)).astype(np.float32)
    fill = np.zeros_like(image)
    left = hole.copy()
    for spread in (SPREAD, 2 * SPREAD, 4 * SPREAD, 8 * SPREAD):
        weight = ndimage.gaussian_filter(kept, spread)
        there = left & (weight > 0.02)
        fill[there] = (ndimage.gaussian_filter(image * kept, spread)[there]) / weight[there]
        left &= ~there
    around = ndimage.binary_dilation(hole, iterations=8) & (kept > 0)
    fine = image - ndimage.gaussian_filter(image, 1.5)
    sigma = float(fine[around].std()) if around.any() else 0.0
    grain = ndimage.gaussian_filter(rng.standard_normal(image.shape), 0.6)
    return np.where(hole & (image > 0), np.maximum(fill + sigma * grain / grain.std(), 0), image).astype(np.float32)


def _told_by_statistics(rng: np.random.Generator, images: Array, is_positive: Array) -> float:
    """Return the AUC with which a ridge regression on image statistics tells the classes of images it has not seen."""
    features = describe_images(images)
    features = (features - features.mean(0)) / (features.std(0) + 1e-9)
    features = np.concatenate((features, np.ones((len(features), 1))), 1)
    found = []
    for _ in range(N_TRIALS):
        order = rng.permutation(len(features))
        train, test = order[: len(order) // 2], order[len(order) // 2 :]
        x, y = features[train], is_positive[train] - is_positive[train].mean()
        weights = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ y)
        value = features[test] @ weights
        found.append(auc(value[is_positive[test]], value[~is_positive[test]])[0])
    return float(np.mean(found))
