"""One reusable container, without the container: the real bridge, which starts the real executor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from pathlib import Path

import psutil

from tests.runtime.scheduler import Worker

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Replica:
    """A bridge process and its executor, in a folder and a process group of their own.

    Attributes:
        worker: the scheduler's side of it.
        folder: where the code bundle is unpacked.
        log_file: what the bridge and the executor print.
        ends_with_bridge: the bridge is the container's first process, with which all others end.
    """

    def __init__(self, worker: Worker, folder: Path) -> None:
        self.worker = worker
        self.folder = folder / "code"
        self.log_file = folder / "log.txt"
        self.ends_with_bridge = True
        self.folder.mkdir(parents=True)
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, queue: str, parallelism: int, scheduler_port: int, env: dict[str, str]) -> None:
        """Start it and wait until it is connected (a second or two)."""
        with self.log_file.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                BIN / "unionai-actor-bridge", "--queue-id", queue, "--worker-id", self.worker.id,
                "--fasttask-url", f"http://127.0.0.1:{scheduler_port}", "--parallelism", str(parallelism),
                "--heartbeat-interval-seconds", "1", "--executor-registration-addr", f"127.0.0.1:{free_port()}",
                "--fast-register-dir-override", self.folder,
                cwd=self.folder, env=env, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        await asyncio.wait_for(self.worker.connected.wait(), 60)

    @property
    def process(self) -> asyncio.subprocess.Process:
        assert self._process is not None, "not started"
        return self._process

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def executor(self) -> int:
        """Process id of the executor: the Python process that runs the tasks."""
        (child,) = psutil.Process(self.process.pid).children()
        return child.pid

    def kill_executor(self) -> None:
        os.kill(self.executor(), signal.SIGKILL)

    def terminate_bridge(self) -> None:
        """What Kubernetes does to a pod that it evicts."""
        self.process.terminate()

    async def ended(self) -> None:
        """Wait for the bridge's end. With a container's first process end all others: the kernel kills them."""
        await self.process.wait()
        self.worker.lose()
        if self.ends_with_bridge:
            self._kill_group()

    async def stop(self) -> None:
        if self._process is not None:
            self._kill_group()
            await self.ended()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
