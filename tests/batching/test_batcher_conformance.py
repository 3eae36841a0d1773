"""flyte.extras' batcher and ours, side by side.

The first half is what flyte.extras documents: both must do it, so that changing the import is the whole migration. The
second half is the table of differences: what theirs does, what ours does instead. Their hangs are bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from typing import Any

import flyte.extras
import pytest
from stepping import NEVER_S, Device, settle, soon

import flyte_batch.batching as ours
import flyte_batch.records
from flyte_batch.errors import BatcherDied, BatcherNotRunning

theirs = flyte.extras
BOTH = [pytest.param(theirs, id="flyte.extras"), pytest.param(ours, id="flyte_batch")]
both = pytest.mark.parametrize("lib", BOTH)

GIVE_UP_S = 0.2
"""How long a test watches one of their hangs: nothing else is going on meanwhile."""


async def hangs(awaitable: Any) -> bool:
    """Whether it is still not done when everything else has come to rest."""
    done, pending = await asyncio.wait({asyncio.ensure_future(awaitable)}, timeout=GIVE_UP_S)
    for task in pending:
        task.cancel()
    for task in done:
        task.exception()
    return bool(pending)


def abandon(batcher: Any) -> None:
    """End a batcher of theirs that can no longer stop."""
    for task in (batcher._aggregator_task, batcher._consumer_task):
        task.cancel()


# -- What both do ----------------------------------------------------------


@pytest.mark.parametrize("name", ["DynamicBatcher", "TokenBatcher"])
def test_every_parameter_of_theirs_is_one_of_ours_with_the_same_default(name):
    for method in ("__init__", "submit", "submit_batch", "start", "stop"):
        expected = inspect.signature(getattr(getattr(theirs, name), method)).parameters
        actual = inspect.signature(getattr(getattr(ours, name), method)).parameters
        for parameter in expected.values():
            assert actual[parameter.name].default == parameter.default, (method, parameter.name)
            assert actual[parameter.name].kind == parameter.kind, (method, parameter.name)


def test_every_field_of_their_stats_is_one_of_ours():
    stats = ours.BatchStats()
    for name in [*theirs.BatchStats.__dataclass_fields__, "utilization"]:
        assert getattr(stats, name) == 0


def test_their_prompt_and_protocols_have_a_counterpart():
    ours_prompt, their_prompt = flyte_batch.records.Prompt(text="what?"), theirs.Prompt(text="what?")
    assert ours_prompt.estimate_tokens() == their_prompt.estimate_tokens()
    assert isinstance(their_prompt, flyte_batch.records.TokenEstimator)
    assert isinstance(ours_prompt, theirs.TokenEstimator)


@both
async def test_a_submit_gives_a_future_of_the_records_own_result(lib):
    async def double(records: list[int]) -> list[int]:
        return [2 * record for record in records]

    async with lib.DynamicBatcher(process_fn=double, batch_timeout_s=0.01) as batcher:
        futures = [await batcher.submit(i) for i in range(20)]
        assert all(isinstance(future, asyncio.Future) for future in futures)
        assert await soon(asyncio.gather(*futures)) == [2 * i for i in range(20)]


@both
async def test_a_subscripted_token_batcher_takes_tokens_by_their_names(lib):
    async with lib.TokenBatcher[flyte_batch.records.Prompt, str](
        inference_fn=Device(), target_batch_tokens=100, default_token_estimate=3, batch_timeout_s=0.01
    ) as batcher:
        await soon(await batcher.submit(flyte_batch.records.Prompt("12345678")))
        await soon(await batcher.submit("x", estimated_tokens=20))
        await soon(await batcher.submit("x", estimated_cost=30))
        await soon(await batcher.submit("x"))
        assert batcher.stats.total_batch_cost == 3 + 20 + 30 + 3


@both
async def test_submit_batch_returns_one_future_a_record_with_the_given_costs(lib):
    async with lib.DynamicBatcher(process_fn=Device(), batch_timeout_s=0.01) as batcher:
        futures = await batcher.submit_batch(["a", "b"], estimated_cost=[2, 3])
        assert await soon(asyncio.gather(*futures)) == [("done", "a"), ("done", "b")]
        assert batcher.stats.total_batch_cost == 5


@both
async def test_max_batch_size_is_a_hard_cap(lib):
    device = Device()
    async with lib.DynamicBatcher(process_fn=device, max_batch_size=3, batch_timeout_s=0.01) as batcher:
        await soon(asyncio.gather(*await batcher.submit_batch(range(10))))
    assert max(map(len, device.batches)) == 3


@both
async def test_a_batch_that_is_not_full_leaves_after_the_timeout(lib):
    async with lib.DynamicBatcher(process_fn=Device(), batch_timeout_s=0.01) as batcher:
        assert await soon(await batcher.submit(1)) == ("done", 1)


@both
async def test_an_exception_goes_to_each_future_of_its_batch_and_the_next_batch_runs(lib):
    def answer(records: list[int]) -> list[int]:
        return [1 // record for record in records]

    async with lib.DynamicBatcher(process_fn=Device(answer), batch_timeout_s=0.01) as batcher:
        lost = await soon(asyncio.gather(*await batcher.submit_batch([1, 0]), return_exceptions=True))
        assert [type(error) for error in lost] == [ZeroDivisionError] * 2
        assert await soon(await batcher.submit(1)) == 1


@both
async def test_a_wrong_number_of_results_is_a_value_error(lib):
    async with lib.DynamicBatcher(process_fn=Device(lambda _: [1]), batch_timeout_s=0.01) as batcher:
        for future in await batcher.submit_batch([1, 2]):
            with pytest.raises(ValueError, match="returned 1 results for batch of 2 records"):
                await soon(future)


@both
async def test_submit_waits_while_the_queue_is_full(lib):
    device = Device()
    device.hold()
    async with lib.DynamicBatcher(
        process_fn=device, max_queue_size=2, max_batch_size=1, batch_timeout_s=0, prefetch_batches=1
    ) as batcher:
        tasks = [asyncio.create_task(batcher.submit(i)) for i in range(20)]
        await settle()
        assert not all(task.done() for task in tasks)
        device.release()
        futures = await soon(asyncio.gather(*tasks))
        assert len(await soon(asyncio.gather(*futures))) == 20


@both
async def test_stop_resolves_everything_submitted_before_it(lib):
    batcher = lib.DynamicBatcher(process_fn=Device(), batch_timeout_s=0.01, max_batch_size=4)
    await batcher.start()
    futures = await batcher.submit_batch(range(10))
    await soon(batcher.stop())
    assert all(future.done() for future in futures)
    await soon(batcher.stop())


@both
async def test_life_is_told_by_is_running_and_errors_are_runtime_errors(lib):
    batcher = lib.DynamicBatcher(process_fn=Device(), batch_timeout_s=0.01)
    assert not batcher.is_running
    with pytest.raises(RuntimeError, match="not running"):
        await batcher.submit(1)
    async with batcher as entered:
        assert entered is batcher
        assert batcher.is_running
        with pytest.raises(RuntimeError, match="already running"):
            await batcher.start()
    assert not batcher.is_running
    async with batcher:
        assert await soon(await batcher.submit(1)) == ("done", 1)


@both
async def test_stats_count_records_batches_and_cost(lib):
    async with lib.DynamicBatcher(process_fn=Device(), max_batch_size=2, batch_timeout_s=0.01) as batcher:
        await soon(asyncio.gather(*await batcher.submit_batch(range(6), estimated_cost=[5] * 6)))
    stats = batcher.stats
    assert (stats.total_submitted, stats.total_completed, stats.total_batches) == (6, 6, 3)
    assert (stats.total_batch_cost, stats.avg_batch_cost, stats.avg_batch_size) == (30, 10, 2)
    assert 0 <= stats.utilization <= 1


# -- Where they differ -----------------------------------------------------


@both
async def test_difference_the_budget_is_checked_before_a_record_is_added(lib):
    """Theirs is checked afterwards, so that most batches are over it."""
    device = Device()
    async with lib.DynamicBatcher(process_fn=device, target_batch_cost=10, batch_timeout_s=0.01) as batcher:
        await soon(asyncio.gather(*await batcher.submit_batch([6] * 6, estimated_cost=[6] * 6)))
    assert max(map(sum, device.batches)) == (12 if lib is theirs else 6)


@both
async def test_difference_a_batch_is_formed_when_the_device_is_free(lib):
    """Theirs forms batches ahead, out of the few records that wait by then."""
    device = Device()
    async with lib.DynamicBatcher(process_fn=device, batch_timeout_s=0.001) as batcher:
        device.hold()
        futures = [await batcher.submit(0)]
        await device.at_work()
        for i in range(3):
            futures.append(await batcher.submit(i))
            # Longer than the timeout, while the device is busy.
            await asyncio.sleep(0.02)
        device.release()
        await soon(asyncio.gather(*futures))
    assert len(device.batches) == (4 if lib is theirs else 2)


@both
async def test_difference_a_lone_record_below_min_batch_size_leaves_with_the_timeout(lib):
    """As documented; theirs puts it back into the queue for ever."""
    batcher = lib.DynamicBatcher(process_fn=Device(), min_batch_size=2, batch_timeout_s=0.01)
    await batcher.start()
    assert await hangs(await batcher.submit(1)) is (lib is theirs)
    await soon(batcher.stop())


@pytest.mark.parametrize("error", [asyncio.CancelledError, GeneratorExit], ids=lambda error: error.__name__)
@both
async def test_difference_a_base_exception_in_process_fn_leaves_nobody_waiting(lib, error):
    """It ends their processing loop silently: futures hang, submits go on being accepted, stop() hangs."""

    def answer(_: list[Any]) -> Any:
        raise error

    batcher = lib.DynamicBatcher(process_fn=Device(answer), batch_timeout_s=0)
    await batcher.start()
    assert await hangs(await batcher.submit(1)) is (lib is theirs)
    if lib is theirs:
        assert batcher.is_running
        with contextlib.suppress(GeneratorExit):
            abandon(batcher)
    else:
        await soon(batcher.stop())


@pytest.mark.parametrize("cost", [None, "many"])
@both
async def test_difference_a_bad_cost_fails_its_own_submit(lib, cost):
    """It ends their aggregation loop."""
    batcher = lib.DynamicBatcher(process_fn=Device(), cost_estimator=lambda _: cost, batch_timeout_s=0)
    await batcher.start()
    if lib is theirs:
        assert await hangs(await batcher.submit(1))
        abandon(batcher)
    else:
        with pytest.raises(TypeError):
            await batcher.submit(1)
        await soon(batcher.stop())


@both
async def test_difference_a_dict_as_the_answer_is_no_list_of_results(lib):
    """Theirs zips its keys onto the records."""
    async with lib.DynamicBatcher(process_fn=Device(lambda _: {"a": 1}), batch_timeout_s=0) as batcher:
        future = await batcher.submit(1)
        if lib is theirs:
            assert await soon(future) == "a"
        else:
            with pytest.raises(TypeError, match="returned dict"):
                await soon(future)


@both
async def test_difference_a_cancelled_record_does_not_reach_the_device(lib):
    device = Device()
    async with lib.DynamicBatcher(process_fn=device, batch_timeout_s=0.01) as batcher:
        kept, given_up = await batcher.submit_batch(["kept", "given up"])
        given_up.cancel()
        await soon(kept)
    assert device.seen == (["kept", "given up"] if lib is theirs else ["kept"])


@both
async def test_difference_a_submit_while_stop_drains_is_refused(lib):
    """Theirs accepts it and never resolves it."""
    device = Device()
    batcher = lib.DynamicBatcher(process_fn=device, batch_timeout_s=0)
    await batcher.start()
    device.hold()
    await batcher.submit(1)
    await device.at_work()
    stopping = asyncio.create_task(batcher.stop())
    await settle()
    if lib is theirs:
        late = await batcher.submit(2)
        device.release()
        await soon(stopping)
        assert not late.done()
    else:
        with pytest.raises(BatcherNotRunning):
            await batcher.submit(2)
        device.release()
        await soon(stopping)


@both
async def test_difference_a_stop_given_up_on_breaks_nothing(lib):
    """Theirs kills the loop it waits for, and the batch with it."""
    device = Device()
    batcher = lib.DynamicBatcher(process_fn=device, batch_timeout_s=0)
    await batcher.start()
    device.hold()
    future = await batcher.submit(1)
    await device.at_work()
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(batcher.stop(), 0.001)
    device.release()
    assert await hangs(future) is (lib is theirs)
    if lib is not theirs:
        await soon(batcher.stop())


@both
async def test_difference_a_plain_function_will_do(lib):
    """Theirs awaits its result, after it ran and blocked the loop."""

    def plain(records: list[int]) -> list[int]:
        return records

    async with lib.DynamicBatcher(process_fn=plain, batch_timeout_s=0) as batcher:
        future = await batcher.submit(1)
        if lib is theirs:
            with pytest.raises(TypeError, match="can't be used in 'await'"):
                await soon(future)
        else:
            assert await soon(future) == 1


@both
async def test_difference_the_running_batch_counts_as_busy(lib):
    device = Device()
    async with lib.DynamicBatcher(process_fn=device, batch_timeout_s=0) as batcher:
        device.hold()
        future = await batcher.submit(1)
        await device.at_work()
        await asyncio.sleep(0.001)
        assert (batcher.stats.busy_time_s == 0) is (lib is theirs)
        device.release()
        await soon(future)


@both
async def test_difference_a_dead_dispatcher_is_told_to_everybody(lib):
    batcher = lib.DynamicBatcher(process_fn=Device(), batch_timeout_s=NEVER_S)
    await batcher.start()
    future = await batcher.submit(1)
    await settle()
    task = batcher._aggregator_task if lib is theirs else batcher._task
    task.cancel()
    if lib is theirs:
        assert await hangs(future)
        assert batcher.is_running
        abandon(batcher)
    else:
        with pytest.raises(BatcherDied):
            await soon(future)
        assert not batcher.is_running
        await batcher.stop()


def test_difference_options_are_checked():
    theirs.DynamicBatcher(process_fn=None, target_batch_cost=-1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="target_batch_cost"):
        ours.DynamicBatcher(process_fn=Device.__call__, target_batch_cost=-1)
