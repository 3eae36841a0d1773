"""Keeps pandas, which this package does not use, from being half imported at the wrong moment."""

from __future__ import annotations

import importlib
from contextlib import suppress


def import_pandas() -> None:
    """Import pandas now, if it is installed; call it on the event loop, before the first rows are read.

    pyarrow imports pandas with the first rows that it reads, which happens on a thread. Flyte looks at pandas whenever
    it converts a task's inputs, and a call that comes while it is half imported fails.
    """
    with suppress(ImportError):
        _ = importlib.import_module("pandas").DataFrame  # Flyte may have left a lazy module that loads at first use
