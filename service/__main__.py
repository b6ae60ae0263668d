# SPDX-License-Identifier: Apache-2.0
"""`python -m service serve` is `oodgate serve`."""

from detector.cli import main

main()
