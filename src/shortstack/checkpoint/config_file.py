"""config.json and the files beside it that transformers reads, as transformers writes them."""

from __future__ import annotations

import json
from typing import Any


def config_text(config: dict[str, Any]) -> str:
    """A config as text. Infinity stays as it is: transformers writes and reads it, and some families' limits are infinite."""
    return json.dumps(config, indent=2, ensure_ascii=False, allow_nan=True) + "\n"
