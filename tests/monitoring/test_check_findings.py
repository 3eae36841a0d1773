"""Each check passes a workflow that is ready for production, and fails it as soon as one thing is changed."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import flyte_batch as fb
from flyte_batch.cli import batch
from tests.helpers import questions

READY = """
from datetime import datetime, timedelta

import flyte
from flyte import notify
from flyte.models import ActionPhase

import flyte_batch as fb
from flyte_batch.monitoring.links import GrafanaDashboard

image = flyte.Image.from_debian_base(
    name="ready", python_version=(3, 11), flyte_version="2.12.1"
).with_pip_packages("unionai-reuse==0.2.0", "prometheus-client==0.23.1").with_env_vars({"HF_HOME": "/tmp/hf"})

replicas = fb.replica_environment(
    "pool", image=image, cpu=2, memory="4Gi", replicas=(1, 4), concurrency=4,
    monitoring=["prometheus:0.0.0.0:9464"], env_vars={"MODE": "batch"},
    secrets=flyte.Secret("hub", as_env_var="HF_TOKEN"),
)
driver = fb.driver_environment(
    "drive", image=image, depends_on=[replicas], monitoring=["prometheus:0.0.0.0:9464"]
)

nightly = flyte.Trigger(
    "nightly", flyte.Cron("0 2 * * *"), inputs={"at": flyte.TriggerTime},
    notifications=notify.Email(on_phase=(ActionPhase.FAILED, ActionPhase.TIMED_OUT), recipients=("a@example.com",)),
)
RETRIES = flyte.RetryStrategy(2, backoff=flyte.Backoff(timedelta(seconds=2)))


@fb.singleton
async def solver():
    return fb.EngineBatcher(fb.FakeEngine(), max_queue_size=2000)


async def infer(chunk: fb.Chunk) -> fb.ChunkReport:
    return await fb.infer(chunk, solver, timeout_s=3600)


@replicas.task(retries=RETRIES)
async def infer_chunk(chunk: fb.Chunk) -> fb.ChunkReport:
    return await infer(chunk)


@replicas.task
async def wake() -> None:
    await fb.warm_up(solver)


@driver.task(
    report=True, links=(GrafanaDashboard("https://grafana.example.com"),), triggers=nightly,
    timeout=timedelta(hours=20),
)
async def main(at: datetime, model: str = "demo", max_failure_rate: float = 0.01) -> fb.RunSummary:
    return await fb.run("in", f"out/{at}", infer_chunk, max_failure_rate=max_failure_rate)
"""

_numbers = itertools.count()


@pytest.fixture(scope="module")
def load_report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a real load test, which shows what it is said to show."""
    path = tmp_path_factory.mktemp("load") / "load.json"
    options = ("--rate", "20", "--seconds", "2", "--warm_up_s", "0.5", "--p50_ms", "5000", "--p99_ms", "9000")
    done = CliRunner().invoke(batch, ["load", *options, "--output", str(path)])
    assert done.exit_code == 0, done.output
    report: dict[str, Any] = json.loads(path.read_text())
    for objective in report["limit"]["steps"][0]["objectives"]:
        objective["is_shown"] = True  # it would take minutes
    return report


@pytest.fixture
def load_test(load_report: dict[str, Any], tmp_path: Path) -> str:
    return write_report(tmp_path, load_report)


def write_report(folder: Path, report: dict[str, Any]) -> str:
    (folder / "load.json").write_text(json.dumps(report))
    return str(folder / "load.json")


def check(folder: Path, *options: str, source: str = READY) -> Result:
    file = folder / f"checked_{next(_numbers)}.py"
    file.write_text(source)
    return CliRunner().invoke(batch, ["check", str(file), *options])


def findings(result: Result) -> dict[tuple[str, str], dict[str, str]]:
    assert result.exit_code in (0, 1), result.output
    return {(each["check"], each["subject"]): each for each in json.loads(result.stdout)["checks"]}


COST = ("--rows", "1000000", "--rows_per_s", "100", "--price_per_hour", "3.6")


def changed(old: str, new: str) -> str:
    assert READY.count(old) == 1, f"{old!r} is in it {READY.count(old)} times"
    return READY.replace(old, new)


def test_a_workflow_that_is_ready_lacks_nothing(tmp_path: Path, load_test: str) -> None:
    result = check(tmp_path, "--load_test", load_test, *COST, "--json")
    assert result.exit_code == 0
    assert {each["status"] for each in findings(result).values()} == {"ok"}
    content = json.loads(result.stdout)
    assert content["counts"] == {"ok": len(content["checks"])}
    areas = dict.fromkeys(each["check"].partition(".")[0] for each in content["checks"])
    assert list(areas) == [
        "autoscaling",
        "limits",
        "monitoring",
        "error_tracking",
        "load_test",
        "cost_projection",
        "deployment",
    ]


ASKED_FOR_A_RATE = """, max_failure_rate: float = 0.01) -> fb.RunSummary:
    return await fb.run("in", f"out/{at}", infer_chunk, max_failure_rate=max_failure_rate)"""
ASKED_FOR_NONE = """) -> fb.RunSummary:
    return await fb.run("in", f"out/{at}", infer_chunk)"""
PROMETHEUS = '"prometheus:0.0.0.0:9464"], env'
NIGHTLY = "drive.main, trigger nightly"

CHANGES = [
    # what is changed, into what, the only check that notices, its subject, its status, words of its evidence
    ("replicas=(1, 4)", "replicas=3", "autoscaling.replicas", "pool", "missing", "always 3 replicas"),
    (
        "concurrency=4",
        "concurrency=4, idle_ttl=45",
        "autoscaling.idle_ttl",
        "pool",
        "missing",
        "after 45 s, sooner than",
    ),
    (
        "concurrency=4",
        "concurrency=4, idle_ttl=7200",
        "autoscaling.idle_ttl",
        "pool",
        "missing",
        "after 7,200 s, and is paid",
    ),
    (
        "concurrency=4",
        "concurrency=4, scaledown_ttl=900",
        "autoscaling.scaledown_ttl",
        "pool",
        "missing",
        "after 900 s",
    ),
    ("concurrency=4", "concurrency=1", "autoscaling.concurrency", "pool", "missing", "one chunk a replica"),
    ("task(retries=RETRIES)", "task", "limits.retries", "pool.infer_chunk", "missing", "no retries"),
    ("retries=RETRIES", "retries=3", "limits.retries", "pool.infer_chunk", "missing", "3 retries without a pause"),
    (", timeout_s=3600", "", "limits.timeout", "pool.infer_chunk", "missing", "nothing ends"),
    ("timeout_s=3600", "timeout_s=None", "limits.timeout", "pool.infer_chunk", "missing", "nothing ends"),
    ("size=2000", "size=10_000_000", "limits.max_queue", "pool.infer_chunk", "missing", "lets 10,000,000 records wait"),
    ("size=2000", "size=int('9')", "limits.max_queue", "pool.infer_chunk", "could not tell", "solver computes"),
    (', memory="4Gi"', "", "limits.resources", "pool", "missing", "given: cpu 2"),
    (
        ', monitoring=["prometheus:0.0.0.0:9464"]\n)',
        ")",
        "monitoring.backends",
        "drive",
        "missing",
        "no backend is named",
    ),
    (
        '=[replicas], monitoring=["prometheus:0.0.0.0:9464"]',
        '=[replicas], env_vars={"FLYTE_BATCH_MONITORING": "graphite"}',
        "monitoring.backends",
        "drive",
        "missing",
        "'graphite' is no backend",
    ),
    (PROMETHEUS, '"prometheus"], env', "monitoring.reachable", "pool", "missing", "loopback only"),
    (PROMETHEUS, '"prometheus:localhost:1"], env', "monitoring.reachable", "pool", "missing", "loopback"),
    (PROMETHEUS, '"logs"], env', "monitoring.reachable", "pool", "missing", "logs gives none"),
    ("report=True, ", "", "monitoring.report", "drive.main", "missing", "no report"),
    (
        'links=(GrafanaDashboard("https://grafana.example.com"),), ',
        "",
        "monitoring.links",
        "drive.main",
        "missing",
        "no link",
    ),
    (
        "max_failure_rate: float = 0.01",
        "max_failure_rate: float | None = None",
        "error_tracking.max_failure_rate",
        "drive.main",
        "missing",
        "half of the rows",
    ),
    (ASKED_FOR_A_RATE, ASKED_FOR_NONE, "error_tracking.max_failure_rate", "drive.main", "missing", "nothing bounds"),
    (", ActionPhase.TIMED_OUT", "", "error_tracking.notifications", NIGHTLY, "missing", "timed_out"),
    (
        '"prometheus-client==0.23.1"',
        '"prometheus-client==0.23.1", "numpy>=2"',
        "deployment.images",
        None,
        "missing",
        "numpy>=2",
    ),
    (
        'env_vars={"MODE": "batch"}',
        'env_vars={"DB_PASSWORD": "hunter2"}',
        "deployment.secrets",
        "",
        "missing",
        "DB_PASSWORD of environment pool",
    ),
    (
        'env_vars={"MODE": "batch"}',
        'env_vars={"MODE": "hf_abcdefghijklmnopqrstuvwxyz"}',
        "deployment.secrets",
        "",
        "missing",
        "MODE of environment pool",
    ),
    ('{"HF_HOME": "/tmp/hf"}', '{"HF_TOKEN": "abc"}', "deployment.secrets", "", "missing", "HF_TOKEN of the image"),
    (
        "inputs={",
        'env_vars={"AWS_SECRET_ACCESS_KEY": "abc"}, inputs={',
        "deployment.secrets",
        "",
        "missing",
        "of trigger nightly",
    ),
    ("\n    timeout=timedelta(hours=20),", "", "deployment.schedule", NIGHTLY, "missing", "overlaps"),
    ("hours=20", "hours=30", "deployment.schedule", NIGHTLY, "missing", "after 108,000 s, the next"),
    ('Cron("0 2 * * *")', "FixedRate(60)", "deployment.schedule", NIGHTLY, "missing", "every 60 minutes"),
    ('Cron("0 2 * * *")', 'Cron("0 2,3 * * *")', "deployment.schedule", NIGHTLY, "could not tell", ""),
]


@pytest.mark.parametrize(("old", "new", "name", "subject", "status", "words"), CHANGES)
def test_one_change_is_noticed_by_one_check(
    old: str, new: str, name: str, subject: str | None, status: str, words: str, tmp_path: Path, load_test: str
) -> None:
    result = check(tmp_path, "--load_test", load_test, *COST, "--json", source=changed(old, new))
    noticed = {key: each for key, each in findings(result).items() if each["status"] not in ("ok", "not applicable")}
    assert {key[0] for key in noticed} == {name}
    assert subject is None or set(noticed) == {(name, subject)}
    for each in noticed.values():
        assert (each["status"], words in each["evidence"]) == (status, True), each
        assert bool(each["remedy"]) == (status == "missing")
    assert result.exit_code == (1 if status == "missing" else 0)


def test_a_driver_in_a_replica_is_missing_an_environment_of_its_own(tmp_path: Path, load_test: str) -> None:
    source = changed("@driver.task(", "@replicas.task(retries=RETRIES, ").replace("links=", "  links=")
    found = findings(check(tmp_path, "--load_test", load_test, *COST, "--json", source=source))
    assert found["limits.driver", "pool.main"]["status"] == "missing"


def test_without_reused_containers_autoscaling_is_missing(tmp_path: Path) -> None:
    source = (
        'import flyte, flyte_batch as fb\nenv = flyte.TaskEnvironment("plain")\n'
        "@env.task\nasync def main() -> None:\n    await fb.run('in', 'out', None)\n"
    )
    found = findings(check(tmp_path, "--json", source=source))
    assert found["autoscaling.replicas", ""]["status"] == "missing"
    assert found["limits.driver", ""]["status"] == "could not tell"
    assert found["monitoring.report", ""]["status"] == "could not tell"
    assert found["limits.resources", "plain"]["status"] == "missing"
    assert found["deployment.images", "plain"]["evidence"].startswith("image 'auto'")
    assert found["deployment.schedule", ""]["status"] == "not applicable"
    assert found["error_tracking.notifications", "plain.main"]["status"] == "not applicable"


ONLY_COPIES = """import flyte
{imports}
env = flyte.TaskEnvironment("plain", image="me/image:1", reusable=flyte.ReusePolicy(2))
@env.task
async def main() -> None:
    {body}
"""


def test_of_a_file_that_answers_no_rows_only_the_rest_is_looked_at(tmp_path: Path) -> None:
    source = ONLY_COPIES.format(imports="import flyte_batch as fb", body="await fb.prefetch('model', 'folder')")
    found = findings(check(tmp_path, "--json", source=source))
    missing = {key for key, each in found.items() if each["status"] == "missing"}
    assert missing == {("limits.resources", "plain")}
    for name in ("autoscaling.replicas", "error_tracking.max_failure_rate", "load_test.level", "cost_projection.bill"):
        assert found[name, ""]["status"] == "not applicable"
        assert found[name, ""]["evidence"] == "no task answers rows (fb.run, fb.infer, a batcher)"
    assert found["deployment.images", "plain"]["status"] == "ok"


@pytest.mark.parametrize(
    ("imports", "body"),
    [
        ("import flyte_batch as fb", "await fb.run('in', 'out', None)"),
        ("from flyte_batch import run as answer", "await answer('in', 'out', None)"),
        ("", "import flyte_batch as fb; await fb.infer(None, None)"),
        ("import its_steps", "await its_steps.all_of_them()"),
        ("from its_steps import all_of_them", "await all_of_them()"),
    ],
)
def test_rows_are_answered_wherever_the_code_for_it_is(
    imports: str, body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "its_steps.py").write_text(
        "import flyte_batch as fb\nasync def all_of_them():\n    fb.EngineBatcher(None)\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "its_steps", raising=False)
    found = findings(check(tmp_path, "--json", source=ONLY_COPIES.format(imports=imports, body=body)))
    assert found["autoscaling.replicas", "plain"]["status"] == "missing"


def test_secrets_are_named_and_never_shown(tmp_path: Path) -> None:
    source = changed(
        'env_vars={"MODE": "batch"}', 'env_vars={"API_KEY": "hunter2hunter2", "URL": "http://me:s3cr3t@x"}'
    )
    for options in (("--json",), ()):
        output = check(tmp_path, *options, source=source).output
        assert "API_KEY of environment pool" in " ".join(output.split())
        assert "hunter2" not in output
        assert "s3cr3t" not in output


@pytest.mark.parametrize(
    "variables",
    ['{"TOKENIZERS_PARALLELISM": "false"}', '{"MAX_TOKEN": "512"}', '{"HF_TOKEN_PATH": "/etc/token"}',
     '{"RUN": "task-abcdefghijklmnopqrst"}', '{"HF_TOKEN": ""}', '{"DB_PASSWORD_FILE": "/run/secrets/db"}', '{"URL": "http://host:80/a@b"}'],
)  # fmt: skip
def test_what_only_sounds_like_a_secret_is_none(variables: str, tmp_path: Path) -> None:
    source = changed('env_vars={"MODE": "batch"}', f"env_vars={variables}")
    assert findings(check(tmp_path, "--json", source=source))["deployment.secrets", ""]["status"] == "ok"


@pytest.mark.parametrize(
    ("image", "status", "evidence"),
    [
        ('"registry.example.com/me/image:1.2"', "ok", "registry.example.com/me/image:1.2"),
        ('"registry.example.com:5000/me/image@sha256:abc"', "ok", "sha256:abc"),
        ('"registry.example.com:5000/me/image"', "missing", "image (no tag)"),
        ('"me/image:latest"', "missing", "me/image (latest)"),
        ('flyte.Image.from_dockerfile(Path("Dockerfile"), "x", "y")', "could not tell", "Dockerfile"),
        ('flyte.Image.from_debian_base().with_requirements("needs.txt")', "missing", "pandas, flyte-batch[cpu]>=1"),
        ('flyte.Image.from_debian_base().with_pip_packages("a==1; os_name > \'3\'", "b @ https://x/b.whl")', "ok",
         "2 packages pinned"),
        ('flyte.Image.from_debian_base().with_uv_project("pyproject.toml")', "missing", "(without a lock file)"),
    ],
)  # fmt: skip
def test_pins_of_images(
    image: str, status: str, evidence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Dockerfile").write_text("FROM python")
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\nversion = '1'\n")
    (tmp_path / "needs.txt").write_text("# ours\nnumpy==2.3  # pinned\npandas\n-r other.txt\nflyte-batch[cpu]>=1\n")
    imports, task = "import flyte\nfrom pathlib import Path\n", "@env.task\nasync def main(): ...\n"
    source = f'{imports}env = flyte.TaskEnvironment("x", image={image})\n{task}'
    found = findings(check(tmp_path, "--json", source=source))["deployment.images", "x"]
    assert (found["status"], evidence in found["evidence"]) == (status, True), found


@pytest.mark.parametrize(
    ("packages", "backend", "status"),
    [
        ('"unionai-reuse==0.2.0"', "prometheus:0.0.0.0:1", "missing"),
        ('"flyte-batch[cpu,monitoring]==0.1"', "prometheus:0.0.0.0:1", "ok"),
        ('"flyteplugins-otel==2.12.1", "opentelemetry_exporter_otlp_proto_http==1.30"', "otel", "ok"),
        ('"flyteplugins-otel==2.12.1"', "otel", "missing"),
        ('"unionai-reuse==0.2.0"', "logs", "not applicable"),
    ],
)
def test_a_backend_needs_its_package_in_the_image(packages: str, backend: str, status: str, tmp_path: Path) -> None:
    source = changed('"unionai-reuse==0.2.0", "prometheus-client==0.23.1"', packages)
    source = source.replace('"prometheus:0.0.0.0:9464"], env', f'"{backend}"], env')
    assert findings(check(tmp_path, "--json", source=source))["monitoring.packages", "pool"]["status"] == status


def test_a_gpu_tells_nothing_without_the_package_that_asks_it(tmp_path: Path) -> None:
    source = changed("cpu=2,", 'cpu=2, gpu="L4:1",')
    found = findings(check(tmp_path, "--json", source=source))["monitoring.packages", "pool"]
    assert (found["status"], found["evidence"]) == ("missing", "not in the image: nvidia-ml-py")


@pytest.mark.parametrize(
    ("gpu", "engine", "tested", "status"),
    [
        ('"L4:1"', "vllm", ["1 x NVIDIA L4"], "ok"),
        ('"L4:1"', "vllm", ["1 x NVIDIA L40S"], "missing"),
        ('"A100:1"', "vllm", ["1 x NVIDIA A100-SXM4-80GB"], "ok"),
        ('"L4:1"', "vllm", ["L4:1"], "ok"),
        ('"L4:1"', "vllm", [], "missing"),
        ('"L4:1"', "ctranslate2", [], "missing"),
        ("1", "vllm", ["1 x NVIDIA L4"], "could not tell"),
        ('"L40s:1"', "vllm", ["1 x NVIDIA L40S"], "ok"),
        ('"A100_80G:1"', "vllm", ["1 x NVIDIA A100-SXM4-80GB"], "ok"),
        ('"A100_80G:1"', "vllm", ["A100_80G:1"], "ok"),
        ('"A100_80G:1"', "vllm", ["1 x NVIDIA A100-SXM4-40GB"], "missing"),
        ('"A10 shared:1"', "vllm", ["1 x NVIDIA A10"], "ok"),
    ],
)
def test_a_load_test_counts_on_the_replicas_gpu(
    gpu: str, engine: str, tested: list[str], status: str, load_report: dict[str, Any], tmp_path: Path
) -> None:
    report = without(load_report, hardware__gpus=tested, test__choice__engine=engine)
    source = changed("cpu=2,", f"cpu=2, gpu={gpu},")
    found = findings(check(tmp_path, "--load_test", write_report(tmp_path, report), "--json", source=source))
    assert found["load_test.hardware", "pool"]["status"] == status


TWO_POOLS = changed(
    "driver = fb.driver",
    """gpu_replicas = fb.replica_environment(
    "gpu-pool", image=image, cpu=2, memory="4Gi", gpu="A10G:1", replicas=(1, 4), concurrency=4
)
driver = fb.driver""",
)


@pytest.mark.parametrize(
    ("tested", "shown", "other"),
    [([], "pool", "gpu-pool"), (["1 x NVIDIA A10G"], "gpu-pool", "pool")],
)
def test_a_load_test_is_of_the_replicas_that_are_like_it(
    tested: list[str], shown: str, other: str, load_report: dict[str, Any], tmp_path: Path
) -> None:
    report = without(load_report, hardware__gpus=tested)
    found = findings(check(tmp_path, "--load_test", write_report(tmp_path, report), "--json", source=TWO_POOLS))
    assert found["load_test.hardware", shown]["status"] == "ok"
    assert found["load_test.hardware", other]["status"] == "could not tell"
    assert found["load_test.hardware", other]["evidence"].endswith("of which that says nothing")


@pytest.mark.parametrize(
    ("backends", "variables", "status"),
    [
        ('"push:http://gateway:9091"', "{}", "ok"),
        ('"otel"', '{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}', "ok"),
        ('"otel"', "{}", "could not tell"),
        ('"logs", "prometheus:[::1]:9464"', "{}", "missing"),
    ],
)
def test_metrics_have_to_get_out_of_the_container(backends: str, variables: str, status: str, tmp_path: Path) -> None:
    source = READY.replace(
        '"prometheus:0.0.0.0:9464"], env_vars={"MODE": "batch"}', f"{backends}], env_vars={variables}"
    )
    assert findings(check(tmp_path, "--json", source=source))["monitoring.reachable", "pool"]["status"] == status


TWO_NOTIFIERS = """(
    notify.Slack(on_phase=ActionPhase.FAILED, webhook_url="https://x"),
    notify.Teams(on_phase=ActionPhase.TIMED_OUT, webhook_url="https://x"),
)"""


@pytest.mark.parametrize(
    ("notifications", "status"),
    [
        ('notify.NamedRule("on-call")', "ok"),
        (TWO_NOTIFIERS, "ok"),
        ('notify.Slack(on_phase=ActionPhase.SUCCEEDED, webhook_url="https://x")', "missing"),
        ("None", "missing"),
    ],
)  # fmt: skip
def test_somebody_has_to_hear_of_a_failed_night(notifications: str, status: str, tmp_path: Path) -> None:
    old = 'notify.Email(on_phase=(ActionPhase.FAILED, ActionPhase.TIMED_OUT), recipients=("a@example.com",))'
    found = findings(check(tmp_path, "--json", source=changed(old, notifications)))
    assert found["error_tracking.notifications", "drive.main, trigger nightly"]["status"] == status


# -- Evidence -------------------------------------------------------------


def without(report: dict[str, Any], **changes: Any) -> dict[str, Any]:
    changed: dict[str, Any] = json.loads(json.dumps(report))
    for path, value in changes.items():
        *outer, last = path.split("__")
        place = changed
        for key in outer:
            place = place[int(key)] if isinstance(place, list) else place[key]
        place[last] = value
    return changed


@pytest.mark.parametrize(
    ("changes", "name", "status", "evidence"),
    [
        ({"started_at": "2020-01-01T00:00:00+00:00"}, "load_test.age", "missing", "of 2020-01-01"),
        ({"test__choice__model": "other/model"}, "load_test.model", "missing", "other/model was tested, demo is"),
        ({"test__choice__engine": "fake"}, "load_test.model", "missing", "only echoes"),
        ({"hardware__gpus": ["L4:1"]}, "load_test.hardware", "missing", "a replica has no GPU"),
        (
            {"limit__highest_kept_per_s": None, "limit__lowest_broken_per_s": 20.0},
            "load_test.level", "missing", "is not kept",
        ),
        ({"limit__steps__0__objectives__0__is_shown": False}, "load_test.level", "could not tell", "do not show it"),
    ],
)  # fmt: skip
def test_a_load_test_that_shows_too_little(
    changes: dict[str, Any], name: str, status: str, evidence: str, load_report: dict[str, Any], tmp_path: Path
) -> None:
    load_test = write_report(tmp_path, without(load_report, **changes))
    found = findings(check(tmp_path, "--load_test", load_test, *COST, "--json"))
    noticed = {key: each for key, each in found.items() if each["status"] != "ok"}
    subject = "pool" if name == "load_test.hardware" else ""
    assert set(noticed) == {(name, subject)}
    assert (noticed[name, subject]["status"], evidence in noticed[name, subject]["evidence"]) == (status, True), noticed


def test_the_model_that_runs_can_be_told(load_test: str, tmp_path: Path) -> None:
    found = findings(check(tmp_path, "--load_test", load_test, "--model", "other/model", "--json"))
    assert found["load_test.model", ""]["status"] == "missing"
    untold = changed('model: str = "demo", ', "")
    assert (
        findings(check(tmp_path, "--load_test", load_test, "--json", source=untold))["load_test.model", ""]["status"]
        == "could not tell"
    )


def test_costs_follow_from_rows_speed_and_price(tmp_path: Path) -> None:
    found = findings(check(tmp_path, *COST, "--json"))
    said = found["cost_projection.bill", ""]["evidence"]
    assert said.startswith("1,000,000 rows at 100 rows/s a replica (told) are 2 h 47 min of replicas: ")
    assert said.endswith(": 10.00 at 3.6 an hour, 10.00 a million rows")
    assert found["cost_projection.time", "pool"]["evidence"] == (
        "41 min 40 s with all 4; standing idle after a run costs at most 1.20 more"
    )


@pytest.mark.parametrize("left_out", ["rows", "rows_per_s", "price_per_hour"])
def test_costs_need_all_three(left_out: str, tmp_path: Path) -> None:
    at = COST.index(f"--{left_out}")
    options = COST[:at] + COST[at + 2 :]
    found = findings(check(tmp_path, *options, "--json"))["cost_projection.bill", ""]
    assert (found["status"], found["evidence"]) == ("missing", f"not known: {left_out}")
    assert f"--{left_out} N" in found["remedy"]


@pytest.fixture
def earlier_run(tmp_path: Path) -> str:
    """The output of a real run of 400 rows with a price."""

    @fb.singleton
    async def solver() -> fb.EngineBatcher[Any, Any]:
        return fb.EngineBatcher(fb.FakeEngine(seconds_per_batch=0.05))

    async def infer_chunk(chunk: fb.Chunk) -> fb.ChunkReport:
        return await fb.infer(chunk, solver, prompt="{question}")

    async def run() -> None:
        source = questions(tmp_path / "in.jsonl", 400)
        await fb.run(source, str(tmp_path / "out"), infer_chunk, chunk_size=100, price_per_hour=7.2, progress="off")

    asyncio.run(run())
    return str(tmp_path / "out")


def test_an_output_without_its_log_says_nothing_of_speed(tmp_path: Path, earlier_run: str) -> None:
    (Path(earlier_run) / "_report.json").unlink()
    result = check(tmp_path, "--run", earlier_run)
    assert result.exit_code == 2
    assert "no run over it that left its log (_report.json) answered a row" in result.output


def test_a_gpu_may_be_a_device_object(load_report: dict[str, Any], tmp_path: Path) -> None:
    report = without(load_report, hardware__gpus=["2 x NVIDIA A100-SXM4-80GB"])
    source = (
        'import flyte\nenv = flyte.TaskEnvironment("pool", image="me/image:1", reusable=flyte.ReusePolicy((1, 2)), '
        'resources=flyte.Resources(cpu=1, memory="1Gi", gpu=flyte.GPU("A100", 2)))\n'
        "@env.task\nasync def main() -> None:\n    from flyte_batch import infer\n"
    )
    found = findings(check(tmp_path, "--load_test", write_report(tmp_path, report), "--json", source=source))
    assert found["load_test.hardware", "pool"]["status"] == "ok"
    assert found["limits.resources", "pool"]["evidence"] == "cpu 1, memory 1Gi, gpu A100:2"


def test_costs_follow_from_an_earlier_run(tmp_path: Path, earlier_run: str) -> None:
    found = findings(check(tmp_path, "--run", earlier_run, "--json"))["cost_projection.bill", ""]
    assert found["status"] == "ok"
    log = json.loads((Path(earlier_run) / "_report.json").read_text())["runs"][-1]
    seconds = log["ended"] - min(engine["started"] for engine in log["engines"])
    assert f"400 rows at {400 / seconds:,.4g} rows/s a replica (measured on no GPU that was seen)" in found["evidence"]
    assert f" at 7.2 an hour, {1e6 * 7.2 / 3600 / (400 / seconds):,.2f} a million rows" in found["evidence"]
    more = findings(check(tmp_path, "--run", earlier_run, "--rows", "4000000", "--json"))["cost_projection.bill", ""]
    assert more["evidence"].startswith("4,000,000 rows")


def test_the_speed_of_a_run_says_nothing_of_other_replicas(tmp_path: Path, earlier_run: str) -> None:
    found = findings(check(tmp_path, "--run", earlier_run, "--json", source=TWO_POOLS))
    assert found["cost_projection.time", "pool"]["status"] == "ok"
    said = found["cost_projection.time", "gpu-pool"]
    assert (said["status"], said["evidence"].partition(":")[0]) == (
        "could not tell",
        "measured on no GPU that was seen; a replica has A10G",
    )
    assert found["cost_projection.bill", ""]["status"] == "ok"
    on_gpus = changed("cpu=2,", 'cpu=2, gpu="A10G:1",')
    unlike = findings(check(tmp_path, "--run", earlier_run, "--json", source=on_gpus))
    assert unlike["cost_projection.bill", ""]["status"] == "could not tell"
    told = findings(check(tmp_path, "--run", earlier_run, "--rows_per_s", "5", "--json", source=TWO_POOLS))
    assert told["cost_projection.time", "gpu-pool"]["status"] == "ok"


# -- The command ----------------------------------------------------------


def test_the_list_says_what_is_missing_and_what_to_do(tmp_path: Path) -> None:
    result = check(tmp_path, source=changed("concurrency=4", "concurrency=1"))
    text = " ".join(result.output.split())
    assert result.exit_code == 1
    assert "missing concurrency, pool: one chunk a replica at once" in text
    assert "-> raise concurrency to 4 or more" in text
    assert text.endswith("missing: autoscaling.concurrency, load_test.level, cost_projection.bill")


@pytest.mark.parametrize("columns", [60, 200])
def test_the_list_fits_the_terminal(columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = check(tmp_path).output.splitlines()
    assert max(map(len, lines)) <= min(columns, 110)


def test_a_reason_accepts_what_is_missing(tmp_path: Path, load_test: str) -> None:
    source = changed("replicas=(1, 4)", "replicas=3")
    options = (
        "--load_test",
        load_test,
        *COST,
        "--json",
        "--accept",
        "autoscaling.replicas:pool=three are paid for anyway",
    )
    result = check(tmp_path, *options, source=source)
    assert result.exit_code == 0
    finding = findings(result)["autoscaling.replicas", "pool"]
    assert finding["status"] == "accepted"
    assert finding["evidence"] == "always 3 replicas; accepted: three are paid for anyway"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--accept", "autoscaling.replicas"), "gives no reason"),
        (
            ("--accept", "foo=fast"),
            "there is no such check here. These are:\n  autoscaling.concurrency\n",
        ),
        (
            ("--accept", "autoscaling.replica=few"),
            "no such check here. Did you mean autoscaling.replicas? These are:\n",
        ),
        (("--accept", "autoscaling.replicas:pol=few"), "Did you mean autoscaling.replicas:pool? These are:\n  autosc"),
        (("--rows", "0"), "--rows must be a positive number, got 0"),
        (("--load_test", "nowhere.json"), "no report of a load test at nowhere.json"),
        (("--run", "nowhere"), "nowhere is not there: give the --output of a run"),
    ],
)
def test_bad_options_are_exit_code_2_and_named(options: tuple[str, ...], words: str, tmp_path: Path) -> None:
    result = check(tmp_path, *options)
    assert result.exit_code == 2
    assert words in result.output
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "import nowhere_to_be_found",
            "can't be loaded: ModuleNotFoundError: No module named 'nowhere_to_be_found': run this in the folder where",
        ),
        ("1 +", "can't be loaded: SyntaxError"),
        ("raise SystemExit(0)", "can't be loaded: it ends the process"),
        ("x = 1", "declares no flyte.TaskEnvironment: give the file that `flyte run` takes"),
    ],
)
def test_a_file_that_can_t_be_loaded_is_exit_code_2(source: str, words: str, tmp_path: Path) -> None:
    result = check(tmp_path, source=source)
    assert result.exit_code == 2
    assert words in result.output


def test_a_file_that_is_not_there_is_exit_code_2(tmp_path: Path) -> None:
    result = CliRunner().invoke(batch, ["check", str(tmp_path / "nowhere.py")])
    assert result.exit_code == 2
    assert "there is no file" in result.output


def test_what_the_workflow_prints_is_no_part_of_the_json(tmp_path: Path) -> None:
    result = check(tmp_path, "--json", source=f"print('hello')\n{READY}")
    assert findings(result)
    assert "hello" in result.stderr
