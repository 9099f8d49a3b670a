"""Autograd of the ops. Each backward is an op of its own: a compiled or exported training graph holds it as one node.

`autograd.Function` classes with `setup_context`, registered under the Autograd key: unlike what
`torch.library.register_autograd` makes, they also work under `torch.func.grad`. Forward-mode and second derivatives are
refused with an error.
"""

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.autograd.function import once_differentiable

from .library import LIBRARY

_ops = torch.ops.vmeanba_fx


class SelectiveScan(Function):
    @staticmethod
    def forward(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, out_dtype=None):
        return _below_autograd(_ops.selective_scan, u, delta, A, B, C, D, z, delta_bias, delta_softplus, out_dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.softplus, _ = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        tensors = ctx.saved_tensors  # read once: under activation checkpointing each read recomputes
        grads = _ops.selective_scan_backward.default(grad, *tensors, ctx.softplus)
        return *_for_given(tensors, grads), None, None


class LinearScan(Function):
    @staticmethod
    def forward(a, b, C):
        return _below_autograd(_ops.linear_scan, a, b, C)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _ops.linear_scan_backward.default(grad, *ctx.saved_tensors)


class SharedScan(Function):
    @staticmethod
    def forward(u, delta, A, B, C, delta_bias=None, delta_softplus=False, out_dtype=None):
        return _below_autograd(_ops.shared_scan, u, delta, A, B, C, delta_bias, delta_softplus, out_dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.softplus, _ = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        tensors = ctx.saved_tensors  # read once: under activation checkpointing each read recomputes
        grads = _ops.shared_scan_backward.default(grad, *tensors, ctx.softplus)
        return *_for_given(tensors, grads), None, None


class SharedScan2d(Function):
    @staticmethod
    def forward(u, delta, A, B, C, delta_bias, directions, order, delta_softplus, merge, out_dtype=None):
        arguments = u, delta, A, B, C, delta_bias, directions, order, delta_softplus, merge, out_dtype
        return _below_autograd(_ops.shared_scan2d, *arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.directions, order, ctx.softplus, ctx.merge, _ = inputs
        ctx.save_for_backward(*tensors, order)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        *tensors, order = ctx.saved_tensors
        arguments = ctx.directions, order, ctx.softplus, ctx.merge
        grads = _ops.shared_scan2d_backward.default(grad, *tensors, *arguments)
        return *_for_given(tensors, grads), None, None, None, None, None


class SS2D(Function):
    @staticmethod
    def forward(x, feats, dt_weight, A, D, delta_bias, directions, order, delta_softplus, out_dtype=None):
        arguments = x, feats, dt_weight, A, D, delta_bias, directions, order, delta_softplus, out_dtype
        return _below_autograd(_ops.ss2d, *arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.directions, order, ctx.softplus, _ = inputs
        ctx.save_for_backward(*tensors, order)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        *tensors, order = ctx.saved_tensors
        grads = _ops.ss2d_backward.default(grad, *tensors, ctx.directions, order, ctx.softplus)
        return *_for_given(tensors, grads), None, None, None, None


class BroadcastAdd(Function):
    @staticmethod
    def forward(y, u, D, out_dtype=None):
        return _below_autograd(_ops.broadcast_add, y, u, D, out_dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        y, u, D, _ = inputs
        ctx.y_dtype, ctx.groups = y.dtype, y.shape[1]
        ctx.save_for_backward(u, D)

    @staticmethod
    def backward(ctx, grad):
        u, D = ctx.saved_tensors
        grad = grad.to(torch.promote_types(u.dtype, torch.float32))
        # y was copied to the channels of its group, so its gradient is their sum.
        dy = grad.unflatten(1, (ctx.groups, -1)).sum(2, keepdim=True).to(ctx.y_dtype)
        if D is None:
            return dy, None, None, None
        du = grad * D.to(grad.dtype)[:, None]
        return dy, du.to(u.dtype), (grad * u.to(grad.dtype)).sum((0, 2)).to(D.dtype), None


def _below_autograd(op, *arguments):
    with torch._C._AutoDispatchBelowAutograd():
        return op.default(*arguments)


def _for_given(tensors, grads):
    """The gradients, with None for each argument that was not given."""
    return [None if tensor is None else grad for tensor, grad in zip(tensors, grads, strict=True)]


def _autograd_kernel(op, function: type[Function]):
    """The op under the Autograd key: the Function where a derivative may be asked for, else straight on."""

    def kernel(*arguments):
        wanted = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)
        if wanted or forward_ad._current_level >= 0:
            return function.apply(*arguments)
        return _below_autograd(op, *arguments)

    return kernel


for _name, _function in (
    ("selective_scan", SelectiveScan),
    ("linear_scan", LinearScan),
    ("shared_scan", SharedScan),
    ("shared_scan2d", SharedScan2d),
    ("ss2d", SS2D),
    ("broadcast_add", BroadcastAdd),
):
    LIBRARY.impl(_name, _autograd_kernel(getattr(_ops, _name), _function), "Autograd")
    # torch.func transforms: `apply` finds the transform itself, but only before the dispatcher has unpacked it.
    LIBRARY.impl(_name, _function.apply, "FuncTorchDynamicLayerFrontMode")
