"""The recurrence h_t = a_t h_{t-1} + b_t, read out as y_t = <C_t, h_t>, in plain operators: chunks that advance together.

All chunks start from a state of zero; their last states are a recurrence over the chunks, which gives the state before
each. Nothing is divided by a product of decays and no sum of exponents is exponentiated: a decay of zero or above one is
as safe as in a loop over time. There are two forms:

`unrolled`  ATen operators alone, which Inductor fuses; their number grows with the logarithm of L. a and b exist for all
            steps, states and channels at once.
`looped`    three loops (torch's scan operator, ONNX's Scan) of about sqrt(L) rounds, so the number of operators is the same
            for every L. a and b exist for one step of every chunk at a time.

Both are called as form(step, inputs, constants, C, R) with inputs (B, K, ..., L) and C (B, K, N, L), and return y (B, K, R, L).
`step(*inputs, *constants) -> (a, b)` gets some of the steps, in the last dim of its inputs, which may have one more dim in
front; a is then (..., B, K, R or 1, N, steps), b (..., B, K, R, N, steps).
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Step = Callable[..., tuple[Tensor, Tensor]]
Form = Callable[[Step, Sequence[Tensor], Sequence[Tensor], Tensor, int], Tensor]

CHUNK = 16  # steps in a chunk of the unrolled form


def looped(step: Step, inputs: Sequence[Tensor], constants: Sequence[Tensor], C: Tensor, R: int) -> Tensor:
    batch, K, N, length = C.shape
    size = math.isqrt(length)  # as many rounds as chunks: both are loops
    chunks = length // size + 1  # never a multiple: the padding is there for every length
    inputs = [_in_chunks(t, size, chunks) for t in inputs]

    def advance(h, product, *now):
        a, b = step(*now)
        return [a * h + b, a * product]

    def next_chunk(h, end, product):
        return [product * h + end, h.clone()]

    def read(h, C, *now):
        a, b = step(*now)
        h = a * h + b
        return [h, _read(h, C)]

    zeros = C.new_zeros(batch, K, R, N, chunks)
    ends, products = (t.movedim(-1, 0) for t in _loop(advance, [zeros, torch.ones_like(zeros)], inputs, constants))
    _, before = _loop(next_chunk, [zeros[..., 0]], [ends, products])
    _, y = _loop(read, [before.movedim(0, -1)], [_in_chunks(C, size, chunks), *inputs], constants)
    return y.movedim(0, -1).flatten(-2)[..., :length]


def _loop(
    body: Callable[..., list[Tensor]], carried: list[Tensor], rows: list[Tensor], constants: Sequence[Tensor] = ()
) -> list[Tensor]:
    """body(*carried, *one of rows, *constants) -> [*carried, *outputs], for each along dim 0 of rows.

    The last carried values, and the outputs stacked. The operator itself: its Python front end goes through Dynamo, which
    makes sizes symbolic that it has seen to differ, in another model even.
    """
    carried, rows = ([t.contiguous() for t in tensors] for tensors in (carried, rows))
    return torch.ops.higher_order.scan(body, carried, rows, tuple(constants))


def _in_chunks(rows: Tensor, size: int, chunks: int) -> Tensor:
    """(..., L) -> (size, ..., chunks): what a loop over the steps of all chunks reads."""
    padded = F.pad(rows, (0, size * chunks - rows.shape[-1]))
    return padded.unflatten(-1, (chunks, size)).movedim(-1, 0)


def unrolled(step: Step, inputs: Sequence[Tensor], constants: Sequence[Tensor], C: Tensor, R: int) -> Tensor:
    """Time goes first: a step is then one contiguous block, whatever the layout of the model around it."""
    *inputs, C = (t.movedim(-1, 0).unsqueeze(-1) for t in (*inputs, C))
    return _read(_states(*step(*inputs, *constants)), C).squeeze(-1).movedim(0, -1)


def _read(h: Tensor, C: Tensor) -> Tensor:
    """h (..., B, K, R, N, steps), C (..., B, K, N, steps) -> y (..., B, K, R, steps)."""
    return (h * C.unsqueeze(-3)).sum(-2)


def _states(a: Tensor, b: Tensor) -> Tensor:
    """All h_t along dim 0. `a` may have size 1 where `b` has more."""
    length = b.shape[0]
    if length == 1:
        return b
    if length <= CHUNK:
        return torch.cat(_unrolled(a.split(1, 0), b.split(1, 0)), 0)
    chunks = -(-length // CHUNK)
    missing = chunks * CHUNK - length
    if missing:  # steps after the last one, which nobody reads
        a, b = (torch.cat([t, torch.zeros_like(t[:missing])]) for t in (a, b))
    a_steps, b_steps = (t.unflatten(0, (chunks, CHUNK)).split(1, 1) for t in (a, b))  # each (chunks, 1, ...)
    states, products = _unrolled(a_steps, b_steps), _products(a_steps)
    ends = _states(products[-1], states[-1])
    before = torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])  # the state before each chunk
    h = torch.cat(states, 1) + torch.cat(products, 1) * before
    return h.flatten(0, 1)[:length]


def _unrolled(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    states = [b[0]]
    for decay, drive in zip(a[1:], b[1:], strict=True):
        states.append(decay * states[-1] + drive)
    return states


def _products(a: Sequence[Tensor]) -> list[Tensor]:
    products = [a[0]]
    for decay in a[1:]:
        products.append(products[-1] * decay)
    return products
