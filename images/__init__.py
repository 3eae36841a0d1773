"""What the containers run: one `flyte.Image` an engine, versions pinned.

``flyte run --local`` ignores images; a cluster builds them at the first deployment.
"""

from __future__ import annotations

from pathlib import Path

import flyte

_PACKAGE = Path(__file__).parent.parent / "flyte_batch"

# Flyte's code bundle carries only modules that are imported when the workflow's file is loaded. flyte_batch loads its
# rooms lazily, so the package goes into the image whole.
_BASE = (
    flyte.Image.from_debian_base(name="flyte-batch-driver", python_version=(3, 11))
    .with_pip_packages(
        "flyte==2.12.1",
        "unionai-reuse==0.2.0",
        "async-lru==2.4.0",
        "pyarrow==26.0.1",
        "jinja2==3.1.6",
        "datasets==5.2.0",
    )
    .with_source_folder(_PACKAGE, dst="/opt/flyte_batch")
    .with_env_vars({"PYTHONPATH": "/opt"})
)

driver_image = _BASE
"""flyte_batch without an engine: plans, fans out, commits."""

cpu_image = _BASE.clone(name="flyte-batch-cpu", extendable=True).with_pip_packages(
    "ctranslate2==4.8.5", "tokenizers==0.23.3"
)
"""Replicas that run `CTranslate2Engine`, or the fake, on CPUs."""
