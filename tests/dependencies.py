# SPDX-License-Identifier: Apache-2.0
"""Are the pinned packages free of known vulnerabilities? Says why it skips where the advisories cannot be reached.

python -m tests.dependencies
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LIMIT_S = 300


def report(requirements: Path) -> tuple[dict[str, Any], str]:
    """What pip-audit says of pinned packages, and why it says nothing, where that is so."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "audit.json"
        command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner", "off"]
        command += ["--requirement", str(requirements), "--format", "json", "--output", str(output)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            return {}, f"no answer within {LIMIT_S} s"
        # Its exit code is 1 for a vulnerability and for no connection alike; only the first writes a report.
        if not output.exists():
            return {}, (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        content: dict[str, Any] = json.loads(output.read_text())
        return content, ""


def verdict(content: dict[str, Any]) -> str:
    """One line of what a report means.

    Raises:
        SystemExit: it names vulnerabilities.
    """
    packages = content["dependencies"]
    found = [
        f"{package['name']} {package['version']}: {flaw['id']}; mended in {' '.join(flaw['fix_versions']) or 'none'}"
        for package in packages
        for flaw in package.get("vulns", ())
    ]
    if found:
        raise SystemExit("\n".join(["pip-audit found vulnerabilities:", *found]))
    # An index without advisories, a mirror for one, knows none of the packages: that is no clean bill.
    unknown = [package["skip_reason"] for package in packages if "skip_reason" in package]
    if len(unknown) == len(packages):
        return f"skipped, no advisories here: {unknown[0] if unknown else 'no packages'}"
    return f"no known vulnerability in {len(packages) - len(unknown)} packages; {len(unknown)} are unknown to it"


def main() -> None:
    content, unreachable = report(Path("constraints.txt"))
    said = f"skipped, its advisories cannot be reached: {unreachable}" if unreachable else verdict(content)
    sys.stdout.write(f"pip-audit: {said}\n")


if __name__ == "__main__":
    main()
