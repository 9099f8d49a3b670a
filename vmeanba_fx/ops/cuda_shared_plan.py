"""Which variant of `cuda/shared_scan.cu` suits a problem: tiles, threads, teams, stages, and their shared memory."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import lcm

MAX_DIRECTIONS = 16
_MAX_TILE = 8192
_MIN_BULK = 2048  # steps of a map from which bulk copies pay


@dataclass(frozen=True)
class Problem:
    """What the choice of a kernel variant depends on."""

    linear: bool
    own_u: bool  # every direction has its own u
    table: bool
    merge: bool
    softplus: bool
    types: tuple[int, int, int, int]  # u, delta (or a), B (or b), C
    batch: int
    groups: int
    states: int
    rank: int
    height: int
    width: int
    codes: tuple[int, ...]
    bulk: bool  # the GPU has bulk copies (sm_90)
    copy: int  # bytes of one asynchronous copy that all arrays' alignment allows, 0 for none

    @property
    def length(self) -> int:
        return self.height * self.width

    @property
    def columns(self) -> bool:
        return any(code & 1 for code in self.codes)

    @property
    def element_sizes(self) -> tuple[int, ...]:
        return tuple(4 if code == 0 else 2 for code in self.types)

    @property
    def directions(self) -> int:
        """The codes as the kernel reads them, four bits each."""
        return sum((code & 7) << (4 * k) for k, code in enumerate(self.codes[:MAX_DIRECTIONS]))


@dataclass(frozen=True)
class Plan:
    """A kernel variant. `parts` blocks share the states of one direction; `rows` and `columns` are sizes of tiles."""

    baked: bool
    merge: bool
    parts: int
    rank: int
    threads: int
    teams: int
    items: int
    stages: int
    pair: int  # states per step
    rescan: bool
    bulk: bool
    loops: bool  # there are more steps than stages
    rows: int
    columns: int
    copy: int
    skew: int
    cap: int
    sum_cap: int
    shared: int


@lru_cache(maxsize=512)
def choose(problem: Problem, baked: bool, shared_limit: int, multiprocessors: int) -> Plan | None:
    """The first of the variants, best first, that fits into shared memory; None if a map cannot be cut into tiles."""
    rank = 1 if problem.rank == 1 else 2 if problem.rank == 2 else 4
    blocks = problem.batch * -(-problem.rank // rank)
    few = blocks * (1 if problem.merge else problem.groups) < multiprocessors // 2
    small = problem.states == 1 and problem.length <= 4096
    in_block = problem.merge and (small or not few)
    for merge in (True, False) if in_block else (False,):
        parts = 1
        if not merge and few:
            wanted = multiprocessors // (blocks * problem.groups)
            parts = max(p for p in range(1, problem.states + 1) if problem.states % p == 0 and p <= max(1, wanted))
        # With many blocks, two per multiprocessor: one computes while the other waits.
        budgets = (shared_limit // 2, shared_limit) if blocks > 2 * multiprocessors else (shared_limit,)
        items = _items(problem.states // parts, problem.length, rank)
        # Whole maps first, then more teams, then more stages.
        sizes = [(budget, _MAX_TILE) for budget in budgets if problem.length <= _MAX_TILE]
        sizes += product(budgets, (_MAX_TILE, 4096, 2048, 1024, 512))
        teams_counts = _team_counts(problem, merge, blocks, multiprocessors)
        plain = baked and not problem.linear and not problem.table and 0 not in problem.types
        twice = plain and items == 16 and problem.states // parts % 2 == 0
        # Whole maps, fetched by a producer: one state a step and three stages suit an H100 (49 us against 52 at batch 128,
        # 56 x 56, N = 16), two states and two stages an H200 (45 against 46).
        produced = merge and problem.bulk and problem.copy == 16 and blocks <= 2 * multiprocessors
        produced = produced and _MIN_BULK <= problem.length <= _MAX_TILE
        pair = 2 if twice and not produced else 1
        # Other blocks on the same multiprocessor, or steps of two states or four ranks, fill the waits as more stages would.
        shallow = pair == 2 or rank == 4 or (problem.states == 1 and blocks > 2 * multiprocessors)
        depths = (2,) if shallow else (3, 2) if twice else (4, 3, 2)
        for (budget, tile), teams, stages in product(sizes, teams_counts, depths):
            plan = _fit(problem, baked, merge, parts, rank, teams, tile, items, stages, pair, budget)
            if plan is not None:
                return plan
    return None


def _items(states: int, length: int, rank: int) -> int:
    """Steps per thread: sixteen spread the cost of a block-wide scan, eight leave more threads to hide waits."""
    return 16 if rank == 1 and length > (1024 if states > 2 else 4096) else 8


def _team_counts(problem: Problem, merge: bool, blocks: int, multiprocessors: int) -> tuple[int, ...]:
    """How many directions a block scans at a time. With blocks to spare, one: other blocks fill the gaps as well. Many ranks
    and states need many registers."""
    if not merge or problem.groups == 1 or problem.rank > 2 or (problem.rank > 1 and problem.states > 1):
        return (1,)
    if blocks > 2 * multiprocessors:
        return (1,)
    return (2, 1) if problem.groups < 4 or problem.length > 1024 else (4, 2, 1)


def _fit(problem, baked, merge, parts, rank, teams, tile, items, stages, pair, shared_limit) -> Plan | None:
    """The plan with these choices, or None if it does not fit into shared memory or a tile cannot hold a line."""
    height, width, length = problem.height, problem.width, problem.length
    states = problem.states // parts
    cut = _cut(problem, tile)
    if cut is None:
        return None
    rows, columns = cut
    used = max(rows, columns * height if problem.columns else 0)
    threads = -(-used // (32 * items)) * 32
    if not baked:
        threads = 1 << (threads - 1).bit_length()  # few variants, each for many sizes
    if threads * teams > 1024:
        return None
    copy = _copy_of_tiles(problem, rows, columns)
    skew = 8 if width % 2 == 0 and height > 1 and (problem.columns or problem.table) else 0
    cap = -(-(threads * items + skew * (max(height, used // width) // 8 + 1)) // 8) * 8
    if not baked:
        cap = -(-cap // 1024) * 1024
    sum_cap = -(-(length + skew * (height // 8 + 1)) // 8) * 8 if merge else cap
    # Bulk copies are for long pieces.
    bulk = problem.bulk and baked and copy == 16 and columns == width and length >= _MIN_BULK
    tiles = max(-(-length // rows), -(-width // columns))
    steps = (-(-problem.groups // teams) if merge else 1) * tiles * states // pair
    stages = min(stages, max(steps, 1 if bulk else 2))
    loops = steps > stages
    if (threads + 32 * (bulk and loops)) * teams > 1024 or (stages == 1 and (loops or not bulk)):
        return None
    front, stage = _bytes_of_step(problem, states, rank, stages, pair)
    shared = teams * (cap * (stages * stage + front) + rank * sum_cap * 4)
    shared += 4 * (problem.groups if merge else 1) * (states + 1)
    fixed = teams * 2 * 4 * (threads // 32 * (pair * rank + pair + 1) + states * rank + stages)
    if shared + fixed > shared_limit - 1024:
        return None
    return Plan(
        *(baked, merge, parts, rank, threads, teams, items, stages, pair),
        *(rank == 1 and items == 8 and pair == 1, bulk, loops),
        *(rows, columns, copy, skew, cap, sum_cap, shared),
    )


def _cut(problem: Problem, tile: int) -> tuple[int, int] | None:
    """Sizes of the pieces of at most `tile` steps that a map is read in: steps along rows, whole columns. None: impossible."""
    height, width, length = problem.height, problem.width, problem.length
    if length <= tile:
        return length, width
    if problem.table:
        return None
    rows, columns = tile, width
    if any(code & 5 == 4 for code in problem.codes):
        whole = lcm(width, 8)  # lines that are read backwards must not be cut
        rows = tile // whole * whole
    rows = rows // 8 * 8
    if problem.columns:
        columns = tile // height
        columns = columns // 8 * 8 if columns >= 8 else columns
    return None if rows == 0 or columns == 0 else (rows, columns)


def _copy_of_tiles(problem: Problem, rows: int, columns: int) -> int:
    """Bytes of one asynchronous copy that suits every tile too; 0 where there is none."""
    width, copy, sizes = problem.width, problem.copy, problem.element_sizes
    while copy >= 4 and any(
        rows * size % copy or (columns != width and (width * size % copy or columns * size % copy)) for size in sizes
    ):
        copy //= 2
    return copy if copy >= max(4, *sizes) else 0


def _bytes_of_step(problem: Problem, states: int, rank: int, stages: int, pair: int) -> tuple[int, int]:
    """Bytes per position in shared memory: of what stays for all states of a direction, and of one stage."""
    size_u, size_delta, size_B, size_C = problem.element_sizes
    if problem.linear:
        return 0, pair * (size_delta + rank * size_B + size_C)
    return -(-stages * pair // states) * (size_delta + rank * size_u), pair * (size_B + size_C)
