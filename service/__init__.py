# SPDX-License-Identifier: Apache-2.0
"""The detector's decision for many callers at once, over HTTP."""

from service.app import create_app as create_app
from service.settings import Settings as Settings
