"""A Flyte cluster on one machine: real drivers (``a0``), real replicas, and a small backend that plays the rest.

What is played, and how:

- `Backend` is the ActionsService that drivers talk to: enqueue an action, watch its parent's actions, abort one.
- A reusable task goes to the pool of its environment, to the replica with the fewest calls. A pool starts all of its
  replicas at once, so that a test knows how many there are, and replaces one that ended, as Kubernetes does.
- Any other task is a process of its own.
- An attempt on a replica that takes longer than its task's ``timeout`` is cancelled there, and has failed.
- An attempt that failed is repeated as often as the task's ``retries`` say, at once; where the replica failed, not the
  task, on another one. A lost replica counts as a failed attempt. The last attempt's error goes to the parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import os
import signal
from collections.abc import AsyncIterator, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from flyte._internal.runtime import convert
from flyte._internal.runtime.task_serde import translate_task_to_wire
from flyte.models import CodeBundle, SerializationContext
from flyteidl2.actions import actions_service_pb2 as actions
from flyteidl2.actions.actions_service_connect import ActionsService, ActionsServiceASGIApplication
from flyteidl2.common import identifier_pb2, phase_pb2
from flyteidl2.core import execution_pb2
from flyteidl2.task import common_pb2
from flyteidl2.workflow import run_definition_pb2, state_service_pb2

from tests.helpers import ROOT
from tests.runtime.replica import BIN, Replica
from tests.runtime.scheduler import End, Scheduler

ORG, PROJECT, DOMAIN = "tests", "runtime", "development"
_PHASES = {
    "SUCCEEDED": phase_pb2.ACTION_PHASE_SUCCEEDED,
    "FAILED": phase_pb2.ACTION_PHASE_FAILED,
    "ABORTED": phase_pb2.ACTION_PHASE_ABORTED,
}


@dataclass(frozen=True)
class Attempt:
    """One try of an action: where it ran and how it ended there."""

    where: str
    end: End
    error: execution_pb2.ExecutionError | None


@dataclass
class Action:
    """A task of a run.

    Attributes:
        name: unique in the run; the run's first is ``a0``.
        task: environment and function, such as ``generate-cpu.infer_chunk``.
        folder: its inputs, and a folder for each attempt.
        attempts: what became of each.
        phase: SUCCEEDED, FAILED or ABORTED; empty before.
    """

    name: str
    task: str
    folder: Path
    attempts: list[Attempt] = field(default_factory=list)
    phase: str = ""
    abort: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def outputs_folder(self) -> Path:
        return self.folder / str(max(1, len(self.attempts)))


class Run:
    """One run: its first action's result, and all actions under it.

    Attributes:
        name: unique in the cluster.
        actions: by name.
        folder: of inputs and outputs.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.actions: dict[str, Action] = {}
        self.driver: asyncio.subprocess.Process | None = None
        self._done: asyncio.Task[Any] | None = None
        self._task: Any = None

    @property
    def root(self) -> Action:
        return self.actions["a0"]

    @property
    def phase(self) -> str:
        return self.root.phase

    @property
    def children(self) -> list[Action]:
        return [action for name, action in self.actions.items() if name != "a0"]

    @property
    def error(self) -> str:
        """Code and message of the last attempt's error; empty if there is none."""
        error = self.root.attempts[-1].error if self.root.attempts else None
        return f"{error.code}: {error.message}" if error is not None else ""

    @property
    def log(self) -> str:
        """What the driver printed; empty where the first action ran on a replica."""
        return "".join(path.read_text(errors="replace") for path in sorted((self.folder / "a0").glob("*/log.txt")))

    def abort(self) -> None:
        """Cancel it, as a click on "abort" does."""
        self.root.abort.set()

    def kill_driver(self) -> None:
        assert self.driver is not None, "there is no driver"
        self.driver.kill()

    async def ended(self, timeout_s: float = 60) -> Run:
        """Wait for the end, whatever it is.

        Raises:
            TimeoutError: it hangs.
        """
        assert self._done is not None
        await asyncio.wait_for(asyncio.shield(self._done), timeout_s)
        return self

    async def result(self, timeout_s: float = 60) -> Any:
        """What the first action returned.

        Raises:
            AssertionError: it did not succeed; says why.
            TimeoutError: it hangs.
        """
        await self.ended(timeout_s)
        assert self.phase == "SUCCEEDED", f"{self.phase} {self.error}\n{self.log}"
        outputs = common_pb2.Outputs.FromString((self.root.outputs_folder / "outputs.pb").read_bytes())
        return await convert.convert_outputs_to_native(self._task.native_interface, convert.Outputs(outputs))


class Pool:
    """The replicas of one environment and one code bundle.

    Attributes:
        replicas: those that are up.
        ended: those that went away; their logs remain.
    """

    def __init__(self, cluster: Cluster, queue: str, size: int, parallelism: int, env: dict[str, str]) -> None:
        self._cluster, self._queue, self._parallelism, self._env = cluster, queue, parallelism, env
        self._room = asyncio.Condition()
        self._numbers = itertools.count()
        self._size = size
        self.replicas: list[Replica] = []
        self.ended: list[Replica] = []
        for _ in range(size):
            cluster.spawn(self._keep_one())

    async def up(self) -> list[Replica]:
        """Wait until all replicas are there."""
        async with self._room:
            await self._room.wait_for(lambda: len(self.replicas) == self._size)
        return self.replicas

    async def _keep_one(self) -> None:
        while True:
            name = f"{self._queue}-{next(self._numbers)}"
            replica = Replica(self._cluster.scheduler.worker(name), self._cluster.folder / "replicas" / name)
            try:
                await replica.start(self._queue, self._parallelism, self._cluster.scheduler.port, self._env)
                async with self._room:
                    self.replicas.append(replica)
                    self._room.notify_all()
                await replica.ended()
                self.replicas.remove(replica)
                self.ended.append(replica)
            except BaseException:
                await replica.stop()
                raise

    async def run(
        self,
        call: str,
        command: list[str],
        env: dict[str, str],
        abort: asyncio.Event,
        *,
        timeout_s: float | None,
        avoid: str | None,
    ) -> tuple[str, End, str]:
        """Run a call on the least loaded replica that has room; gives its name, the end and the bridge's reason.

        Args:
            timeout_s: seconds on the replica after which it is cancelled.
            avoid: a replica that just failed this call. One that dies says so some 50 ms before it is gone, and would
                be given the next attempts as well, for it has the fewest calls.
        """
        if self._size == 1:
            avoid = None  # it failed the call, but may live; one that died is replaced under another name
        async with self._room:
            await self._room.wait_for(lambda: self._least_loaded(avoid))
            replica = self._least_loaded(avoid)
            assert replica is not None
            ended = replica.worker.assign(call, command, env)
        aborted = asyncio.create_task(abort.wait())
        try:
            await asyncio.wait((ended, aborted), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if aborted.done():
                replica.worker.abort(call)
            elif not ended.done():
                replica.worker.abort(call, End.TIMED_OUT, f"the task took longer than {timeout_s:g} s")
            end, reason = await ended
            if end in (End.ABORTED, End.TIMED_OUT):
                await replica.worker.freed()
        finally:
            aborted.cancel()
            async with self._room:
                self._room.notify_all()
        return replica.worker.id, end, reason

    def _least_loaded(self, avoid: str | None) -> Replica | None:
        free = [
            replica
            for replica in self.replicas
            if replica.worker.connected.is_set()
            and replica.worker.id != avoid
            and len(replica.worker.calls) < self._parallelism
        ]
        return min(free, key=lambda replica: len(replica.worker.calls), default=None)


class Cluster:
    """See the module's text. Use it by the fixture ``cluster``, which takes everything down.

    Attributes:
        folder: of all files: runs, replicas, logs.
        pools: by environment name; of several versions the last.
        runs: all runs so far.
    """

    def __init__(self, folder: Path, replicas: int = 2, env: Mapping[str, str] | None = None) -> None:
        """Give variables for the environment of all processes as ``env``."""
        self.folder = folder
        self._replicas = replicas
        self._extra_env = dict(env or {})
        self.scheduler = Scheduler()
        self.pools: dict[str, Pool] = {}
        self._queues: dict[str, Pool] = {}
        self.runs: dict[str, Run] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._backend = Backend(self)

    @contextlib.asynccontextmanager
    async def up(self) -> AsyncIterator[Cluster]:
        (self.folder / "tmp").mkdir(parents=True)
        async with self.scheduler, self._backend.serving() as endpoint:
            config = self.folder / "config.yaml"
            config.write_text(f"admin:\n  endpoint: {endpoint}\n  insecure: true\n")
            self._env = {
                "PATH": f"{BIN}:{os.defpath}",
                "HOME": str(self.folder),
                "TMPDIR": str(self.folder / "tmp"),
                "DO_NOT_TRACK": "1",
                "FLYTECTL_CONFIG": str(config),
                "FSSPEC_FILE_AUTO_MKDIR": "true",
                "PYTHONUNBUFFERED": "1",
                "RUST_LOG": "warn",
                "_U_USE_ACTIONS": "1",
                **self._extra_env,
            }
            try:
                yield self
            finally:
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)

    async def start(self, task: Any, bundle: Path, **inputs: Any) -> Run:
        """What ``flyte run`` does: write the inputs, and hand the task to the backend."""
        name = f"run{len(self.runs)}"
        run = self.runs[name] = Run(name, self.folder / "runs" / name)
        run._task = task
        (run.folder / "a0").mkdir(parents=True)
        converted = await convert.convert_from_native_to_inputs(task.native_interface, **inputs)
        inputs_file = run.folder / "a0" / "inputs.pb"
        inputs_file.write_bytes(converted.proto_inputs.SerializeToString())
        version = _version(bundle)
        code = CodeBundle(tgz=str(bundle), destination=".", computed_version=version)
        context = SerializationContext(
            org=ORG, project=PROJECT, domain=DOMAIN, version=version, root_dir=ROOT, code_bundle=code
        )
        action = actions.Action(
            action_id=identifier_pb2.ActionIdentifier(
                name="a0", run=identifier_pb2.RunIdentifier(org=ORG, project=PROJECT, domain=DOMAIN, name=name)
            ),
            input_uri=str(inputs_file),
            run_output_base=str(run.folder),
            task=run_definition_pb2.TaskAction(spec=translate_task_to_wire(task, context)),
        )
        run._done = self.begin(run, action)
        return run

    async def run(self, task: Any, bundle: Path, timeout_s: float = 60, **inputs: Any) -> Any:
        """`start` and wait for the result."""
        return await (await self.start(task, bundle, **inputs)).result(timeout_s)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        return task

    def begin(self, run: Run, action: actions.Action) -> asyncio.Task[Any]:
        template = action.task.spec.task_template
        name = action.action_id.name
        run.actions[name] = Action(name, template.id.name, run.folder / name)
        return self.spawn(self._attempts(run, run.actions[name], action))

    async def _attempts(self, run: Run, action: Action, request: actions.Action) -> None:
        template = request.task.spec.task_template
        for number in range(1, 2 + template.metadata.retries.retries):
            outputs = action.folder / str(number)
            outputs.mkdir(parents=True)
            where, end, reason = await self._attempt(run, action, request, number, outputs)
            action.attempts.append(Attempt(where, end, _error(outputs, end, reason)))
            if end is End.ABORTED or action.attempts[-1].error is None:
                break
        last = action.attempts[-1]
        action.phase = "ABORTED" if last.end is End.ABORTED else "FAILED" if last.error is not None else "SUCCEEDED"
        self._backend.publish(request, _PHASES[action.phase], str(outputs), last.error)

    async def _attempt(
        self, run: Run, action: Action, request: actions.Action, number: int, outputs: Path
    ) -> tuple[str, End, str]:
        template = request.task.spec.task_template
        placeholders = {
            "{{.input}}": request.input_uri,
            "{{.outputPrefix}}": str(outputs),
            "{{.rawOutputDataPrefix}}": str(action.folder / "raw"),
            "{{.checkpointOutputPrefix}}": str(outputs / "checkpoint"),
            "{{.prevCheckpointPrefix}}": '""',
            "{{.runName}}": run.name,
            "{{.actionName}}": action.name,
            "{{.runStartTime}}": "2026-01-02T03:04:05Z",
        }
        command = [placeholders.get(word, word) for word in template.container.args]
        identity = {
            "RUN_NAME": run.name,
            "ACTION_NAME": action.name,
            "_U_RUN_BASE": str(run.folder),
            "_U_ORG_NAME": ORG,
            "FLYTE_INTERNAL_TASK_PROJECT": PROJECT,
            "FLYTE_INTERNAL_TASK_DOMAIN": DOMAIN,
            "FLYTE_INTERNAL_EXECUTION_PROJECT": PROJECT,
            "FLYTE_INTERNAL_EXECUTION_DOMAIN": DOMAIN,
        }
        env = {**self._env, **{pair.key: pair.value for pair in template.container.env}}
        if template.type == "actor":
            pool = self._pool(template.custom, env)
            last = action.attempts[-1] if action.attempts else None
            failed_at = last.where if last is not None and last.end is not End.RETURNED else None
            call = f"{run.name}-{action.name}-{number}"
            timeout_s = template.metadata.timeout.ToTimedelta().total_seconds() or None
            return await pool.run(call, command, identity, action.abort, timeout_s=timeout_s, avoid=failed_at)
        return await self._run_process(run, command, {**env, **identity}, outputs, action.abort)

    def _pool(self, custom: Any, env: dict[str, str]) -> Pool:
        name, spec = custom["name"], custom["spec"]
        queue = f"{name}-{custom['version']}"
        if queue not in self._queues:
            size = min(self._replicas, int(spec["replica_count"]))
            self._queues[queue] = self.pools[name] = Pool(self, queue, size, int(spec["parallelism"]), env)
        return self._queues[queue]

    async def _run_process(
        self, run: Run, command: list[str], env: dict[str, str], outputs: Path, abort: asyncio.Event
    ) -> tuple[str, End, str]:
        (outputs / "code").mkdir()
        with (outputs / "log.txt").open("wb") as log:
            process = run.driver = await asyncio.create_subprocess_exec(
                BIN / command[0], *command[1:], cwd=outputs / "code", env=env,
                stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        aborted, ended = asyncio.create_task(abort.wait()), asyncio.create_task(process.wait())
        try:
            await asyncio.wait((aborted, ended), return_when=asyncio.FIRST_COMPLETED)
            if aborted.done() and not ended.done():
                process.terminate()
            code = await ended
        finally:
            aborted.cancel()
            ended.cancel()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if aborted.done() and not aborted.cancelled():
            return "process", End.ABORTED, ""
        return "process", End.RETURNED if code == 0 else End.FAILED, f"exit code {code}"


def _version(bundle: Path) -> str:
    return hashlib.sha256(bundle.read_bytes()).hexdigest()[:12]


def _error(outputs: Path, end: End, reason: str) -> execution_pb2.ExecutionError | None:
    """The error of an attempt: what its task wrote, or what happened to the replica."""
    if (outputs / "error.pb").exists() and end is not End.TIMED_OUT:
        error = execution_pb2.ErrorDocument.FromString((outputs / "error.pb").read_bytes()).error
        return execution_pb2.ExecutionError(code=error.code, message=error.message, kind=error.origin)
    if end is End.RETURNED:
        return None
    return execution_pb2.ExecutionError(code=end.name, message=reason, kind=execution_pb2.ExecutionError.SYSTEM)


class Backend(ActionsService):
    """The three calls of the ActionsService that a driver makes."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._updates: dict[tuple[str, str], dict[str, state_service_pb2.ActionUpdate]] = {}
        self._watchers: dict[tuple[str, str], list[asyncio.Queue[state_service_pb2.ActionUpdate]]] = {}

    async def enqueue(self, request: Any, ctx: Any) -> Any:
        action = request.action
        run = self._cluster.runs[action.action_id.run.name]
        if action.action_id.name not in run.actions:  # a driver's own retries ask again
            self._cluster.begin(run, action)
        return actions.EnqueueResponse()

    async def watch_for_updates(self, request: Any, ctx: Any) -> AsyncIterator[Any]:
        key = request.parent_action_id.run.name, request.parent_action_id.name
        news: asyncio.Queue[state_service_pb2.ActionUpdate] = asyncio.Queue()
        watchers = self._watchers.setdefault(key, [])
        watchers.append(news)
        try:
            for update in list(self._updates.get(key, {}).values()):
                yield actions.WatchForUpdatesResponse(action_update=update)
            sentinel = state_service_pb2.ControlMessage(sentinel=True)
            yield actions.WatchForUpdatesResponse(control_message=sentinel)
            while True:
                yield actions.WatchForUpdatesResponse(action_update=await news.get())
        finally:
            watchers.remove(news)

    async def abort(self, request: Any, ctx: Any) -> Any:
        action = self._cluster.runs[request.action_id.run.name].actions.get(request.action_id.name)
        if action is not None:
            action.abort.set()
        return actions.AbortResponse()

    def publish(self, request: Any, phase: int, outputs: str, error: execution_pb2.ExecutionError | None) -> None:
        update = state_service_pb2.ActionUpdate(
            action_id=request.action_id, phase=phase, output_uri=outputs, error=error
        )
        key = request.action_id.run.name, request.parent_action_name
        self._updates.setdefault(key, {})[request.action_id.name] = update
        for news in self._watchers.get(key, ()):
            news.put_nowait(update)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """Serve on a free loopback port; gives the endpoint that drivers are configured with."""
        config = uvicorn.Config(
            ActionsServiceASGIApplication(self), host="127.0.0.1", port=0, log_level="critical", lifespan="off"
        )
        socket = config.bind_socket()
        server = _Server(config)
        serving = asyncio.create_task(server.serve(sockets=[socket]))
        try:
            yield f"dns:///localhost:{socket.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            await serving
            socket.close()


class _Server(uvicorn.Server):
    """Leaves the signals to pytest."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield
