"""The same job on a schedule: every night at two, the last day's questions in, a dated folder of answers out.

    flyte deploy workflows/nightly.py driver          # puts it on the schedule
    flyte run --local workflows/nightly.py main --trigger_time 2026-02-01 --source 'in/{day}.jsonl' --output 'out/{day}'

A night that failed half-way is finished by running it again with its time.
"""

from __future__ import annotations

from datetime import datetime, timedelta

import flyte

import flyte_batch as fb
from images import cpu_image
from workflows import generate

driver = fb.driver_environment("nightly", image=cpu_image, depends_on=[generate.driver])

every_night = flyte.Trigger("every-night", flyte.Cron("0 2 * * *"), inputs={"trigger_time": flyte.TriggerTime})


@driver.task(triggers=every_night, report=True, timeout=timedelta(hours=20))
async def main(
    trigger_time: datetime,
    source: str = "s3://my-bucket/questions/{day}.jsonl",
    output: str = "s3://my-bucket/answers/{day}",
    model: str = "demo",
    engine: str = "auto",
    max_failure_rate: float = 0.01,
) -> fb.RunSummary:
    """Answer the questions of the day before.

    Args:
        trigger_time: when the trigger fired, or a time given by hand.
        source: where the questions are; {day} becomes the day before trigger_time, as YYYY-MM-DD.
        output: the folder for the answers; {day} likewise.
        model: "demo", a folder, or a Hugging Face id.
        engine: "auto", "ctranslate2" or "fake".
        max_failure_rate: share (0-1) of failed rows above which the night counts as failed.
    """
    date = f"{trigger_time - timedelta(days=1):%Y-%m-%d}"
    return await generate.main(
        source=source.replace("{day}", date),
        output=output.replace("{day}", date),
        model=model,
        engine=engine,
        max_failure_rate=max_failure_rate,
    )
