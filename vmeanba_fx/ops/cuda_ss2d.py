"""`ss2d` on CUDA: one launch of `cuda/ss2d.cu`. This module chooses the kernel variant and its shared memory.

Layouts. `x` is fast as (B, D, H, W) contiguous and as channels-last; the output lies in memory as `x` does. `feats` is
fast in half or bfloat16 as records: the K * F values of a position next to each other, F >= R + 2N per direction: `feats`
is a view of a (B, H*W, K, F) tensor, as one GEMM `x @ weights` writes it. F a multiple of 8 is best (16-byte loads, whole
sectors): pad the GEMM's weights with rows of zeros, so that R + 2N = 14, 26, 50 become F = 16, 32, 56. Half features in
other layouts are copied to that one first. float32 features are read as they lie.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import gcd

import torch
from torch import Tensor

from . import compose, cuda_runtime
from .cuda import LaunchCache, layout, pointer, type_code, usable
from .cuda_runtime import TYPE_CODES
from .directions import direction_table
from .library import LIBRARY, empty_map, is_channels_last

_MAX_DIRECTIONS = 16  # direction codes travel in one 64-bit integer
_MAX_LENGTH = 2**30
_MAX_STATES = 128
# Maps whose size is compiled into the kernel; more sizes than this run on kernels that take it as an argument.
_MAX_BAKED = 48
_baked: set[tuple[int, int]] = set()


@dataclass(frozen=True)
class _Plan:
    """A kernel with its launch: everything that follows from shapes, strides and dtypes."""

    kernel: cuda_runtime.Kernel
    blocks: int
    threads: int
    shared: int
    workspace: int
    sizes: tuple[int, ...]


# By layout of the arguments: a plan, or None where they must be copied to another layout first.
_plans = LaunchCache()


def ss2d(x, feats, dt_weight, A, D, delta_bias, directions, order, delta_softplus, out_dtype=None):
    tensors = (x, feats, dt_weight, A, D, delta_bias, order)
    # Where the storage of feats ends decides whether a load may go past its last record.
    end = feats.storage_offset(), feats.untyped_storage().nbytes()
    key = (x.get_device(), layout(*tensors), end, tuple(directions), delta_softplus, out_dtype)
    if key in _plans:
        plan = _plans[key]
    elif not usable(*tensors[:6]) or (out_dtype or x.dtype) not in TYPE_CODES or x.numel() == 0:
        return compose.ss2d(*tensors[:6], directions, order, delta_softplus, out_dtype)
    else:
        plan = None
        if all(a is b for a, b in zip(tensors, _prepared(*tensors, directions), strict=True)):
            plan = _make_plan(*tensors, tuple(directions), delta_softplus, out_dtype or x.dtype)
        _plans.add(key, plan)
    if plan is None:
        tensors = _prepared(*tensors, directions)
        directions = directions if tensors[6] is None else []
        return ss2d(*tensors[:6], directions, tensors[6], delta_softplus, out_dtype)
    out = empty_map(x, out_dtype or x.dtype)
    workspace = torch.empty(plan.workspace, dtype=torch.uint8, device=x.device) if plan.workspace else None
    pointers = (pointer(t) for t in (*tensors[:6], out, order, workspace))
    plan.kernel.launch((plan.blocks, 1, 1), plan.threads, plan.shared, (*pointers, *plan.sizes))
    return out


def _prepared(x, feats, dt_weight, A, D, delta_bias, order, directions):
    """The same tensors in layouts that the kernel reads; those that already are come back as they came."""
    if order is None and len(directions) > _MAX_DIRECTIONS:
        order = direction_table(directions, *x.shape[2:]).to(x.device)
    if order is not None:
        order = order.to(torch.int32).contiguous()
    dt_weight, A = dt_weight.contiguous(), A.contiguous()
    if dt_weight.data_ptr() % 4:
        dt_weight = dt_weight.clone()
    D, delta_bias = (None if t is None else t.contiguous() for t in (D, delta_bias))
    return _flat_map(x), _records(_flat_map(feats), dt_weight.shape[2]), dt_weight, A, D, delta_bias, order


def _flat_map(tensor: Tensor) -> Tensor:
    """(..., H, W) whose positions lie at one stride, so that position h*W + w is `w_stride * (h*W + w)` away."""
    height, width = tensor.shape[-2:]
    if height == 1 or width == 1 or tensor.stride(-2) == width * tensor.stride(-1):
        return tensor
    return tensor.contiguous()


def _position_stride(tensor: Tensor) -> int:
    return tensor.stride(-2) if tensor.shape[-1] == 1 else tensor.stride(-1)


def _records(feats: Tensor, rank: int) -> Tensor:
    """Half features as records of a position. float32 features, and odd ranks, are read with any strides."""
    if feats.dtype == torch.float32 or rank % 2 or _record_fetch(feats, 1):
        return feats
    batch, directions, count, height, width = feats.shape
    padded = -(-count // 8) * 8
    records = feats.new_empty(batch, height, width, directions, padded)[..., :count]
    return records.copy_(feats.permute(0, 3, 4, 1, 2)).permute(0, 3, 4, 1, 2)


def _padding_is_readable(feats: Tensor) -> bool:
    """Whether the storage goes on far enough after the last record to round its length up to a multiple of 8."""
    last = sum((extent - 1) * stride for extent, stride in zip(feats.shape, feats.stride(), strict=True))
    needed = feats.storage_offset() + last + 1 + -feats.shape[2] % 8
    return needed * feats.element_size() <= feats.untyped_storage().nbytes()


def _record_fetch(feats: Tensor, words: int) -> int:
    """`words` if loads of that many 4-byte words may cover each record of `feats`, else 0."""
    batch, directions, count, height, width = feats.shape
    strides = (feats.stride(0) if batch > 1 else 0, feats.stride(1) if directions > 1 else 0)
    strides += (_position_stride(feats) if height * width > 1 else 0,)
    if feats.stride(2) != 1 or any(stride % (2 * words) for stride in strides) or feats.data_ptr() % (4 * words):
        return 0
    return words if count % (2 * words) == 0 or _padding_is_readable(feats) else 0


def _make_plan(x, feats, dt_weight, A, D, delta_bias, order, directions, softplus, out_dtype) -> _Plan:
    batch, channels, height, width = x.shape
    groups, rank, states = feats.shape[1], dt_weight.shape[2], A.shape[1]
    length, device = height * width, x.get_device()
    if length > _MAX_LENGTH:
        raise ValueError(f"ss2d on CUDA: the map may have at most {_MAX_LENGTH} positions, but is {height} x {width}")
    if states > _MAX_STATES:
        raise ValueError(f"ss2d on CUDA: the state size N may be at most {_MAX_STATES}, but is {states}")

    fetch, used, apart = 0, rank // 2, False
    if feats.dtype != torch.float32 and rank and rank % 2 == 0 and torch.cuda.get_device_capability(device) >= (8, 0):
        # 4-byte words of a record that the tensor cores read: 4 lanes load `fetch` at a time.
        apart = states == 1 and used in (4, 8, 16, 32, 64)
        used += states == 1 and not apart
        wanted = 1 if used <= 4 else 2 if used <= 8 else 4
        fetch = next((w for w in (4, 2, 1) if w <= wanted and _record_fetch(feats, w)), 0)
    lane_words = fetch * -(-used // (4 * fetch)) if fetch else 0
    whole, segment = _segment(height, width, order is not None, states, lane_words)
    tiles = -(-length // (8 * segment))
    couple = 2 * x.element_size()
    bake = order is None and ((height, width) in _baked or len(_baked) < _MAX_BAKED)
    if bake:
        _baked.add((height, width))

    columns = order is None and any(code & 1 for code in directions)
    pitch, x_offsets, y_offsets = _bank_layout(height, width, segment, columns, x.element_size())
    plane = -(-(height * pitch + 32) // 32) * 32
    team_bytes = 4 * plane * (8 + couple)
    teams_of_batch = -(-channels // 8)
    sequence, pairs = _sequence(directions, groups)
    pairs = pairs and length % (8 * segment) == 0
    warps, fronts, teams = _team_shape(batch, teams_of_batch, tiles, states, pairs, team_bytes, device)
    shared = teams * (_links_bytes(warps, fronts, states) + team_bytes)
    spill = shared > cuda_runtime.shared_memory_limit(device)
    if spill:
        shared -= teams * team_bytes
    threads = 32 * warps * fronts * teams
    steady = whole and length % (8 * segment) == 0 and not any(8 * segment * warps % n for n in (height, width))
    blocks_of_batch = -(-teams_of_batch // teams)
    blocks_at_once = max(1, min(512 // threads, cuda_runtime.shared_memory_limit(device) // (shared + 1024)))

    x_stride, f_stride = _position_stride(x), _position_stride(feats)
    typed = {"X": x, "F": feats, "W": dt_weight, "A": A, "D": D, "BIAS": delta_bias}
    baked = {"HEIGHT": height, "WIDTH": width, "PITCH": pitch, "PLANE": plane, "F_STRIDE": f_stride}
    baked |= {"X_STRIDE": x.stride(1), "X_OFFSETS": _packed(x_offsets, 8), "Y_OFFSETS": _packed(y_offsets, 8)}
    # Four copies of the main loop pay where a multiprocessor's warps work on the same ones, or where the loop is short.
    special = whole and states == 1 and (tiles == 1 or 2 * team_bytes > cuda_runtime.shared_memory_limit(device))
    full = channels % (8 * teams) == 0
    macros = (
        *((f"{name}_TYPE", type_code(tensor, absent=0)) for name, tensor in typed.items()),
        *(("OUT_TYPE", TYPE_CODES[out_dtype]), ("RANK", rank), ("NSTATE", states), ("SOFTPLUS", int(softplus))),
        *(("SEG", segment), ("WARPS", warps), ("FRONTS", fronts), ("TEAMS", teams)),
        *(("RING", _ring(warps)), ("LINKS_BYTES", _links_bytes(warps, fronts, states)), ("MIN_BLOCKS", blocks_at_once)),
        *((name, value * bake) for name, value in baked.items()),
        *(("WHOLE", int(whole)), ("SPECIAL", int(special)), ("STEADY", int(steady))),
        *(("ORDER", int(order is not None)), ("FULL", int(full)), ("X_LAYOUT", _x_layout(x) * full)),
        *(("MMA", int(fetch > 0)), ("FETCH", fetch or 1), ("BC_APART", int(apart))),
        *(("OUT_LAYOUT", 2 if is_channels_last(x) else int(width % 2 == 0)), ("SPLIT", int(dt_weight.dtype != feats.dtype))),
        ("SPILL", int(spill)),
    )
    sizes = (
        *(channels, groups, _packed(directions, 4), _packed(sequence, 4), height, width),
        *(x.stride(0), x.stride(1), x_stride, feats.stride(0), feats.stride(1), feats.stride(2), f_stride),
        *(pitch, plane, _packed(x_offsets, 8), _packed(y_offsets, 8)),
        blocks_at_once * cuda_runtime.multiprocessors(device),
    )
    blocks = batch * blocks_of_batch
    return _Plan(
        kernel=cuda_runtime.kernel("ss2d.cu", "ss2d", macros, device),
        blocks=blocks,
        threads=threads,
        shared=shared,
        workspace=blocks * teams * team_bytes if spill else 0,
        sizes=sizes,
    )


def _x_layout(x: Tensor) -> int:
    """The kernel's X_LAYOUT: 1 rows of even length, 2 channels-last, 0 anything."""
    (batch, channels, _, width), step = x.shape, _position_stride(x)
    starts = (x.stride(0) if batch > 1 else 0, x.stride(1) if channels > 1 else 0)
    if step == 1 and width % 2 == 0 and not any(s % 2 for s in starts) and x.data_ptr() % (2 * x.element_size()) == 0:
        return 1
    starts = (starts[0], step)
    if x.stride(1) == 1 and channels % 8 == 0 and not any(s % 8 for s in starts) and x.data_ptr() % 16 == 0:
        return 2
    return 0


def _segment(height: int, width: int, table: bool, states: int, lane_words: int) -> tuple[bool, int]:
    """Whether a lane's consecutive steps stay in one line of the map, and how many they are.

    The fewest estimated instructions win: those per step (more where a segment can turn a corner), and those per tile.
    Long segments need registers: for decays and inputs, and for the features of a tile.
    """
    most = 14 if states == 1 else 8
    if lane_words:
        most = max(4, min(most, 64 // lane_words))
    common, length = gcd(height, width), height * width
    options = [(False, n, 60) for n in (4, 7, 8) if n <= most]
    if not table:
        options += [(True, n, 50) for n in range(4, most + 1) if common % n == 0]
    whole, n, _ = min(options, key=lambda option: -(-length // (8 * option[1])) * (option[2] * option[1] + 90))
    return whole, n


def _sequence(directions: tuple[int, ...], groups: int) -> tuple[list[int], bool]:
    """The order in which the directions are worked on, and whether it is pairs of a direction and its reverse."""
    left, paired = list(range(groups)), []
    while left and directions:
        first = left.pop(0)
        reverse = next((k for k in left if directions[k] == directions[first] ^ 2), None)
        if reverse is None:
            return list(range(groups)), False
        left.remove(reverse)
        paired += [first, reverse]
    return (paired, True) if directions else (list(range(min(groups, _MAX_DIRECTIONS))), False)


def _ring(warps: int) -> int:
    """Slots for states under way from tile to tile: a power of 2, at least warps + 2."""
    return 1 << (warps + 1).bit_length()


def _links_bytes(warps: int, fronts: int, states: int) -> int:
    """Size of the kernel's struct Links."""
    return -(-(fronts * states * _ring(warps) * 64 + 8) // 16) * 16


def _team_shape(batch, teams, tiles, states, pairs, team_bytes, device) -> tuple[int, int, int]:
    """Warps of a front, fronts of a team, and teams of a block: about 14 warps on a multiprocessor."""
    processors, limit = cuda_runtime.multiprocessors(device), cuda_runtime.shared_memory_limit(device)
    most = next(n for n in (14, 6, 2, 1) if n == 1 or _links_bytes(n, 1, states) <= limit // 5)
    resident = max(1, limit // (team_bytes + _links_bytes(2, 2, states)))
    busy = -(-batch * teams // processors)  # teams that each multiprocessor would get
    wanted = -(-14 // min(resident, busy))
    if wanted == 1:
        # One warp is a team; teams of one batch item share its features through the L1 cache, if they are in one block.
        for n in (8, 6, 4, 3, 2):
            if teams % n == 0 and 2 * n * (team_bytes + _links_bytes(1, 1, states)) <= limit:
                return 1, 1, n
        return 1, 1, 1
    fronts = 2 if pairs and states == 1 else 1
    rounds = -(-tiles // min(-(-wanted // fronts), most))
    return -(-tiles // rounds), fronts, 1


def _packed(values, bits: int) -> int:
    """Small numbers in one signed 64-bit integer, the first in the lowest bits."""
    packed = sum(value << (bits * i) for i, value in enumerate(values))
    return packed - 2**64 if packed >= 2**63 else packed


@lru_cache(maxsize=256)
def _bank_layout(height: int, width: int, segment: int, columns: bool, bytes_of_x: int) -> tuple[int, tuple, tuple]:
    """Row pitch, and offsets of the 4 planes of x and of y, with the fewest bank conflicts in shared memory.

    Lane 4*g + j of a warp accesses plane j at the place of step t = (8 * tile + g) * segment, in rows or in columns.
    Eight bytes are served in two halves of a warp from 16 banks, four bytes in one go from 32. Planes start at multiples
    of 32.
    """
    orders = ((height, width, False), (width, height, True)) if columns else ((height, width, False),)

    def places(pitch):
        for lines, line_length, column in orders:
            for tile in range(min(4, -(-height * width // (8 * segment)))):
                steps = [min((8 * tile + g) * segment, lines * line_length - 1) for g in range(8)]
                walked = (divmod(t, line_length) for t in steps)
                yield [step * pitch + line if column else line * pitch + step for line, step in walked]

    def served(place, offsets, banks):
        """How many turns the banks need; distinct places in a bank take turns."""
        counts = {}
        for address in {(j, p + offset) for p in place for j, offset in enumerate(offsets)}:
            counts[address[1] % banks] = counts.get(address[1] % banks, 0) + 1
        return max(counts.values())

    def best_offsets(sampled, banks):
        parts = [part for place in sampled for part in ((place,) if banks == 32 else (place[:4], place[4:]))]
        candidates = [(0, a, b, (a + b) % banks) for a in range(banks) for b in range(a, banks)]
        return min((sum(served(part, offsets, banks) for part in parts), offsets) for offsets in candidates)

    def best(pitch):
        sampled = list(places(pitch))
        y_turns, y_offsets = best_offsets(sampled, 16)
        x_turns, x_offsets = best_offsets(sampled, 32) if bytes_of_x == 2 else (y_turns, y_offsets)
        return 2 * y_turns + x_turns, pitch, x_offsets, y_offsets

    return min(best(pitch) for pitch in (range(width, width + 4) if columns else (width,)))[1:]


LIBRARY.impl("ss2d", ss2d, "CUDA")
