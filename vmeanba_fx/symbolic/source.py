"""Where in the user's code a trace is, and how a value read there is used."""

from __future__ import annotations

import ast
import functools
import linecache
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..capturing import codeswap

_SKIPPED = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep)

# Calls that use a dtype or device without deciding anything: tensor conversions, factories and reductions.
_PASSES_ON = frozenset(
    "to type new_zeros new_ones new_empty new_full new_tensor zeros ones empty full arange linspace rand randn tensor "
    "as_tensor eye zeros_like ones_like empty_like full_like rand_like randn_like sum mean softmax log_softmax".split()
)


def run_model(model: torch.nn.Module, *inputs: Any):
    """Call the model; frames outside of this call are not the model's. (fx would print a return annotation.)"""
    return model(*inputs)


def user_frames() -> Iterator[types.FrameType]:
    """Frames of the traced model's code, innermost first: those outside torch and outside this tracer."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not run_model.__code__:
        if is_user_frame(frame):
            yield frame
        frame = frame.f_back


def is_user_frame(frame: types.FrameType) -> bool:
    """Whether a frame is neither torch's nor this tracer's."""
    filename = frame.f_code.co_filename
    return not filename.startswith(_SKIPPED) and filename != codeswap.FILENAME


def asked_by_user() -> bool:
    """Whether the function that called the caller of this one is the model's code, not torch's."""
    return not sys._getframe(2).f_code.co_filename.startswith(_SKIPPED)


def line_of(frame: types.FrameType, number: int | None = None) -> str:
    """``vmamba.py:1526 `B, D, H, W = x.shape` ``"""
    code = frame.f_code
    number = number or frame.f_lineno
    text = linecache.getline(code.co_filename, number, frame.f_globals).strip()
    shortened = text if len(text) <= 90 else text[:87] + "..."
    return f"{os.path.basename(code.co_filename)}:{number}" + (f" `{shortened}`" if text else "")


def stack_trace(frames: list[types.FrameType]) -> str:
    """The frames as fx keeps them in ``node.stack_trace``, outermost first."""
    lines = []
    for frame in reversed(frames):
        code = frame.f_code
        lines.append(f'  File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}')
        if text := linecache.getline(code.co_filename, frame.f_lineno, frame.f_globals).strip():
            lines.append(f"    {text}")
    return "\n".join(lines)


@functools.lru_cache(maxsize=64)
def _attribute_uses(filename: str, source: str) -> tuple[tuple[ast.Attribute, str], ...]:
    """Every read of ``.dtype`` and ``.device`` in a file, and the name of the function it is handed to, or ""."""
    del filename  # part of the cache key, so that two files with one text do not meet
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return ()
    parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}

    def receiver(node: ast.Attribute) -> str:
        parent = parents.get(node)
        if isinstance(parent, ast.Attribute):  # `x.device.type` is read on, and decided upon there
            return "to" if node.attr == "device" and parent.attr in ("type", "index") else ""
        parent = parents.get(parent) if isinstance(parent, ast.keyword) else parent
        if not isinstance(parent, ast.Call) or parent.func is node:
            return ""
        return parent.func.attr if isinstance(parent.func, ast.Attribute) else getattr(parent.func, "id", "")

    return tuple(
        (node, receiver(node))
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("dtype", "device")
    )


def is_passed_on(frame: types.FrameType, attribute: str, is_leaf: Callable[[object], bool]) -> bool:
    """True where the running line uses ``.dtype``/``.device`` only to hand it on, as ``y.to(x.dtype)`` does.

    Any other use may be a decision that leaves no trace on a proxy (``x.dtype is torch.float16``), so without source
    the answer is False. ``is_leaf``: whether a function becomes one node, so that it decides for itself.
    """
    filename = frame.f_code.co_filename
    lines = linecache.getlines(filename, frame.f_globals)
    if not lines:
        return False

    def harmless(name: str) -> bool:
        return name in _PASSES_ON or is_leaf(frame.f_locals.get(name, frame.f_globals.get(name)))

    uses = [
        harmless(name)
        for node, name in _attribute_uses(filename, "".join(lines))
        if node.attr == attribute and node.lineno <= frame.f_lineno <= (node.end_lineno or node.lineno)
    ]
    return bool(uses) and all(uses)
