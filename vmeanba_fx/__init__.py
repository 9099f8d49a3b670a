"""vmeanba_fx: make visual state-space models fast without retraining, as a torch.fx compiler pass."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("vmeanba_fx.passes") is None:
    # Run from a checkout that is not installed: the passes lie beside the package, and must have one name only.
    _source = Path(__file__).resolve().parent.parent / "passes" / "__init__.py"
    _spec = importlib.util.spec_from_file_location(
        "vmeanba_fx.passes", _source, submodule_search_locations=[str(_source.parent)]
    )
    if _spec is None or _spec.loader is None or not _source.is_file():
        raise ImportError(f"vmeanba_fx.passes is neither installed nor at {_source.parent}")
    _passes = importlib.util.module_from_spec(_spec)
    sys.modules["vmeanba_fx.passes"] = _passes
    _spec.loader.exec_module(_passes)

from .api import apply_plan, bake_autocast, pack_weights, transform, unroll_depthwise
from .calibration.calibrate import calibrate
from .calibration.metrics import Batch
from .capturing.capture import capture
from .capturing.families import canonical as _canonical  # noqa: F401  registers the signatures of public code
from .capturing.registry import ScanCall, register_scan, unregister_scan
from .errors import (
    CalibrationError,
    CaptureError,
    ExportError,
    GraphCheckError,
    NoSitesError,
    PassError,
    PlanError,
    SiteError,
    VMeanbaError,
)
from .exporting.export import Exported, Loaded, export, load
from .plan import Plan
from .report import Report, report
from .sites import Site, find_sites
from .symbolic import GuardError, SymbolicTraceError, symbolic_trace

__all__ = [
    "Batch",
    "CalibrationError",
    "CaptureError",
    "ExportError",
    "Exported",
    "GraphCheckError",
    "GuardError",
    "Loaded",
    "NoSitesError",
    "PassError",
    "Plan",
    "PlanError",
    "Report",
    "ScanCall",
    "Site",
    "SiteError",
    "SymbolicTraceError",
    "VMeanbaError",
    "apply_plan",
    "bake_autocast",
    "calibrate",
    "capture",
    "export",
    "find_sites",
    "load",
    "pack_weights",
    "register_scan",
    "report",
    "symbolic_trace",
    "transform",
    "unregister_scan",
    "unroll_depthwise",
]
