"""Imports run one way, each library has its home, and the four names are nobody else's."""

from __future__ import annotations

import ast
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "recon": {"recon"},
    "triage": {"recon", "triage"},
    "edge": {"recon", "triage", "edge"},
    "export": {"recon", "triage", "export"},
}
LIBRARIES = {  # which of our modules may import it; "recon" and the like stand for all of a folder's
    "numpy": {"recon", "triage", "edge", "export"},
    "scipy": {"recon", "triage", "export", "edge.comparison"},
    "pydicom": {
        "edge.deidentify",
        "edge.dicom",
        "edge.dicom_frames",
        "edge.dicom_identity",
        "edge.dicom_map",
        "edge.dicom_mr",
        "edge.dicom_quality",
        "edge.dicom_read",
        "edge.dicom_reference",
        "edge.dicom_seg",
        "edge.dicom_sr",
        "edge.dicom_store",
        "edge.incoming_process",
    },
    "pynetdicom": {"edge.dicom_net", "edge.dicom_store", "edge.incoming_process"},
    "zmq": {"edge.wire", "edge.router", "edge.client", "edge.gate", "edge.keyring"},
    "prometheus_client": {"edge.metrics"},
    "hl7": {"edge.hl7_sink"},
    "fhir": {"edge.fhir_sink"},
    "sqlite3": {"edge.ledger", "edge.daemon"},
    "h5py": {"edge.rawfile", "edge.raw_write", "edge.replay"},
    "ismrmrd": {"edge.raw_write"},
    "PIL": {"edge.preview", "export.slices", "export.triage_images"},
    "rich": {
        "edge.demo",
        "edge.doctor",
        "edge.engine_command",
        "edge.keys_command",
        "edge.recon_file",
        "edge.replay",
        "edge.simulate",
        "edge.triage_file",
        "edge.watch",
        "export.calibrate_quality",
        "export.measurements",
        "export.quantise",
        "export.triage_gate",
    },
    "defusedxml": {"edge.header"},
    "threadpoolctl": {
        "edge.chain",
        "edge.triage_process",
        "export.batches",
        "export.calibrate_quality",
        "export.measurements",
        "export.train",
    },
    "tomli": {"edge.settings_file"},
    "tomllib": {"edge.settings_file"},  # not in the library of Python 3.10
    "nibabel": {"edge.nifti", "export"},
    "torch": {"export"},
    "onnx": {"export"},
    "onnxruntime": {
        "edge.backends.ort",
        "export.assess",
        "export.onnx",
        "export.quantise",
        "export.superres_onnx",
        "export.triage_chain",
        "export.triage_onnx",
    },
    "cupy": {"edge.backends.device"},
    "cupyx": {"recon.fourier"},  # the transforms that keep complex64, for arrays that are CuPy's already
    "matplotlib": {"export.roc", "export.validation"},
    "nilearn": {"export"},
}
NEVER_IN_PURE = {"os", "pathlib", "socket", "time", "datetime", "logging", "subprocess", "threading", "asyncio"}
MODULES = sorted(path for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every absolute module name that `path` imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names.add(node.module or "")
    return names


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_run_one_way_and_libraries_stay_at_home(path: Path) -> None:
    module = module_name(path)
    folder = module.partition(".")[0]
    for name in imported(path):
        top = name.partition(".")[0]
        if top in MAY_IMPORT or top in ("benchmarks", "tests"):
            assert top in MAY_IMPORT[folder], f"{module} imports {name}"
        elif top not in sys.stdlib_module_names:
            homes = LIBRARIES.get(top, set())
            assert homes & {folder, module}, f"{module} imports {top}, whose home is {sorted(homes) or 'nowhere'}"
        elif folder in ("recon", "triage"):
            assert top not in NEVER_IN_PURE, f"{module} is pure, and imports {name}"


def test_run_time_never_imports_the_factory_or_torch() -> None:
    for path in MODULES:
        if not module_name(path).startswith("export"):
            assert not {"torch", "onnx", "export"} & {name.partition(".")[0] for name in imported(path)}, path


def test_no_other_distribution_owns_our_names() -> None:
    for distribution in distributions():
        if distribution.metadata["Name"] == "scanside":
            continue
        tops = (distribution.read_text("top_level.txt") or "").split()
        assert not set(MAY_IMPORT) & set(tops), f"{distribution.metadata['Name']} owns one of {sorted(MAY_IMPORT)}"


def test_packages_hold_a_docstring_and_nothing_else() -> None:
    for folder in MAY_IMPORT:
        tree = ast.parse((ROOT / folder / "__init__.py").read_text("utf-8"))
        assert ast.get_docstring(tree)
        assert len(tree.body) == 1


def test_no_module_is_a_drawer() -> None:
    for path in MODULES:
        assert path.stem not in ("utils", "common", "helpers")
        assert len(path.read_text("utf-8").splitlines()) <= 400, f"{path.name}: look for the second idea"
