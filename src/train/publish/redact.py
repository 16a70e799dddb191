"""Removes local paths and URLs from text before it is published."""

import re
from pathlib import Path


def without_paths(text: str) -> str:
    """Shorten local paths and URLs in a setting or its value to their last component.

    `owner/name` is kept unless it is an existing local path.
    """
    key, equals, value = text.partition("=") if re.match(r"[+~]*[\w.@]+=", text) else ("", "", text)
    value = value.replace("${embedded:}", "")
    parts = re.split(r"([,\[\]{}'\"]|: )", value)  # splits lists and dicts; paths may contain spaces
    return key + equals + "".join(map(_last_part, parts))


def _last_part(part: str) -> str:
    path = part.lstrip()
    outside = path.count("/") != 1 or path[0] in "/~." or Path(path).exists()
    if not ("/" in path and outside or "\\" in path):
        return part
    blanks = part[: len(part) - len(path)]
    return blanks + re.split(r"[/\\]", path.split("?")[0].rstrip("/\\"))[-1]
