"""The bare recurrence h_t = a_t h_{t-1} + b_t in plain PyTorch, in two memory layouts.

Neither divides by a cumulative product nor takes the exponential of a sum, so both are as safe as the loop itself: a
decay of exactly zero, a decay above one and a sequence of 65,536 steps are all fine.

`scan_steps_`  time is the outermost dim: each step is one wide vector, at one fused multiply-add per element. For many
               rows.
`scan_rows`    time is the innermost dim. For few rows, where a step would be too short a vector: the window of steps
               that an element has absorbed doubles (1, 2, 4, ... W), then blocks of W steps follow one another.
"""

from functools import cache

import torch
from torch import Tensor

# Found by timing: a block step on fewer elements is dominated by the cost of the call, and so is a row of fewer steps.
_BLOCK_ELEMENTS = 8192
_SHORTEST_WINDOW = 32
Steps = list[Tensor] | tuple[Tensor, ...]


def scan_steps_(a: Steps, b: Steps) -> None:
    """Run the recurrence in place, b[t] becoming h_t, from h_{-1} = 0: `a`, `b` hold one tensor per step."""
    if len(b) < 2:
        return
    if b[0].device.type == "cpu" and _foreach_is_sequential():
        torch._foreach_addcmul_(b[1:], a[1:], b[:-1])
    else:
        for t in range(1, len(b)):
            b[t].addcmul_(a[t], b[t - 1])


@cache
def _foreach_is_sequential() -> bool:
    """True where `_foreach_addcmul_` works through its list in order, so that each entry sees the one before it.

    On the CPU it is a plain loop in C++, and one call then runs all steps. That order is not documented, so it is tried
    once, on a chain long and wide enough that any other order shows; where it fails, the steps are issued one by one.
    """
    with torch.inference_mode(False), torch.no_grad():
        chain = torch.ones(64, 40_000)
        steps = list(chain.unbind(0))
        decay = list(torch.full_like(chain, 0.5).unbind(0))
        torch._foreach_addcmul_(steps[1:], decay[1:], steps[:-1])
        expected = 2 - 0.5 ** torch.arange(64.0)
        return torch.equal(chain, expected[:, None].expand_as(chain))


def scan_rows(a: Tensor, b: Tensor, *, spoil: bool = False, reverse: bool = False) -> Tensor:
    """The states h along the last dim, in a fresh tensor of b's shape.

    `a` broadcasts against `b` in the dims before the last. With `spoil`, `a` and `b` are contiguous work space that may
    be overwritten, and the result may be `b`. With `reverse`, h_t = a_t h_{t+1} + b_t.
    """
    length = b.shape[-1]
    window = _window(length, b.numel() // max(length, 1))
    free_a: list[Tensor] = []
    free_b: list[Tensor] = []

    def replace(old: Tensor, free: list[Tensor]) -> Tensor:
        new = free.pop() if free else torch.empty(old.shape, dtype=old.dtype, device=old.device)
        if spoil:
            free.append(old)
        return new

    width = 1
    while width < window:
        # Now b[t] is h_t with all before step t-width+1 taken as zero, and a[t] the decay over those width steps. (For
        # the first width-1 steps a is something else, but there it meets only the zero state before the first step.)
        near, far, edge = _halves(width, reverse)
        a_now, b_now = a, b
        b = replace(b_now, free_b)
        torch.addcmul(b_now[near], a_now[near], b_now[far], out=b[near])
        b[edge].copy_(b_now[edge])
        if 2 * width < length:
            a = replace(a_now, free_a)
            torch.mul(a_now[near], a_now[far], out=a[near])
        spoil = True
        width *= 2
    if window < length or not spoil:
        b = b if spoil else b.clone(memory_format=torch.contiguous_format)
        _scan_blocks_(a, b, window, reverse)
    return b


def _halves(width: int, reverse: bool) -> tuple:
    """Slices of the last dim: where a neighbour `width` steps before exists, that neighbour, where there is none."""
    if reverse:
        return (..., slice(None, -width)), (..., slice(width, None)), (..., slice(-width, None))
    return (..., slice(width, None)), (..., slice(None, -width)), (..., slice(None, width))


def _scan_blocks_(a: Tensor, b: Tensor, window: int, reverse: bool) -> None:
    """The recurrence in blocks of `window` steps, each element seeing the one `window` steps before it."""
    length = b.shape[-1]
    whole = length - length % window
    sizes = [window] * (whole // window) + [length - whole] * (whole < length)
    if reverse:
        sizes.reverse()
    steps_a, steps_b = list(a.split(sizes, -1)), list(b.split(sizes, -1))
    if reverse:
        steps_a.reverse()
        steps_b.reverse()
    if whole == length:
        scan_steps_(steps_a, steps_b)
        return
    last_a, last_b = steps_a.pop(), steps_b.pop()
    scan_steps_(steps_a, steps_b)
    rest = last_b.shape[-1]
    last_b.addcmul_(last_a, steps_b[-1][..., -rest:] if reverse else steps_b[-1][..., :rest])


def _window(length: int, rows: int) -> int:
    """How many steps an element absorbs by doubling before the block steps begin: a power of two, at most `length`."""
    window = 1
    while 2 * window <= length and (window < _SHORTEST_WINDOW or window * rows < _BLOCK_ELEMENTS):
        window *= 2
    return window
