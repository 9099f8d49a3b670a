"""What the launchers of the scans' CUDA kernels choose; needs no GPU."""

import itertools

import pytest

from vmeanba_fx.ops import cuda_merged, cuda_ss2d_plan
from vmeanba_fx.ops.cuda_shared_plan import Problem, choose

LIMIT, PROCESSORS = 232448, 132  # of an H100


def problem(batch, height, width, states=1, rank=1, half=True, **changed):
    given = {
        **dict.fromkeys(("linear", "own_u", "table"), False), **dict.fromkeys(("merge", "softplus", "bulk"), True),
        "types": (int(half),) * 4, "batch": batch, "groups": 4, "states": states, "rank": rank, "height": height,
        "width": width, "codes": (0, 1, 2, 3), "copy": 16,
    }  # fmt: skip
    return Problem(**given | changed)


@pytest.mark.parametrize("half", [True, False])
def test_every_plan_can_be_launched(half):
    sizes = [(1, 1), (7, 7), (14, 14), (56, 56), (33, 70), (128, 128), (256, 256), (1, 65536), (1000, 3)]
    for size, batch, states, rank in itertools.product(sizes, (1, 16, 128, 600), (1, 3, 16), (1, 4)):
        for baked, linear, merge in ((True, False, True), (False, False, False), (True, True, False)):
            asked = problem(batch, *size, states, rank, half, linear=linear, own_u=linear, merge=merge)
            plan = choose(asked, baked, LIMIT, PROCESSORS)
            assert plan.threads % 32 == 0 and (plan.threads + 32 * (plan.bulk and plan.loops)) * plan.teams <= 1024
            assert plan.threads * plan.items >= plan.rows and plan.shared < LIMIT
            assert states % (plan.parts * plan.pair) == 0 and (plan.stages > 1 or plan.bulk)


def test_what_goes_to_the_merged_scan():
    def merged(*size, baked=True, **changed):
        return cuda_merged.choose(problem(128, *size, **changed), baked, LIMIT)

    wide = merged(56, 56)
    assert (wide.items, wide.threads, wide.order) == (8, 416 + 64, (1, 3, 0, 2)), "along columns first"
    assert merged(56, 56, half=False, own_u=True).shared < LIMIT
    assert merged(60, 56).items == 4, "eight would cut columns"
    assert merged(32, 32).items == 4, "eight would leave few threads"
    assert merged(56, 56, groups=2, codes=(3, 1)).order == (1, 0)
    assert merged(54, 56, groups=2, codes=(2, 0)), "rows may be cut anywhere"
    others = [
        {"baked": False}, {"states": 2}, {"rank": 2}, {"groups": 5, "codes": (0,) * 5},
        {"copy": 8}, {"codes": (0, 1, 2, 7)}, {"groups": 1, "codes": (0,)}, {"codes": (0, 1, 1, 3)}, {"merge": False},
        {"bulk": False}, *({name: True} for name in ("linear", "table")),
    ]  # fmt: skip
    assert not any(merged(56, 56, **changed) for changed in others)
    assert not any(merged(*size) for size in ((14, 14), (54, 56), (128, 128))), "short, cut columns, too large"


def test_what_the_shapes_of_vmamba_get():
    deep = choose(problem(128, 56, 56, 16), True, LIMIT, PROCESSORS)
    assert (deep.merge, deep.teams, deep.pair, deep.stages) == (True, 2, 1, 3)
    assert choose(problem(128, 56, 56, 16, bulk=False), True, LIMIT, PROCESSORS).pair == 2, "two states a step"
    assert choose(problem(128, 56, 56, 16, half=False), True, LIMIT, PROCESSORS).pair == 1
    ranks = choose(problem(128, 56, 56, 16, rank=4, merge=False, own_u=True), True, LIMIT, PROCESSORS)
    assert (ranks.rank, ranks.stages) == (4, 2)
    few = choose(problem(16, 128, 128, 16), True, LIMIT, PROCESSORS)
    assert (few.merge, few.parts, few.pair) == (False, 2, 2), "128 blocks, each with half of the states of a direction"


def map_problem(batch, channels, side, rank, states=1, **changed):
    given = {
        "batch": batch, "channels": channels, "height": side, "width": side, "groups": 4, "rank": rank, "states": states,
        "directions": (0, 1, 2, 3), "table": False, "bytes_of_x": 2, "words": 4,
    }  # fmt: skip
    return cuda_ss2d_plan.Problem(**given | changed)


def test_every_plan_of_ss2d_can_be_launched():
    for side, batch, channels, states in itertools.product((1, 7, 14, 33, 56, 128), (1, 128), (8, 100, 768), (1, 16, 128)):
        for changed in ({}, {"table": True, "directions": ()}, {"bytes_of_x": 4, "words": 0}, {"directions": (0, 1, 1, 0)}):
            asked = map_problem(batch, channels, side, 12, states, **changed)
            plan = cuda_ss2d_plan.choose(asked, LIMIT, PROCESSORS)
            assert plan.team.threads <= 1024 and plan.shared <= LIMIT and plan.blocks_at_once >= 1
            assert plan.blocks * plan.team.teams * 8 >= batch * channels, "every channel is in a team"
            assert plan.team.ring >= plan.team.warps + 2 and sorted(plan.sequence) == [0, 1, 2, 3]
            assert plan.spill == (plan.workspace > 0), "what does not fit into shared memory is in device memory"
            assert not plan.whole or side % plan.segment == 0, "no segment turns a corner"


def test_what_the_maps_of_vmamba_get():
    large, middle, small = (
        cuda_ss2d_plan.choose(map_problem(128, *sizes), LIMIT, PROCESSORS)
        for sizes in ((192, 56, 6), (384, 28, 12), (768, 14, 24))
    )
    assert (large.team.warps, large.team.fronts, large.segment, large.blocks_at_once) == (7, 2, 14, 1)
    assert (middle.team.warps, middle.team.fronts, middle.blocks_at_once) == (2, 2, 4)
    assert (small.team.warps, small.team.teams) == (1, 8), "one warp a team, eight teams share their features"
    assert [plan.features.fetch for plan in (large, middle, small)] == [1, 2, 4]
    assert large.sequence == (0, 2, 1, 3), "each direction with its reverse"
    assert cuda_ss2d_plan.choose(map_problem(4, 96, 256, 6), LIMIT, PROCESSORS).spill
