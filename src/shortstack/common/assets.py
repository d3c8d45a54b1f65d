"""Where the files in the package lie: the small model, the measured families, the published orders and figures."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).resolve().parents[1] / "assets"
