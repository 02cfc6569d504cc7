"""Compiling one CUDA kernel and launching it: what that takes of NVRTC and of the driver.

Both are there wherever PyTorch runs on an NVIDIA GPU: it ships with NVRTC and loads the driver. So
no compiler and no package is needed at the rig. Whatever fails raises RuntimeError with one line.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path
from typing import TypeVar

import torch

_Data = TypeVar("_Data", bound=ctypes._SimpleCData | ctypes.Array)

MAX_SHARED_OF_FUNCTION = 8
"""Attributes of a function and of a device: their numbers are part of the driver's interface."""
MAX_SHARED_OF_DEVICE = 97


def _nvrtc() -> ctypes.CDLL:
    """The NVRTC that came with PyTorch, or the system's of the same version."""
    major = (torch.version.cuda or "").split(".")[0]
    name = f"libnvrtc.so.{major}"
    folders = [Path(path) for path in sys.path] + [Path(torch.__file__).parent / "lib"]
    beside = [
        found
        for folder in folders
        for found in (folder / name, *sorted(folder.glob(f"nvidia/*/lib/{name}")))
        if found.is_file()
    ]
    return _load(*map(str, beside), str(Path(sys.prefix) / "lib" / name), name)


def _load(*names: str) -> ctypes.CDLL:
    """The first of some libraries that is there."""
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise RuntimeError(f"no {names[-1]}, which PyTorch for NVIDIA GPUs brings or needs")


@functools.cache
def compile_cuda(source: str, architecture: str) -> bytes:
    """Machine code of a kernel, as of ``"sm_90"``."""
    nvrtc, program = _nvrtc(), c_void_p()

    def check(result: int) -> None:
        if result:
            nvrtc.nvrtcGetErrorString.restype = c_char_p
            said = nvrtc.nvrtcGetErrorString(result).decode()
            raise RuntimeError(f"NVRTC for {architecture}: {said}{_log(nvrtc, program)}")

    check(nvrtc.nvrtcCreateProgram(byref(program), source.encode(), b"kernel.cu", 0, None, None))
    try:
        options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
        check(nvrtc.nvrtcCompileProgram(program, len(options), (c_char_p * 2)(*options)))
        size = c_size_t()
        check(nvrtc.nvrtcGetCUBINSize(program, byref(size)))
        code = ctypes.create_string_buffer(size.value)
        check(nvrtc.nvrtcGetCUBIN(program, code))
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(byref(program))


def _log(nvrtc: ctypes.CDLL, program: c_void_p) -> str:
    """The first line of what the compiler complains of."""
    size = c_size_t()
    if nvrtc.nvrtcGetProgramLogSize(program, byref(size)) or size.value < 2:
        return ""
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    return ": " + log.value.decode(errors="replace").splitlines()[0]


class Kernel:
    """One function of machine code, for PyTorch's own context on a device.

    Parameters
    ----------
    code : bytes
        From :func:`compile_cuda`.
    name : str
        Of the function.
    bytes_name : str
        A variable of the code that says how many bytes of shared memory a block needs.
    more_bytes : int
        It needs besides.
    threads : int
        Of a block.
    device : torch.device
    """

    def __init__(
        self,
        code: bytes,
        name: str,
        bytes_name: str,
        more_bytes: int,
        threads: int,
        device: torch.device,
    ) -> None:
        torch.cuda.synchronize(device)  # the context is there, and the one of this thread
        self._driver, self._threads = _load("libcuda.so.1"), threads
        self._module, self._function, index = c_void_p(), c_void_p(), c_int()
        self._check(self._driver.cuModuleLoadData(byref(self._module), code))
        self._check(
            self._driver.cuModuleGetFunction(byref(self._function), self._module, name.encode())
        )
        self._shared = self.read(bytes_name, c_int()).value + more_bytes
        self._check(self._driver.cuCtxGetDevice(byref(index)))
        most = c_int()
        self._check(
            self._driver.cuDeviceGetAttribute(byref(most), c_int(MAX_SHARED_OF_DEVICE), index)
        )
        if self._shared > most.value:
            raise RuntimeError(
                f"a block needs {self._shared} bytes of shared memory, of which the GPU has "
                f"{most.value}"
            )
        self._check(
            self._driver.cuFuncSetAttribute(
                self._function, c_int(MAX_SHARED_OF_FUNCTION), c_int(self._shared)
            )
        )

    def read(self, name: str, into: _Data) -> _Data:
        """A variable of the code, as its type."""
        address, size = c_void_p(), c_size_t()
        self._check(
            self._driver.cuModuleGetGlobal_v2(
                byref(address), byref(size), self._module, name.encode()
            )
        )
        self._check(self._driver.cuMemcpyDtoH_v2(byref(into), address, size))
        return into

    def _check(self, result: int) -> None:
        if result:
            text = c_char_p()
            self._driver.cuGetErrorString(result, byref(text))
            raise RuntimeError(f"CUDA driver: {(text.value or b'unknown error').decode()}")

    def blocks_at_once(self) -> int:
        """Most blocks of it that one multiprocessor holds."""
        blocks = c_int()
        self._check(
            self._driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(
                byref(blocks), self._function, c_int(self._threads), c_size_t(self._shared)
            )
        )
        return blocks.value

    def launch(self, grid: tuple[int, int], *addresses: int) -> None:
        """Launch it on PyTorch's current stream, all of its blocks at once, or not at all."""
        values = [c_void_p(address) for address in addresses]
        pointers = (c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = c_void_p(torch.cuda.current_stream().cuda_stream)
        self._check(
            self._driver.cuLaunchCooperativeKernel(
                self._function, *grid, 1, self._threads, 1, 1, self._shared, stream,
                ctypes.cast(pointers, POINTER(c_void_p)),
            )
        )  # fmt: skip
