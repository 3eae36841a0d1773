from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import flyte
import pytest
from flyte._deploy import plan_deploy
from flyte._image import PythonWheels
from flyte._internal.runtime.task_serde import translate_task_to_wire
from flyte.models import ActionID, SerializationContext

import flyte_batch as fb
import images
from flyte_batch import environments
from flyte_batch.data.sources import open_source
from flyte_batch.replica import ReplicaSettings, environments_called
from images import cpu_image
from tests.helpers import ROOT, questions
from workflows import generate, gsm8k


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Our own warnings so far; each is said once in a process, and anew in every test."""
    environments._warn_once.cache_clear()
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("flyte_batch")]


def test_a_replica_environment_reuses_containers_with_the_given_device() -> None:
    environment = fb.replica_environment(
        "solver", image=cpu_image, gpu="A10G:1", memory="16Gi", replicas=(1, 4), concurrency=10, idle_ttl=600
    )
    policy = environment.reusable
    assert policy is not None
    assert (policy.replicas, policy.concurrency, policy.idle_ttl) == ((1, 4), 10, flyte.ReusePolicy(1, 600).idle_ttl)
    assert environment.resources is not None
    assert environment.resources.gpu == "A10G:1"
    assert environment.plugin_config is None  # Flyte refuses reusable tasks with a custom configuration
    assert fb.slots(environment) == (4, 10)


def test_containers_log_the_action_of_each_line_unless_told_otherwise() -> None:
    replicas = fb.replica_environment("logging", image=cpu_image, env_vars={"DISABLE_RICH_LOGGING": "0", "MINE": "1"})
    driver = fb.driver_environment("logging-driver", image=cpu_image, env_vars={"MINE": "2"})
    assert (replicas.env_vars or {}).items() >= {
        "FLYTE_RESET_ROOT_LOGGER": "1", "DISABLE_RICH_LOGGING": "0", "MINE": "1",
    }.items()  # fmt: skip
    assert driver.env_vars == {"FLYTE_RESET_ROOT_LOGGER": "1", "DISABLE_RICH_LOGGING": "1", "MINE": "2"}


def test_a_fixed_number_of_replicas_is_the_most_too() -> None:
    assert fb.slots(fb.replica_environment("fixed", image=cpu_image, replicas=3, concurrency=2)) == (3, 2)


def test_a_driver_is_no_replica_and_depends_on_them() -> None:
    replicas = fb.replica_environment("replicas", image=cpu_image)
    driver = fb.driver_environment("driver", image=cpu_image, depends_on=[replicas])
    assert driver.reusable is None
    assert driver.depends_on == [replicas]
    with pytest.raises(ValueError, match="'driver' has no ReusePolicy"):
        fb.slots(driver)


@pytest.mark.parametrize("options", [{"replicas": 0}, {"replicas": (3, 2)}, {"concurrency": 0}])
def test_numbers_that_cannot_work_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        fb.replica_environment("none", image=cpu_image, **options)  # type: ignore[arg-type]


class Remote:
    """As much of a task's context on a cluster as is looked at."""

    mode = "remote"
    action = ActionID(name="a0", run_name="run")


def test_on_a_cluster_paths_that_containers_do_not_share_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fb.require_shared(output="out/here")  # outside a run, and in local mode: one machine
    monkeypatch.setattr(flyte, "ctx", Remote)
    fb.require_shared(output="s3://bucket/out")
    with pytest.raises(fb.BadInput, match=r"--output out/here lies on one container's own disk.*file:///mnt/folder if"):
        fb.require_shared(output="out/here")


async def test_a_file_uri_is_the_users_word_that_containers_share_the_disk_and_a_run_reads_and_writes_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(flyte, "ctx", Remote)
    folder = tmp_path / "shared disk"
    folder.mkdir()
    questions(folder / "in.jsonl", 20)
    source, output = f"{folder.as_uri()}/*.jsonl", (folder / "out").as_uri()
    fb.require_shared(source=source, output=output)

    @fb.singleton
    async def solver() -> fb.EngineBatcher[Any, Any]:
        return fb.EngineBatcher(fb.FakeEngine())

    async def run_chunk(chunk: fb.Chunk) -> fb.ChunkReport:
        return await fb.infer(chunk, solver, prompt="{question}")

    run = partial(fb.run, output=output, run_chunk=run_chunk, chunk_size=5)
    assert (await run(source)).rows == 20
    assert (await run(source)).chunks_reused == 4
    assert fb.read_output(output)["response"].to_pylist() == [f"echo: question {i}" for i in range(20)]
    assert {path.suffix for path in (folder / "out").glob("part-*")} == {".parquet"}
    assert open_source(source).rows == 20


def test_the_workflows_tasks_sit_where_they_belong() -> None:
    assert generate.infer_chunk.parent_env_name == "generate-cpu"
    assert generate.infer_chunk_on_gpu.parent_env_name == "generate-gpu"
    assert generate.main.parent_env_name == "generate"
    assert generate.driver.depends_on == [generate.cpu_replicas, generate.gpu_replicas]


def test_pools_of_another_gpu_or_concurrency_are_told_apart() -> None:
    def pool(gpu: str, concurrency: int) -> dict[str, str] | None:
        return fb.replica_environment(
            "a", image="auto", gpu=gpu, concurrency=concurrency, env_vars={"MINE": "1"}
        ).env_vars

    first, same, gpu, concurrency = pool("A10G:1", 10), pool("A10G:1", 10), pool("L4:1", 10), pool("A10G:1", 4)
    assert first is not None
    assert first["MINE"] == "1"
    assert first == same
    assert first != gpu
    assert first != concurrency


@pytest.mark.parametrize(
    ("gpu", "right"), [("L40S:1", "L40s:1"), ("a10g:1", "A10G:1"), ("A10G", "A10G:1"), ("T100:1", "")]
)
def test_a_gpu_that_flyte_does_not_know_is_refused_with_the_one_that_was_meant(gpu: str, right: str) -> None:
    with pytest.raises(
        fb.BadInput, match=f"knows no gpu '{gpu}'.*did you mean {right}" if right else "knows no gpu"
    ) as e:
        fb.replica_environment("a", image="auto", gpu=gpu)
    assert len(str(e.value)) < 150


@pytest.mark.parametrize("workflow", [generate, gsm8k])
def test_a_driver_asks_for_the_gpu_that_the_submitting_shell_named(workflow: ModuleType) -> None:
    """Its container imports the file again, without that shell's variables."""
    assert (workflow.driver.env_vars or {})["FLYTE_BATCH_GPU"] == workflow.GPU
    assert workflow.gpu_replicas.resources.gpu == workflow.GPU


# -- Autoscaling ------------------------------------------------------------


def test_autoscaling_is_told_to_flyte_as_it_was_asked_for() -> None:
    policy = fb.replica_environment(
        "scaled", image=cpu_image, replicas=(0, 8), idle_ttl=900, scaledown_ttl=120, scope="run"
    ).reusable
    assert policy is not None
    assert (policy.min_replicas, policy.max_replicas, policy.scope) == (0, 8, "run")
    assert (policy.idle_ttl, policy.scaledown_ttl) == (timedelta(seconds=900), timedelta(seconds=120))


def test_what_is_not_said_about_scaling_is_flytes_own_default() -> None:
    ours, flytes = fb.replica_environment("plain", image=cpu_image).reusable, flyte.ReusePolicy()
    assert ours is not None
    assert (ours.scaledown_ttl, ours.scope) == (flytes.scaledown_ttl, flytes.scope)


def test_replicas_know_after_how_long_their_environment_shuts_down() -> None:
    environment = fb.replica_environment("told", image=cpu_image, idle_ttl=900)
    told = ReplicaSettings("told", None, 2, 10, 900).variable()
    assert (environment.env_vars or {}).items() >= told.items()


# -- What Flyte refuses by itself, in words that say what to do ---------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"idle_ttl": 29}, "idle_ttl must be at least 30 seconds"),
        ({"scaledown_ttl": 29}, "scaledown_ttl must be at least 30 seconds"),
        ({"scope": "task"}, 'scope must be "global" or "run"'),
        ({"replicas": (-1, 2)}, "replicas must be a positive number or"),
        ({"concurrency": 2.5}, "concurrency must be an int"),
    ],
)
def test_settings_that_flyte_does_not_take_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fb.replica_environment("refused", image=cpu_image, **options)


def test_a_sync_task_is_refused_where_replicas_take_several_calls() -> None:
    def blocking(question: str) -> str:
        return question

    with pytest.raises(ValueError, match=r"only supported for async tasks\. Please use an async function or set"):
        fb.replica_environment("several", image=cpu_image, concurrency=2).task(blocking)
    fb.replica_environment("one", image=cpu_image, concurrency=1).task(blocking)


def test_a_custom_plugin_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match="Cannot set plugin_config when environment is reusable"):
        flyte.TaskEnvironment("custom", image=cpu_image, reusable=flyte.ReusePolicy(), plugin_config=object())


@pytest.mark.parametrize(
    "override", [{"resources": flyte.Resources(gpu="L4:1")}, {"env_vars": {"A": "1"}}, {"secrets": "token"}]
)
def test_a_call_cannot_ask_for_another_container_than_the_replicas(override: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Cannot override .* when reusable is set.*reusable='off'"):
        generate.infer_chunk.override(**override)
    assert generate.infer_chunk.override(reusable="off", **override).reusable is None


@pytest.mark.parametrize("option", [{"pod_template": "gpu-pod"}, {"service_account": "somebody"}])
def test_a_task_cannot_ask_for_another_pod_than_its_environments(option: dict[str, Any]) -> None:
    environment = fb.replica_environment("pods", image=cpu_image)
    with pytest.raises(ValueError, match=r"Cannot .* when environment is reusable"):
        environment.task(**option)


def test_two_environments_of_one_name_are_refused_together() -> None:
    small, large = (fb.replica_environment("twice", image=cpu_image, gpu=gpu) for gpu in ("L4:1", "A10G:1"))
    with pytest.raises(ValueError, match="Duplicate environment name 'twice'"):
        plan_deploy(fb.driver_environment("twice-driver", image=cpu_image, depends_on=[small, large]))


# -- What Flyte lets pass ----------------------------------------------------


def test_an_environment_without_containers_is_refused() -> None:
    with pytest.raises(fb.BadInput, match=r"'none-at-all' may have no replica.*raise the most"):
        fb.check_environment(flyte.TaskEnvironment("none-at-all", image=cpu_image, reusable=flyte.ReusePolicy((0, 0))))


@pytest.mark.parametrize("later", [{"resources": flyte.Resources(gpu="L4:1")}, {"reusable": flyte.ReusePolicy((1, 8))}])
def test_resources_that_came_after_the_task_are_refused(later: dict[str, Any]) -> None:
    environment = flyte.TaskEnvironment("later", image=cpu_image, reusable=flyte.ReusePolicy(2))

    @environment.task
    async def answer(question: str) -> str:
        return question

    fb.check_environment(environment)
    for name, value in later.items():
        setattr(environment, name, value)
    with pytest.raises(fb.BadInput, match=r"task 'later.answer' asks for other containers.*one environment for each"):
        fb.slots(environment)


def test_a_task_that_is_not_reused_takes_no_slot_and_may_have_other_resources() -> None:
    environment, _, _ = one_environment(1, 1)
    main = environment.tasks["all-in-one.main"]
    environment.tasks[main.name] = main.override(reusable="off", resources=flyte.Resources(cpu=8))
    assert fb.slots(environment) == (1, 1)


def test_pools_of_one_name_that_differ_only_in_what_flyte_does_not_compare_are_told_apart() -> None:
    """Flyte's version of a pool leaves out concurrency and the kind of GPU."""

    async def answer(question: str) -> str:
        return question

    def version(environment: flyte.TaskEnvironment) -> str:
        context = SerializationContext(project="p", domain="d", version="v", org="o", root_dir=ROOT)
        return str(translate_task_to_wire(environment.task(answer), context).task_template.custom["version"])

    def flytes(gpu: str, concurrency: int) -> flyte.TaskEnvironment:
        policy, resources = flyte.ReusePolicy(2, concurrency=concurrency), flyte.Resources(gpu=gpu)  # type: ignore[arg-type]
        return flyte.TaskEnvironment("pool", image=flyte.Image.from_base("any"), reusable=policy, resources=resources)

    def ours(gpu: str, concurrency: int) -> flyte.TaskEnvironment:
        return fb.replica_environment("pool", image=flyte.Image.from_base("any"), gpu=gpu, concurrency=concurrency)

    kinds = [("L4:1", 4), ("A10G:1", 4), ("L4:1", 8)]
    assert len({version(flytes(*kind)) for kind in kinds}) == 1
    assert len({version(ours(*kind)) for kind in kinds}) == 3


def test_a_clone_of_a_replica_environment_is_warned_about(warnings: Callable[[], list[str]]) -> None:
    environment = fb.replica_environment("original", image=cpu_image)
    fb.check_environment(environment)
    assert warnings() == []
    fb.check_environment(environment.clone_with("copy"))
    (warning,) = warnings()
    assert "'copy' tells its replicas by FLYTE_BATCH_REPLICA that they are of 'original'" in warning
    assert "replica_environment()" in warning


# -- A driver on the replicas that it waits for ------------------------------


def one_environment(replicas: int, concurrency: int) -> tuple[flyte.TaskEnvironment, Any, Any]:
    """An environment of both, chunks and driver; made by Flyte alone."""
    policy = flyte.ReusePolicy(replicas, concurrency=concurrency)
    environment = flyte.TaskEnvironment("all-in-one", image=cpu_image, reusable=policy)

    @environment.task
    async def infer_chunk(chunk: fb.Chunk, prompt: str) -> fb.ChunkReport:
        raise AssertionError

    async def call(chunk: fb.Chunk) -> fb.ChunkReport:
        return await infer_chunk(chunk, "{question}")

    @environment.task
    async def main(source: str) -> fb.RunSummary:
        async def run_chunk(chunk: fb.Chunk) -> fb.ChunkReport:
            return await call(chunk)

        return await fb.run(source, "out", run_chunk)

    return environment, infer_chunk, call


def test_a_driver_declared_on_the_only_slot_of_its_replicas_is_refused() -> None:
    environment, _, _ = one_environment(1, 1)
    with pytest.raises(fb.BadInput, match=r"task 'all-in-one.main' runs in the only slot.*fb.driver_environment"):
        fb.slots(environment)


def test_a_driver_declared_on_one_of_several_slots_is_warned_about(warnings: Callable[[], list[str]]) -> None:
    environment, _, _ = one_environment(2, 3)
    assert fb.slots(environment) == (2, 3)
    (warning,) = warnings()
    assert "task 'all-in-one.main' takes one of the 6 slots" in warning


elsewhere = flyte.TaskEnvironment("elsewhere", image=cpu_image)


@elsewhere.task
async def answer_elsewhere(question: str) -> str:
    return question


class Lazy:
    """Stands for a module that loads at the first look."""

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"{name} was looked at")


lazy = Lazy()


def test_tasks_are_found_in_inner_functions_and_nothing_is_loaded_to_find_them() -> None:
    def driver() -> object:
        async def run_chunk() -> object:
            return await answer_elsewhere(lazy.question, later)

        assert environments_called(run_chunk) == {"elsewhere"}
        later = 1
        return run_chunk, later

    driver()
    assert environments_called(driver) == {"elsewhere"}
    assert environments_called(generate.main.func) == {"generate-cpu", "generate-gpu"}


def test_an_attribute_is_not_taken_for_a_task_of_its_name() -> None:
    async def driver() -> object:
        return await lazy.answer_elsewhere("what?")

    assert environments_called(driver) == set()


@pytest.mark.parametrize("workflow", [generate, gsm8k])
def test_our_own_workflows_are_silent(workflow: ModuleType, warnings: Callable[[], list[str]]) -> None:
    for environment in (workflow.cpu_replicas, workflow.gpu_replicas):
        fb.check_environment(environment)
    assert warnings() == []


@pytest.fixture
def on_a_replica(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make this process one of a replica environment."""

    def be(replicas: int, concurrency: int, *, reused: bool = True) -> None:
        settings = ReplicaSettings("all-in-one", replicas=replicas, concurrency=concurrency)
        for name, value in settings.variable().items():
            monkeypatch.setenv(name, value)
        if reused:
            monkeypatch.setitem(sys.modules, "unionai_actor_executor", ModuleType("unionai_actor_executor"))

    return be


@pytest.mark.parametrize("way", ["the task", "a partial", "a function"])
async def test_a_driver_on_the_only_replica_that_its_chunks_could_run_on_is_refused(
    on_a_replica: Callable[..., None], tmp_path: Path, way: str
) -> None:
    _, task, function = one_environment(1, 1)
    ways = {"the task": task, "a partial": partial(task, prompt="x"), "a function": function}
    on_a_replica(1, 1)
    with pytest.raises(fb.BadInput, match=r"this driver runs in the only slot .*'all-in-one'.*fb.driver_environment"):
        await fb.run(questions(tmp_path / "in.jsonl", 3), str(tmp_path / "out"), ways[way])
    assert not (tmp_path / "out").exists()


async def run_in_process(folder: Path, named: object = None) -> int:
    """A run that answers its chunks itself; its function names ``named``."""

    @fb.singleton
    async def solver() -> fb.EngineBatcher[Any, Any]:
        return fb.EngineBatcher(fb.FakeEngine())

    async def run_chunk(chunk: fb.Chunk) -> fb.ChunkReport:
        _ = named
        return await fb.infer(chunk, solver, prompt="{question}")

    return (await fb.run(questions(folder / "in.jsonl", 3), str(folder / "out"), run_chunk)).rows


async def test_a_driver_on_one_of_several_slots_is_warned_about_and_runs(
    on_a_replica: Callable[..., None], tmp_path: Path, warnings: Callable[[], list[str]]
) -> None:
    _, task, _ = one_environment(2, 3)
    on_a_replica(2, 3)
    assert await run_in_process(tmp_path, task) == 3
    (warning,) = warnings()
    assert "this driver takes one of the 6 slots" in warning


async def test_a_run_within_one_replica_and_one_whose_chunks_go_elsewhere_are_left_alone(
    on_a_replica: Callable[..., None], tmp_path: Path, warnings: Callable[[], list[str]]
) -> None:
    on_a_replica(1, 1)
    for name, named in (("within", None), ("elsewhere", generate.infer_chunk)):
        (tmp_path / name).mkdir()
        assert await run_in_process(tmp_path / name, named) == 3
    assert warnings() == []


async def test_a_container_that_is_used_once_is_no_replica_whatever_its_variables_say(
    on_a_replica: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, task, _ = one_environment(1, 1)
    monkeypatch.delitem(sys.modules, "unionai_actor_executor", raising=False)
    on_a_replica(1, 1, reused=False)
    assert await run_in_process(tmp_path, task) == 3


# -- unionai-reuse -----------------------------------------------------------

DEBIAN = flyte.Image.from_debian_base(name="checked")


def files(folder: Path) -> dict[str, flyte.Image]:
    """Images that install from files, by what the files say."""
    texts = {
        "plain.txt": "pandas==2.3\nnumpy\n",
        "reuse.txt": "pandas\nunionai_reuse==0.2.0\n",
        "other.txt": "-r reuse.txt\n",
        "plain.toml": '[project]\nname = "job"\nversion = "1"\ndependencies = ["pandas"]\nurls = {home = "https://x"}\n',
        "reuse.lock": '[[package]]\nname = "unionai-reuse"\n',
        "plain.lock": '[[package]]\nname = "pandas"\nsource = {virtual = "https://x"}\n',
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    project = partial(DEBIAN.with_uv_project, folder / "plain.toml")
    return {
        "plain requirements": DEBIAN.with_requirements(folder / "plain.txt"),
        "requirements": DEBIAN.with_requirements(folder / "reuse.txt"),
        "requirements of requirements": DEBIAN.with_requirements(folder / "other.txt"),
        "plain lock": project(uvlock=folder / "plain.lock"),
        "lock": project(uvlock=folder / "reuse.lock"),
        "gone": DEBIAN.clone(addl_layer=flyte._image.Requirements(file=folder / "gone.txt")),
    }


LACKING = {
    "auto": "auto",
    "flyte's own": DEBIAN,
    "packages": DEBIAN.with_pip_packages("pandas", "vllm==0.32.0").with_apt_packages("git").with_env_vars({"A": "1"}),
    "source": DEBIAN.with_source_folder(ROOT / "flyte_batch").with_commands(["useradd flyte_batcher"]),
}
HOLDING = {
    "named": DEBIAN.with_pip_packages("pandas", "unionai-reuse>=0.2"),
    "named otherwise": DEBIAN.with_pip_packages("Unionai_Reuse"),
    "a package that requires it": DEBIAN.with_pip_packages("flyte-batch[vllm]==0.1"),
    "a wheel": DEBIAN.clone(addl_layer=PythonWheels(wheel_dir=ROOT, package_name="mine")),
    "commands": DEBIAN.with_commands(["pip install -r /requirements.txt"]),
    "a url": DEBIAN.with_pip_packages("git+https://host/mine.git"),
    "an address": "registry/image:1",
    "another base": flyte.Image.from_base("registry/image:1"),
    "a dockerfile": flyte.Image.from_dockerfile(ROOT / "Dockerfile", registry="registry", name="image"),
    "a configured image": flyte.Image.from_ref_name("mine"),
    **{name: image for name, image in vars(images).items() if isinstance(image, flyte.Image)},
}


@pytest.mark.parametrize("kind", [*LACKING, "plain requirements", "plain lock"])
def test_an_image_without_unionai_reuse_is_warned_about_once(
    kind: str, tmp_path: Path, warnings: Callable[[], list[str]]
) -> None:
    environment = fb.replica_environment("lacking", image=(LACKING | files(tmp_path))[kind])
    (warning,) = warnings()
    fb.slots(environment)
    assert warnings() == [warning]
    assert "image of environment 'lacking' installs no unionai-reuse" in warning
    assert ".with_pip_packages('unionai-reuse')" in warning


@pytest.mark.parametrize("kind", [*HOLDING, "requirements", "requirements of requirements", "lock", "gone"])
def test_an_image_that_has_unionai_reuse_or_cant_be_looked_into_is_not_warned_about(
    kind: str, tmp_path: Path, warnings: Callable[[], list[str]]
) -> None:
    fb.replica_environment("holding", image=(HOLDING | files(tmp_path))[kind])
    assert warnings() == []
