# SPDX-License-Identifier: Apache-2.0
"""The real server, with faults on order: one word a line on its input. For tests alone.

    python -m tests.faults.launcher serve …

`exception`, `memory` and `nan` spoil every batch from now on, `white` its white images alone, `none` ends that, `kill`
raises SystemExit in the inference thread, wherever it is. Each word is answered by a line of the log.
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading
from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor

from detector.backbone import Backbone
from detector.cli import main
from detector.outputs import Outputs

_run = Backbone.outputs
_fault = "none"


def spoiled(backbone: Backbone, images: Tensor, *, checked: bool = True) -> Outputs:
    """What the network gives, or what has befallen it."""
    if _fault == "exception":
        raise RuntimeError("injected")
    if _fault == "memory":
        raise torch.cuda.OutOfMemoryError("injected: out of memory on the device")
    outputs = _run(backbone, images, checked=checked)
    if _fault == "nan":
        return replace(outputs, penultimate=outputs.penultimate * torch.nan)  # the scores are made of it
    if _fault == "white":
        white = (images == 255).flatten(1).all(dim=1, keepdim=True)
        return replace(outputs, penultimate=outputs.penultimate.masked_fill(white, torch.nan))
    return outputs


def kill() -> None:
    """Raise SystemExit in the inference thread, at whatever it does next."""
    (ident,) = (thread.ident for thread in threading.enumerate() if thread.name == "inference")
    assert ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(SystemExit))


def obey() -> None:
    """Take orders until the input ends."""
    global _fault
    for line in sys.stdin:
        word = line.strip()
        if word == "kill":
            kill()
        else:
            _fault = word
        sys.stdout.write(json.dumps({"message": "fault", "fault": word}) + "\n")
        sys.stdout.flush()


def launch() -> NoReturn:
    Backbone.outputs = spoiled  # type: ignore[assignment,method-assign]
    threading.Thread(target=obey, daemon=True).start()
    main()
    raise SystemExit


if __name__ == "__main__":
    launch()
