"""Every kernel once on small inputs, without checking results: what compute-sanitizer is pointed at.

for tool in memcheck racecheck initcheck; do compute-sanitizer --tool $tool python3 tests/cuda/driver.py; done
"""

import torch

from vmeanba_fx import ops


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def selective(batch, groups, per_group, states, length, dtype):
    channels = groups * per_group
    u, delta = (normal(batch, channels, length, dtype=dtype) for _ in range(2))
    B, C = (normal(batch, groups, states, length, dtype=dtype) for _ in range(2))
    A, D, bias = -torch.rand(channels, states, device="cuda"), normal(channels), normal(channels)
    out = ops.selective_scan(u, delta, A, B, C, D, None, bias, True, torch.float32)
    torch.ops.vmeanba_fx.selective_scan_backward(out, u, delta, A, B, C, D, None, bias, True)


def maps(batch, groups, rank, states, height, width, dtype, merge, directions, order=None):
    u, delta = normal(batch, 1, rank, height, width, dtype=dtype), normal(batch, groups, height, width, dtype=dtype)
    B, C = (normal(batch, groups, states, height, width, dtype=dtype) for _ in range(2))
    A, bias = -torch.rand(groups, states, device="cuda"), normal(groups)
    ops.shared_scan2d(u, delta, A, B, C, bias, directions, order, True, merge, torch.float32)


def main() -> None:
    half, single = torch.float16, torch.float32
    selective(2, 2, 5, 1, 49, half)
    selective(2, 2, 3, 3, 72, single)
    selective(64, 4, 24, 1, 64, half)
    selective(1, 1, 3, 2, 3000, half)
    maps(2, 4, 1, 1, 9, 7, half, True, [0, 1, 2, 3])
    maps(2, 4, 1, 1, 16, 24, half, True, [0, 1, 2, 3])
    maps(70, 4, 1, 3, 8, 16, single, True, [4, 5, 6, 7])
    maps(70, 2, 3, 2, 14, 14, half, False, [1, 2])
    maps(70, 2, 1, 1, 72, 120, single, True, [3, 2])
    maps(2, 1, 1, 2, 6, 6, half, True, [], torch.randperm(36, device="cuda")[None])
    a, b = torch.rand(2, 2, 3, 40, device="cuda"), normal(2, 2, 2, 3, 40)
    ops.linear_scan(a, b, a)
    ops.broadcast_add(normal(2, 2, 1, 9), normal(2, 6, 9, dtype=half), normal(6))
    ops.broadcast_add(normal(2, 2, 1, 16), normal(2, 6, 16, dtype=half), normal(6))
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
