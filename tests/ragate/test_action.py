"""The composite action, its shell steps run as Actions runs them: in a scratch repository, with a judge that stands in.

Steps that use other actions are not run; expressions are read by the few forms that the file has, and any other form
is an error here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from github_api import REPOSITORY, TOKEN, FakeGitHub, serving

from ragate.init import write_init

HERE = Path(__file__).parent
RAGATE = f"""\
#!{sys.executable}
# `ragate` with a judge without a model, and a system under test that prints workflow commands
import os, sys
sys.path[:0] = [{str(HERE)!r}]
from fake_engine import FakeEngine
from ragate import session
from ragate.cli import run
engine = FakeEngine(answer=lambda prompt, schema: os.environ.get("JUDGE_SAYS") or None)
session.open_engine = lambda *_: engine
sys.exit(run(sys.argv[1:]))
"""
PYTHON = f"""\
#!/bin/bash
# python, but pip only notes what it would install
if [ "$1 $2" = "-m pip" ]; then echo "$*" >> "$RUNNER_TEMP/pip"; else exec {sys.executable} "$@"; fi
"""
TARGET = """\
def answer(question):
    print("\\n::error::pwned by the judged system\\n##[set-output name=x]y")
    return {"answer": "It keeps results.", "contexts": ["A cache keeps results."]}
"""
YES = '{"classifications":[{"statement":"It keeps.","reason":"so it says","attributed":1}]}'
NO = YES.replace('"attributed":1', '"attributed":0')


class Job:
    """A job on a runner: a checkout, the runner's folders and files, and the action in it."""

    def __init__(self, folder: Path, github: FakeGitHub) -> None:
        self.github = github
        self.workspace = folder / "work"
        self.temp = folder / "temp"
        self.bin = folder / "bin"
        for path in (self.workspace, self.temp, self.bin):
            path.mkdir()
        for name, text in (("ragate", RAGATE), ("python", PYTHON)):
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)
        rows = (
            {"id": f"q{i}", "question": f"What does part {i} keep?", "reference": "It keeps results."}
            for i in range(30)
        )
        (self.workspace / "testset.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (self.workspace / "judge.gguf").touch()
        (self.workspace / "app.py").write_text(TARGET)
        write_init(self.workspace, {"target": "app:answer", "judge": "judge.gguf"})
        settings = self.workspace / "ragate.toml"
        kept = re.sub(r"(?m)^metrics = .*", 'metrics = ["context_recall"]', settings.read_text())
        settings.write_text(kept)
        git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
        for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "first"]):
            subprocess.run([*git, *command], cwd=self.workspace, check=True)
        self.event = {"pull_request": {"number": 7, "head": {"sha": "ab12" * 10}}}
        self.event_name = "pull_request"
        self.summary = ""
        self.ran: dict[str, str] = {}
        """Step -> what it printed."""

    def run(self, says: str = YES, **inputs: str) -> tuple[int, dict[str, str]]:
        """Run the action's steps; returns (exit code of the job, outputs of the action)."""
        action = yaml.safe_load((self.workspace / ".github/actions/ragate/action.yml").read_text())
        given = {name: str(spec["default"]) for name, spec in action["inputs"].items()} | inputs
        outputs: dict[str, dict[str, str]] = {"upload": {"artifact-url": "https://github.example/artifact/5"}}
        self.ran, code = {}, 0

        def value(text: str) -> str:
            return re.sub(
                r"\$\{\{ ([^}]*) \}\}", lambda match: self.expression(match[1], given, outputs), text
            )

        for step in action["runs"]["steps"]:
            wanted = value(step.get("if", "${{ 'x' != '' }}")) == "true"
            # without a condition of its own a step runs only while all is well
            if not wanted or (code and "cancelled()" not in step.get("if", "")):
                continue
            if "uses" in step:
                self.ran[step["name"]] = step["uses"]
                continue
            files = {
                name: self.temp / name for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY", "GITHUB_ENV")
            }
            for file in files.values():
                file.write_text("")
            (self.temp / "event.json").write_text(json.dumps(self.event))
            (self.temp / "step.sh").write_text(step["run"])
            environment = {
                "PATH": f"{self.bin}:/usr/bin:/bin",
                "HOME": str(self.temp),
                "RAGATE_CACHE": os.environ.get("RAGATE_CACHE", ""),
                "RAGAS_DO_NOT_TRACK": "true",
                "HF_HUB_OFFLINE": "1",
                "JUDGE_SAYS": says,
                "CI": "true",
                "GITHUB_ACTIONS": "true",
                "GITHUB_API_URL": self.github.url,
                "GITHUB_SERVER_URL": "https://github.example",
                "GITHUB_REPOSITORY": REPOSITORY,
                "GITHUB_RUN_ID": "42",
                "GITHUB_SHA": "0" * 40,
                "GITHUB_EVENT_NAME": self.event_name,
                "GITHUB_EVENT_PATH": str(self.temp / "event.json"),
                "GITHUB_WORKSPACE": str(self.workspace),
                "RUNNER_TEMP": str(self.temp),
                "RUNNER_OS": "Linux",
                **{name: str(file) for name, file in files.items()},
                **{name: value(text) for name, text in step.get("env", {}).items()},
            }
            assert step["shell"] == "bash"
            done = subprocess.run(
                ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(self.temp / "step.sh")],
                cwd=self.workspace / value(step.get("working-directory", ".")),
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            # the runner reads two pipes, in no order: nothing that matters may come through the second
            self.ran[step["name"]] = done.stdout + done.stderr
            code = code or done.returncode
            self.summary += files["GITHUB_STEP_SUMMARY"].read_text()
            lines = files["GITHUB_OUTPUT"].read_text().splitlines()
            outputs[step.get("id", step["name"])] = dict(line.split("=", 1) for line in lines)
        return code, {name: value(spec["value"]) for name, spec in action["outputs"].items()}

    def expression(self, text: str, inputs: dict[str, str], outputs: dict[str, dict[str, str]]) -> str:
        """The value of an expression of the forms that the action has."""
        if " && " in text:
            parts = [self.expression(part, inputs, outputs) for part in text.split(" && ")]
            return "true" if all(part == "true" for part in parts) else "false"
        if match := re.fullmatch(r"(.+) (==|!=) '(.*)'", text):
            same = self.expression(match[1], inputs, outputs) == match[3]
            return str(same == (match[2] == "==")).lower()
        if match := re.fullmatch(r"inputs\.([\w-]+)", text):
            # a default may be an expression itself
            return inputs[match[1]].replace("${{ github.token }}", TOKEN)
        if match := re.fullmatch(r"steps\.([\w-]+)\.outputs\.([\w-]+)", text):
            return outputs.get(match[1], {}).get(match[2], "")
        fixed: dict[str, Any] = {
            "!cancelled()": "true",
            "'x'": "x",
            "runner.os": "Linux",
            "github.event_name": self.event_name,
            "github.run_id": "42",
            "github.run_attempt": "1",
        }
        return str(fixed[text])

    def obeyed(self) -> list[str]:
        """The workflow commands that the runner would obey in what the evaluation printed."""
        found, stopped = [], ""
        for line in self.ran["Evaluate"].splitlines():
            if stopped:
                stopped = "" if line.strip() == f"::{stopped}::" else stopped
            elif match := re.match(r"\s*::stop-commands::(\w+)", line):
                stopped = match[1]
            elif line.lstrip().startswith("::") or "##[" in line:
                found.append(line)
        assert not stopped
        return found


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    with serving() as github:
        yield Job(tmp_path, github)


def accept(job: Job) -> None:
    """Commit the baseline that the artifact of the last run holds."""
    made = job.workspace / ".ragate/testset/baseline.json"
    (job.workspace / "baselines").mkdir(exist_ok=True)
    (job.workspace / "baselines/testset.json").write_text(made.read_text())


def test_from_the_baseline_over_a_fork_to_a_bad_change_and_back(job: Job) -> None:
    # started by hand it makes the baseline
    pull_request, job.event, job.event_name = job.event, {}, "workflow_dispatch"
    code, outputs = job.run(**{"update-baseline": "true"})
    assert (code, outputs["verdict"], outputs["exit-code"]) == (0, "PASS", "0")
    assert "Comment" not in job.ran
    made = Path(outputs["folder"]) / "baseline.json"
    assert made.read_text() == (job.workspace / "baselines/testset.json").read_text()

    # a fork's run fails for nothing but its verdict, and leaves the artifact
    job.event, job.event_name, job.github.read_only = pull_request, "pull_request", True
    code, outputs = job.run()
    assert (code, outputs["verdict"]) == (0, "PASS")
    assert job.ran["Comment"].startswith("not commented: GitHub answered 403")
    assert job.ran["Keep the report"] == "actions/upload-artifact@v5"
    assert job.github.comments == {}
    kept = {path.name for path in Path(outputs["folder"]).iterdir()}
    artifact = {
        "run.json",
        "baseline.json",
        "verdict.json",
        "report.html",
        "comment.md",
        "junit.xml",
        "badge.svg",
    }
    assert artifact <= kept

    # a bad change fails, with the settings that it was started with
    job.github.read_only = False
    code, outputs = job.run(NO, arguments="--out .ragate/other --threshold 0.2")
    assert (code, outputs["verdict"], outputs["exit-code"]) == (1, "FAIL", "1")
    assert outputs["sentence"].startswith("FAIL: context_recall fell 100.0 pt (limit 20.0 pt = 20 %")
    assert outputs["folder"] == str(job.workspace / ".ragate/other")
    (body,) = job.github.bodies(7)
    assert "**❌ FAIL** testset: context\\_recall fell 100.0 pt (limit 20.0 pt = 20 %" in body
    assert "[Full report](https://github.example/artifact/5)" in body
    assert "of commit ab12ab12ab" in body
    assert job.ran["Verdict"] == outputs["sentence"] + "\n"
    # the marks lie on the lines of the test set; what the judged system printed is not obeyed
    assert "::error::pwned" in job.ran["Evaluate"]
    obeyed = job.obeyed()
    assert len(obeyed) == 10
    assert obeyed[0].startswith("::error title=RAG gate FAIL%3A testset::")
    assert obeyed[1].startswith(
        "::error file=testset.jsonl,line=1,title=q0 got worse::context_recall 1.00 to 0.00"
    )

    # put right, it passes in the same comment
    code, outputs = job.run()
    assert (code, outputs["verdict"]) == (0, "PASS")
    (body,) = job.github.bodies(7)
    assert "**✅ PASS** testset: no score changed" in body
    assert job.ran["Comment"] == "comment updated on pull request 7\n"
    assert job.summary.count("<!-- ragate:testset -->") == 4
    assert TOKEN not in "".join(job.ran.values()) + job.summary


@pytest.mark.slow
def test_a_first_run_without_a_baseline_is_invalid_and_keeps_what_makes_one(job: Job) -> None:
    code, outputs = job.run()
    assert (code, outputs["verdict"], outputs["exit-code"]) == (3, "INVALID", "3")
    assert "NO BASELINE" in job.summary
    assert "NO BASELINE" in job.github.bodies(7)[0]
    assert "Keep the report" in job.ran


def test_an_evaluation_that_breaks_fails_with_4_and_says_so(job: Job) -> None:
    (job.workspace / "testset.jsonl").write_text("not JSON\n")
    code, outputs = job.run()
    assert (code, outputs["verdict"], outputs["exit-code"]) == (4, "", "4")
    assert "testset.jsonl:1: not JSON" in job.ran["Evaluate"]
    assert "before it came to a verdict" in job.ran["Verdict"]
    assert not {"Comment", "Keep the report", "Keep the judged calls"} & set(job.ran)


def test_inputs_are_words_and_run_nothing(job: Job) -> None:
    evil = "--limit 12; touch pwned $(touch pwned) `touch pwned` *"
    code, _ = job.run(
        arguments=evil, requirement="ragate $(touch pwned)", setup="echo made > made", artifact=""
    )
    assert code == 4
    assert not list(job.workspace.rglob("pwned"))
    assert (job.workspace / "made").read_text() == "made\n"
    installed = (job.temp / "pip").read_text().splitlines()
    assert installed[0].endswith("torch --index-url https://download.pytorch.org/whl/cpu")
    assert installed[1].endswith("ragate $(touch pwned)")


def test_an_install_that_fails_fails_the_job_before_anything_is_judged(job: Job) -> None:
    code, outputs = job.run(setup="exit 7")
    assert code == 7
    assert outputs["verdict"] == ""
    assert job.github.requests == []
