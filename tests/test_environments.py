from __future__ import annotations

from types import ModuleType

import flyte
import pytest

import flyte_batch as fb
from images import cpu_image
from workflows import generate, gsm8k


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


def test_on_a_cluster_paths_that_containers_do_not_share_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Remote:
        mode = "remote"

    fb.require_shared(output="out/here")  # outside a run, and in local mode: one machine
    monkeypatch.setattr(flyte, "ctx", Remote)
    fb.require_shared(output="s3://bucket/out")
    with pytest.raises(fb.BadInput, match="--output out/here lies on one container's own disk"):
        fb.require_shared(output="out/here")


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
