"""The plan as JSON: every field checked, nothing executed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .calibration.curve import Curve
from .calibration.fingerprint import Fingerprint
from .choice import check_group_by
from .errors import SiteError
from .files import is_count, is_flag, is_name, is_number, is_text
from .fitting.reduction import Reduction
from .passes.mean_scan import check_mean
from .sites import Site

if TYPE_CHECKING:
    from .plan import Plan

_FORMAT = "vmeanba_fx.plan"
_VERSION = 2
_KEYS = frozenset(
    "format version metric higher_is_better mean base samples scores tiebreaks sites refused inputs estimates intervals apart "
    "group_by curve fingerprint reduction".split()
)


def plan_dict(plan: Plan) -> dict[str, Any]:
    """What :func:`plan_fields` reads."""
    return {
        "format": _FORMAT, "version": _VERSION, "metric": plan.metric, "higher_is_better": plan.higher_is_better,
        "mean": plan.mean, "base": plan.base, "samples": plan.samples, "scores": plan.scores,
        "tiebreaks": plan.tiebreaks, "sites": [s.to_dict() for s in plan.sites],
        "refused": [list(r) for r in plan.refused], "inputs": plan.inputs,
        "estimates": plan.estimates, "intervals": [list(pair) for pair in plan.intervals], "apart": plan.apart,
        "group_by": plan.group_by, "curve": None if plan.curve is None else plan.curve.to_dict(),
        "fingerprint": plan.fingerprint.to_dict(),
    } | ({} if plan.reduction.kind == "mean" else {"reduction": plan.reduction.to_dict()})  # fmt: skip


def plan_fields(d: dict[str, Any]) -> dict[str, Any]:
    """Arguments of :class:`Plan` from JSON.

    Raises:
        ValueError, KeyError, TypeError: it is not what :func:`plan_dict` gave.
    """
    if d.get("format") != _FORMAT:
        raise ValueError(f"its format is {d.get('format')!r}, expected {_FORMAT!r}")
    if d.get("version") == 1:
        raise ValueError("its version is 1, of an older release; it has no held-out measurements: calibrate again")
    if d.get("version") != _VERSION:
        raise ValueError(f"its version is {d.get('version')!r}, this release reads {_VERSION}")
    if unknown := sorted(set(d) - _KEYS):  # of a changed file, or of a release that did not give them a version of their own
        raise ValueError(f"it has unknown fields, {repr(unknown[:4])[:80]}")
    metric, samples = d.get("metric"), d.get("samples")
    if not is_name(metric) or not is_count(samples):
        raise ValueError(f"its metric is {repr(metric)[:80]}, of {repr(samples)[:80]} samples")
    sites = [_site(s) for s in _typed(d, "sites", list)]
    if not sites or len({s.name for s in sites}) != len(sites):
        raise ValueError("site names are missing or not unique")
    lists = {name: _numbers(d, name) for name in ("scores", "tiebreaks", "estimates")}
    intervals = [_pair(pair) for pair in _typed(d, "intervals", list)]
    per_site: dict[str, list[Any]] = {**lists, "intervals": intervals}
    for name, values in per_site.items():
        if len(values) not in (0, len(sites)):
            raise ValueError(f"{len(values)} {name} for {len(sites)} sites")
    apart = _typed(d, "apart", list)
    if len(apart) not in (0, len(sites) - 1) or not all(map(is_flag, apart)):
        raise ValueError("apart is not a list of flags, one for each pair of neighbours")
    base = d["base"]
    scored = bool(lists["scores"] or lists["estimates"])
    if (base is None) == scored or (base is not None and not is_number(base)):
        raise ValueError("base is missing or not a finite number")
    check_mean(_typed(d, "mean", str))
    try:
        check_group_by(d["group_by"])
    except SiteError as error:
        raise ValueError(str(error)) from None
    inputs, refused = _typed(d, "inputs", list), _typed(d, "refused", list)
    _check_inputs(inputs)
    if not all(isinstance(r, list) and len(r) == 2 and all(map(is_text, r)) for r in refused):
        raise ValueError("refused is not a list of names and reasons")
    return {
        "sites": sites, "refused": [(name, why) for name, why in refused], "metric": metric,
        "higher_is_better": _typed(d, "higher_is_better", bool), "mean": d["mean"],
        "base": None if base is None else float(base), "samples": samples,
        "fingerprint": Fingerprint.from_dict(d["fingerprint"]), "inputs": inputs, "intervals": intervals,
        "reduction": Reduction.from_dict(d["reduction"]) if "reduction" in d else Reduction(), "apart": apart,
        "group_by": d["group_by"],
        "curve": None if d["curve"] is None else Curve.from_dict(d["curve"], len(sites)), **lists,
    }  # fmt: skip


def _pair(pair: Any) -> tuple[float, float]:
    if not isinstance(pair, list) or len(pair) != 2 or not all(map(is_number, pair)) or pair[0] > pair[1]:
        raise ValueError("an interval is not a pair of finite numbers, the lower one first")
    return float(pair[0]), float(pair[1])


def _typed(d: dict[str, Any], key: str, kind: type) -> Any:
    if key not in d:
        raise ValueError(f"{key} is missing")
    if not isinstance(d[key], kind):
        raise ValueError(f"{key} is a {type(d[key]).__name__}, expected {kind.__name__}")
    return d[key]


def _numbers(d: dict[str, Any], key: str) -> list[float]:
    values = _typed(d, key, list)
    if not all(map(is_number, values)):
        raise ValueError(f"{key} holds something that is not a finite number")
    return [float(v) for v in values]


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "name": is_name, "groups": is_count, "channels": is_count, "state": is_count, "length": is_count, "dtype": is_name,
    "skip": is_flag, "gate": is_flag, "annihilated": is_flag, "reason": is_text,
}  # fmt: skip


def _site(d: Any) -> Site:
    if not isinstance(d, dict) or set(d) != set(_FIELDS):
        raise ValueError("a site with missing or unknown fields")
    for name, ok in _FIELDS.items():
        if not ok(d[name]):
            raise ValueError(f"a site whose {name} is {repr(d[name])[:80]}")
    if min(d[name] for name in ("groups", "channels", "state", "length")) < 1:
        raise ValueError(f"a site of no size, {d['name']!r}")
    return Site(**d)


_MAX_ELEMENTS = 2**28  # of all example inputs together: reading a plan must not allocate without bound
_MAX_DIMS = 16


def _check_inputs(inputs: list[Any]) -> None:
    elements = 0
    for item in inputs:
        if not isinstance(item, dict) or not (is_count(item.get("key")) or is_name(item.get("key"))):
            raise ValueError(f"an input described as {str(item)[:80]}")
        if set(item) == {"key", "value"} and not isinstance(item["value"], (list, dict)):
            continue
        shape = item.get("shape")
        whole = set(item) == {"key", "shape", "dtype"} and dtype_of(item["dtype"]) is not None
        if not whole or not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(map(is_count, shape)):
            raise ValueError(f"an input described as {str(item)[:80]}")
        elements += math.prod(shape)
    if elements > _MAX_ELEMENTS:
        raise ValueError(f"example inputs of {elements} elements")


def dtype_of(name: Any) -> torch.dtype | None:
    found = getattr(torch, name, None) if isinstance(name, str) else None
    return found if isinstance(found, torch.dtype) else None
