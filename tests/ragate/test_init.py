"""`ragate init`: the files it writes are read back by what they are for."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from ragate import __version__
from ragate.config import KEYS, load_settings
from ragate.errors import ConfigError
from ragate.init import COMMENT_PACKAGES, ci_text, plan_init, write_init

ROOT = Path(__file__).parents[2]
WORKFLOWS = [f".github/workflows/{name}.yml" for name in ("rag-gate", "rag-gate-comment", "tests")]

FILES = [
    "ragate.toml",
    ".github/actions/ragate/action.yml",
    ".github/workflows/rag-gate.yml",
    ".github/workflows/rag-gate-comment.yml",
    ".gitignore",
]


def _written(folder: Path, place: str) -> Any:
    """A YAML file of the plan, read."""
    return yaml.safe_load(dict(plan_init(folder))[folder / place])


def test_every_file_is_written_and_named(tmp_path: Path) -> None:
    plan = plan_init(tmp_path)
    written = write_init(tmp_path)
    assert written == [tmp_path / name for name in FILES]
    assert [path.read_text() for path in written] == [content for _, content in plan]


@pytest.mark.parametrize(
    ("there", "left"),
    [
        ("build/\n*.log", "build/\n*.log\n.ragate/\n"),
        ("", ".ragate/\n"),
        ("/.ragate/\nbuild/\n", "/.ragate/\nbuild/\n"),
    ],
)
def test_a_gitignore_that_is_there_is_added_to_once(tmp_path: Path, there: str, left: str) -> None:
    (tmp_path / ".gitignore").write_text(there)
    for _ in range(2):
        write_init(tmp_path, force=True)
        assert (tmp_path / ".gitignore").read_text() == left


def test_answers_are_written_as_they_were_given(tmp_path: Path) -> None:
    answers = {
        "testset": 'a "b" ü\U0001f600.jsonl',
        "target": "app:TESTSET",
        "judge": "qwen-0.5b",
        "threshold": "0.03",
    }
    write_init(tmp_path, answers)
    settings = load_settings({}, tmp_path)
    assert {name: str(getattr(settings, name)) for name in answers} == answers


@pytest.mark.parametrize("threshold", ["5 %", "0", "7", "nan"])
def test_a_threshold_that_is_none_is_refused_before_anything_is_written(
    tmp_path: Path, threshold: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape("threshold must be above 0 and at most 1, got")):
        write_init(tmp_path, {"threshold": threshold})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FILES[:4])
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


def test_the_gate_runs_a_forks_code_with_no_more_than_a_pull_request_may(tmp_path: Path) -> None:
    workflow = _written(tmp_path, FILES[2])
    # `on` is read as true in YAML 1.1; pull_request_target would run a fork's code with rights and secrets
    assert set(workflow[True]) == {"pull_request", "workflow_dispatch"}
    assert workflow["permissions"] == {}
    job = workflow["jobs"]["rag-gate"]
    assert job["permissions"] == {"contents": "read", "pull-requests": "write"}
    assert job["steps"][0]["with"] == {"persist-credentials": False}
    assert job["steps"][1]["uses"] == "./.github/actions/ragate"


def test_the_commenter_runs_on_the_default_branch_and_nothing_of_the_fork(tmp_path: Path) -> None:
    workflow = _written(tmp_path, FILES[3])
    assert workflow[True] == {"workflow_run": {"workflows": ["RAG gate"], "types": ["completed"]}}
    job = workflow["jobs"]["comment"]
    assert job["permissions"] == {"actions": "read", "contents": "read", "pull-requests": "write"}
    checkout = job["steps"][0]
    assert checkout["uses"].startswith("actions/checkout@")
    assert checkout["with"] == {"persist-credentials": False}  # no ref: the default branch
    runs = [step["run"] for step in job["steps"] if "run" in step]
    assert runs[-1] == 'ragate comment --artifact "$RUNNER_TEMP/rag-gate"'
    assert not any("${{" in run for run in runs)
    download = next(step for step in job["steps"] if "download-artifact" in step.get("uses", ""))
    assert download["with"]["path"] == "${{ runner.temp }}/rag-gate"


def test_versions_that_stand_in_the_fingerprint_are_pinned(tmp_path: Path) -> None:
    pinned = f"ragate[hub]=={__version__} pydantic=={metadata.version('pydantic')}"
    gate = _written(tmp_path, FILES[2])["jobs"]["rag-gate"]["steps"][1]
    assert gate["with"]["requirement"] == pinned
    assert _written(tmp_path, FILES[1])["inputs"]["requirement"]["default"] == f"ragate[hub]=={__version__}"
    assert f'--no-deps "ragate=={__version__}"' in dict(plan_init(tmp_path))[tmp_path / FILES[3]]


def test_the_commenter_installs_all_that_a_comment_imports() -> None:
    code = (
        "import sys, ragate.cli, ragate.suite, ragate.github, ragate.report.markdown, ragate.gate.stats, scipy.special;"
        "print(*{name.split('.')[0] for name in sys.modules} - set(sys.stdlib_module_names))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    brought = {"annotated_types", "pydantic_core", "typing_extensions", "typing_inspection"}  # by pydantic
    brought |= {"anyio", "certifi", "h11", "httpcore", "idna", "sniffio"}  # by httpx
    brought |= {"pygments", "markdown_it", "mdurl"}  # by rich
    optional = {"charset_normalizer", "zstandard", "chardet", "brotli", "brotlicffi", "socksio", "h2"}
    named = {name for name in out if not name.startswith(("_", "cython_runtime"))}
    assert named - brought - optional - {"ragate"} <= set(COMMENT_PACKAGES)


def test_no_file_that_the_settings_suggest_is_one_that_git_ignores(tmp_path: Path) -> None:
    settings = dict(plan_init(tmp_path))[tmp_path / "ragate.toml"]
    suggested = re.findall(r'(?m)^#? ?(?:baseline|release|calibration) = "(.+)"$', settings)
    assert len(suggested) == 3 and not [path for path in suggested if path.startswith(".ragate")]


# This repository


def test_this_repositorys_action_is_the_one_that_init_writes() -> None:
    assert (ROOT / FILES[1]).read_text() == ci_text("action.yml")


def test_this_repositorys_commenter_differs_only_in_whose_ragate_it_runs() -> None:
    own = (ROOT / FILES[3]).read_text().splitlines()
    changed = [line for line in own if line not in ci_text("rag-gate-comment.yml").splitlines()]
    assert len(changed) == 2
    assert changed[1].endswith("--no-deps -e .")


def test_this_repositorys_gate_watches_prompts_chunking_embeddings_and_settings() -> None:
    workflow = yaml.safe_load((ROOT / FILES[2]).read_text())
    paths = workflow[True]["pull_request"]["paths"]
    for path in ("ragate/demo/pipeline.py", "ragate/demo/chunks.py", "ragate/embeddings.py", "ragate.toml"):
        assert (ROOT / path).is_file()
        assert any(fnmatch(path, pattern) for pattern in paths), path
    for pattern in paths:
        assert pattern.startswith("baselines/") or list(ROOT.glob(pattern)), pattern


@pytest.mark.parametrize(
    ("schema", "place"),
    [("vendor.github-actions", FILES[1]), *(("vendor.github-workflows", name) for name in WORKFLOWS)],
)
def test_the_files_are_valid_by_githubs_schema(tmp_path: Path, schema: str, place: str) -> None:
    pytest.importorskip("check_jsonschema")
    write_init(tmp_path)
    files = [str(path) for path in (ROOT / place, tmp_path / place) if path.is_file()]
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("place", [FILES[1], *WORKFLOWS])
def test_nothing_from_outside_is_pasted_into_a_script_and_every_action_has_a_version(place: str) -> None:
    text = (ROOT / place).read_text()
    found = yaml.safe_load(text)
    steps = (
        found["runs"]["steps"] if "runs" in found else [s for j in found["jobs"].values() for s in j["steps"]]
    )
    for step in steps:
        assert "${{" not in step.get("run", ""), step
        uses = step.get("uses", "")
        assert not uses or uses.startswith("./") or re.fullmatch(r"actions/[a-z/-]+@v\d+", uses), uses
    assert "${{ secrets" not in text
    assert "pull_request_target" not in text
