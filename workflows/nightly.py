"""The same job on a schedule: every night at two, the day's questions in, a dated folder of answers out.

    flyte deploy workflows/nightly.py driver          # puts it on the schedule
    flyte run --local workflows/nightly.py main --day 2026-01-31 --source 'in/{day}.jsonl' --output 'out/{day}'

A night that failed half-way is finished by running it again for its day.
"""

from __future__ import annotations

from datetime import datetime

import flyte

import flyte_batch as fb
from images import driver_image
from workflows import generate

driver = fb.driver_environment("nightly", image=driver_image, depends_on=[generate.driver])

every_night = flyte.Trigger("every-night", flyte.Cron("0 2 * * *"), inputs={"day": flyte.TriggerTime})


@driver.task(triggers=every_night)
async def main(
    day: datetime,
    source: str = "s3://my-bucket/questions/{day}.jsonl",
    output: str = "s3://my-bucket/answers/{day}",
    model: str = "demo",
    engine: str = "auto",
    max_failure_rate: float = 0.01,
) -> fb.RunSummary:
    """Answer one day's questions.

    Args:
        day: the trigger's time, or any day to run by hand.
        source: where that day's questions are; {day} becomes YYYY-MM-DD.
        output: the folder for that day's answers; {day} likewise.
        model: "demo", a folder, or a Hugging Face id.
        engine: "auto", "ctranslate2" or "fake".
        max_failure_rate: share (0-1) of failed rows above which the night counts as failed.
    """
    date = f"{day:%Y-%m-%d}"
    return await generate.main(
        source=source.replace("{day}", date),
        output=output.replace("{day}", date),
        model=model,
        engine=engine,
        max_failure_rate=max_failure_rate,
    )
