"""GPUs as NVML sees them: the real nvidia-ml-py over a stand-in for the driver's library, `fake_nvml.c`."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from flyte_batch.errors import BadInput
from flyte_batch.monitoring import clock, gpu
from flyte_batch.monitoring.details import gpu_use
from flyte_batch.monitoring.gpu import GpuSampler, GpuTotal, GpuUse, gpu_totals
from tests.helpers import ENVIRONMENT, ROOT, questions

pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py comes with the extra 'monitoring'")

FIRST = "GPU-11111111-aaaa-bbbb-cccc-000000000000"
SECOND = "GPU-22222222-aaaa-bbbb-cccc-000000000000"
THIRD = "GPU-22233333-aaaa-bbbb-cccc-000000000000"
INSTANCE = "MIG-33333333-aaaa-bbbb-cccc-000000000000"
GIB = 1 << 30


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the stand-in for libnvidia-ml.so.1."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("the stand-in for NVML needs gcc")
    folder = tmp_path_factory.mktemp("nvml")
    source = Path(__file__).with_name("fake_nvml.c")
    subprocess.run(
        [compiler, "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(folder / "libnvidia-ml.so.1"), str(source)],
        check=True,
    )
    return folder


class Machine:
    """The GPUs that the stand-in shows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values: dict[tuple[str, str], object] = {}

    def set(self, device: str | int, **values: object) -> None:
        """Change what a device says; None is what it does not support."""
        self._values |= {(str(device), name): value for name, value in values.items()}
        lines = [f"{of} {name} {value}\n" for (of, name), value in self._values.items() if value is not None]
        new = self.path.with_suffix(".new")
        new.write_text("".join(lines))
        new.replace(self.path)

    def add(self, uuid: str, name: str = "NVIDIA L4", **values: object) -> None:
        number = sum(key == "uuid" and "." not in of for of, key in self._values)
        self.set(number, uuid=uuid, name=name, **values)
        self.set("-", count=number + 1)


@pytest.fixture
def machine(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """No GPU yet; nvidia-ml-py of this process talks to the stand-in."""
    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(library / "libnvidia-ml.so.1")))
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.setenv("FAKE_NVML", str(tmp_path / "gpus"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = Machine(tmp_path / "gpus")
    found.set("-", count=0)
    return found


Start = Callable[..., GpuSampler]


@pytest.fixture
def start() -> Iterator[Start]:
    """A sampler that looks only when it is told to."""
    made: list[GpuSampler] = []

    def one(interval_s: float = 3600, **options: Any) -> GpuSampler:
        made.append(GpuSampler(interval_s, **options))
        return made[-1]

    yield one
    for each in made:
        each.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class TestSample:
    def test_two_gpus_say_what_nvml_says_in_our_units(self, machine: Machine, start: Start) -> None:
        machine.add(
            FIRST, utilization=87, memory_utilization=41, memory_used=20 * GIB, memory_total=24 * GIB, power_mw=71_500,
            temperature=63, sm_clock=2040, memory_clock=6251, energy_mj=123_456_789, event_reasons=0x24,
        )  # fmt: skip
        machine.add(SECOND, "NVIDIA A10G", utilization=0, memory_utilization=0, power_mw=15_000)
        before = clock.now()
        first, second = start().latest()
        assert before - 0.01 <= first.at <= clock.now() + 0.01
        assert replace(first, at=0) == gpu.GpuSample(
            at=0, index=0, uuid=FIRST, name="NVIDIA L4", utilization=0.87, memory_utilization=0.41,
            memory_used_bytes=20 * GIB, memory_total_bytes=24 * GIB, power_w=71.5, temperature_c=63, sm_clock_mhz=2040,
            memory_clock_mhz=6251, energy_j=123_456.789, energy_source="counter",
            throttle_reasons=("power_cap", "software_thermal"),
        )  # fmt: skip
        assert (second.index, second.uuid, second.name) == (1, SECOND, "NVIDIA A10G")
        assert (second.utilization, second.power_w, second.energy_j, second.energy_source) == (0, 15, 0, "power")

    def test_what_is_not_supported_is_none_and_never_0(self, machine: Machine, start: Start) -> None:
        machine.add(FIRST)
        sampler = start()
        (sample,) = sampler.latest()
        told = {"at", "index", "uuid", "name"}
        values = {name: getattr(sample, name) for name in sample.__slots__}
        assert {name for name, value in values.items() if value is not None} == told
        (total,) = sampler.totals()
        assert total == GpuTotal(FIRST, "NVIDIA L4", total.seconds, None, None, None, None, None, None, None, ())

    def test_drivers_before_535_call_the_reasons_by_another_name(self, machine: Machine, start: Start) -> None:
        machine.add(FIRST, throttle_reasons=0x1)
        assert start().latest()[0].throttle_reasons == ("idle",)

    def test_a_reading_that_fails_once_is_none_once(self, machine: Machine, start: Start) -> None:
        machine.add(FIRST, utilization=50, memory_utilization=1, energy_mj=1000)
        sampler = start()
        machine.set(0, error=999)
        sampler.sample()
        assert (sampler.latest()[0].utilization, sampler.latest()[0].energy_j) == (None, 1.0)
        machine.set(0, error=None, energy_mj=9000)
        sampler.sample()
        assert (sampler.latest()[0].utilization, sampler.latest()[0].energy_j) == (0.5, 9.0)
        assert sampler.totals()[0].energy_j == 8.0


class TestSampler:
    def test_it_looks_by_itself_until_it_is_closed(self, machine: Machine) -> None:
        machine.add(FIRST, utilization=10, memory_utilization=0)
        with GpuSampler(0.005) as sampler:
            until(lambda: len(sampler.samples()[FIRST]) > 2)
            machine.set(0, utilization=90)
            until(lambda: sampler.latest()[0].utilization == 0.9)
        assert sampler.is_closed
        seen = sampler.samples()
        sampler.sample()
        sampler.close()
        assert sampler.samples() == seen
        times = [sample.at for sample in seen[FIRST]]
        assert times == sorted(times)

    def test_a_lost_gpu_is_one_warning_and_the_other_goes_on(
        self, machine: Machine, start: Start, caplog: pytest.LogCaptureFixture
    ) -> None:
        machine.add(FIRST, power_mw=70_000, energy_mj=1000)
        machine.add(SECOND, power_mw=60_000, energy_mj=1000)
        sampler = start()
        machine.set(0, energy_mj=3000)
        sampler.sample()
        lost_at = sampler.latest()[0].at
        machine.set(0, lost=1)
        machine.set(1, energy_mj=8000)
        for _ in range(3):
            sampler.sample()
        assert [sample.uuid for sample in sampler.latest()] == [SECOND]
        (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert "GPU 0 (NVIDIA L4, GPU-11111111" in record.getMessage()
        first, second = sampler.totals()
        assert (first.energy_j, second.energy_j) == (2.0, 7.0)
        assert first.seconds < second.seconds
        assert [use.uuid for use in sampler.use_between(lost_at + 1e-4, clock.now())] == [SECOND]

    def test_a_gpu_that_answers_nothing_holds_nobody(
        self, machine: Machine, start: Start, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        machine.add(FIRST, utilization=30, memory_utilization=0)
        sampler = start()
        monkeypatch.setattr(gpu, "_PATIENCE_S", 0.05)
        machine.set(0, hang=1)
        (use,) = sampler.use_between(0, clock.now())
        assert use.end == sampler.latest()[0].at
        machine.set(0, hang=None)
        until(lambda: len(sampler.samples()[FIRST]) == 2)

    def test_a_long_series_is_thinned_without_losing_energy_or_peaks(self, machine: Machine, start: Start) -> None:
        machine.add(FIRST, utilization=50, memory_utilization=0, energy_mj=0, memory_used=GIB, memory_total=2 * GIB)
        sampler = start(most_samples=16)
        began = sampler.latest()[0].at
        for number in range(1, 201):
            machine.set(0, energy_mj=number * 1000, memory_used=2 * GIB if number == 77 else GIB)
            sampler.sample()
        samples = sampler.samples()[FIRST]
        assert 8 <= len(samples) <= 16
        assert samples[0].at == began
        assert samples[-1].at == sampler.latest()[0].at
        assert [sample.utilization for sample in samples] == pytest.approx([0.5] * len(samples))
        energies = [sample.energy_j for sample in samples if sample.energy_j is not None]
        assert energies[0] == 0
        steps = [after - before for before, after in pairwise(energies)]  # as many joules as samples
        assert set(steps[:-1]) == {max(steps)}  # evenly, over the whole time
        assert 0 < steps[-1] <= max(steps) <= 16
        assert sum(sample.memory_used_bytes == 2 * GIB for sample in samples) == 1
        (total,) = sampler.totals()
        assert (total.energy_j, total.peak_memory_bytes) == (200.0, 2 * GIB)
        assert total.mean_utilization == pytest.approx(0.5)

    @pytest.mark.parametrize("options", [{"interval_s": 0}, {"interval_s": -1}, {"interval_s": 1, "most_samples": 1}])
    def test_numbers_that_make_no_sense_are_refused(self, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"interval_s must be positive|most_samples must be"):
            GpuSampler(**options)


class TestUse:
    def test_the_energy_of_a_part_of_the_time_is_interpolated(self, machine: Machine, start: Start) -> None:
        machine.add(FIRST, energy_mj=50_000)
        sampler = start()
        machine.set(0, energy_mj=150_000)
        sampler.sample()
        first, last = (sample.at for sample in sampler.samples()[FIRST])
        quarter = first + (last - first) / 4
        (use,) = sampler.use_between(quarter, last)
        assert (use.start, use.end, use.energy_source) == (quarter, last, "counter")
        assert use.energy_start_j == pytest.approx(75, rel=1e-3)
        assert use.energy_end_j == 150

    def test_without_a_counter_energy_is_power_over_time(self, machine: Machine, start: Start) -> None:
        machine.add(FIRST, power_mw=100_000, utilization=20, memory_utilization=0)
        sampler = start()
        began = sampler.latest()[0].at
        sampler.sample()
        machine.set(0, power_mw=300_000, utilization=60)
        sampler.sample()
        middle, end = (sample.at for sample in sampler.samples()[FIRST][1:])
        (total,) = sampler.totals()  # looks once more
        after = sampler.latest()[0].at - end
        joules = (middle - began) * 100 + (end - middle) * 200 + after * 300
        assert total.energy_source == "power"
        assert total.energy_j == pytest.approx(joules)
        assert total.mean_power_w == pytest.approx(joules / total.seconds)
        busy = (middle - began) * 0.2 + (end - middle) * 0.4 + after * 0.6
        assert total.mean_utilization == pytest.approx(busy / total.seconds)

    def test_peaks_are_those_of_the_time(self, machine: Machine, start: Start) -> None:
        machine.add(FIRST, memory_used=3 * GIB, memory_total=8 * GIB, temperature=80, event_reasons=0x40)
        sampler = start()
        for used, temperature, reasons in ((GIB, 50, 0x4), (2 * GIB, 40, 0x1), (GIB, 30, 0x1)):
            machine.set(0, memory_used=used, temperature=temperature, event_reasons=reasons)
            sampler.sample()
        times = [sample.at for sample in sampler.samples()[FIRST]]
        (use,) = sampler.use_between(times[1], times[2])
        assert (use.peak_memory_bytes, use.max_temperature_c) == (2 * GIB, 50)
        assert use.throttle_reasons == ("idle", "power_cap")
        assert sampler.totals()[0].throttle_reasons == ("idle", "power_cap", "hardware_thermal")

    def test_a_time_in_which_nobody_looked_is_no_use(self, machine: Machine, start: Start) -> None:
        machine.add(FIRST, energy_mj=0)
        sampler = start()
        assert sampler.use_between(0, 1) == ()

    def test_a_use_is_plain_data(self, machine: Machine, start: Start) -> None:
        machine.add(FIRST, utilization=50, memory_utilization=1, energy_mj=1000, event_reasons=0x4)
        (use,) = start().use_between(0, clock.now())
        fields = json.loads(json.dumps(asdict(use)))
        assert GpuUse(**fields | {"throttle_reasons": tuple(fields["throttle_reasons"])}) == use


def use_of(start: float, end: float, uuid: str = FIRST, **fields: Any) -> GpuUse:
    """A use of a device whose counter goes up by 10 J a second, at a utilization of a half."""
    values: dict[str, Any] = {
        "sampler": "one", "busy_start_s": start / 2, "busy_end_s": end / 2, "energy_start_j": 10 * start,
        "energy_end_j": 10 * end, "energy_source": "counter", "peak_memory_bytes": None, "memory_total_bytes": None,
        "max_temperature_c": None, "throttle_reasons": (),
    }  # fmt: skip
    return GpuUse(uuid=uuid, name="NVIDIA L4", start=start, end=end, **values | fields)


class TestTotals:
    def test_chunks_that_overlap_count_once(self) -> None:
        (total,) = gpu_totals([use_of(100, 160), use_of(130, 200), use_of(140, 150)])
        assert (total.seconds, total.energy_j, total.mean_utilization, total.mean_power_w) == (100, 1000, 0.5, 10)

    def test_time_between_chunks_is_not_counted(self) -> None:
        (total,) = gpu_totals([use_of(100, 150), use_of(1000, 1050)])
        assert (total.seconds, total.energy_j) == (100, 1000)

    def test_every_device_has_its_own(self) -> None:
        totals = gpu_totals([use_of(100, 150), use_of(100, 150, SECOND), use_of(150, 160)])
        assert [(total.uuid, total.energy_j) for total in totals] == [(FIRST, 600), (SECOND, 500)]
        assert gpu.energy_j(totals) == 1100

    def test_two_replicas_on_one_device_share_its_counter(self) -> None:
        (total,) = gpu_totals(
            [use_of(100, 150, sampler="a"), use_of(100, 150, sampler="b", busy_start_s=0.0, busy_end_s=25.0)]
        )
        assert (total.energy_j, total.mean_utilization, total.seconds) == (500, 0.5, 50)

    def test_power_that_was_integrated_belongs_to_who_did_it(self) -> None:
        meters = {"energy_source": "power", "energy_start_j": 0.0, "energy_end_j": 70.0}
        (total,) = gpu_totals([use_of(0, 10, sampler="a", **meters), use_of(50, 60, sampler="b", **meters)])
        assert (total.energy_j, total.energy_source) == (140, "power")

    def test_energy_that_is_unknown_anywhere_is_unknown_altogether(self) -> None:
        unknown = {"energy_source": None, "energy_start_j": None, "energy_end_j": None}
        totals = gpu_totals([use_of(0, 10), use_of(0, 10, SECOND, **unknown)])
        assert [total.energy_j for total in totals] == [100, None]
        assert gpu.energy_j(totals) is None
        assert gpu_totals([use_of(0, 10), use_of(10, 20, **unknown)])[0].energy_j is None
        assert gpu.energy_j([]) is None

    def test_merged_uses_are_one_a_device_and_replica_with_what_was_between_them(self) -> None:
        first = use_of(130, 200, peak_memory_bytes=3, max_temperature_c=70, throttle_reasons=("power_cap",))
        second = use_of(100, 150, peak_memory_bytes=5, max_temperature_c=60, throttle_reasons=("idle", "power_cap"))
        later = use_of(1000, 1050, max_temperature_c=65)
        (one,) = gpu.merged([first, second, later])
        assert one == use_of(
            100, 1050, peak_memory_bytes=5, max_temperature_c=70, throttle_reasons=("idle", "power_cap")
        )
        assert gpu_totals([one])[0].energy_j == 9500
        assert gpu.merged([one, first, second, later]) == (one,)
        others = (use_of(0, 10, SECOND), use_of(0, 10, sampler="two"))
        assert gpu.merged([first, *others]) == (first, *others)

    def test_watt_hours_for_a_million_tokens(self) -> None:
        assert gpu.wh_per_million_tokens(7_200_000, 4_000_000) == 500
        assert gpu.wh_per_million_tokens(7_200_000, 0) is None
        assert gpu.wh_per_million_tokens(None, 100) is None


class TestChoice:
    @pytest.fixture(autouse=True)
    def _three(self, machine: Machine) -> None:
        for uuid in (FIRST, SECOND, THIRD):
            machine.add(uuid, energy_mj=1000)

    @pytest.mark.parametrize(
        ("visible", "chosen"),
        [
            (None, [0, 1, 2]),
            ("1", [1]),
            ("2,0", [2, 0]),
            (" 1 , 2 ", [1, 2]),
            (f"{SECOND},0", [1, 0]),
            ("GPU-1111", [0]),
            ("1,9,0", [1]),  # CUDA ignores what follows a device that is not there
            ("1,-1,0", [1]),
            ("0,GPU-222", [0]),  # two begin so
        ],
    )
    def test_those_that_cuda_would_use(
        self, visible: str | None, chosen: list[int], start: Start, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [sample.index for sample in start().latest()] == chosen

    @pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles", "9", "GPU-"])
    def test_none_where_cuda_would_use_none(self, visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with pytest.raises(BadInput, match="CUDA_VISIBLE_DEVICES hides them"):
            GpuSampler()

    def test_the_callers_choice_comes_first(self, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        assert [sample.index for sample in start(devices=[2, SECOND, THIRD, 1]).latest()] == [2, 1]
        with pytest.raises(BadInput, match=r"there is no GPU 7: NVML knows 0 \(GPU-1111.*2 \(GPU-2223"):
            GpuSampler(devices=[0, 7])

    def test_a_gpu_that_cannot_be_opened_is_left_out(self, machine: Machine, start: Start) -> None:
        machine.set(1, lost=1)
        assert [sample.index for sample in start().latest()] == [0, 2]


class TestMig:
    @pytest.fixture(autouse=True)
    def _divided(self, machine: Machine) -> None:
        machine.add(FIRST, energy_mj=1000, power_mw=300_000, mig_mode=1, mig_places=7)
        machine.set("0.2", uuid=INSTANCE, name="NVIDIA H100 MIG 1g.10gb", memory_used=GIB, memory_total=10 * GIB)
        machine.add(SECOND, energy_mj=1000, mig_mode=0)

    def test_an_instance_has_its_own_memory_and_nobodys_power(self, start: Start) -> None:
        instance, other = start().latest()
        assert (instance.index, instance.uuid, instance.name) == (0, INSTANCE, "NVIDIA H100 MIG 1g.10gb")
        assert (instance.memory_used_bytes, instance.memory_total_bytes) == (GIB, 10 * GIB)
        assert (instance.utilization, instance.power_w, instance.energy_j) == (None, None, None)
        assert (other.uuid, other.energy_j) == (SECOND, 1.0)

    @pytest.mark.parametrize("visible", [INSTANCE, "MIG-3333"])
    def test_it_can_be_chosen(self, visible: str, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [sample.uuid for sample in start().latest()] == [INSTANCE]


def run(program: str, *arguments: str, **environment: str) -> str:
    """What a program prints in a process of its own, which finds NVML as every process does."""
    clean = {name: value for name, value in ENVIRONMENT.items() if name not in ("CUDA_VISIBLE_DEVICES", "FAKE_NVML")}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT, env={**clean, **environment}, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return done.stdout + done.stderr


STARTED_TWICE = """
import logging
logging.basicConfig(level=logging.DEBUG, format="%(name)s %(levelname)s %(message)s")
from flyte_batch.monitoring import clock, gpu
first, second = gpu.start_sampler(), gpu.start_sampler()
print(first is second, first is None, [sample.uuid for sample in gpu.latest()])
if first is not None:
    first.close()
    print(gpu.latest(), gpu.start_sampler() is not first, len(gpu.latest()))
"""


class TestProcess:
    def test_a_process_has_one_sampler(self, library: Path, tmp_path: Path) -> None:
        machine = Machine(tmp_path / "gpus")
        machine.add(FIRST, energy_mj=1000)
        output = run(STARTED_TWICE, LD_LIBRARY_PATH=str(library), FAKE_NVML=str(machine.path))
        assert output.startswith(f"True False ['{FIRST}']\n() True 1\n")

    def test_without_a_driver_there_is_none_and_one_line_says_so(self, library: Path) -> None:
        told, printed = run(STARTED_TWICE, LD_LIBRARY_PATH=str(library)).splitlines()[::-1]
        assert printed == "True True []"
        assert told.startswith("flyte_batch.monitoring.gpu DEBUG GPUs are not monitored: NVML does not start (Driver")

    @pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="this machine has a driver")  # noqa: PTH110
    def test_without_the_library_there_is_none(self) -> None:
        output = run(STARTED_TWICE, LD_LIBRARY_PATH="")
        assert "True True []" in output
        assert output.count("NVML Shared Library Not Found") == 1

    def test_without_the_package_there_is_none(self) -> None:
        output = run("import sys; sys.modules['pynvml'] = None\n" + STARTED_TWICE)
        assert "True True []" in output
        assert output.count("install flyte-batch with its extra 'monitoring'") == 1

    def test_importing_loads_no_library(self) -> None:
        assert "False" in run("import sys, flyte_batch.monitoring.gpu; print('pynvml' in sys.modules)")


RUN = """
import asyncio, sys
import flyte_batch as fb

@fb.singleton
async def solver():
    return fb.EngineBatcher(fb.FakeEngine(seconds_per_batch=0.1), target_batch_cost=2600)

async def infer_chunk(chunk: fb.Chunk) -> fb.ChunkReport:
    return await fb.infer(chunk, solver, prompt="{question}")

summary = asyncio.run(fb.run(*sys.argv[1:], infer_chunk, chunk_size=10, replicas=1, concurrency=10))
print(summary.seconds, summary.prompt_tokens + summary.response_tokens)
"""


def test_the_energy_of_a_run_is_power_times_its_seconds_however_many_chunks_share_them(
    library: Path, tmp_path: Path
) -> None:
    machine = Machine(tmp_path / "gpus")
    machine.add(FIRST, power_mw=100_000, utilization=40, memory_utilization=0)
    machine.add(SECOND, power_mw=50_000, utilization=0, memory_utilization=0)
    source, output = questions(tmp_path / "questions.jsonl", 100), tmp_path / "output"
    printed = run(
        RUN, source, str(output), LD_LIBRARY_PATH=str(library), FAKE_NVML=str(machine.path), FLYTE_BATCH_PROGRESS="off"
    )
    run_s, tokens = (float(value) for value in printed.split())
    (log,) = json.loads((output / "_report.json").read_text())["runs"]
    totals = gpu_totals(gpu_use(each) for each in log["gpus"])
    for total, watts, utilization in zip(totals, (100, 50), (0.4, 0), strict=True):
        assert total.mean_power_w == pytest.approx(watts)
        assert total.mean_utilization == pytest.approx(utilization)
        assert 0.9 < total.seconds <= run_s  # ten batches of 0.1 s
    page = (output / "_report.html").read_text()
    found = re.search(r"([\d.,]+) Wh per million tokens", page)
    assert found is not None
    expected = (100 * totals[0].seconds + 50 * totals[1].seconds) / 3600 / tokens * 1e6
    assert float(found[1].replace(",", "")) == pytest.approx(expected, rel=0.01)
