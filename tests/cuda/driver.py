"""Every kernel once on small inputs, without checking results: what compute-sanitizer is pointed at.

    for tool in memcheck initcheck racecheck synccheck; do compute-sanitizer --tool $tool python3 tests/cuda/driver.py; done
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


def map_scan(batch, D, height, width, rank, states, dtype, padding=0, K=4, order=None, channels_last=False):
    x = normal(batch, D, height, width, dtype=dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    count = rank + 2 * states  # as one GEMM writes them: the features of a position together
    feats = normal(batch, height, width, K, count + padding, dtype=dtype)[..., :count].permute(0, 3, 4, 1, 2)
    weight, A = normal(K, D, rank, dtype=dtype), -torch.rand(K * D, states, device="cuda")
    codes = list(range(K)) if order is None else []
    ops.ss2d(x, feats, weight, A, normal(D), normal(K * D), codes, order, True, torch.float32)


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
    maps(140, 4, 1, 4, 24, 24, half, True, [0, 1, 2, 3])
    maps(3, 4, 1, 16, 56, 40, half, True, [0, 1, 2, 3])
    maps(2, 4, 2, 1, 20, 30, half, False, [0, 1, 2, 3])
    maps(1, 2, 1, 4, 96, 120, torch.bfloat16, True, [0, 3])
    maps(1, 2, 1, 2, 128, 96, half, True, [0, 3])
    maps(3, 4, 1, 1, 56, 40, half, True, [0, 1, 2, 3])
    maps(2, 2, 1, 1, 28, 36, single, True, [3, 1])
    map_scan(2, 24, 14, 14, 6, 1, half)
    map_scan(2, 17, 9, 7, 6, 1, single)
    map_scan(2, 16, 16, 16, 4, 1, torch.bfloat16, padding=2)
    map_scan(2, 9, 14, 28, 6, 4, half)
    map_scan(1, 8, 96, 80, 6, 1, half)
    map_scan(3, 40, 8, 8, 24, 1, half, padding=6, channels_last=True)
    map_scan(2, 13, 9, 7, 6, 1, single, channels_last=True)
    map_scan(1, 8, 6, 6, 4, 1, half, K=2, order=torch.stack([torch.randperm(36, device="cuda") for _ in range(2)]))
    a, b = torch.rand(2, 2, 3, 40, device="cuda"), normal(2, 2, 2, 3, 40)
    ops.linear_scan(a, b, a)
    ops.broadcast_add(normal(2, 2, 1, 9), normal(2, 6, 9, dtype=half), normal(6))
    ops.broadcast_add(normal(2, 2, 1, 16), normal(2, 6, 16, dtype=half), normal(6))
    ops.broadcast_add(normal(2, 1, 1, 9), normal(2, 9, 16, dtype=half).transpose(1, 2), normal(16))
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
