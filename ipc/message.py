"""Control messages: msgpack maps with text keys, versioned, of bounded size. Never on the data path.

- `encode(message, limit)`, `decode(data, limit)`: both raise MessageError with what is wrong.

The version travels as key "v" and is added and taken off here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack

VERSION = 1
LIMIT_BYTES = 262144  # ATOLL_CONTROL_BYTES


class MessageError(ValueError):
    """Bad or too large a message."""


def encode(message: Mapping[str, Any], limit: int = LIMIT_BYTES) -> bytes:
    """The bytes of a message; at most `limit` of them."""
    try:
        data: bytes = msgpack.packb({"v": VERSION, **message}, use_bin_type=True)
    except (TypeError, ValueError, OverflowError) as error:
        raise MessageError(f"a message holds what cannot be sent: {error}") from error
    if len(data) > limit:
        raise MessageError(f"message of {len(data)} bytes; at most {limit} can be sent")
    return data


def decode(data: bytes | memoryview, limit: int = LIMIT_BYTES) -> dict[str, Any]:
    """The map that was sent; nothing in it is checked but version, size and that its keys are text."""
    if len(data) > limit:
        raise MessageError(f"message of {len(data)} bytes; at most {limit} are accepted")
    try:
        message = msgpack.unpackb(data, raw=False, strict_map_key=True)
    except Exception as error:  # msgpack raises ValueError, UnpackException, and what its hooks raise
        raise MessageError(f"not a msgpack message: {error or type(error).__name__}") from error
    if not isinstance(message, dict) or not all(isinstance(key, str) for key in message):
        raise MessageError(f"a message is a map with text keys, not {type(message).__name__}")
    version = message.pop("v", None)
    if version != VERSION:
        raise MessageError(f"message of version {version!r}; this program speaks version {VERSION}")
    return message
