"""Random networks, random choices of sites, random passes: equal to an independent reference, or refused; never wrong.

A network is drawn and captured, then rewritten ``PER_NET`` times: some sites, a variant of the mean, passes left out. The
graph is run after each pass that changed it, at batch 2 and 1, and compared with the reference: that comparison, of one
graph, is a case. CI runs 2,000 of them. A longer run, with other networks each time (about 40 cases each):

    VMEANBA_FUZZ_NETS=1000 nice python -m pytest tests/robustness/test_fuzz.py -s
"""

import dataclasses
import functools
import os
from collections import Counter
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from vmeanba_fx.passes import manager

import vmeanba_fx
from tests.robustness import blocks
from vmeanba_fx import VMeanbaError

LONG = int(os.environ.get("VMEANBA_FUZZ_NETS", "0"))
NETS, PER_NET, CASES = LONG or 60, 12, 2000
PASSES = ("drop_annihilated", "merge_skips", "fuse_ss2d", "join_scans", "channels_last", "flatten_positions", "cleanup")
MEANS = ("direction", "all", "input")
# Rounding, beyond four times that of the model itself in this dtype. LayerNorms over a few channels blow single roundings in
# bfloat16 up to a tenth of the output (with the same weights in float32: 1e-7); a wrong graph is off by about as much as it is.
BOUND = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 0.25}
seen: Counter[str] = Counter()
_check_graph = manager.check_graph


def relative(found, expected):
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-3))


def choices(names):
    """(sites to replace, mean, passes to leave out)."""
    return st.tuples(
        st.lists(st.sampled_from(names), unique=True), st.sampled_from(MEANS), st.lists(st.sampled_from(PASSES), max_size=1)
    )


@settings(
    max_examples=NETS, deadline=None, derandomize=not LONG, database=None, suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],  # a case takes too long for shrinking; nets and choices are small already
)  # fmt: skip
@given(spec=blocks.nets(), data=st.data())
def check(spec, data):
    model = blocks.build(spec)
    exact = blocks.build(dataclasses.replace(spec, dtype=torch.float64))
    exact.load_state_dict(model.state_dict())
    x = blocks.images(spec, 2)

    @functools.cache
    def truth(sites, mean):
        """The reference in float64, and how far the model's own dtype is from it."""
        replaced = dict.fromkeys(sites, mean)
        wanted = blocks.reference(exact, x.double(), replaced)
        return wanted, 0.0 if spec.dtype == torch.float64 else relative(blocks.reference(model, x, replaced), wanted)

    try:
        plan = vmeanba_fx.calibrate(model, [x], score_sites=False)
    except VMeanbaError as error:
        seen["network refused"] += 1
        print(f"refused: {error}")
        return
    names = [s.name for s in plan.sites]
    assert set(names) <= set(blocks.site_names(spec))
    seen["networks"] += 1
    seen["sites"] += len(names)
    seen["sites refused"] += len(blocks.site_names(spec)) - len(names)
    for sites, mean, skipped in data.draw(st.lists(choices(names), min_size=PER_NET, max_size=PER_NET)):
        codes = {manager._code(plan.graph)}

        def compare(gm, name, sites=frozenset(sites), mean=mean if sites else "direction", codes=codes):
            _check_graph(gm, name)
            code = manager._code(gm)
            if code in codes:
                return
            codes.add(code)
            wanted, own = truth(sites, mean)
            for batch in (2, 1):
                with torch.no_grad():
                    error = relative(gm(x[:batch]), wanted[:batch])
                assert error <= 4 * own + BOUND[spec.dtype], f"after {name}: off by {error:.1e} (own {own:.1e}), {sites} {mean}"
            seen["cases"] += 1

        try:
            with mock.patch.object(manager, "check_graph", compare):
                changed = dataclasses.replace(plan, mean=mean)
                changed.apply(skip_passes=skipped, **({"sites": sites} if sites else {"k": 0}))
        except VMeanbaError as error:
            seen["rewriting refused"] += 1
            print(f"refused: {error}")


@pytest.mark.slow
def test_rewritten_networks_are_right_or_refused():
    seen.clear()
    check()
    print(dict(seen))
    if not LONG:
        assert seen["cases"] >= CASES
    assert seen["network refused"] + seen["rewriting refused"] <= 0.02 * seen["cases"]
    assert seen["sites refused"] <= 0.02 * seen["sites"]
