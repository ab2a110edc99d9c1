"""Drop phase-encode lines of a fully sampled scan, as an accelerated scan would not have measured them."""

from __future__ import annotations

from xml.etree.ElementTree import Element, SubElement, tostring

import numpy as np

from edge.header import parse_header, read_header
from edge.mrd import (
    CALIBRATION,
    CALIBRATION_AND_IMAGING,
    FIRST_IN_SLICE,
    LAST_IN_MEASUREMENT,
    LAST_IN_REPETITION,
    LAST_IN_SLICE,
    NOT_IMAGING,
)
from edge.rawfile import RawFile, selected
from recon.arrays import Array
from recon.errors import AcquisitionError
from recon.scan import Encoding

_NAMESPACE = "http://www.ismrm.org/ISMRMRD"
_IMAGE_COUNTERS = ("slice", "contrast", "phase", "repetition", "set")


def undersample(raw: RawFile, acceleration: int, acs: int) -> RawFile:
    """Keep every `acceleration`-th phase-encode line, from row 0 on, and the `acs` central ones.

    Rows are those of the encoded matrix: step − center + n // 2; the central ones start at n // 2 − acs // 2 and are
    flagged *calibration and imaging*, as they are measured image data. Noise and other readouts that are not image
    data stay. First and last of slice, last of repetition and of measurement move to lines that are kept. The header
    says what was done.
    Raises AcquisitionError for numbers out of range, or where the file is undersampled already; acceleration 1 returns
    `raw` itself.
    """
    if acceleration == 1:
        return raw
    encoding = read_header(raw.header, "")[0].encodings[0]
    n = encoding.encoded_matrix.y
    if not 1 < acceleration <= n or not 0 <= acs <= n:
        raise AcquisitionError(
            f"acceleration {acceleration} with {acs} lines: both must lie in the matrix of {n} lines"
        )
    flags = raw.heads["flags"].astype(np.uint64)
    is_image = ((flags & np.uint64(NOT_IMAGING)) == 0) & (raw.heads["encoding_space_ref"] == 0)
    rows = _rows(raw.heads, encoding)
    _check_full(encoding, flags[is_image], rows[is_image])
    first_central = n // 2 - acs // 2
    is_central = is_image & (rows >= first_central) & (rows < first_central + acs)
    keep = ~is_image | is_central | (rows % acceleration == 0)
    if not (keep & is_image).any():
        raise AcquisitionError("no line of the file lies on the undersampled grid; fewer lines must be dropped")
    flags[is_central] |= np.uint64(CALIBRATION_AND_IMAGING)
    heads = raw.heads.copy()
    heads["flags"] = _moved(heads, flags, is_image, keep)
    return selected(raw, keep, heads, _patched(raw.header, acceleration))


def _rows(heads: Array, encoding: Encoding) -> Array:
    n = encoding.encoded_matrix.y
    limit = encoding.limits.get("kspace_encoding_step_1")
    center = n // 2 if limit is None else limit.center
    rows: Array = heads["idx"]["kspace_encode_step_1"].astype(np.int64) - center + n // 2
    return rows


def _check_full(encoding: Encoding, flags: Array, rows: Array) -> None:
    """Raise AcquisitionError where lines are missing between the first and the last: they were left out before."""
    calibration = np.uint64(CALIBRATION | CALIBRATION_AND_IMAGING)
    if encoding.acceleration != (1, 1) or (flags & calibration).any():
        raise AcquisitionError("the file is undersampled already; only a fully sampled one can be accelerated")
    n_missing = len(rows) and int(np.ptp(rows)) + 1 - len(np.unique(rows))
    if n_missing or not len(rows):
        raise AcquisitionError(f"{n_missing} of the file's lines are missing; a fully sampled file is needed")


def _moved(heads: Array, flags: Array, is_image: Array, keep: Array) -> Array:
    """Return `flags` with the marks of firsts and lasts on lines that are kept."""
    idx = heads["idx"]
    image = np.unique(np.stack([idx[name] for name in _IMAGE_COUNTERS]), axis=1, return_inverse=True)[1].reshape(-1)
    everything = np.zeros(len(heads), np.int64)
    for mark, group, place in (
        (FIRST_IN_SLICE, image, 0),
        (LAST_IN_SLICE, image, -1),
        (LAST_IN_REPETITION, idx["repetition"], -1),
        (LAST_IN_MEASUREMENT, everything, -1),
    ):
        bit = np.uint64(mark)
        for key in np.unique(group[is_image]):
            members = is_image & (group == key)
            was_marked = bool((flags[members] & bit).any())
            flags[members] &= ~bit
            kept = np.flatnonzero(members & keep)
            if len(kept) and (was_marked or mark == LAST_IN_SLICE):
                flags[kept[place]] |= bit
    return flags


def _patched(header: bytes, acceleration: int) -> bytes:
    """Return the header with parallelImaging in its first encoding, where the schema wants it."""
    root = parse_header(header)
    root.set("xmlns", _NAMESPACE)  # the tags come without their namespace
    encoding = root.find("encoding")
    for former in encoding.findall("parallelImaging"):
        encoding.remove(former)
    parallel = Element("parallelImaging")
    factor = SubElement(parallel, "accelerationFactor")
    SubElement(factor, "kspace_encoding_step_1").text = str(acceleration)
    SubElement(factor, "kspace_encoding_step_2").text = "1"
    SubElement(parallel, "calibrationMode").text = "embedded"
    names = [child.tag for child in encoding]
    before = names.index("echoTrainLength") if "echoTrainLength" in names else len(names)
    encoding.insert(before, parallel)
    return bytes(tostring(root, encoding="utf-8", xml_declaration=True))
