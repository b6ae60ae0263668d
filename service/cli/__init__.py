# SPDX-License-Identifier: Apache-2.0
"""The commands that need the service, each an entry point of `oodgate.commands`."""
