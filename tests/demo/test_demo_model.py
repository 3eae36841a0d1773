"""The packaged model really works: it answers problems that it never saw, through the package's engine."""

from __future__ import annotations

from flyte_batch.demo.problems import generate, is_right
from flyte_batch.engines import choose_engine, start_engine
from flyte_batch.records import Completion, Prompt, SamplingParameters


async def test_the_demo_model_answers_held_out_problems_exactly() -> None:
    problems = list(generate(500, seed=20_261_121))  # a seed that neither training nor its evaluation used
    engine = await start_engine(choose_engine("ctranslate2", "demo"), SamplingParameters(max_tokens=160))
    try:
        results = await engine.infer([engine.prepare(Prompt(problem.question)) for problem in problems])
    finally:
        await engine.aclose()
    responses = [result.text for result in results if isinstance(result, Completion)]
    wrong = [
        (problem, response)
        for problem, response in zip(problems, responses, strict=True)
        if not is_right(response, problem.answer)
    ]
    assert len(wrong) <= len(problems) * 0.01, wrong[:3]
    finished = [result for result in results if isinstance(result, Completion) and result.finish_reason == "stop"]
    assert len(finished) >= len(problems) * 0.99
