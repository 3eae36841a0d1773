"""Datasets in, parts out: what a run reads, how it is cut, and what it leaves behind.

A run's data takes these steps, a module each:

1. ``sources``  a path becomes a `Source`: files, row counts, schema, identity; all bad input is found here
2. ``chunks``   a source becomes `Chunk` s, references that travel to the workers; a worker reads its rows back
3. ``parts``    a chunk's rows and results become one Parquet file, whole or not at all
4. ``output``   parts become an output: what is done already, and the manifest that says it is finished

``formats``, ``jsonl`` and ``parquet`` are what differs between formats, ``storage`` what differs between file systems;
``pandas_import`` is for pyarrow's sake.
Nothing here knows an engine or Flyte. This package imports nothing, so that naming a `Chunk` in a task's signature does
not load pyarrow.
"""
