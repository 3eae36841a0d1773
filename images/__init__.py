"""What the containers run: one `flyte.Image` an engine, every version pinned and every pin explained.

``flyte run --local`` ignores images; a cluster builds them at the first deployment. They hold libraries only: our own
code travels in Flyte's code bundle. docs/images.md says how, and what to do where it cannot.

A pin is the version that the tests run with: the one in ``constraints.txt``, and for vLLM's image in
``tests/vllm_cpu/requirements.txt``.
"""

from __future__ import annotations

import flyte

# The base image's Flyte, and a pin beside it so that no other package moves it: the same one on both sides of a run.
FLYTE = "2.12.1"

# Drivers and replicas alike. A run's identity holds the bytecode of its task (`flyte_batch.fingerprint`), which differs
# between minor versions: this is the one that the tests, and with them the pins below, were made with.
PYTHON = (3, 11)

MODELS = "/tmp/huggingface"  # noqa: S108 - the container's own disk: no other user is on it
"""Where models and datasets from Hugging Face land: a folder that any user of a container may create, whoever it runs
as. To keep models between containers mount a volume and name it in ``env_vars={"HF_HOME": ...}``."""

# What flyte_batch and the workflows import beside an engine.
COMMON = (
    f"flyte=={FLYTE}",
    "unionai-reuse==0.2.0",  # what a reused container starts; 0.2 wants flyte < 2.15
    "async-lru==2.4.0",  # singletons
    "pyarrow==26.0.1",  # sources and parts
    "jinja2==3.1.6",  # chat templates, reports
    "click==8.5.1",  # these four come with Flyte
    "pydantic==2.14.3",
    "pyyaml==6.0.3",
    "rich==15.0.0",
    "tokenizers==0.23.3",
    "huggingface-hub==2.4.0",  # models by id
    "hf-xet==1.8.0",  # the hub's downloader. From 1.8 on its buffers fit the container; before, up to 64 GB
    "datasets==5.2.0",  # datasets by id
    # Monitoring: metrics to scrape or push; spans and metrics over OTLP.
    "prometheus-client==0.26.0",
    "flyteplugins-otel==2.12.1",  # moves with Flyte
    "opentelemetry-sdk==1.45.2",
    "opentelemetry-exporter-otlp-proto-http==1.45.2",
)

cpu_image = (
    flyte.Image.from_debian_base(name="flyte-batch-cpu", python_version=PYTHON, flyte_version=FLYTE)
    .with_pip_packages(*COMMON, "ctranslate2==4.8.5")
    .with_env_vars({"HF_HOME": MODELS})
)
"""Drivers, and replicas that run `CTranslate2Engine` or the fake on CPUs.

The driver has the engine's libraries too: it finds out before anything starts whether the engine could run.
"""

vllm_image = (
    # amd64 only: the default builds for arm64 as well, several gigabytes that few GPU nodes could run.
    flyte.Image.from_debian_base(
        name="flyte-batch-vllm", python_version=PYTHON, flyte_version=FLYTE, platform=("linux/amd64",)
    )
    .with_apt_packages("build-essential")  # Triton and torch.compile call a C compiler when a model loads
    .with_pip_packages(
        *COMMON,
        # The release that the engine's tests run, in its CPU build; 0.33.0 cannot be resolved, it asks for a certifi
        # (2026.10.19) that was not published. It pins what must match it, torch 2.13.0 first of all, built for CUDA
        # 13.0: the nodes' NVIDIA driver must be 580 or newer, their GPUs T4 or newer (no V100).
        "vllm==0.32.0",
        # Tokenises and renders chat templates. vLLM takes 5.16.1 to 5.19: without a pin each build takes the latest.
        "transformers==5.19.0",
        "flyteplugins-vllm==2.12.1",  # weights from object storage, streamed to the GPU; moves with Flyte
        "pillow==13.0.0",  # pictures in prompts
        "jsonschema==4.26.0",  # answers that must fit a schema
        "nvidia-ml-py==13.615.71",  # the report's GPU figures; vLLM's own copy can't be imported by others
    )
    .with_env_vars(
        {
            "HF_HOME": MODELS,
            # Downloads that use the whole network, and up to half of the container's memory. hf-transfer and its
            # HF_HUB_ENABLE_HF_TRANSFER, which older examples set, do nothing but warn since huggingface-hub 1.0.
            "HF_XET_HIGH_PERFORMANCE": "1",
            # Compiled kernels: beside the models, for the same reason.
            "VLLM_CACHE_ROOT": "/tmp/vllm",  # noqa: S108
            # A replica is full of threads (its executor's, object storage's), which a forked engine would lose.
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            # FlashInfer's sampler, vLLM's default, is compiled by nvcc at its first use, and finds none in this image:
            # an engine would die after its weights were loaded. vLLM's own sampler takes its place.
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
            # A batch job tells nobody outside what it runs.
            "VLLM_NO_USAGE_STATS": "1",
        }
    )
)
"""Replicas that run vLLM on NVIDIA GPUs. Not built here: that takes Docker or Union's image builder."""
