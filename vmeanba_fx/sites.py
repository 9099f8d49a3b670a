"""Where a captured graph can be rewritten: one :class:`Site` per selective scan, one sentence per scan that cannot be."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, fx

from .analysis.regions import concrete_shape, is_annihilated
from .calibration.execute import Executor
from .capturing.capture import capture_info
from .capturing.confinement import one_at_a_time
from .capturing.copies import to_device
from .errors import NoSitesError, SiteError, UnknownSizeError
from .graph import LAST_STATE, REPORT, SITE, args_of, aten, computes_in_half, scan_nodes

__all__ = ["Site", "SiteList", "find_sites"]


_ROUNDING = 30.0  # how many times its own rounding a shift may move the outputs


@dataclass(frozen=True)
class Site:
    """One selective scan that can be replaced.

    ``name``: module path (``#i`` where a module scans several times). ``groups`` K, ``channels`` D per group, ``state`` N,
    ``length`` L as traced. ``dtype`` of ``u``. ``skip``/``gate``: a ``+ D*u`` / ``* silu(z)`` follows inside the call.
    ``annihilated``: a LayerNorm over channels absorbs everything VMeanba's scan would contribute; ``reason`` says which,
    or why the site is live.
    """

    name: str
    groups: int
    channels: int
    state: int
    length: int
    dtype: str
    skip: bool
    gate: bool
    annihilated: bool
    reason: str

    @property
    def module(self) -> str:
        """Path of the module that scans: the block that a choice by module takes or leaves as a whole."""
        path, mark, number = self.name.rpartition("#")
        return path if mark and number.isdigit() else self.name

    @property
    def kind(self) -> str:
        return "annihilated" if self.annihilated else "live"

    def flops(self, batch: int = 1) -> int:
        """Operations of the full scan as the paper's authors count them: 9*B*L*D*N, + B*L*D for the skip."""
        width = self.groups * self.channels * self.length * batch
        return 9 * width * self.state + (width if self.skip else 0)

    def flops_replaced(self, batch: int = 1) -> int:
        """The same after VMeanba: B*L*D*N + 10*B*L*N, + the skip; of an annihilated site the skip alone remains."""
        width = self.groups * self.channels * self.length * batch
        skip = width if self.skip else 0
        if self.annihilated:
            return skip
        return width * self.state + 10 * batch * self.groups * self.length * self.state + skip

    def flops_rank(self, rank: int, batch: int = 1) -> int:
        """The same with ``rank`` channels per direction: their scan, and 2*B*L*D*r for each of the two projections."""
        positions = self.groups * self.length * batch
        skip = positions * self.channels if self.skip else 0
        return positions * rank * (9 * self.state + 4 * self.channels) + skip

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class SiteList(list[Site]):
    """Sites in graph order. ``refused``: (name, sentence) for every scan that is no site."""

    def __init__(self, sites: list[Site], refused: list[tuple[str, str]]) -> None:
        super().__init__(sites)
        self.refused = refused

    def __str__(self) -> str:
        rows = [
            [s.name, s.groups, s.channels, s.state, s.length, s.dtype, "yes" if s.skip else "no",
             "yes" if s.gate else "no", s.kind, s.reason]
            for s in self
        ]  # fmt: skip
        head = ["site", "K", "D", "N", "L", "dtype", "D skip", "gate", "kind", "because"]
        lines = [tabulate(rows, head)] + [f"{name}: not a site, {why}" for name, why in self.refused]
        return "\n".join(lines)

    __repr__ = __str__  # what a notebook shows


@one_at_a_time
def find_sites(gm: fx.GraphModule, *, probe: bool = True) -> SiteList:
    """Every selective scan of a captured graph.

    Args:
        gm: what :func:`vmeanba_fx.capture` returned.
        probe: confirm each verdict "annihilated" by one perturbed run on the captured example inputs (models in float32
            and float64).

    Raises:
        NoSitesError: the graph holds no scan that could be rewritten; the message lists those refused.
        SiteError: the probe contradicts the structure (a defect worth reporting).
    """
    info = capture_info(gm)
    refused = [(name or "(top level)", sentence) for name, sentence in info.refused]
    sites: list[Site] = []
    for owner, node in scan_nodes(gm):
        name = node.meta[SITE]
        why = _refusal(node)
        if why:
            refused.append((name, why))
            continue
        inside = "" if owner is gm else "it lies inside an autocast or checkpoint region"
        sites.append(_describe(name, node, inside))
    if not sites and REPORT in gm.meta:
        raise NoSitesError("this model was rewritten already: transform the original one")
    if not sites:
        detail = f" ({_by_reason(refused)})" if refused else ""
        hint = f". This looks like one: {'; '.join(info.lookalikes)}" if info.lookalikes else ""
        known = bool(refused) and not info.lookalikes
        teach = "" if known else ". Teach vmeanba_fx a signature that it does not know with vmeanba_fx.register_scan"
        raise NoSitesError(f"the model has no selective scan to rewrite{detail}{hint}{teach}")
    if probe:
        _probe(gm, sites)
    return SiteList(sites, refused)


def _by_reason(refused: list[tuple[str, str]]) -> str:
    """Every reason once, with the names that it is given for."""
    names: dict[str, list[str]] = {}
    for name, why in refused:
        names.setdefault(why, []).append(name)
    return "; ".join(f"{', '.join(some[:3])}{', ...' if some[3:] else ''}: {why}" for why, some in names.items())


def _refusal(node: fx.Node) -> str:
    u, delta, _, B = args_of(node)[:4]
    for user in u.users:
        if user.target in LAST_STATE and user.args[1] is delta and user.users:
            return "its last state is used, which a one-channel scan does not have"
    try:
        channels, groups = concrete_shape(u)[1], concrete_shape(B)[1]
    except UnknownSizeError:
        return "its batch depends on the data"
    if channels == groups:
        return "it has one channel per group (B and C constant over time or per channel, or a scan along channels)"
    return ""


def _describe(name: str, node: fx.Node, inside: str) -> Site:
    u, _, _, B = args_of(node)[:4]
    _, channels, length = concrete_shape(u)
    _, groups, state, _ = concrete_shape(B)
    annihilated, reason = (False, inside) if inside else is_annihilated(node, groups)
    end, skip = _after_skip(node, u)
    gate = any(user.target is aten.mul.Tensor and _is_silu(user, end) for user in end.users)
    dtype = str(u.meta["val"].dtype).removeprefix("torch.")
    return Site(name, groups, channels // groups, state, length, dtype, skip, gate, annihilated, reason)


def _after_skip(node: fx.Node, u: fx.Node) -> tuple[fx.Node, bool]:
    """The node after ``+ D*u`` and True, or the scan itself and False."""
    product = skip_product(node)
    return (next(iter(product.users)), True) if product is not None else (node, False)


def skip_product(scan: fx.Node) -> fx.Node | None:
    """The node ``D*u`` of the ``+ D*u`` right behind a scan, where there is one that nothing else reads."""
    for user in scan.users:
        if user.target is aten.add.Tensor:
            other = user.args[1] if user.args[0] is scan else user.args[0]
            if isinstance(other, fx.Node) and other.target is aten.mul.Tensor and scan.args[0] in other.all_input_nodes:
                return other if len(other.users) == 1 else None
    return None


def _is_silu(product: fx.Node, of: fx.Node) -> bool:
    others = [a for a in product.all_input_nodes if a is not of]
    return any(a.target is aten.silu.default for a in others)


def _probe(gm: fx.GraphModule, sites: list[Site]) -> None:
    """Shift each annihilated scan by something constant over channels and see that the model's outputs stay.

    Not in half precision, where it proves nothing: the shift itself is rounded, and what a LayerNorm makes of that may be
    large. The verdict was proved in float64.
    """
    info = capture_info(gm)
    nodes = {node.meta[SITE]: node for owner, node in scan_nodes(gm) if owner is gm}
    checked = [s for s in sites if s.annihilated]
    if not checked or computes_in_half(gm):
        return
    scans = [nodes[s.name] for s in checked]
    executor = Executor(gm, scans, keep=scans)
    args, kwargs = to_device((info.args, info.kwargs), executor.device)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        base, state = executor.run(*args, **kwargs)
        shifted = {nodes[s.name]: _shifted(state.value(nodes[s.name]), s) for s in checked}
        # One run clears all of them; only where it does not, one run each finds the culprit.
        if _moved(base, executor.rerun(state, shifted)) is None:
            return
        for site in checked:
            node = nodes[site.name]
            error = _moved(base, executor.rerun(state, {node: shifted[node]}))
            if error is None:
                continue
            # Some models blow rounding up. A difference as small as the rounding of the shift then moves as much.
            rounded = _rounded(state.value(node), site)
            if error > _ROUNDING * (_moved(base, executor.rerun(state, {node: rounded}), tolerance=0.0) or 0.0):
                raise SiteError(
                    f"{site.name}: its structure says that a LayerNorm absorbs channel-constant terms "
                    f"({site.reason}), but shifting the scan moved the output by {error:.1e} (relative). "
                    "Please report this model; find_sites(probe=False) skips the check"
                )


def _shifted(y: Tensor, site: Site) -> Tensor:
    """y (B, K*D, L) plus something of its own size that is constant over the channels of each group."""
    noise = torch.randn(y.shape[0], site.groups, 1, y.shape[2], generator=torch.Generator().manual_seed(1))
    return y + (noise.to(y) * _size(y, site)).expand(-1, -1, site.channels, -1).reshape(y.shape)


def _size(y: Tensor, site: Site) -> Tensor:
    """The largest channel of each group at each position, (B, K, 1, L): a scan may grow without bound along its walk, and what
    is small beside its end would drown in the rounding of a shift of that size. Ones where y is zero throughout."""
    size = y.unflatten(1, (site.groups, site.channels)).abs().amax(2, keepdim=True)
    return size if size.any() else torch.ones_like(size)


def _rounded(y: Tensor, site: Site) -> Tensor:
    """y with a difference of about its rounding error, in its own dtype or in that of the model, to which it is cast."""
    eps = max(torch.finfo(y.dtype).eps, torch.finfo(getattr(torch, site.dtype)).eps)
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y).unflatten(1, (site.groups, site.channels))
    return y + (noise * _size(y, site) * eps).reshape(y.shape)


def _moved(base: Any, moved: Any, tolerance: float = 1e-3) -> float | None:
    """The largest relative change of an output beyond ``tolerance``, by default more than rounding, or None."""
    for old, new in zip(_tensors(base), _tensors(moved), strict=True):
        error = float((new - old).float().abs().max()) / max(float(old.float().abs().max()), 1e-12)
        if not error <= tolerance:
            return error
    return None


def _tensors(outputs: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
