"""Scoring answers that can be checked."""

from __future__ import annotations

import re


def holds(reply: str, key: str) -> bool:
    """Whether ``key`` stands in ``reply`` as whole words; case and the width of spaces do not matter."""
    wanted = r"\s+".join(re.escape(word) for word in key.split())
    return re.search(rf"(?<!\w){wanted}(?!\w)", reply, re.IGNORECASE) is not None
