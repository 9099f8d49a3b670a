"""Random arguments for each op, with which its result depends on every one of them.

The decays are spread over (0, 1) and the scan term is as large as the skip: at a model's usual initialisation it is a
thousandth of it, and tests would pass whatever the scan does.
"""

import torch
from torch import Tensor


class Maker:
    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64):
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def decay(self, *shape: int) -> Tensor:
        """A, between about -3 and -0.1."""
        return -torch.exp(0.8 * torch.randn(*shape, generator=self.generator, dtype=torch.float64)).to(self.dtype)


def selective_scan(batch, K, D, N, L, dtype=torch.float64, seed=0, full=True, softplus=True) -> dict:
    make = Maker(seed, dtype)
    given = {
        "u": make.normal(batch, K * D, L),
        "delta": make.normal(batch, K * D, L),
        "A": make.decay(K * D, N),
        "B": make.normal(batch, K, N, L),
        "C": make.normal(batch, K, N, L),
    }
    if not softplus:
        given["delta"] = given["delta"].abs()
    if full:
        given |= {"D": make.normal(K * D), "z": make.normal(batch, K * D, L), "delta_bias": make.normal(K * D)}
    return given | {"delta_softplus": softplus}


def linear_scan(batch, K, R, N, L, dtype=torch.float64, seed=0) -> dict:
    make = Maker(seed, dtype)
    a = torch.rand(batch, K, N, L, generator=make.generator, dtype=torch.float64).to(dtype)
    return {"a": a, "b": make.normal(batch, K, R, N, L), "C": make.normal(batch, K, N, L)}


def shared_scan(batch, K, R, N, L, dtype=torch.float64, seed=0, bias=True) -> dict:
    make = Maker(seed, dtype)
    return {
        "u": make.normal(batch, K, R, L),
        "delta": make.normal(batch, K, L),
        "A": make.decay(K, N),
        "B": make.normal(batch, K, N, L),
        "C": make.normal(batch, K, N, L),
        "delta_bias": make.normal(K) if bias else None,
        "delta_softplus": True,
    }


def orders(K: int, L: int, seed: int = 0) -> Tensor:
    """A table (K, L) of random permutations."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(L, generator=generator) for _ in range(K)])


def shared_scan2d(batch, directions, R, N, H, W, dtype=torch.float64, seed=0, own_u=True, merge=True) -> dict:
    """`directions`: codes, or an int K for K random orders."""
    make = Maker(seed, dtype)
    K = directions if isinstance(directions, int) else len(directions)
    return {
        "u": make.normal(batch, K if own_u else 1, R, H, W),
        "delta": make.normal(batch, K, H, W),
        "A": make.decay(K, N),
        "B": make.normal(batch, K, N, H, W),
        "C": make.normal(batch, K, N, H, W),
        "delta_bias": make.normal(K),
        **_order(directions, H, W),
        "delta_softplus": True,
        "merge": merge,
    }


def ss2d(batch, directions, D, R, N, H, W, dtype=torch.float64, seed=0, full=True) -> dict:
    make = Maker(seed, dtype)
    K = directions if isinstance(directions, int) else len(directions)
    return {
        "x": make.normal(batch, D, H, W),
        "feats": make.normal(batch, K, R + 2 * N, H, W),
        "dt_weight": make.normal(K, D, R),
        "A": make.decay(K * D, N),
        "D": make.normal(D) if full else None,
        "delta_bias": make.normal(K * D) if full else None,
        **_order(directions, H, W),
        "delta_softplus": True,
    }


def broadcast_add(batch, K, D, L, dtype=torch.float64, seed=0, skip=True) -> dict:
    make = Maker(seed, dtype)
    D_weights = make.normal(K * D) if skip else None
    return {"y": make.normal(batch, K, 1, L), "u": make.normal(batch, K * D, L), "D": D_weights}


def _order(directions, H: int, W: int) -> dict:
    if isinstance(directions, int):
        return {"directions": [], "order": orders(directions, H * W)}
    return {"directions": directions, "order": None}


def doubled(arguments: dict) -> dict:
    """The same values in float64, for the reference."""
    return {name: x.double() if _is_float(x) else x for name, x in arguments.items()}


def strided(arguments: dict) -> dict:
    """The same values in tensors whose last dim is not contiguous and that begin inside a larger storage."""

    def spread(x: Tensor) -> Tensor:
        larger = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"), dtype=x.dtype)
        view = larger[..., 1::2]
        view.copy_(x)
        return view

    return {name: spread(x) if _is_float(x) else x for name, x in arguments.items()}


def with_grad(arguments: dict) -> tuple[dict, list[Tensor]]:
    """Copies that require grad, and the list of them."""
    copies = {name: x.clone().requires_grad_() if _is_float(x) else x for name, x in arguments.items()}
    return copies, [x for x in copies.values() if _is_float(x)]


def _is_float(x) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
