"""Copy a model to where replicas load it fast: once, before the runs that use it.

    flyte run --local workflows/prefetch.py main --model Qwen/Qwen2.5-7B-Instruct --folder /mnt/models/qwen
    flyte run workflows/prefetch.py main --model Qwen/Qwen2.5-7B-Instruct --folder s3://bucket/models/qwen

Then name the folder as the model: ``--model s3://bucket/models/qwen``. Run it again, and nothing is left to do; stopped
half-way and run again, it does the rest. On a cluster a model of Hugging Face passes through the container's disk:
``FLYTE_BATCH_DISK`` (of the shell that submits the run) says how large that is.
"""

from __future__ import annotations

import os
from datetime import timedelta

import flyte

import flyte_batch as fb
from images import cpu_image

DISK = os.environ.get("FLYTE_BATCH_DISK", "50Gi")

RETRIES = flyte.RetryStrategy(2, backoff=flyte.Backoff(timedelta(seconds=2), factor=5, cap=timedelta(minutes=1)))

driver = fb.driver_environment("prefetch", image=cpu_image, cpu=2, memory="8Gi", disk=DISK)


@driver.task(retries=RETRIES)
async def main(model: str, folder: str) -> fb.PrefetchedModel:
    """Copy a model, or what is missing of it.

    Args:
        model: a folder, its URI, or a Hugging Face id, with or without ``@revision``.
        folder: where to: a new folder, or one that an earlier run began.

    Returns:
        Where it is, where it came from, and how much of it this run copied.
    """
    fb.require_shared(folder=folder)
    try:
        done = await fb.prefetch(model, folder)
    except fb.BadInput as error:
        raise flyte.errors.NonRecoverableError(str(error), code="BadInput") from error  # a retry would say the same
    print(f"{done.source}: {done.files} files, {done.size:,} bytes, {done.copied} of them copied now: {done.location}")
    return done
