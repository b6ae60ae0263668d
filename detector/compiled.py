# SPDX-License-Identifier: Apache-2.0
"""Run shared libraries that torch's AOTInductor made of a network, each for batches of one size.

They are called by their C interface rather than by torch's Python binding, which holds the interpreter lock for the
whole forward pass: a server would answer nobody meanwhile.
"""

from __future__ import annotations

import _ctypes
import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detector.errors import BackboneError

OUTPUTS = 2  # logits, penultimate
_capsules_of: Any = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors
_tensors_of: Any = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


class CompiledForward:
    """A compiled network for batches of any size.

    A batch is cut into pieces of the sizes there are, largest first: on a CPU the pieces take the time of the whole,
    and padding would cost images.

    Args:
        libraries: by batch size, among them 1, shared libraries of AOTInductor that run on the CPU.
        callers: threads that may run it at the same time; more of them wait.

    Input: uint8 [N, H, W, 3], N > 0. Output: logits float32 [N, C], penultimate float32 [N, D].

    Raises:
        BackboneError: a library cannot be loaded; or, at a call, one failed.
    """

    reentrant = True

    def __init__(self, libraries: Mapping[int, Path], callers: int = 1) -> None:
        self._libraries = {size: _Library(libraries[size], callers) for size in sorted(libraries, reverse=True)}

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        images = images.contiguous()
        parts, start = [], 0
        for size, library in self._libraries.items():
            while len(images) - start >= size:
                parts.append(library(images[start : start + size]))
                start += size
        if len(parts) == 1:
            return parts[0]
        return torch.cat([logits for logits, _ in parts]), torch.cat([penultimate for _, penultimate in parts])


class _Library:
    def __init__(self, path: Path, callers: int) -> None:
        self._container = ctypes.c_void_p()
        try:
            self._code = ctypes.CDLL(str(path))
            self._run = self._code.AOTInductorModelContainerRun
            self._delete = self._code.AOTInductorModelContainerDelete
            create = self._code.AOTInductorModelContainerCreateWithDevice
        except (OSError, AttributeError) as error:
            raise BackboneError(f"{path} cannot be loaded: {error}") from error
        if create(ctypes.byref(self._container), ctypes.c_size_t(callers), b"cpu", None):
            _ctypes.dlclose(self._code._handle)
            raise BackboneError(f"{path} cannot be started; torch printed why")

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        given = (ctypes.c_void_p * 1)(_pointer(_capsules_of([images])[0], None))  # the run frees the handle
        got = (ctypes.c_void_p * OUTPUTS)()
        # No stream, and no executor for operators outside the library: it was refused if it needed one.
        if self._run(self._container, given, ctypes.c_size_t(1), got, ctypes.c_size_t(OUTPUTS), None, None):
            raise BackboneError("the compiled network failed; torch printed why")
        logits, penultimate = _tensors_of([_capsule(handle, None, None) for handle in got])
        return logits, penultimate

    def __del__(self) -> None:
        if self._container:
            self._delete(self._container)
            _ctypes.dlclose(self._code._handle)  # it holds the weights, and its file, until then
