# SPDX-License-Identifier: Apache-2.0
"""Who calls: bearer tokens, known to the server by their SHA-256 alone.

A token is 256 random bits (`oodgate token`), so a fast hash of it tells an attacker nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from detector.errors import OodgateError
from service.errors import AdminDisabled, AdminOnly, Unauthorized

_HASH = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
OPEN_PATHS = ("/v2/health/", "/metrics", "/console/")  # probes, scrapers, and the page that asks for the token


class BadTokens(OodgateError):
    """The tokens in the settings cannot be read."""

    code = "bad_tokens"


@dataclass(frozen=True)
class Caller:
    """Who sent a request: the name of its token, `anonymous` in open mode."""

    name: str
    admin: bool = False


ANONYMOUS = Caller("anonymous")


class Tokens:
    """The tokens that are let in.

    Args:
        users: SHA-256, in hex, by the token's name.
        admin: SHA-256, in hex, of the admin's token; empty where there is none.

    Raises:
        BadTokens: a name or a hash is not of its form.
    """

    def __init__(self, users: Mapping[str, str], admin: str = "") -> None:
        wrong = [name for name, digest in users.items() if not (_NAME.fullmatch(name) and _HASH.fullmatch(digest))]
        if admin and not _HASH.fullmatch(admin):
            wrong.append("the admin's")
        if wrong:
            raise BadTokens(
                f"tokens {', '.join(map(repr, wrong))}: give NAME and the 64 hexadecimal digits of the SHA-256, "
                "as `oodgate token` prints them"
            )
        self._callers = {bytes.fromhex(digest): Caller(name) for name, digest in users.items()}
        self.has_admin = bool(admin)
        if admin:
            self._callers[bytes.fromhex(admin)] = Caller("admin", admin=True)

    @property
    def open(self) -> bool:
        """Whether anybody may ask for verdicts."""
        return not any(not caller.admin for caller in self._callers.values())

    def caller(self, authorization: bytes | None) -> Caller:
        """Who sent this Authorization header.

        Raises:
            Unauthorized: a token is needed and none, or an unknown one, was sent.
        """
        if authorization is None:
            if self.open:
                return ANONYMOUS
            raise Unauthorized("a token is needed: send the header `Authorization: Bearer TOKEN`")
        scheme, _, token = authorization.partition(b" ")
        found = None
        if scheme.lower() == b"bearer":
            digest = hashlib.sha256(token.strip()).digest()
            for known, caller in self._callers.items():  # all of them, so that the time tells nothing
                if hmac.compare_digest(known, digest):
                    found = caller
        if found is None:
            raise Unauthorized("the token is not known here; ask the operator for one")
        return found

    def is_admin(self, authorization: bytes) -> bool:
        """Whether this Authorization header, which may be empty, is the admin's."""
        try:
            return self.caller(authorization).admin
        except Unauthorized:
            return False

    def require_admin(self, caller: Caller) -> None:
        """Let only the admin through.

        Raises:
            AdminDisabled: no admin token is configured.
            AdminOnly: the caller is not the admin.
        """
        if not self.has_admin:
            raise AdminDisabled
        if not caller.admin:
            raise AdminOnly("this needs the admin token")


def read_tokens(path: Path) -> dict[str, str]:
    """Tokens from a file of lines `NAME:SHA256`; empty lines and lines with # are skipped.

    Raises:
        BadTokens: the file cannot be read, or a line is not of that form.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadTokens(f"the tokens of {path} cannot be read: {error}") from error
    tokens: dict[str, str] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        name, colon, digest = line.partition(":")
        if not colon or name in tokens:
            raise BadTokens(f"line {number} of {path} must be NAME:SHA256, each name once")
        tokens[name] = digest.strip()
    return tokens


def is_open_path(path: str) -> bool:
    """Whether a path needs no token."""
    return path == "/" or path.startswith(OPEN_PATHS)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
