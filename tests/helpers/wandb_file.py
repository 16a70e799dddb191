"""Reader of W&B offline run files: records in blocks of 32 KiB, each chunk with checksum, length and kind."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, FILE_HEADER, CHUNK_HEADER = 32768, 7, 7
FULL, LAST = 1, 4  # kinds of chunk that end a record


def records(path: Path) -> Iterator[Record]:
    """Yield the complete records; the file of a killed run may be truncated."""
    content, at, record = path.read_bytes(), FILE_HEADER, b""
    while at + CHUNK_HEADER <= len(content):
        left = BLOCK - at % BLOCK
        if left < CHUNK_HEADER:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        record += content[at + CHUNK_HEADER : at + CHUNK_HEADER + length]
        at += CHUNK_HEADER + length
        if kind in (FULL, LAST):
            yield Record.FromString(record)
            record = b""


def history(path: Path) -> list[dict[str, Any]]:
    """Return the logged rows."""
    return [_values(r.history.item) for r in records(path) if r.WhichOneof("record_type") == "history"]


def _values(items: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
