"""What a chunk costs beside its rows: figures measured on Flyte's reusable-container runtime.

Source: ``benchmarks/runtime.py``, benchmarks/README.md, "Calls, fan-out and chunks on the real replica runtime". The
services around driver and replicas were played there, on one machine without a network: a cluster's take longer.
"""

from __future__ import annotations

MEASURED_GAP_S = 0.03
"""Seconds of a device lost between one chunk and the next on a replica that takes one at a time: part written, report
sent, next call submitted and assigned, rows read, first batch formed. Of chunks of 200 rows; of 2,000 rows it is 0.05,
of 12,000 it is 0.2, which is less in proportion."""

CLUSTER_FACTOR = 10
"""An assumption, not measured: on a cluster, with its network, queues and object store, the gap is so many times as
long."""

CHUNK_GAP_S = CLUSTER_FACTOR * MEASURED_GAP_S
"""Seconds from a chunk's last record to the first of the next one in its slot, for planning."""

FAN_OUT_PER_S = 50.0
"""Chunks that one driver submits and completes a second. Measured were 80 on a free core, 48 to 70 beside other jobs;
Flyte allows 100 (``_F_MAX_QPS``)."""

USUAL_ROWS_PER_S = 100.0
"""An assumption about replicas of which nothing is known: a fast language model on one GPU. What a chunk costs beside
its rows is the same number of seconds whatever their speed, but a tail is the longer the slower they are: to take a
slow replica for a fast one costs more than the reverse."""
