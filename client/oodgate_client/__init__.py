# SPDX-License-Identifier: Apache-2.0
"""Ask an oodgate server about images, and gate your calls by the answer."""

from oodgate_client.client import AsyncClient as AsyncClient, Client as Client
from oodgate_client.errors import (
    DeadlinePassed as DeadlinePassed,
    ImageRefused as ImageRefused,
    NotFound as NotFound,
    OodgateError as OodgateError,
    Overloaded as Overloaded,
    RequestRefused as RequestRefused,
    ServerFailed as ServerFailed,
    TokenRefused as TokenRefused,
    Unanswered as Unanswered,
    Unavailable as Unavailable,
    Unreachable as Unreachable,
)
from oodgate_client.gate import AsyncGate as AsyncGate, Gate as Gate, Outcome as Outcome
from oodgate_client.images import Image as Image
from oodgate_client.models import ModelCard as ModelCard, Verdict as Verdict
from oodgate_client.retry import Retry as Retry

__version__ = "0.1.0"
