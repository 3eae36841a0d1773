"""Plays the service that assigns calls to replicas (fasttask), for the real ``unionai-actor-bridge``.

A bridge opens one stream: it tells what became of its calls, and is told which to begin (ASSIGN) and to forget
(DELETE, which cancels one that is under way).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import grpc

messages, services = grpc.protos_and_services("tests/runtime/fasttask.proto")
_ASSIGN, _DELETE, _ACK = (messages.HeartbeatResponse.Operation.Value(name) for name in ("ASSIGN", "DELETE", "ACK"))


class End(Enum):
    """How a call ended."""

    RETURNED = "the task returned or raised; its files say which"
    FAILED = "the replica says that it could not run it to its end"
    LOST = "the replica went away with it"
    ABORTED = "it was cancelled from outside"
    TIMED_OUT = "it took longer than the timeout of its task"


_ENDS = {6: End.RETURNED, 7: End.FAILED, 8: End.FAILED, 10: End.ABORTED}


@dataclass
class Worker:
    """One bridge, as the scheduler sees it.

    Attributes:
        connected: its stream is open.
        calls: those under way on it, by id.
        busy: slots that the bridge says are taken; it drops a call for which there is none, and says nothing.
        heartbeat: notified of every one.
    """

    id: str
    connected: asyncio.Event = field(default_factory=asyncio.Event)
    calls: dict[str, asyncio.Future[tuple[End, str]]] = field(default_factory=dict)
    busy: int = 0
    heartbeat: asyncio.Condition = field(default_factory=asyncio.Condition)
    _orders: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)

    def assign(self, call: str, command: Sequence[str], env: dict[str, str]) -> asyncio.Future[tuple[End, str]]:
        """Begin a call; the future says how it ended, and the bridge's reason if it gave one."""
        run = messages.ExecutionIdentifier(
            org=env["_U_ORG_NAME"], project=env["FLYTE_INTERNAL_TASK_PROJECT"],
            domain=env["FLYTE_INTERNAL_TASK_DOMAIN"], name=env["RUN_NAME"],
        )  # fmt: skip
        self.calls[call] = asyncio.get_running_loop().create_future()
        self._order(call, _ASSIGN, cmd=command, env_vars=env, exec_id=run)
        return self.calls[call]

    def abort(self, call: str, end: End = End.ABORTED, reason: str = "") -> None:
        """Cancel a call; does nothing if it has ended."""
        if call in self.calls:
            self._order(call, _DELETE)
            self._end(call, end, reason)

    def lose(self) -> None:
        """The replica is gone, and every call on it."""
        self.connected.clear()
        for call in list(self.calls):
            self._end(call, End.LOST, "the replica's connection ended")

    async def listen(self, heartbeats: AsyncIterator[Any], first: Any) -> None:
        self._hear(first)
        self.connected.set()
        async for heartbeat in heartbeats:
            self._hear(heartbeat)
            async with self.heartbeat:
                self.heartbeat.notify_all()

    async def freed(self) -> None:
        """Wait until the slot of an aborted call is free: the call may take its time to end."""
        async with self.heartbeat:
            await self.heartbeat.wait()  # what was heard before may be older than the call
            await self.heartbeat.wait_for(lambda: not self.connected.is_set() or self.busy <= len(self.calls))

    async def next_order(self) -> Any:
        return await self._orders.get()

    def _hear(self, heartbeat: Any) -> None:
        self.busy = heartbeat.capacity.execution_count
        for status in heartbeat.task_statuses:
            if status.phase in _ENDS:
                self._order(status.task_id, _DELETE)  # until then the bridge reports it again and again
                self._end(status.task_id, _ENDS[status.phase], status.reason)
            elif status.task_id in self.calls:
                self._order(status.task_id, _ACK)

    def _order(self, call: str, operation: int, **fields: Any) -> None:
        order = messages.HeartbeatResponse(task_id=call, namespace="tests", operation=operation, **fields)
        self._orders.put_nowait(order)

    def _end(self, call: str, end: End, reason: str) -> None:
        future = self.calls.pop(call, None)
        if future is not None and not future.done():
            future.set_result((end, reason))


class Scheduler(services.FastTaskServicer):  # type: ignore[misc]
    """The service. `worker` makes a place for a bridge before it connects."""

    def __init__(self) -> None:
        self._workers: dict[str, Worker] = {}
        self._server = grpc.aio.server()
        services.add_FastTaskServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")

    def worker(self, worker_id: str) -> Worker:
        return self._workers.setdefault(worker_id, Worker(worker_id))

    async def __aenter__(self) -> Scheduler:
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(grace=0)

    async def Heartbeat(self, heartbeats: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
        # The bridge waits for the response's headers before it says anything.
        await context.send_initial_metadata(())
        first = await anext(aiter(heartbeats))
        worker = self._workers[first.worker_id]

        async def write() -> None:
            while True:
                await context.write(await worker.next_order())

        writer = asyncio.create_task(write())
        try:
            await worker.listen(heartbeats, first)
        finally:
            writer.cancel()
            worker.lose()
            async with worker.heartbeat:
                worker.heartbeat.notify_all()
