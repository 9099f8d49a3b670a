"""Whole models on a CPU: the official VMamba, the same weights rewritten, and a ResNet-50.

    python benchmarks/cpu_models.py --official vmamba.py [--threads 2] [--batch 1] [--out benchmarks/results]

"official" is github.com/MzeroMiko/VMamba's vmamba.py as it is, on the path it takes on a CPU by itself: no Triton, no CUDA
extension, so `selective_scan_torch`, a Python loop over time, and cross scan and merge in plain PyTorch. The ResNet-50 is one
of plain PyTorch in channels-last memory, of about as many operations as VMamba-T. The digits model is the trained one of the
examples, whose "official" is the official class with its weights. In bfloat16 the official model runs under autocast (cast to
bfloat16 as a whole it fails), ours in bfloat16 throughout. "packed" is `vmeanba_fx.pack_weights` on top.
"products alone" are the convolutions and matrix products of VMamba's forward, one after another with nothing between them, to
compare with: their work stays, but packing makes it faster, and sites that are replaced need fewer of them.

Numbers first: what claims to be lossless is compared with the official model's outputs (without it, with this package's own
VMamba; in bfloat16 it may be off by twice what the model itself is), and a failure prints no speed. Times are medians of
forwards one after another. "peak" is the most that the CPU allocator held during a forward beyond weights and input.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import vmeanba_fx
from benchmarks.cpu_scan import conditions, error, median, processor, write
from benchmarks.official import load_official
from tests.helpers import make_scan_matter
from vmeanba_fx import models
from vmeanba_fx.cli.arguments import at_least
from vmeanba_fx.ops import cpu_jit

# Largest difference of a lossless graph, relative to the largest output.
TOLERANCE = 1e-4


def bottleneck(inputs: int, width: int, stride: int) -> nn.Module:
    def conv(a: int, b: int, size: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(a, b, size, stride, size // 2, bias=False), nn.BatchNorm2d(b)]

    main = nn.Sequential(
        *conv(inputs, width, 1), nn.ReLU(), *conv(width, width, 3, stride), nn.ReLU(), *conv(width, 4 * width, 1)
    )
    short = nn.Sequential(*conv(inputs, 4 * width, 1, stride)) if inputs != 4 * width else nn.Identity()
    return Residual(main, short)


class Residual(nn.Module):
    def __init__(self, main: nn.Module, short: nn.Module):
        super().__init__()
        self.main, self.short = main, short

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.main(x) + self.short(x))


def resnet50() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(depth):
            layers.append(bottleneck(inputs, width, 2 if block == 0 and width > 64 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


class ChannelsLast(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.contiguous(memory_format=torch.channels_last))


def rewritten(model: nn.Module, images: Tensor) -> dict[str, nn.Module]:
    plan = vmeanba_fx.calibrate(model, [images[:1].expand(2, -1, -1, -1).contiguous()], score_sites=False, progress=False)
    sites = [site.name for site in plan.sites]
    half = plan.apply(sites=sites[len(sites) // 2 :])
    graphs = {"k = 0": plan.apply(0), f"k = {len(sites) - len(sites) // 2}": half, f"k = {len(sites)}": plan.apply(len(sites))}
    return graphs | {f"{name}, packed": vmeanba_fx.pack_weights(gm, len(images)) for name, gm in graphs.items()}


def vmamba_tiny(module, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, Tensor]:
    own = models.vmamba_tiny_s1l8().eval()
    if dtype == torch.float32:  # these weights magnify what bfloat16 rounds away
        make_scan_matter(own)
    return own, getattr(module, "vmamba_tiny_s1l8", models.vmamba_tiny_s1l8)().eval(), torch.randn(1, 3, 224, 224)


def vanilla_vmamba_tiny(module, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, Tensor]:
    """The first version: 16 states, twice the channels, no MLP."""
    own = make_scan_matter(models.vanilla_vmamba_tiny(), out_gain=1.0).eval()
    return own, module.vanilla_vmamba_tiny().eval(), torch.randn(1, 3, 224, 224)


def vmamba_digits(module, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, Tensor]:
    own = models.vmamba_digits(pretrained=True).eval()
    baseline = models.vmamba_digits() if module is models else module.VSSM(**models.factories._SPECS["vmamba_digits"])
    return own, baseline.eval(), torch.randn(1, 1, 32, 32)


class Products(TorchDispatchMode):
    """Keeps the convolutions and matrix products that run in it; calling it runs them again, whatever it is given."""

    KINDS = tuple(getattr(torch.ops.aten, name).default for name in ("convolution", "addmm", "mm", "bmm"))

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict]] = []
        with torch.no_grad(), self:  # inference mode would keep linear and conv2d whole
            model(images)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator in self.KINDS:
            self.calls.append((operator, args, kwargs or {}))
        return operator(*args, **(kwargs or {}))

    def __call__(self, images: Tensor) -> None:
        for operator, args, kwargs in self.calls:
            operator(*args, **kwargs)


MODELS = {build.__name__: build for build in (vmamba_tiny, vanilla_vmamba_tiny, vmamba_digits)}


def measure(build: Callable, module, batch: int, dtype: torch.dtype, seconds: float) -> list[list]:
    torch.manual_seed(0)
    own, baseline, image = build(module, dtype)
    baseline.load_state_dict(own.state_dict())
    images = torch.randn(batch, *image.shape[1:])
    title = "official" if module is not models else "own VMamba, eager"
    runs = {title: (baseline, images)}
    if dtype != torch.float32:
        runs[f"{title}, autocast"] = torch.autocast("cpu", dtype)(baseline.forward), images
    with torch.inference_mode():
        expected = baseline(images)
    runs |= {name: (gm, images.to(dtype)) for name, gm in rewritten(own.to(dtype), images.to(dtype)).items()}
    runs["products alone"] = Products(own, images.to(dtype)), images.to(dtype)
    if build is not vmamba_digits:
        runs["ResNet-50"] = ChannelsLast(resnet50().eval().to(dtype)), images.to(dtype)
    with torch.inference_mode():
        limit = TOLERANCE if dtype == torch.float32 else 2 * error(own(images.to(dtype)), expected)
        exact = {name: error(runs[name][0](images.to(dtype)), expected) for name in ("k = 0", "k = 0, packed")}
        for name, difference in exact.items():
            if not difference < limit:
                raise SystemExit(f"{name} is wrong by {difference:.1e} in {dtype}; no speed is printed")
        rows: list[list[Any]] = []
        for (name, (model, x)), milliseconds in zip(runs.items(), times(list(runs.values()), seconds), strict=True):
            kind = "float32" if x.dtype == torch.float32 and "autocast" not in name else "bfloat16"
            full = name if name == "ResNet-50" else f"{build.__name__}, {name}"
            rows.append([full, kind, batch, milliseconds, peak(model, x) / 2**20, exact.get(name)])
    return [[*row[:4], rows[0][3] / row[3], *row[4:]] for row in rows]  # how many times as fast as the first


def times(runs: list[tuple[Callable, Tensor]], seconds: float) -> list[float]:
    """Median milliseconds of each, the better of two rounds: a slow moment of the machine should not meet one of them alone."""
    rounds = [[median(partial(model, x), seconds / len(runs) / 2) for model, x in runs] for _ in range(2)]
    return [min(pair) for pair in zip(*rounds, strict=True)]


def peak(model: nn.Module, x: Tensor) -> int:
    """The most bytes that were allocated at once during a forward."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = model(x)
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    del out
    return most


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--official", help="path of the official vmamba.py")
    parser.add_argument("--threads", type=at_least(1), default=torch.get_num_threads(), help="intra-op threads of PyTorch")
    parser.add_argument("--batch", type=at_least(1), default=1)
    parser.add_argument("--precision", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["vmamba_tiny", "vmamba_digits"])
    parser.add_argument("--seconds", type=float, default=10.0, help="measuring time for each model and precision")
    parser.add_argument("--without-numba", action="store_true", help="measure the PyTorch code instead of the kernels")
    parser.add_argument("--out", type=Path, help="folder that the table is written to as well")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.without_numba:
        cpu_jit._kernels = lambda: None  # type: ignore[assignment]  # nothing to cache
    module = models
    if options.official:
        if not Path(options.official).is_file():
            parser.error(f"--official {options.official}: no such file")
        module = load_official(options.official, triton=False)

    rows = []
    for name in options.models:
        for precision in options.precision:
            rows += measure(MODELS[name], module, options.batch, getattr(torch, precision), options.seconds)
    headers = ["model", "dtype", "batch", "ms", "times faster", "peak MiB", "difference"]
    formats = ("", "", "d", ".2f", ".1f", ".1f", ".1e")
    text = conditions(options.threads) + "\n\n" + tabulate(rows, headers, tablefmt="github", floatfmt=formats) + "\n"
    print(text, end="")
    if options.out:
        write(
            options.out, f"cpu_models_{processor()}_{'-'.join((*options.models, *options.precision))}_batch{options.batch}",
            options.threads, text,
        )


if __name__ == "__main__":
    main()
