"""Flyte takes the link, on tasks of reused containers too, and finds its placeholders in it."""

from __future__ import annotations

from dataclasses import replace
from urllib.parse import parse_qs, urlsplit

import flyte
import flyte.report
import pytest
from flyte._internal.runtime.task_serde import translate_task_to_wire
from flyte.models import ActionID, RawDataPath, SerializationContext, TaskContext

from flyte_batch.errors import BadInput
from flyte_batch.monitoring.grafana import UID
from flyte_batch.monitoring.links import GrafanaDashboard
from tests.helpers import ROOT

HOST = "https://grafana.example.com/"


def link(link: GrafanaDashboard, run: str = "run1", action: str = "a0", pod: str = "{{.podName}}") -> str:
    """What Flyte gets, called as it calls."""
    return link.get_link(
        run_name=run, project="p", domain="d", context={}, parent_action_name="a0", action_name=action, pod_name=pod
    )


def query(url: str) -> dict[str, list[str]]:
    return parse_qs(urlsplit(url).query)


def test_it_leads_to_the_dashboard_that_is_written() -> None:
    url = link(GrafanaDashboard(HOST, datasource="my prometheus & co"))
    assert url.startswith(f"https://grafana.example.com/d/{UID}/")
    assert query(url) == {"from": ["now-6h"], "to": ["now"], "var-datasource": ["my prometheus & co"]}


def test_what_flyte_fills_in_later_is_there_to_be_found() -> None:
    """It replaces ``{{.podName}}`` in the finished URL; what is percent-encoded it would not find."""
    chosen = {"instance": "{{.podName}}:9464", "job": "a b", "run": "{{.runName}}"}
    url = link(GrafanaDashboard(HOST, variables=chosen), run="", pod="{{.podName}}")
    assert "var-instance={{.podName}}%3A9464" in url
    assert "var-job=a+b" in url
    assert "var-run={{.runName}}" in url
    assert query(url.replace("{{.podName}}", "pod-1"))["var-instance"] == ["pod-1:9464"]


def test_what_is_known_is_filled_in() -> None:
    chosen = {"run": "{{.runName}}", "action": "{{.actionName}}", "pod": "{{.podName}}"}
    url = link(GrafanaDashboard(HOST, variables=chosen), "r&1", "a/1", "pod 1")
    assert query(url) == {
        "from": ["now-6h"], "to": ["now"], "var-run": ["r&1"], "var-action": ["a/1"], "var-pod": ["pod 1"]
    }  # fmt: skip


@pytest.mark.parametrize("reused", [True, False])
def test_flyte_puts_it_into_a_task(reused: bool) -> None:
    environment = flyte.TaskEnvironment(
        "linked-reused" if reused else "linked",
        image="registry.example.com/image:1",
        reusable=flyte.ReusePolicy(replicas=(1, 2), concurrency=4) if reused else None,
    )

    @environment.task(links=(GrafanaDashboard(HOST, variables={"instance": "{{.podName}}"}),))
    async def infer(x: int) -> int:
        return x

    context = SerializationContext(version="1", root_dir=ROOT)
    action = ActionID(name="{{.actionName}}", run_name="{{.runName}}", project="p", domain="d", org="o")
    task = TaskContext(
        action=action,
        version="1",
        raw_data_path=RawDataPath(path=""),
        output_path="",
        run_base_dir="",
        report=flyte.report.Report(name="r"),
        custom_context={},
    )
    spec = translate_task_to_wire(infer, context, task_context=task)
    (found,) = spec.task_template.metadata.log_links
    assert found.name == "Grafana"
    assert found.uri.endswith("var-instance={{.podName}}")
    assert spec.task_template.type == ("actor" if reused else "python")


@pytest.mark.parametrize("host", ["grafana.example.com", "ftp://grafana", "https://", "https://user:s3cret@grafana"])
def test_a_host_that_is_none_or_tells_a_password_is_refused(host: str) -> None:
    with pytest.raises(BadInput, match="host must be Grafana's URL") as caught:
        replace(GrafanaDashboard(HOST), host=host)
    assert "s3cret" not in str(caught.value)
