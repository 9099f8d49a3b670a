"""Which variant of `cuda/ss2d.cu` suits a problem: segments, warps, fronts, teams, and the layout of shared memory."""

from dataclasses import dataclass
from functools import lru_cache
from math import gcd

MAX_DIRECTIONS = 16  # direction codes travel in one 64-bit integer


@dataclass(frozen=True)
class Problem:
    """What the choice of a kernel variant depends on."""

    batch: int
    channels: int
    height: int
    width: int
    groups: int
    rank: int
    states: int
    directions: tuple[int, ...]
    table: bool  # positions come from an index table
    bytes_of_x: int
    words: int  # 4-byte words that one load of features for the tensor cores may have at most, 0 where they cannot be used

    @property
    def length(self) -> int:
        return self.height * self.width

    @property
    def columns(self) -> bool:
        """Whether any direction walks along columns."""
        return not self.table and any(code & 1 for code in self.directions)


@dataclass(frozen=True)
class Features:
    """How a warp loads features. 4 lanes load `fetch` words (0: no tensor cores) of a record at a time, each `lane_words`
    in all; `apart`: B and C come by loads of their own."""

    fetch: int
    lane_words: int
    apart: bool


@dataclass(frozen=True)
class Stage:
    """x and y of a team in shared memory: pitch of rows and size of a plane, in places of two channels; offsets of 4 planes."""

    pitch: int
    plane: int
    x_offsets: tuple[int, ...]
    y_offsets: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Team:
    """Warps of a front, fronts of a team, teams of a block."""

    warps: int
    fronts: int
    teams: int

    @property
    def threads(self) -> int:
        return 32 * self.warps * self.fronts * self.teams

    @property
    def ring(self) -> int:
        """Slots for states under way from tile to tile: a power of 2, at least warps + 2."""
        return 1 << (self.warps + 1).bit_length()

    def links_bytes(self, states: int) -> int:
        """Size of the kernel's struct Links."""
        return -(-(self.fronts * states * self.ring * 64 + 8) // 16) * 16


@dataclass(frozen=True)
class Plan:
    """A kernel variant. `whole`, `special`, `steady`, `full` are the kernel's macros of these names."""

    features: Features
    stage: Stage
    team: Team
    segment: int
    sequence: tuple[int, ...]  # the order in which the directions are worked on
    whole: bool
    special: bool
    steady: bool
    full: bool
    spill: bool  # x and y are in device memory
    shared: int
    blocks: int
    blocks_at_once: int  # on a multiprocessor

    @property
    def workspace(self) -> int:
        """Bytes of device memory."""
        return self.blocks * self.team.teams * self.stage.bytes if self.spill else 0


def choose(problem: Problem, shared_limit: int, multiprocessors: int) -> Plan:
    features = _features(problem)
    whole, segment = _segment(problem, features.lane_words)
    tile = 8 * segment  # steps
    tiles, even = -(-problem.length // tile), problem.length % tile == 0
    stage = _stage(problem, segment)
    sequence, pairs = _sequence(problem.directions, problem.groups)
    team = _team(problem, tiles, pairs and even, stage.bytes, shared_limit, multiprocessors)
    links = team.teams * team.links_bytes(problem.states)
    spill = links + team.teams * stage.bytes > shared_limit
    shared = links if spill else links + team.teams * stage.bytes
    return Plan(
        features=features,
        stage=stage,
        team=team,
        segment=segment,
        sequence=sequence,
        whole=whole,
        # Four copies of the main loop pay where a multiprocessor's warps work on the same ones, or where the loop is short.
        special=whole and problem.states == 1 and (tiles == 1 or 2 * stage.bytes > shared_limit),
        steady=whole and even and tile * team.warps % problem.height == tile * team.warps % problem.width == 0,
        full=problem.channels % (8 * team.teams) == 0,
        spill=spill,
        shared=shared,
        blocks=problem.batch * -(-_teams_of_batch(problem) // team.teams),
        blocks_at_once=max(1, min(512 // team.threads, shared_limit // (shared + 1024))),
    )


def _teams_of_batch(problem: Problem) -> int:
    return -(-problem.channels // 8)


def _features(problem: Problem) -> Features:
    used, apart = problem.rank // 2, False  # 4-byte words of a record that the tensor cores read
    if not problem.words:
        return Features(0, 0, apart)
    if problem.states == 1:
        apart = used in (4, 8, 16, 32, 64)
        used += not apart
    wanted = 1 if used <= 4 else 2 if used <= 8 else 4
    fetch = min(wanted, problem.words)
    return Features(fetch, fetch * -(-used // (4 * fetch)), apart)


def _segment(problem: Problem, lane_words: int) -> tuple[bool, int]:
    """Whether a lane's consecutive steps stay in one line of the map, and how many they are.

    The fewest estimated instructions win: those per step (more where a segment can turn a corner), and those per tile.
    Long segments need registers: for decays and inputs, and for the features of a tile.
    """
    most = 14 if problem.states == 1 else 8
    if lane_words:
        most = max(4, min(most, 64 // lane_words))
    common = gcd(problem.height, problem.width)
    options = [(False, n, 60) for n in (4, 7, 8) if n <= most]
    if not problem.table:
        options += [(True, n, 50) for n in range(4, most + 1) if common % n == 0]
    whole, n, _ = min(options, key=lambda option: -(-problem.length // (8 * option[1])) * (option[2] * option[1] + 90))
    return whole, n


def _sequence(directions: tuple[int, ...], groups: int) -> tuple[tuple[int, ...], bool]:
    """The order in which the directions are worked on, and whether it is pairs of a direction and its reverse."""
    if not directions:
        return tuple(range(min(groups, MAX_DIRECTIONS))), False
    left, paired = list(range(groups)), []
    while left:
        first = left.pop(0)
        reverse = next((k for k in left if directions[k] == directions[first] ^ 2), None)
        if reverse is None:
            return tuple(range(groups)), False
        left.remove(reverse)
        paired += [first, reverse]
    return tuple(paired), True


def _team(problem: Problem, tiles: int, pairs: bool, team_bytes: int, limit: int, multiprocessors: int) -> Team:
    """About 14 warps on a multiprocessor. `pairs`: a second front may walk the reverse of the first one's direction."""
    states, teams = problem.states, _teams_of_batch(problem)
    most = next(n for n in (14, 6, 2, 1) if n == 1 or Team(n, 1, 1).links_bytes(states) <= limit // 5)
    resident = max(1, limit // (team_bytes + Team(2, 2, 1).links_bytes(states)))
    busy = -(-problem.batch * teams // multiprocessors)  # teams that each multiprocessor would get
    wanted = -(-14 // min(resident, busy))
    if wanted == 1:
        # One warp is a team; teams of one batch item share its features through the L1 cache, if they are in one block.
        for n in (8, 6, 4, 3, 2):
            if teams % n == 0 and 2 * n * (team_bytes + Team(1, 1, n).links_bytes(states)) <= limit:
                return Team(1, 1, n)
        return Team(1, 1, 1)
    fronts = 2 if pairs and states == 1 else 1
    rounds = -(-tiles // min(-(-wanted // fronts), most))
    return Team(-(-tiles // rounds), fronts, 1)


def _stage(problem: Problem, segment: int) -> Stage:
    height, width, element = problem.height, problem.width, problem.bytes_of_x
    pitch, x_offsets, y_offsets = _bank_layout(height, width, segment, problem.columns, element)
    plane = -(-(height * pitch + 32) // 32) * 32
    return Stage(pitch, plane, x_offsets, y_offsets, bytes=4 * plane * (8 + 2 * element))


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
        counts: dict[int, int] = {}
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
