"""What the launcher of `cuda/shared_scan.cu` chooses; needs no GPU."""

import itertools

import pytest

from vmeanba_fx.ops import cuda_merged
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
