"""Compiling and launching the kernels of `cuda/*.cu`: NVRTC through CuPy, on torch's device and current stream.

    kernel = cuda_runtime.kernel("tail.cu", "broadcast_add", (("U_TYPE", 1), ("VECTOR", 1)), device=0)
    kernel.launch(grid=(blocks, 1, 1), threads=256, shared=0, fields=(y.data_ptr(), out.data_ptr(), length))

Every kernel takes one struct by value, all of whose fields are 64-bit integers: pointers, sizes and strides. The host
packs it in one go and hands it to cuLaunchKernel, without CuPy's handling of single arguments.

A kernel is compiled at first use for the device's own architecture. CuPy keeps the binary on disk (CUPY_CACHE_DIR,
~/.cupy/kernel_cache), this module keeps the loaded function per (file, kernel, macros, device). Headers named by
`#include "..."` are pasted into the source, so that a change in one is a change of CuPy's cache key.
Importing this module imports neither CuPy nor CUDA.
"""

import threading
import warnings
from array import array
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

Macros = tuple[tuple[str, int | str], ...]

#: How the kernels name element types (see `cuda/common.cuh`).
TYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_kernels: dict[tuple[str, str, Macros, int], "Kernel"] = {}
_compile_lock = threading.RLock()
_thread = threading.local()


class KernelError(RuntimeError):
    """A kernel could not be compiled, loaded or launched."""


@lru_cache(maxsize=1)
def _cupy():
    """The CuPy module, or None (with one warning) where it cannot be imported."""
    try:
        return import_module("cupy")
    except ImportError as error:
        extra = f"cuda{(torch.version.cuda or '13').split('.')[0]}"
        warnings.warn(
            f"CuPy cannot be imported ({error}): scans on the GPU fall back to slower PyTorch code. "
            f"For the CUDA kernels: pip install vmeanba-fx[{extra}]",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def available() -> bool:
    """Whether kernels can be compiled here. The first call imports CuPy; if that fails it warns, once per process."""
    return _cupy() is not None


def source(file: str) -> str:
    """The text of `cuda/<file>` with its `#include "..."` lines replaced by the files they name."""
    folder = _source_folder()
    lines = []
    for line in (folder / file).read_text(encoding="utf-8").splitlines():
        if line.startswith('#include "'):
            lines.append((folder / line.split('"')[1]).read_text(encoding="utf-8"))
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def kernel(file: str, name: str, macros: Macros, device: int) -> "Kernel":
    """The `extern "C"` kernel `name` of `cuda/<file>`, compiled with `-D` macros for the GPU of index `device`."""
    key = (file, name, macros, device)
    found = _kernels.get(key)
    if found is None:
        with _compile_lock:
            found = _kernels.get(key)
            if found is None:
                found = _kernels[key] = Kernel(*key)
    return found


@lru_cache(maxsize=16)
def shared_memory_limit(device: int) -> int:
    """Bytes of shared memory that one block may use on the GPU of index `device`."""
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stubs leave this one out
    return properties.shared_memory_per_block_optin


@lru_cache(maxsize=16)
def multiprocessors(device: int) -> int:
    """Number of multiprocessors of the GPU of index `device`."""
    return torch.cuda.get_device_properties(device).multi_processor_count


class Kernel:
    """One compiled kernel on one device. Made by `kernel()`."""

    __slots__ = ("_function", "_launch_kernel", "_pointer", "device", "name")

    def __init__(self, file: str, name: str, macros: Macros, device: int):
        cupy = _cupy()
        if cupy is None:
            raise KernelError(f"{name} needs CuPy: pip install vmeanba-fx[cuda13]")
        if torch.cuda.is_current_stream_capturing():
            raise KernelError(
                f"{name} is used for the first time inside a CUDA graph capture, where it cannot be compiled: "
                "run the model once before capturing"
            )
        options = ("-std=c++17", *(f"-D{key}={value}" for key, value in macros))
        with cupy.cuda.Device(device):
            try:
                function = cupy.RawModule(code=source(file), options=options).get_function(name)
                static = function.shared_size_bytes
            except Exception as error:
                raise KernelError(f"cuda/{file} does not compile with {' '.join(options)}: {error}") from error
            # The limit only: what a launch asks for decides how many blocks fit, not this.
            function.max_dynamic_shared_size_bytes = shared_memory_limit(device) - static
            self._function = function.kernel  # keeps the module loaded
        self._pointer = self._function.ptr
        self._launch_kernel = cupy.cuda.driver.launchKernel
        self.device = device
        self.name = name

    def launch(self, grid: tuple[int, int, int], threads: int, shared: int, fields: tuple[int, ...]) -> None:
        """Launch on torch's current stream of the kernel's device. `fields`: those of the kernel's struct, in order."""
        device = self.device
        if torch.cuda.current_device() != device:
            with torch.cuda.device(device):
                self._launch(grid, threads, shared, fields)
            return
        if not getattr(_thread, "has_context", False):
            # A new thread may run torch code on cached memory before anything made the CUDA context current in it.
            _cupy().cuda.Device(device).use()
            _thread.has_context = True
        self._launch(grid, threads, shared, fields)

    def _launch(self, grid, threads, shared, fields):
        # Slot 0 is the array of argument addresses that cuLaunchKernel wants (one argument), the struct follows it.
        packed = array("q", (0, *fields))
        address = packed.buffer_info()[0]
        packed[0] = address + 8
        try:
            self._launch_kernel(
                self._pointer, *grid, threads, 1, 1, shared, torch._C._cuda_getCurrentRawStream(self.device), address, 0
            )
        except Exception as error:
            raise KernelError(
                f"{self.name} could not be launched with grid {grid}, {threads} threads and {shared} bytes of shared "
                f"memory: {error}"
            ) from error


@lru_cache(maxsize=1)
def _source_folder() -> Path:
    """`vmeanba_fx/cuda` in a wheel; `cuda` beside the package in an editable install or a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "cuda", package.parent / "cuda"):
        if (folder / "common.cuh").is_file():
            return folder
    raise KernelError(f"the CUDA sources (common.cuh and others) are not in {package / 'cuda'}: reinstall vmeanba-fx")
