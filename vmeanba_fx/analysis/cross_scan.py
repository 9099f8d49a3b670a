"""Recognise a cross scan, its projections and its cross merge by what they compute, whatever nodes they are built from.

Everything found here is *proved on numbers*: the region is evaluated in float64 (:mod:`.evaluate`) on index tensors
and on random inputs, and must agree with the closed form to float64 rounding. Where it does not, :class:`Unprovable`
says why and the graph stays as it was.

Notation: x (B, D, H, W) is the un-scanned map, order[k, t] the flat position that direction k reads at step t.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, fx

from ..graph import aten, value
from ..ops.directions import CODES, direction_table, inverse_table
from .evaluate import Unprovable, batch_symbols, depends_on, evaluate, is_parameter_only, shape_of
from .regions import IDENTITY, LINEAR, NOTHING, PRODUCT

_TOLERANCE = 1e-9
_BIASED = {aten.add.Tensor}
_MOVES = LINEAR - {aten.add.Tensor, aten.sub.Tensor, aten.neg.default, aten.sum.dim_IntList} | IDENTITY


@dataclass(frozen=True)
class CrossScan:
    """u (B, K*D, L) is a copy of ``source`` in K orders. ``last``: the source's channels are its last axis.

    ``directions``: a code per direction (see :mod:`vmeanba_fx.ops.directions`), or empty where ``order`` is no such code.
    """

    source: fx.Node
    groups: int
    channels: int
    height: int
    width: int
    last: bool
    order: Tensor
    directions: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.height * self.width

    def to_source(self, x: Tensor) -> Tensor:
        """(B, D, L) in the shape of the source."""
        shape = (x.shape[0], *shape_of(self.source, x.shape[0])[1:])
        return (x.transpose(1, 2) if self.last else x).reshape(shape)


@dataclass(frozen=True)
class Projections:
    """feats_k = x_weight_k @ x, split into R step features, B and C; delta_k = dt_weight_k @ step features + dt_offset_k."""

    x_weight: Tensor  # (K, R + 2N, D)
    dt_weight: Tensor  # (K, D, R)
    dt_offset: Tensor | None  # (K*D,)
    rank: int


@dataclass(frozen=True)
class Merge:
    """``node`` = sum over directions of y put back in place, + ``skip`` * x. ``last``: its channels are its last axis."""

    node: fx.Node
    last: bool
    skip: Tensor | None  # (D,)


def find_cross_scan(u: fx.Node, groups: int) -> CrossScan:
    """The cross scan that made ``u`` (B, K*D, L), K = ``groups``."""
    source = map_behind(u)
    rows = _Rows(u.graph)
    channels_all, length = shape_of(u, rows.batch)[1:]
    channels = channels_all // groups
    shape = shape_of(source, rows.batch)[1:]
    count = channels * length
    if _numel(shape) != count:
        raise Unprovable(
            f"what it scans is no copy of a map: {source.name} behind it has {_numel(shape)} elements per image, a direction "
            f"of the scan {count}"
        )
    index = torch.arange(count, dtype=torch.float64, device=rows.device).reshape(1, *shape)
    [found] = evaluate([u], {source: index.repeat(rows.batch, *[1] * len(shape))}, rows.batch)
    if not bool(torch.isfinite(found).all()):
        raise Unprovable("u holds elements that were never written")
    table = found[0].long().reshape(groups, channels, length).cpu()
    d = torch.arange(channels).reshape(1, -1, 1)
    for last in (False, True):
        position = table // channels if last else table % length
        if torch.equal(table % channels if last else table // length, d.expand_as(table)):
            order = position[:, 0]
            if torch.equal(position, order[:, None].expand_as(position)):
                break
    else:
        raise Unprovable("u is not the same map in K orders: its channels are mixed")
    inverse_table(order)  # a ValueError is impossible for a copy of the whole map, and says so otherwise
    height, width, directions = _geometry(shape, last, order)
    return CrossScan(source, groups, channels, height, width, last, order, directions)


def find_projections(scan: CrossScan, delta: fx.Node, B: fx.Node, C: fx.Node, u: fx.Node) -> Projections:
    """The weights that make delta, B and C from the source, proved on random maps."""
    rows = _Rows(u.graph)
    K, D, L = scan.groups, scan.channels, scan.length
    low_rank = _contraction_input(delta, scan.source)
    rank, rest = divmod(_numel(shape_of(low_rank, rows.batch)[1:]), K * L)
    if rest or rank < 1 or rank >= D:
        raise Unprovable(f"the step projection reads {low_rank.name}, which is no low-rank feature map")
    x_weight, shift = _read_affine(rows, scan.source, scan.to_source, (K, D, L), [low_rank, B, C], scan.order)
    if bool(shift.abs().max() > 0):
        raise Unprovable("the step features, B or C are no linear function of the same position of the map")
    state = shape_of(B, rows.batch)[2]
    shape = shape_of(low_rank, rows.batch)[1:]
    dt_weight, offset = _read_affine(
        rows, low_rank, lambda t: t[:, None].expand(-1, K, -1, -1).reshape(-1, *shape), (K, rank, L), [delta]
    )

    x = rows.random(0, D, L)
    xs = x[:, :, scan.order].transpose(1, 2)  # (B, K, D, L)
    expected = torch.einsum("kcd,bkdl->bkcl", x_weight, xs)
    steps, Bs, Cs = expected.split([rank, state, state], dim=2)
    deltas = torch.einsum("kdr,bkrl->bkdl", dt_weight, steps) + offset[..., None]
    found = evaluate([u, delta, B, C], {scan.source: scan.to_source(x)}, rows.batch)
    for name, a, b in zip(("u", "delta", "B", "C"), (xs, deltas, Bs, Cs), found, strict=True):
        _require_equal(a.reshape(b.shape), b, f"{name} is no pointwise projection of the un-scanned map")
    has_offset = bool(offset.abs().max() > 0)
    return Projections(x_weight, dt_weight, offset.reshape(-1) if has_offset else None, rank)


def find_pointwise(scan: CrossScan, features: list[fx.Node], u: fx.Node) -> tuple[Tensor, Tensor]:
    """(weight (K, F, D), shift (K, F)): ``features``, (B, K, f, L) or (B, K, L), are weight @ map + shift in scan order."""
    rows = _Rows(u.graph)
    sizes = scan.groups, scan.channels, scan.length
    weight, shift = _read_affine(rows, scan.source, scan.to_source, sizes, features, scan.order)
    x = rows.random(0, scan.channels, scan.length)
    xs = x[:, :, scan.order].transpose(1, 2)
    expected = torch.einsum("kfd,bkdl->bkfl", weight, xs) + shift[..., None]
    found = evaluate([u, *features], {scan.source: scan.to_source(x)}, rows.batch)
    _require_equal(xs.reshape(found[0].shape), found[0], f"{u.name} mixes images")
    read = torch.cat([t.reshape(rows.batch, scan.groups, -1, scan.length) for t in found[1:]], dim=2)
    _require_equal(expected, read, "what the scan reads is no pointwise projection of the un-scanned map")
    return weight, shift


def find_read_out(scan: CrossScan, low: fx.Node, y: fx.Node) -> tuple[Tensor, Tensor]:
    """(V (K, D, r), b (K, D)): ``y`` (B, K*D, L) is V @ ``low`` + b, where ``low`` is (B, K, r, L)."""
    rows = _Rows(low.graph)
    K, r, L = (*shape_of(low, rows.batch)[1:3], scan.length)
    weight, shift = _read_affine(rows, low, lambda t: t[:, None].expand(-1, K, -1, -1), (K, r, L), [y])
    given = rows.random(3, K, r, L)
    expected = torch.einsum("kdr,bkrl->bkdl", weight, given) + shift[..., None]
    [found] = evaluate([y], {low: given}, rows.batch)
    _require_equal(expected.reshape(found.shape), found, f"{y.name} is no linear map of the scan's output")
    return weight, shift


def find_merge(scan: CrossScan, start: fx.Node, y: fx.Node | None) -> Merge:
    """The first node that holds the merged map: all that ``start`` contributes, in one (B, D, L)-sized value.

    ``y``: the scan's output (B, K*D, L), or ``None`` where only the skip D*u is left; ``start`` is then that product.
    """
    rows = _Rows(start.graph)
    K, D, L = scan.groups, scan.channels, scan.length
    x, ys = rows.random(1, D, L), rows.random(2, K, D, L)
    inverse = inverse_table(scan.order)
    merged = sum(ys[:, k][:, :, inverse[k]] for k in range(K))
    reason = "its directions are never summed into one map"
    for node in _candidates(start, D * L, rows.batch):
        given = {scan.source: scan.to_source(x)}
        ones = {scan.source: torch.ones_like(given[scan.source])}
        if y is not None:
            given[y] = ys.reshape(rows.batch, K * D, L)
            ones[y] = torch.zeros_like(given[y])
        try:
            [found], [skips] = evaluate([node], given, rows.batch), evaluate([node], ones, rows.batch)
        except Unprovable as error:
            reason = str(error)
            continue
        for last in (False, True):
            shape = (rows.batch, L, D) if last else (rows.batch, D, L)
            a, s = (t.reshape(shape).transpose(1, 2) if last else t.reshape(shape) for t in (found, skips))
            skip = s[0, :, 0]
            expected = x * skip[:, None] + (merged if y is not None else 0.0)
            if _equal(expected, a):
                return Merge(node, last, skip if bool(skip.abs().max() > 0) else None)
        reason = f"{node.name} is not the sum of the directions put back in place"
    raise Unprovable(reason)


def _read_affine(
    rows: _Rows, source: fx.Node, to_source: Callable[[Tensor], Tensor], sizes: tuple[int, int, int], wanted: list[fx.Node],
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(weight (K, F, c), shift (K, F)) of a pointwise map from the c channels of ``source`` to ``wanted``, if it is one.

    ``sizes``: (K, c, L). ``order``: the positions of ``source`` that each step of ``wanted`` belongs to. One evaluation
    reads all weights: position p of image b holds the unit vector of channel (b*L + p) mod (c + 1), the last one zero.
    """
    K, channels, L = sizes
    images = -(-(channels + 1) // L)
    unit = torch.zeros(images, channels + 1, L, dtype=torch.float64, device=rows.device)
    p = torch.arange(images * L)
    unit[p // L, p % (channels + 1), p % L] = 1.0
    parts = rows.run(wanted, source, to_source(unit[:, :channels]))
    features = torch.cat([t.reshape(images, K, -1, L) for t in parts], dim=2)
    c = torch.arange(channels + 1)
    steps = (c % L).expand(K, -1) if order is None else inverse_table(order)[:, c % L]
    read = torch.stack([features[c // L, k, :, steps[k]] for k in range(K)])  # (K, c + 1, F)
    shift = read[:, channels]
    return (read[:, :channels] - shift[:, None]).transpose(1, 2), shift


class _Rows:
    """Evaluates a region on any number of images, whatever batch the graph was traced with."""

    def __init__(self, graph: fx.Graph) -> None:
        self.dynamic = bool(batch_symbols(graph))
        placeholder = next(n for n in graph.nodes if n.op == "placeholder" and isinstance(value(n), Tensor))
        self.batch = 2 if self.dynamic else int(value(placeholder).shape[0])
        self.device = value(placeholder).device

    def random(self, seed: int, *shape: int) -> Tensor:
        """Normal values for one batch; the same for the same seed on every device."""
        return _normal(seed, (self.batch, *shape)).to(self.device)

    def run(self, wanted: list[fx.Node], source: fx.Node, rows: Tensor) -> list[Tensor]:
        if self.dynamic:
            return evaluate(wanted, {source: rows}, rows.shape[0])
        out: list[list[Tensor]] = [[] for _ in wanted]
        for chunk in rows.split(self.batch):
            filled = torch.cat([chunk, chunk.new_zeros(self.batch - chunk.shape[0], *chunk.shape[1:])])
            for kept, t in zip(out, evaluate(wanted, {source: filled}, self.batch), strict=True):
                kept.append(t[: chunk.shape[0]])
        return [torch.cat(kept) for kept in out]


@lru_cache(maxsize=8)  # the sites of a stage ask for the same one after the other
def _normal(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def map_behind(u: fx.Node) -> fx.Node:
    """The one value that ``u`` is a rearranged copy of."""
    frontier: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = [u]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in _MOVES:
            stack.extend(a for a in node.all_input_nodes if not isinstance(value(a), (torch.SymInt, int)))
        elif not is_parameter_only(node) and not _is_fresh(node):
            frontier.add(node)
    if len(frontier) != 1:
        names = ", ".join(sorted(n.name for n in frontier)) or "none"
        raise Unprovable(f"u does not come from one map (it comes from {names})")
    source = frontier.pop()
    if source is u:
        raise Unprovable("u is no rearranged copy of another value")
    return source


def _is_fresh(node: fx.Node) -> bool:
    return node.target in (aten.new_empty.default, aten.new_zeros.default, aten.empty_like.default)


def _geometry(shape: tuple[int, ...], last: bool, order: Tensor) -> tuple[int, int, tuple[int, ...]]:
    """(H, W, direction codes); no codes where the orders are none of the eight."""
    length = order.shape[1]
    sizes = [tuple(shape[:-1] if last else shape[1:])]
    if len(sizes[0]) != 2 or _numel(sizes[0]) != length:  # tokens, a video, or an axis of one before the channels
        sizes = [(h, length // h) for h in range(1, length + 1) if length % h == 0]
        sizes.sort(key=lambda s: abs(s[0] - s[1]))
    for height, width in sizes:
        tables = direction_table(tuple(CODES), height, width)
        codes = [next((c for c in CODES if torch.equal(tables[c], row)), None) for row in order]
        if None not in codes:
            return height, width, tuple(c for c in codes if c is not None)
    height, width = sizes[0]
    return height, width, ()


def _contraction_input(delta: fx.Node, source: fx.Node) -> fx.Node:
    """What the last projection before ``delta`` reads: the low-rank step features."""
    seen: set[fx.Node] = set()
    projections: set[fx.Node] = set()
    stack = [delta]
    while stack:
        node = stack.pop()
        if node in seen or is_parameter_only(node) or not depends_on(node, source):
            continue
        seen.add(node)
        if node is source:
            raise Unprovable("delta is the map itself, not a projection of it")
        if node.target in _MOVES or node.target in _BIASED:
            stack.extend(node.all_input_nodes)
        else:
            projections.add(node)
    inputs = {a for p in projections for a in p.all_input_nodes if not is_parameter_only(a) and depends_on(a, source)}
    if len(projections) != 1 or len(inputs) != 1:
        raise Unprovable("delta is not made by one projection")
    return inputs.pop()


def _candidates(start: fx.Node, count: int, batch: int) -> Iterator[fx.Node]:
    """Nodes behind ``start`` through which all it contributes flows, of ``count`` elements per image, nearest first."""
    reached = {start}
    for node in start.graph.nodes:
        if node is start or not any(a in reached for a in node.all_input_nodes):
            continue
        if node.target not in LINEAR and node.target not in IDENTITY and node.target not in PRODUCT:
            continue
        reached.add(node)
        held = value(node)
        if isinstance(held, Tensor) and _numel(shape_of(node, batch)[1:]) == count and _dominates(node, start, reached):
            yield node


def _dominates(node: fx.Node, start: fx.Node, reached: set[fx.Node]) -> bool:
    """True where every use of ``start``, directly or through linear nodes, passes through ``node``."""
    inner: set[fx.Node] = set()
    stack = [start]
    while stack:
        current = stack.pop()
        if current in inner or current is node:
            continue
        inner.add(current)
        for user in current.users:
            if user.target in NOTHING:
                continue
            if user is not node and (user not in reached or not depends_on(node, user)):
                return False
            stack.append(user)
    return True


def _equal(a: Tensor, b: Tensor) -> bool:
    # Not a number anywhere makes the largest difference not a number, and the comparison false.
    return bool(_largest(a - b) <= _TOLERANCE * max(float(_largest(a)), 1.0))


def _largest(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(t, float("inf"))


def _require_equal(a: Tensor, b: Tensor, sentence: str) -> None:
    if not _equal(a, b):
        raise Unprovable(sentence)
