# SPDX-License-Identifier: Apache-2.0
"""A request's body -> the encoded images in it."""

from __future__ import annotations

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
        part: name of the form's parts that are images; None: every file of the form.

    Raises:
        UnsupportedMediaType, EmptyRequest, MalformedForm, TooManyImages: what the client sent cannot be used.
    """
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


async def _read_form(request: Request, max_images: int, max_bytes: int, part: str | None) -> list[bytes]:
    charset = parse_options_header(request.headers["content-type"])[1].get(b"charset", _CHARSETS[0])
    if charset.lower() not in _CHARSETS:
        raise MalformedForm("the form names a charset that is not supported; send it in UTF-8")
    # One file more than allowed may pass the parser, so that the answer can be ours.
    parser = MultiPartParser(request.headers, request.stream(), max_files=max_images + 1, max_fields=100)
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
        files = [
            await value.read()
            for name, value in form.multi_items()
            if isinstance(value, UploadFile) and part in (None, name)
        ]
    finally:
        await form.close()
    if not files:
        wanted = "file part" if part is None else f"file part named `{part}`"
        raise EmptyRequest(f"the form has no {wanted}; send one or more")
    if len(files) > max_images:
        raise TooManyImages(max_images)
    return files
