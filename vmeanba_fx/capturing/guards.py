"""The input guards of ``torch.export``: which inputs a captured graph takes, and which of its guards are needless.

A graph made with ``ExportedProgram.module()`` calls ``_guards_fn`` first, which fails with an ``AssertionError`` where
the trace decided something that would be otherwise for these inputs. Most guards are needed. Some only record that a
tensor had to be copied to be viewed, which is right for every input; those are dropped where the numbers prove it.
"""

from __future__ import annotations

import ast
import logging
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.export import ExportedProgram

log = logging.getLogger(__name__)
_PREFIX = "Guard failed: "
_MOST = 16  # guards dropped from one graph; more would mean that this is not about copies


def failed_guard(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The first guard of ``gm`` that these inputs violate, as text; empty where they pass."""
    guards = getattr(gm, "_guards_fn", None)
    if guards is None:
        return ""
    try:
        guards(*pytree.arg_tree_leaves(*args, **kwargs))
    except AssertionError as error:
        return str(error).removeprefix(_PREFIX)
    return ""


def drop_needless_guards(
    program: ExportedProgram, gm: fx.GraphModule, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[fx.GraphModule, str]:
    """``gm`` without the guards that refuse these inputs, if the graph gives what ``run(*args, **kwargs)`` gives.

    Returns the graph, as it was where the outputs differ, and the guard that still refuses the inputs, if any.
    """
    guard = failed_guard(gm, args, kwargs)
    if not guard or not _agree(run(*args, **kwargs), program.module(check_guards=False)(*args, **kwargs)):
        return gm, guard
    for _ in range(_MOST):
        # The list is private to torch; without it the graph is merely refused more often than it needs to be.
        codes = getattr(program, "_guards_code", [])
        kept = [code for code in codes if _readable(code) != guard]
        if len(kept) == len(codes):
            break
        log.info("dropped a guard that no number depends on: %s", guard)
        program._guards_code = kept
        gm = program.module()
        guard = failed_guard(gm, args, kwargs)
        if not guard:
            break
    return gm, guard


def _readable(code: str) -> str:
    """A guard as its error message shows it: ``L['x'].size()[0]`` is ``x.size()[0]``."""
    return ast.unparse(ast.parse(re.sub(r"L\['(\w+)'\]", r"\1", code).replace("\n", ""), mode="eval"))


def _agree(expected: Any, found: Any) -> bool:
    pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True)
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)
        for a, b in pairs
        if isinstance(a, Tensor)
    )


def drop_implied_bounds(gm: fx.GraphModule) -> None:
    """Erase runtime assertions ``size >= number`` of sizes of which another one asserts the exact value.

    Such a size is that of a selection by a mask, say ``42 * batch``. Its bound follows from the batches that
    ``torch.export`` thinks of, from two on, and refuses batch 1.
    """
    checks = [(n, n.args[0]) for n in gm.graph.nodes if n.target is torch.ops.aten._assert_scalar.default]
    checks = [(node, what) for node, what in checks if isinstance(what, fx.Node)]
    pinned = {side for _, what in checks if what.target is operator.eq for side in what.args}
    for node, what in checks:
        if what.target is operator.ge and what.args[0] in pinned and isinstance(what.args[1], int):
            gm.graph.erase_node(node)
