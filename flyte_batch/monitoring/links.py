"""Links from an action in Flyte's UI to the Grafana dashboard."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode, urlsplit

from flyte_batch.errors import BadInput
from flyte_batch.monitoring.grafana import UID

_ENCODED_TEMPLATE = re.compile(r"%7B%7B([.\w]+)%7D%7D")
"""``{{.podName}}`` and such, percent-encoded. Flyte fills them in later, in the finished URL, as they were."""


@dataclass
class GrafanaDashboard:
    """A link to the dashboard that ``flyte batch dashboards`` writes: ``@env.task(links=(GrafanaDashboard(...),))``.

    A `flyte.Link`. The dashboard shows all processes unless ``variables`` choose some: metrics have no label for run
    or action, see `flyte_batch.monitoring.metrics`.

    Args:
        host: Grafana's URL, ``https://grafana.example.com``.
        name: what the link is called.
        icon_uri: its picture.
        lookback: how far back the dashboard looks, in Grafana's words: ``now-6h``. It can't follow the action: Flyte
            tells a link no times.
        datasource: uid or name of the Prometheus in Grafana; "" takes Grafana's default.
        variables: further choices, ``{"instance": "{{.podName}}:9464"}`` where that is what Prometheus calls a process.
            Flyte fills in ``{{.podName}}``, ``{{.runName}}`` and ``{{.actionName}}``.
        uid: the dashboard's, if yours has another.

    Raises:
        BadInput: ``host`` is no URL, or holds a password: a link is shown to everybody.
    """

    host: str
    name: str = "Grafana"
    icon_uri: str | None = ""
    lookback: str = "now-6h"
    datasource: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)
    uid: str = UID

    def __post_init__(self) -> None:
        parts = urlsplit(self.host)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise BadInput("host must be Grafana's URL without user and password, such as https://grafana.example.com")

    def get_link(
        self,
        run_name: str,
        project: str,
        domain: str,
        context: dict[str, str],
        parent_action_name: str,
        action_name: str,
        pod_name: str,
        **kwargs: Any,
    ) -> str:
        """The URL; Flyte calls this."""
        names = {"runName": run_name, "actionName": action_name, "podName": pod_name}
        variables = {"datasource": self.datasource} if self.datasource else {}
        variables |= {name: _filled(text, names) for name, text in self.variables.items()}
        chosen = {f"var-{name}": text for name, text in variables.items()}
        query = urlencode({"from": self.lookback, "to": "now", **chosen})
        return f"{self.host.rstrip('/')}/d/{self.uid}/flyte-batch?" + _ENCODED_TEMPLATE.sub(r"{{\1}}", query)


def _filled(text: str, names: Mapping[str, str]) -> str:
    """A variable's value with what is known by now; the rest is left for Flyte to fill in."""
    for name, known in names.items():
        if known:
            text = text.replace(f"{{{{.{name}}}}}", known)
    return text
