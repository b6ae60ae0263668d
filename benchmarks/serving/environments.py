# SPDX-License-Identifier: Apache-2.0
"""A virtual environment for each peer, from its pins, in the build folder.

What a peer does not pin (torch, torchvision, numpy, Pillow and what `detector` needs) comes from the environment that
runs the benchmark, at a lower priority, so that everybody computes with the very same libraries.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import sysconfig
from pathlib import Path

from benchmarks.serving.workloads import BUILD

PEERS = Path(__file__).parent / "peers"


def requirements(peer: str) -> Path:
    return PEERS / peer / "requirements.txt"


def interpreter(peer: str) -> Path:
    """The peer's Python; its environment is made where it is not there or its pins have changed."""
    home = BUILD / "environments" / peer
    python = home / "bin" / "python"
    shared = sysconfig.get_path("purelib")
    wanted = hashlib.sha256(requirements(peer).read_bytes() + sys.version.encode() + shared.encode()).hexdigest()
    stamp = home / "stamp"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
    # The pins are complete; --no-deps lets a release that asks for one newer than the index serves still install.
    install = ("-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps", "-r")
    subprocess.run([python, *install, requirements(peer)], check=True)
    packages = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (packages / "shared.pth").write_text(f"{shared}\n")
    stamp.write_text(wanted)
    return python


def versions(peer: str) -> dict[str, str]:
    """The pinned packages of a peer."""
    lines = requirements(peer).read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)
