"""`ragate init`: the files it writes are read back by what they are for."""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from ragate import __version__
from ragate.config import KEYS, load_settings
from ragate.errors import ConfigError
from ragate.init import plan_init, write_init

if TYPE_CHECKING:
    from pathlib import Path


def _workflow(folder: Path) -> Any:
    return yaml.safe_load(plan_init(folder)[1][1])


def test_both_files_are_written_and_named(tmp_path: Path) -> None:
    written = write_init(tmp_path)
    assert written == [tmp_path / "ragate.toml", tmp_path / ".github/workflows/rag-gate.yml"]
    assert [path.read_text() for path in written] == [content for _, content in plan_init(tmp_path)]


@pytest.mark.parametrize("name", ["ragate.toml", ".github/workflows/rag-gate.yml"])
def test_a_file_that_is_there_stops_everything_unless_forced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=re.escape(f"{name} is there already; --force overwrites")):
        write_init(tmp_path)
    assert [p.read_text() for p in tmp_path.rglob("*") if p.is_file()] == ["mine"]
    write_init(tmp_path, force=True)
    assert (tmp_path / name).read_text() != "mine"


def test_the_settings_are_read_and_are_the_defaults(tmp_path: Path) -> None:
    write_init(tmp_path)
    settings = load_settings({}, tmp_path)
    bare = load_settings({"testset": "testset.jsonl"}, tmp_path.parent)
    own = {"root", "origins"}
    assert settings.model_dump(exclude=own) == bare.model_dump(exclude=own)


def test_every_setting_is_in_the_file_and_its_example_is_accepted(tmp_path: Path) -> None:
    write_init(tmp_path)
    path = tmp_path / "ragate.toml"
    lines = path.read_text().splitlines()
    shown = [re.sub(r"^# (?=[a-z_]+ = |\[)", "", line) for line in lines]
    path.write_text("\n".join(shown))
    named = tomllib.loads(path.read_text())
    assert set(named) == set(KEYS)
    assert load_settings({}, tmp_path).target_options == {"k": 5}


@pytest.mark.parametrize(
    ("there", "named"),
    [
        ([], "testset.jsonl"),
        (["testsets/b.jsonl", "testsets/a.csv", "testsets/README.md"], "testsets/a.csv"),
        (["testset.json", "testsets/a.csv"], "testset.json"),
        (['testsets/od"d\\.jsonl'], 'testsets/od"d\\.jsonl'),
    ],
)
def test_a_test_set_that_is_there_is_named(tmp_path: Path, there: list[str], named: str) -> None:
    for name in there:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert tomllib.loads(plan_init(tmp_path)[0][1])["testset"] == named


def test_the_workflow_may_only_read_and_keeps_no_credentials(tmp_path: Path) -> None:
    workflow = _workflow(tmp_path)
    assert workflow["permissions"] == {"contents": "read"}
    job = workflow["jobs"]["rag-gate"]
    assert "permissions" not in job
    assert job["steps"][0]["with"] == {"persist-credentials": False}
    # `on` is read as true in YAML 1.1; a workflow with pull_request_target would run a fork's code with rights
    assert set(workflow[True]) == {"pull_request", "workflow_dispatch"}
    assert "secrets." not in plan_init(tmp_path)[1][1]


def test_the_workflow_pins_this_version_and_keys_the_model_cache_by_it(tmp_path: Path) -> None:
    job = _workflow(tmp_path)["jobs"]["rag-gate"]
    assert job["env"] == {"RAGATE_VERSION": __version__}
    cache = next(step for step in job["steps"] if step.get("uses", "").startswith("actions/cache@"))
    assert cache["with"]["key"] == "ragate-models-${{ runner.os }}-${{ env.RAGATE_VERSION }}"


def test_the_workflow_keeps_the_report_of_a_failing_gate(tmp_path: Path) -> None:
    steps = _workflow(tmp_path)["jobs"]["rag-gate"]["steps"]
    runs = [step.get("run", "") for step in steps]
    assert "ragate eval --quiet" in runs
    upload = steps[-1]
    assert upload["uses"].startswith("actions/upload-artifact@")
    assert upload["if"] == "${{ !cancelled() }}"
    assert upload["with"]["include-hidden-files"] is True
    assert ".ragate/*/report.html" in upload["with"]["path"]
