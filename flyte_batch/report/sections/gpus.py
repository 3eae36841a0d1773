"""What the GPUs of replicas did."""

from __future__ import annotations

from flyte_batch.monitoring import gpu
from flyte_batch.report.answer import tokens_done
from flyte_batch.report.formats import count, number, percent, said, size
from flyte_batch.report.run_log import RunLog
from flyte_batch.report.sections.elements import Table, bounded_table


def gpus(log: RunLog) -> Table | None:
    rows = []
    for total in gpu.gpu_totals(log.gpus):
        memory = said(total.peak_memory_bytes, size)
        if total.peak_memory_bytes is not None and total.memory_total_bytes:
            memory += f" of {size(total.memory_total_bytes)}"
        rows.append(
            [
                total.name,
                total.uuid,
                said(total.mean_utilization, percent),
                memory,
                said(total.mean_power_w, lambda watts: f"{watts:,.0f} W"),
                said(total.energy_j, lambda joules: f"{number(joules / 3600)} Wh"),
                said(total.max_temperature_c, lambda degrees: f"{degrees:.0f} °C"),
                ", ".join(reason for reason in total.throttle_reasons if reason != "idle") or "none",
            ]
        )
    headings = ("GPU", "UUID", "Kernels ran", "Memory, peak", "Power, mean", "Energy", "Hottest", "Throttled by")
    return bounded_table("GPUs while chunks were answered", headings, rows, {1, 7}) if rows else None


def gpus_note(log: RunLog) -> str:
    energy = gpu.energy_j(gpu.gpu_totals(log.gpus))
    per_million = gpu.wh_per_million_tokens(energy, tokens_done(log))
    if energy is None or per_million is None:
        return ""
    return (
        f"{number(energy / 3600)} Wh for {count(tokens_done(log))} tokens of this run: {number(per_million)} Wh per "
        "million tokens."
    )
