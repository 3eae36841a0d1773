"""The versions of what a process runs with."""

from __future__ import annotations

import contextlib
import platform
from importlib import metadata

import flyte_batch

PACKAGES = ("flyte", "unionai-reuse", "vllm", "ctranslate2", "torch", "pyarrow")


def versions() -> dict[str, str]:
    """Of Python, of flyte_batch, and of those of `PACKAGES` that are installed here."""
    found = {"python": platform.python_version(), "flyte-batch": flyte_batch.__version__}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
