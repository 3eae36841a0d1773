"""What the containers run: one `flyte.Image` an engine, versions pinned.

``flyte run --local`` ignores images; a cluster builds them at the first deployment. They hold the libraries; the
package itself travels in Flyte's code bundle (see `flyte_batch.environments`).
"""

from __future__ import annotations

import flyte

cpu_image = flyte.Image.from_debian_base(name="flyte-batch-cpu", python_version=(3, 11)).with_pip_packages(
    "flyte==2.12.1",
    "unionai-reuse==0.2.0",
    "async-lru==2.4.0",
    "pyarrow==26.0.1",
    "jinja2==3.1.6",
    "ctranslate2==4.8.5",
    "tokenizers==0.23.3",
    "datasets==5.2.0",
)
"""Drivers, and replicas that run `CTranslate2Engine` or the fake on CPUs.

The driver has the engine's libraries too: it finds out before anything starts whether the engine could run.
"""
