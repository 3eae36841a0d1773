"""Interactive use: whether a batcher keeps a service level under load, and up to what rate.

`run_load` makes requests at a given mean rate and says what became of them; `find_limit` searches the rate at which a
`ServiceLevel` stops to be kept. Both take any batcher, or any async function. ``plan``, ``measure`` and ``report`` are
what `flyte batch load` and ``workflows/load.py`` do with an engine and its prompts.
"""

from flyte_batch.load.generator import Latencies, LoadResult, run_load
from flyte_batch.load.levels import Objective, ServiceLevel
from flyte_batch.load.limits import Limit, find_limit

__all__ = ["Latencies", "Limit", "LoadResult", "Objective", "ServiceLevel", "find_limit", "run_load"]
