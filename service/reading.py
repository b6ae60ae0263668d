# SPDX-License-Identifier: Apache-2.0
"""A request's body -> the encoded images in it."""

from __future__ import annotations

import re
from typing import Any

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from service.errors import EmptyRequest, MalformedForm, TooManyImages, UnsupportedMediaType
from service.settings import Settings

IMAGE_TYPES = ("image/jpeg", "image/png", "image/webp")
FORM_TYPE = "multipart/form-data"
# The parser decodes by whatever codec of Python has the name: some raise, and punycode takes a minute for a megabyte.
_CHARSETS = (b"utf-8", b"utf8", b"us-ascii", b"iso-8859-1")
# What every parser reads alike: no `name*=`, no escapes, no parameter that the next one may not know.
_PLAIN_FORM = re.compile(
    r'multipart/form-data\s*;\s*(?:charset="?[\w-]+"?\s*;\s*)?boundary=("?)([^\s",;\\]+)\1\s*(?:;\s*charset="?[\w-]+"?\s*)?;?',
    re.I,
)
_FIELD_TYPES = (b"text/plain", b"application/json")
_PLAIN_FIELD = re.compile(rb'form-data *; *name=("?)[^";\\]*\1 *', re.I)
_BYTES = {"type": "string", "format": "binary"}
_FORM = {"type": "object", "properties": {"file": {"type": "array", "items": _BYTES}}, "required": ["file"]}
IMAGES_BODY: dict[str, Any] = {  # for the OpenAPI document
    "required": True,
    "content": {kind: {"schema": _BYTES} for kind in IMAGE_TYPES} | {FORM_TYPE: {"schema": _FORM}},
}


async def read_images(request: Request, settings: Settings, *, part: str | None = "file") -> tuple[list[bytes], bool]:
    """The encoded images of a request, and whether they are answered as a list.

    Args:
        request: its content type is an image's, or a form's.
        settings: the limits.
        part: name of the form's parts that are images; None: every file of the form. Such a request goes on as it came,
            and must be the same files to whoever reads it next.

    Raises:
        UnsupportedMediaType, EmptyRequest, MalformedForm, TooManyImages: what the client sent cannot be used.
    """
    if part is None:
        _check_head(request)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == FORM_TYPE:
        files = await _read_form(request, settings.max_images, settings.max_body_bytes, part)
        return files, len(files) > 1
    if kind not in IMAGE_TYPES:
        wanted = ", ".join((*IMAGE_TYPES, FORM_TYPE))
        raise UnsupportedMediaType(f"content type {kind or 'missing'!r} is not supported; send one of {wanted}")
    body = await request.body()
    if not body:
        raise EmptyRequest("the body is empty; send one image")
    return [body], False


def _check_head(request: Request) -> None:
    """Refuse a body that could be taken for another kind than it was judged as."""
    # An app behind CGI or WSGI cannot tell `_` from `-` in a name.
    headers = [(name.replace(b"_", b"-"), value) for name, value in request.scope["headers"]]
    if sum(name == b"content-type" for name, _ in headers) > 1:
        raise UnsupportedMediaType("the request has more than one content type; send one")
    for name, value in headers:
        if name == b"content-encoding" and value.lower() != b"identity":
            encoding = value.decode("latin-1")
            raise UnsupportedMediaType(f"content encoding {encoding!r} is not supported; send the body uncompressed")


class _PlainParser(MultiPartParser):
    """Refuses a form in which another parser might find another file."""

    parts = 0

    def on_part_begin(self) -> None:
        super().on_part_begin()
        self.parts += 1

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        part = self._current_part
        headers = dict(part.item_headers)
        if len(headers) < len(part.item_headers) or min(b"".join(headers.values())) < 32:
            raise MalformedForm("a part of the form has a header twice, or a control character in one; send neither")
        # Some decode it, most do not.
        if headers.get(b"content-transfer-encoding", b"binary").strip().lower() not in (b"7bit", b"8bit", b"binary"):
            raise MalformedForm("a part of the form has a transfer encoding; send files as they are")
        kind = headers.get(b"content-type", b"text/plain").partition(b";")[0].strip().lower()
        if part.file is None and not (kind in _FIELD_TYPES and _PLAIN_FIELD.fullmatch(headers[b"content-disposition"])):
            raise MalformedForm(
                "a part of the form that is no file could be taken for one; give it its name alone, without quotes, "
                "semicolons or backslashes in it, and no content type but text/plain or application/json. A file has a "
                "plain `filename`"
            )

    def check(self, body: bytes) -> None:
        """Refuse a form that has parts for those alone who look for its boundary in other places."""
        plain = _PLAIN_FORM.fullmatch(self.headers["content-type"])
        if plain is None:
            raise MalformedForm("the content type of the form has more than a plain boundary and a charset")
        if not len(self.items) == self.parts == body.count(b"--" + plain[2].encode("latin-1")) - 1:
            raise MalformedForm("the form does not end with its boundary, or has it elsewhere than between its parts")


async def _read_form(request: Request, max_images: int, max_bytes: int, part: str | None) -> list[bytes]:
    charset = parse_options_header(request.headers["content-type"])[1].get(b"charset", _CHARSETS[0])
    if charset.lower() not in _CHARSETS:
        raise MalformedForm("the form names a charset that is not supported; send it in UTF-8")
    kind = _PlainParser if part is None else MultiPartParser
    # One file more than allowed may pass the parser, so that the answer can be ours.
    parser = kind(request.headers, request.stream(), max_files=max_images + 1, max_fields=100)
    parser.spool_max_size = max_bytes  # stay in memory: the body limit bounds it, and the disk may be read-only
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise TooManyImages(max_images) from error
        raise MalformedForm(f"the form cannot be parsed: {error.message}") from error
    except KeyError as error:
        raise MalformedForm("the form has no boundary in its content type") from error
    try:
        if isinstance(parser, _PlainParser):
            parser.check(await request.body())
        files = [
            await value.read()
            for name, value in form.multi_items()
            if isinstance(value, UploadFile) and part in (None, name)
        ]
    finally:
        for file in parser._files_to_close_on_error:  # the form knows none that was cut off
            file.close()
    if not files:
        wanted = "file part" if part is None else f"file part named `{part}`"
        raise EmptyRequest(f"the form has no {wanted}; send one or more")
    if len(files) > max_images:
        raise TooManyImages(max_images)
    return files
