"""What cannot work is said where the job is submitted, in one line and with the remedy."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from flyte_batch.demo import model_path
from flyte_batch.engines import CTranslate2Engine, FakeEngine, choose_engine, start_engine
from flyte_batch.errors import BadInput, EngineError
from flyte_batch.records import Prompt, SamplingParameters


@pytest.fixture
def hugging_face_model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_path("hf"), tmp_path / "hf"))


@pytest.fixture(autouse=True)
def _vllm_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an environment without the extra, wherever these tests run."""
    pretend(monkeypatch, vllm=False)


def pretend(monkeypatch: pytest.MonkeyPatch, **installed: bool) -> None:
    """Let packages look installed, or not."""
    real = importlib.util.find_spec
    spec = importlib.util.spec_from_loader("anything", None)
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name: (spec if installed[name] else None) if name in installed else real(name),
    )


class TestChoosing:
    def test_auto_runs_the_demo_model_with_ctranslate2(self) -> None:
        chosen = choose_engine()
        assert (chosen.engine, chosen.model) == ("ctranslate2", "demo")
        assert chosen == choose_engine("ctranslate2", "demo")

    @pytest.mark.parametrize(
        ("engine", "model", "why"),
        [
            ("ctranslate", "demo", r"did you mean ctranslate2\?.*auto, ctranslate2, vllm, fake"),
            ("qwerty", "demo", "engines are auto, ctranslate2, vllm, fake"),
            ("auto", "demmo", r"did you mean demo\?"),
            ("auto", "", "no model given"),
            ("auto", "/nowhere/at/all", "there is no folder /nowhere/at/all: check the path"),
            ("auto", "./nowhere", "a relative one counts from"),
            ("auto", "models/of/mine", "there is no folder models/of/mine"),
            ("ctranslate2", "file:///models/a", "name it by its path"),
            ("ctranslate2", "s3://bucket/model", "download it to a folder first.*or take the engine vllm"),
            ("auto", "two words", "Hugging Face id"),
        ],
    )
    def test_says_what_is_wrong_and_what_to_do(self, engine: str, model: str, why: str) -> None:
        with pytest.raises(BadInput, match=why) as caught:
            choose_engine(engine, model)
        assert "\n" not in str(caught.value)

    def test_a_hugging_face_model_gets_the_command_that_converts_it(self, tmp_path: Path) -> None:
        for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja"):
            (tmp_path / name).touch()
        with pytest.raises(BadInput) as caught:
            choose_engine("auto", str(tmp_path))
        command = f"ct2-transformers-converter --model {tmp_path} --output_dir OUT --copy_files"
        assert f"{command} tokenizer.json chat_template.jinja; or take the engine vllm" in str(caught.value)

    def test_a_folder_without_a_model_says_what_was_looked_for(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match=r"looked for model\.bin"):
            choose_engine("auto", str(tmp_path))

    def test_a_folder_without_a_tokenizer_says_where_to_get_it(self, own_model: Path) -> None:
        (own_model / "tokenizer.json").unlink()
        with pytest.raises(BadInput, match=r"no tokenizer\.json: copy it"):
            choose_engine("auto", str(own_model))

    def test_a_file_is_no_model(self, own_model: Path) -> None:
        with pytest.raises(BadInput, match="is a file"):
            choose_engine("auto", str(own_model / "model.bin"))

    @pytest.mark.parametrize(
        ("package", "model", "remedy"),
        [("ctranslate2", "demo", r"extra 'cpu'"), ("huggingface_hub", "owner/name", r"extra 'hf'")],
    )
    def test_a_missing_package_says_what_to_install(
        self, monkeypatch: pytest.MonkeyPatch, package: str, model: str, remedy: str
    ) -> None:
        pretend(monkeypatch, **{package: False})
        with pytest.raises(BadInput, match=f"{package}.*with its {remedy}"):
            choose_engine("auto", model)

    @pytest.mark.parametrize("model", ["owner/name", "s3://bucket/model"])
    def test_vllm_where_it_is_missing_says_what_to_install(self, model: str) -> None:
        for engine in ("vllm", "auto") if "://" in model else ("vllm",):
            with pytest.raises(BadInput, match=r"vllm needs vllm, not installed here.*with its extra 'vllm'"):
                choose_engine(engine, model)

    @pytest.mark.parametrize("here", [True, False])
    def test_auto_runs_hugging_face_models_with_vllm_and_converted_ones_with_ctranslate2(
        self, monkeypatch: pytest.MonkeyPatch, model: Path, hugging_face_model: Path, here: bool
    ) -> None:
        pretend(monkeypatch, vllm=here)  # on another machine it need not be installed here
        chosen = {name: choose_engine("auto", name, here).engine for name in (
            "demo", "owner/name", "owner/name@v1", "s3://bucket/model", str(model), str(hugging_face_model)
        )}  # fmt: skip
        assert [name for name, engine in chosen.items() if engine == "ctranslate2"] == ["demo", str(model)]
        assert set(chosen.values()) == {"ctranslate2", "vllm"}

    def test_auto_does_without_vllm(self) -> None:
        assert choose_engine("auto", "owner/name").engine == "ctranslate2"

    @pytest.mark.parametrize("engine", ["vllm", "ctranslate2"])
    def test_on_another_machine_no_package_is_needed_here(self, monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
        pretend(monkeypatch, vllm=False, ctranslate2=False, tokenizers=False, huggingface_hub=False)
        assert choose_engine(engine, "owner/name", here=False).engine == engine
        assert choose_engine(engine, "demo", here=False).engine == engine

    @pytest.mark.parametrize(
        ("missing", "why"),
        [("config.json", r"holds no config\.json"), ("model.safetensors", "holds no weights: vLLM needs")],
    )
    def test_vllm_needs_a_whole_hugging_face_model(self, hugging_face_model: Path, missing: str, why: str) -> None:
        (hugging_face_model / missing).unlink()
        with pytest.raises(BadInput, match=why):
            choose_engine("vllm", str(hugging_face_model), here=False)

    def test_vllm_does_not_take_what_was_converted_for_ctranslate2(self, own_model: Path) -> None:
        with pytest.raises(BadInput, match="converted for CTranslate2: name the folder it was converted from"):
            choose_engine("vllm", str(own_model), here=False)

    def test_loads_no_engine(self) -> None:
        code = (
            "import sys; from flyte_batch.engines import choose_engine; choose_engine(); choose_engine('fake'); "
            "print([m for m in ('ctranslate2', 'tokenizers', 'torch', 'pyarrow') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


class TestIdentity:
    def test_is_that_of_the_files_wherever_they_lie(self, model: Path, own_model: Path) -> None:
        same = {choose_engine("auto", str(folder)).identity for folder in (model, own_model)}
        assert same == {choose_engine().identity}

    @pytest.mark.parametrize("name", ["model.bin", "tokenizer.json", "chat_template.jinja"])
    def test_changes_with_any_file(self, own_model: Path, name: str) -> None:
        before = choose_engine("auto", str(own_model)).identity
        content = bytearray((own_model / name).read_bytes())
        content[len(content) // 2] ^= 1
        (own_model / name).write_bytes(content)
        assert choose_engine("auto", str(own_model)).identity != before

    def test_changes_with_engine_and_revision(self) -> None:
        names = ["owner/name@a", "owner/name@b", "owner/name", "owner/other"]
        assert len({choose_engine("auto", name).identity for name in names}) == 4
        assert choose_engine("auto", "owner/name").identity == choose_engine("auto", "owner/name@main").identity
        assert choose_engine("fake").identity != choose_engine("ctranslate2").identity
        assert choose_engine("vllm", "owner/name", here=False) != choose_engine("ctranslate2", "owner/name")

    def test_of_a_folder_for_vllm_is_that_of_its_files(self, hugging_face_model: Path) -> None:
        demo = choose_engine("vllm", "demo", here=False).identity
        assert choose_engine("vllm", str(hugging_face_model), here=False).identity == demo
        (hugging_face_model / "generation_config.json").write_text("{}")
        assert choose_engine("vllm", str(hugging_face_model), here=False).identity != demo


class TestStarting:
    async def test_starts_what_was_chosen(self) -> None:
        sampling = SamplingParameters(max_tokens=4)
        engine = await start_engine(choose_engine(), sampling, sub_batch=2)
        assert isinstance(engine, CTranslate2Engine)
        assert len(await engine.infer([engine.prepare(Prompt("Hi"))])) == 1
        await engine.aclose()
        assert isinstance(await start_engine(choose_engine("fake"), sampling), FakeEngine)

    async def test_downloads_a_hugging_face_model(self, monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
        asked: list[Any] = []

        def download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
            asked.append((repository, revision))
            return str(model)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        engine = await start_engine(choose_engine("auto", "owner/name@v1"))
        assert asked == [("owner/name", "v1")]
        await engine.aclose()

    async def test_a_downloaded_model_that_is_not_converted_says_so(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "config.json").write_text("{}")
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
        with pytest.raises(
            BadInput, match=r"owner/name holds no model\.bin.*ct2-transformers-converter --model owner/name"
        ):
            await start_engine(choose_engine("auto", "owner/name"))

    def test_without_a_network_says_how_to_do_without(self, tmp_path: Path) -> None:
        code = (
            "import asyncio; from flyte_batch.engines import choose_engine, start_engine\n"
            "try: asyncio.run(start_engine(choose_engine('auto', 'owner/name')))\n"
            "except Exception as error: print(type(error).__name__, error)"
        )
        offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=offline)
        assert done.stdout.startswith("EngineError there is no folder owner/name here, and as a model of")
        assert "name its folder" in done.stdout
        assert done.stdout.count("\n") == 1

    async def test_a_model_that_does_not_exist_is_bad_input(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(*_: Any, **__: Any) -> str:
            from huggingface_hub.errors import RepositoryNotFoundError

            # Its constructor wants a response of whichever HTTP library the installed version uses.
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError, "404")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
        with pytest.raises(BadInput, match=r"no model owner/name, or it is private: check the name, or set HF_TOKEN"):
            await start_engine(choose_engine("auto", "owner/name"))

    async def test_a_folder_that_is_gone_on_the_other_machine_says_so(self, own_model: Path) -> None:
        chosen = choose_engine("auto", str(own_model))
        shutil.rmtree(own_model)
        with pytest.raises((BadInput, EngineError), match="no folder"):
            await start_engine(chosen)


def test_importing_the_engines_loads_none_of_them() -> None:
    code = (
        "import sys, flyte_batch.engines; "
        "print([m for m in ('ctranslate2', 'tokenizers', 'torch', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
