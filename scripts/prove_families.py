"""Run the matrix of families and write down what is exact: src/shortstack/assets/families.json and docs/families.md.

    python scripts/prove_families.py              # all of them
    python scripts/prove_families.py bamba lfm2    # these configurations, the others as they were

The tests of the matrix (`tests/families/test_matrix.py`) compare what they find with this record, so that it cannot say
more than is so.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.families import matrix  # noqa: E402
from tests.families.configs import CONFIGS  # noqa: E402

from shortstack.artifacts.provenance import versions  # noqa: E402
from shortstack.families.table import FAMILIES  # noqa: E402
from shortstack.inspection.families import MEASURED  # noqa: E402


def main() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    chosen = sys.argv[1:] or sorted(CONFIGS)
    before = json.loads(MEASURED.read_text())["configurations"] if sys.argv[1:] else {}
    found: dict[str, Any] = {name: record for name, record in before.items() if name in CONFIGS}
    for name in chosen:
        if FAMILIES[name.partition("@")[0]].refused:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found[name] = matrix.measured(name, Path(folder)).record()
        print(name, len(found[name]["exact"]), "exact", flush=True)
    used = {key: value for key, value in versions().items() if key in ("torch", "transformers")}
    MEASURED.write_text(
        json.dumps({"versions": used, "configurations": dict(sorted(found.items()))}, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
