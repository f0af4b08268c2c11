"""The command line end to end: exit codes, one sentence for what is wrong, and runs that are stopped."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
from command import Ended, Ragate
from fake_engine import FakeEngine
from runs import FINGERPRINT, METRICS, good_run, worse_run

from ragate import __version__, catalog, session
from ragate.journal import CallEntry, Journal, read_entries
from ragate.run import Run, Score, load_run, save_run
from ragate_engine import DeviceError


def sentence(ended: Ended, code: int = 4) -> str:
    """The one sentence of a command that went wrong."""
    assert ended.code == code, ended
    assert re.fullmatch(r"error: [^\n]+\n", ended.err), ended.err
    assert "Traceback" not in ended.err
    assert "unexpected" not in ended.err
    return ended.err


ITEMS = [
    {
        "id": f"q{i}",
        "question": f"What does part {i} of a cache keep?",
        "reference": f"Part {i} keeps results.",
        "answer": f"Part {i} keeps results that were computed before.",
        "contexts": [f"Part {i} of a cache keeps results.", "Blocks hold 16 tokens."],
    }
    for i in range(12)
]


def write_items(path: str = "cases.jsonl", items: list[Any] = ITEMS) -> str:
    Path(path).write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


@pytest.fixture
def fake_judge(ragate: Ragate, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    """Arguments of an `eval` of twelve items whose judge answers at once and without a model."""
    engines: list[FakeEngine] = []

    def open_engine(path: Path, progress: object, adapter: Path | None) -> FakeEngine:
        engines.append(FakeEngine())
        return engines[-1]

    monkeypatch.setattr(session, "open_engine", open_engine)
    Path("judge.gguf").touch()
    yield "eval", "--quiet", "--testset", write_items(), "--judge", "judge.gguf"
    for engine in engines:
        engine.close()


def store(run: Run, folder: str) -> str:
    save_run(run, Path(folder) / "run.json")
    return folder


def shell(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Run `command`, in which $RAGATE is the command line."""
    environment = {**os.environ, "RAGATE": f"{sys.executable} -m ragate"}
    arguments = ["bash", "-c", f"set -o pipefail; {command}"]
    return subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False)


# Help and wrong usage


def test_help_names_every_command_and_version_is_that_of_the_package(ragate: Ragate) -> None:
    shown = ragate("--help")
    assert shown.code == 0
    commands = ("init", "eval", "check", "baseline", "report", "compare", "show", "models", "doctor")
    assert all(re.search(rf"^  {command} ", shown.out, re.MULTILINE) for command in commands)
    assert ragate("--version") == (0, f"ragate, version {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval", "--tresshold", "0.1"], "No such option '--tresshold'"),
        (["evla"], "No such command 'evla'. Did you mean 'eval'?"),
        (
            ["check", "--current", "x"],
            "give a baseline and a run: `ragate check BASELINE RUN`; see `ragate check --help`",
        ),
        (["check", "base"], "give a baseline and a run"),
        (["check", "base", "head", "more"], "give a baseline and a run"),
        (["check", "base", "--current", "head"], "give a baseline and a run"),
        (["eval", "--threshold", "much"], "'--threshold': 'much' is not a valid float"),
        (["eval", "--threshold", "7"], "--threshold: input should be less than or equal to 1"),
        (["eval", "--metrics", "faithfulnes"], "did you mean 'faithfulness'?"),
        (["eval", "--format", "xml"], "'xml' is not one of 'text', 'json', 'markdown'"),
        (["eval"], "no test set is named; give one with --testset"),
        (["report"], "no test set is named"),
        (["models", "path", "qwen-9b"], "did you mean 'qwen-1.5b'?"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_4(ragate: Ragate, arguments: list[str], said: str) -> None:
    assert said in sentence(ragate(*arguments))


def test_debug_shows_the_traceback_of_the_same_error(ragate: Ragate) -> None:
    ended = ragate("--debug", "eval", "--testset", "nowhere.jsonl")
    assert ended.code == 4
    assert ended.err.startswith("Traceback")
    assert ended.err.endswith("nowhere.jsonl: no such test set; name one with --testset\n")


def test_escape_sequences_in_a_name_do_not_reach_the_terminal(ragate: Ragate) -> None:
    said = sentence(ragate("eval", "--testset", "a\x1b[31m\nred.jsonl"))
    assert "\x1b" not in said
    assert "a red.jsonl: no such test set" in said


def test_a_reader_that_leaves_is_neither_a_pass_nor_a_fail(ragate: Ragate, tmp_path: Path) -> None:
    store(good_run(12), "run")
    check = "$RAGATE check --baseline run --current run --format json"
    assert shell(tmp_path, f"{check} >read").returncode == 0
    for format_ in ("json", "text"):
        ended = shell(tmp_path, f"(sleep 0.1; {check} --format {format_}) | true")
        assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_verdict_that_cannot_be_printed_is_no_pass(ragate: Ragate, tmp_path: Path) -> None:
    store(good_run(12), "run")
    ended = shell(tmp_path, "$RAGATE check --baseline run --current run --format json >/dev/full")
    assert ended.returncode == 4
    assert "No space left on device" in ended.stderr


# init, models, doctor


def test_init_writes_a_repository_that_says_what_is_still_missing(ragate: Ragate) -> None:
    subprocess.run(["git", "init", "--quiet"], check=True)
    assert ragate("init").code == 0
    written = {
        path: path.read_text() for path in (Path("ragate.toml"), Path(".github/workflows/rag-gate.yml"))
    }
    assert "rag-gate.yml and .github/workflows/rag-gate-comment.yml are there already" in sentence(
        ragate("init", "--yes")
    )
    assert {path: path.read_text() for path in written} == written
    assert "testset.jsonl: no such test set; name one with --testset" in sentence(ragate("eval"))
    assert "ragate eval" in sentence(ragate("report"))
    assert not Path(".ragate").exists()


def test_init_asks_what_differs_where_there_is_a_terminal(
    ragate: Ragate, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("mine.csv\nmyapp.rag:answer\n\n0.03\n"))
    assert ragate("init").code == 0
    written = tomllib.loads(Path("ragate.toml").read_text())
    assert written["testset"] == "mine.csv"
    assert (written["target"], written["judge"], written["threshold"]) == ("myapp.rag:answer", "auto", 0.03)
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    assert ragate("init", "--yes", "--force").code == 0
    assert tomllib.loads(Path("ragate.toml").read_text())["testset"] == "testset.jsonl"
    assert "threshold must be above 0" in sentence(_answered(ragate, monkeypatch, Terminal("\n\n\nmuch\n")))


def _answered(ragate: Ragate, monkeypatch: pytest.MonkeyPatch, answers: io.StringIO) -> Ended:
    """`ragate init` with these answers; what click asked on stderr or stdout is left out."""
    monkeypatch.setattr(sys, "stdin", answers)
    return ragate("init", "--force")


def test_models_that_are_not_in_the_cache_are_listed_and_named_with_the_command_that_fetches_them(
    ragate: Ragate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAGATE_CACHE", str(tmp_path / "cache"))
    listed = ragate("models", "list")
    assert listed.code == 0
    assert all(model.name in listed.out for model in catalog.models())
    assert listed.out.endswith(f"cache: {tmp_path / 'cache' / 'models'}\n")
    assert "`ragate models pull smollm2-135m`" in sentence(ragate("models", "path", "smollm2-135m"))
    assert "smollm2-135m: SmolLM2-135M-Instruct.Q4_1.gguf: missing" in sentence(
        ragate("models", "verify", "smollm2-135m")
    )
    assert ragate("models", "verify") == (0, "", "")


def test_a_wrong_sha256_is_named_and_the_file_deleted(
    ragate: Ragate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAGATE_CACHE", str(tmp_path))
    file = tmp_path / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF, but tampered with")
    said = sentence(ragate("models", "verify", "smollm2-135m"))
    assert (
        "SmolLM2-135M-Instruct.Q4_1.gguf: wrong sha256, deleted; fetch it again with `ragate models" in said
    )
    assert not file.exists()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_doctor_reports_whatever_is_missing_and_exits_0(ragate: Ragate, device: str) -> None:
    ended = ragate("doctor", "--device", device)
    assert (ended.code, ended.err) == (0, "")
    assert f"ragate {__version__}, torch " in ended.out
    assert "no test set is named" in ended.out
    assert re.search(rf"^  device +{device} +--device$", ended.out, re.MULTILINE)
    assert re.search(r"^  threshold +0.05 +default$", ended.out, re.MULTILINE)


def test_a_card_lost_in_mid_run_leaves_its_journal_and_the_same_command_goes_on(
    ragate: Ragate, fake_judge: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def lose(prompt: str) -> Exception | None:
        nonlocal calls
        calls += 1
        lost = DeviceError("NVIDIA H200 was lost in mid-run (CUDA error: unspecified launch failure)")
        return lost if calls > 10 else None

    command = (*fake_judge, "--metrics", "faithfulness")
    assert ragate(*command, "--out", "undisturbed").code == 3  # there is no baseline
    with monkeypatch.context() as patch:
        engine = FakeEngine(fail=lose)
        patch.setattr(session, "open_engine", lambda *_: engine)
        said = sentence(ragate(*command, "--out", "out"))
    assert (
        "NVIDIA H200 was lost in mid-run (CUDA error: unspecified launch failure); what was judged is" in said
    )
    assert said.endswith("is safe in the journal: run the same command again to go on\n")
    entries, corrupt, _ = read_entries(Path("out/journal.jsonl").read_bytes())
    assert (len([entry for entry in entries if isinstance(entry, CallEntry)]), corrupt) == (10, [])
    assert not Path("out/run.json").exists()

    assert ragate(*command, "--out", "out").code == 3
    timings = json.loads(Path("out/timings.json").read_text())
    assert timings["calls_resumed"] == 10
    assert Path("out/run.json").read_bytes() == Path("undisturbed/run.json").read_bytes()


# Stored runs: check, baseline, report


@pytest.mark.parametrize(
    ("run", "code", "said"),
    [
        (good_run(), 0, "PASS: no score changed"),
        (worse_run(), 1, "FAIL: faithfulness fell"),
        (good_run(fingerprint=FINGERPRINT | {"decoding": "sampled"}), 3, "INVALID: decoding differs"),
    ],
    ids=["PASS", "FAIL", "INVALID"],
)
def test_check_gates_two_stored_runs_and_prints_one_format_alone(
    ragate: Ragate, run: Run, code: int, said: str
) -> None:
    compared = ("check", "--baseline", store(good_run(), "base"), "--current", store(run, "head"))
    text = ragate(*compared)
    assert (text.code, text.err) == (code, "")
    assert said in text.out
    machine = ragate(*compared, "--format", "json")
    assert (machine.code, machine.err) == (code, "")
    gate = json.loads(machine.out)["gate"]
    assert gate["sentence"].startswith(said)
    assert gate["verdict"] == said.partition(":")[0]
    comment = ragate(*compared, "--format", "markdown")
    assert (comment.code, comment.err) == (code, "")
    assert comment.out.startswith("<!-- ragate:llm-serving -->\n")
    assert said.partition(":")[0] in comment.out


def test_check_takes_its_threshold_from_the_settings_and_the_flag_before_them(ragate: Ragate) -> None:
    Path("ragate.toml").write_text('threshold = 0.9\nthreshold_mode = "absolute"\n')
    compared = ("check", "--baseline", store(good_run(), "base"), "--current", store(worse_run(), "head"))
    assert ragate(*compared).code == 0
    assert ragate(*compared, "--threshold", "0.01").code == 1


def test_a_baseline_is_set_shown_compared_and_replaced(ragate: Ragate) -> None:
    store(good_run(40), "good")
    store(worse_run(40), "worse")
    made = ragate("baseline", "set", "good")
    assert made.code == 0
    assert "wrote baselines/llm-serving.json: 40 items" in made.out
    shown = ragate("baseline", "show", "baselines/llm-serving.json")
    mean = good_run(40).mean("faithfulness")
    assert re.search(rf"^  faithfulness +{mean:.4f}  \(40 scored\)$", shown.out, re.MULTILINE)
    before = Path("baselines/llm-serving.json").read_bytes()
    difference = ragate("baseline", "diff", "worse")
    assert difference.code == 0
    assert all(metric in difference.out for metric in METRICS)
    assert Path("baselines/llm-serving.json").read_bytes() == before
    assert ragate("baseline", "set", "worse").code == 0
    assert ragate("check", "--baseline", "baselines/llm-serving.json", "--current", "worse").code == 0


def test_a_report_is_made_again_from_the_stored_run_without_any_model(
    ragate: Ragate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAGATE_CACHE", str(tmp_path / "cache"))
    store(worse_run(), "run")
    store(good_run(), "good")
    ragate("baseline", "set", "good")
    Path("run/report.html").write_text("old")
    assert ragate("report", "run").out == "".join(
        f"wrote run/{name}\n" for name in ("report.html", "comment.md", "junit.xml", "badge.svg")
    )
    assert "FAIL: " in Path("run/report.html").read_text()
    assert "FAIL" in Path("run/comment.md").read_text()
    assert not (tmp_path / "cache").exists()
    assert "other.json: no baseline yet" in sentence(
        ragate("report", "run", "--baseline", "other.json"), code=3
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["report", "run"],
        ["baseline", "set", "run"],
        ["baseline", "diff", "run"],
        ["check", "--baseline", "base.json", "--current", "run"],
    ],
    ids=["report", "set", "diff", "check"],
)
def test_a_run_that_is_not_there_or_corrupt_is_named(ragate: Ragate, arguments: list[str]) -> None:
    store(good_run(12), "good")
    ragate("baseline", "set", "good", "--baseline", "base.json")
    assert "run/run.json: no such run; make one with `ragate eval --out run`" in sentence(ragate(*arguments))
    Path("run").mkdir()
    Path("run/run.json").write_text('{"version": 1, "suite"')
    assert "run/run.json: not a ragate run: the file: Invalid JSON" in sentence(ragate(*arguments))
    Path("run/run.json").write_text("{}")
    assert "run/run.json: not a ragate run: suite: Field required" in sentence(ragate(*arguments))


def test_a_corrupt_baseline_is_invalid_and_said_before_anything_is_judged(
    ragate: Ragate, fake_judge: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "open_engine", lambda *_: pytest.fail("the judge was loaded"))
    Path("base.json").write_text("<<<<<<< HEAD\n")
    store(good_run(12), "run")
    for command in (
        fake_judge,
        ("report", "run"),
        ("check", "--current", "run"),
        ("baseline", "diff", "run"),
    ):
        said = sentence(ragate(*command, "--baseline", "base.json"), code=3)
        assert "base.json: not a baseline" in said
        assert "restore it from git" in said


# Evaluations whose judge is no model


def test_eval_without_a_baseline_is_invalid_and_its_stdout_is_the_format_alone(
    ragate: Ragate, fake_judge: tuple[str, ...]
) -> None:
    ended = ragate(*fake_judge, "--metrics", "context_recall", "--format", "json")
    assert ended.code == 3
    assert ended.err == (
        "INVALID: no baseline at baselines/cases.json to compare with; "
        "make this run the baseline with `ragate baseline set`\n"
    )
    result = json.loads(ended.out)
    assert result["gate"] is None
    assert result["means"] == {"context_recall": load_run(Path(".ragate/cases")).mean("context_recall")}
    assert ragate(*fake_judge, "--metrics", "context_recall", "--update-baseline").code == 0
    comment = ragate(*fake_judge, "--metrics", "context_recall", "--format", "markdown")
    assert (comment.code, comment.err) == (0, "")
    assert comment.out.startswith("<!-- ragate:cases -->\n")


def test_a_metric_that_the_baseline_has_and_the_run_has_not_is_invalid_unless_check_names_the_others(
    ragate: Ragate, fake_judge: tuple[str, ...]
) -> None:
    narrow = (*fake_judge, "--metrics", "faithfulness")
    assert ragate(*narrow).code == 3
    one = load_run(Path(".ragate/cases"))
    others = [metric for metric in METRICS if metric != "faithfulness"]
    rest = tuple(
        Score(item=item.id, metric=metric, state="ok", value=0.5) for item in one.items for metric in others
    )
    four = one.model_copy(
        update={
            "metrics": METRICS,
            "scores": one.scores + rest,
            "fingerprint": one.fingerprint
            | {f"prompt_{metric}": "0" for metric in others}
            | {"embeddings": "0"},
        }
    )
    ragate("baseline", "set", store(four, "four"))

    ended = ragate(*narrow, "--format", "json")
    assert ended.code == 3
    lacks = [f"{metric} is missing in the run" for metric in others]
    assert json.loads(ended.out)["gate"]["reasons"] == lacks
    Path("ragate.toml").write_text('metrics = ["faithfulness"]\n')  # as a pull request might
    assert "context_precision is missing in the run" in ragate(*fake_judge).out
    compared = ("check", "--baseline", "baselines/cases.json", "--current", ".ragate/cases")
    missing = ragate(*compared)
    assert missing.code == 3
    assert "context_precision is missing in the run" in missing.out
    narrowed = ragate(*compared, "--metrics", "faithfulness", "--format", "json")
    assert narrowed.code == 0
    assert [metric["metric"] for metric in json.loads(narrowed.out)["gate"]["metrics"]] == ["faithfulness"]
    assert ragate(*compared, "--metrics", "context_recall").code == 3
    ragate("report", ".ragate/cases")
    assert "is missing in the run" in Path(".ragate/cases/comment.md").read_text()

    before = Path("baselines/cases.json").read_bytes()
    said = sentence(ragate("baseline", "set", ".ragate/cases"))
    lost = "context_precision, context_recall, answer_relevance"
    assert f"baselines/cases.json: the baseline also has {lost}, which this run did not score" in said
    assert "with --force" in said
    assert Path("baselines/cases.json").read_bytes() == before
    assert ragate("baseline", "set", ".ragate/cases", "--force").code == 0
    ragate("report", "four")  # a metric that the baseline lacks is not passed over
    assert "is missing in the baseline" in Path("four/comment.md").read_text()


def test_an_update_that_would_lose_metrics_is_refused_before_judging_unless_forced(
    ragate: Ragate, fake_judge: tuple[str, ...]
) -> None:
    update = (*fake_judge, "--update-baseline", "--metrics")
    both = "context_recall,faithfulness"
    assert ragate(*update, both).code == 0
    before = Path("baselines/cases.json").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "open_engine", lambda *_: pytest.fail("the judge was loaded"))
        said = sentence(ragate(*update, "faithfulness"))
    assert "baselines/cases.json: the baseline also has context_recall, which" in said
    assert Path("baselines/cases.json").read_bytes() == before
    assert ragate(*update, f"{both},context_precision").code == 0  # more is no loss
    assert ragate(*update, "faithfulness", "--force").code == 0
    assert json.loads(Path("baselines/cases.json").read_bytes())["metrics"] == ["faithfulness"]


def test_an_unreadable_baseline_is_replaced_by_a_new_one(ragate: Ragate) -> None:
    Path("base.json").write_text("<<<<<<< HEAD\n")
    assert ragate("baseline", "set", store(good_run(12), "good"), "--baseline", "base.json").code == 0
    assert ragate("baseline", "show", "base.json").code == 0


def test_an_interrupted_eval_exits_130_and_says_how_to_go_on(
    ragate: Ragate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ragate.suite.run_suite", interrupted)
    assert ragate("eval", "--testset", "my cases.jsonl", "--quiet") == (
        130,
        "",
        "interrupted: what was judged is safe in .ragate/my-cases; "
        "run `ragate eval --testset 'my cases.jsonl' --quiet` again to go on\n",
    )


def test_a_second_run_in_the_same_folder_is_told_which_process_has_it(
    ragate: Ragate, fake_judge: tuple[str, ...]
) -> None:
    with Journal.open(Path("out/journal.jsonl")):
        said = sentence(ragate(*fake_judge, "--out", "out"))
    assert f"out: process {os.getpid()} is writing a run here; wait for it" in said


@pytest.mark.parametrize("command", ["eval", "report", "baseline set"])
def test_a_full_disk_while_a_result_is_written_leaves_the_old_file(
    ragate: Ragate, fake_judge: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = Path("out")
    store(good_run(12), "out")
    ragate("report", "out")
    ragate("baseline", "set", "out")
    before = {path: path.read_bytes() for path in (*folder.iterdir(), *Path("baselines").iterdir())}
    arguments = {
        "eval": (*fake_judge, "--metrics", "context_recall", "--out", "out"),
        "report": ("report", "out"),
        "baseline set": ("baseline", "set", "out"),
    }[command]
    refused = {"eval": "out/run.json", "report": "out/report.html"}.get(command, "baselines/llm-serving.json")
    with monkeypatch.context() as patch:
        patch.setattr("ragate.files.os.replace", full)
        said = sentence(ragate(*arguments))
    assert f"{refused}: cannot write: No space left on device; free some space" in said
    assert {path: path.read_bytes() for path in before} == before
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


class OneJudge(BaseHTTPRequestHandler):
    """An endpoint that finds every context useful; it notes who asks."""

    seen: ClassVar[list[tuple[str, str | None]]] = []

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((body["model"], self.headers["Authorization"]))
        message = {"content": '{"reason":"because","verdict":1}'}
        data = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.mark.parametrize("user", ["", "me:secret@"])
def test_a_judge_by_url_is_asked_with_its_key_and_no_file_or_message_holds_a_secret(
    ragate: Ragate, monkeypatch: pytest.MonkeyPatch, user: str
) -> None:
    monkeypatch.setenv("RAGATE_JUDGE_KEY", "secret-key")
    monkeypatch.setattr(OneJudge, "seen", [])
    with ThreadingHTTPServer(("127.0.0.1", 0), OneJudge) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f"127.0.0.1:{server.server_port}/v1"
        judge = ("--testset", write_items(), "--judge", f"http://{user}{where}#my-model")
        ended = ragate("eval", "-q", *judge, "--metrics", "context_precision", "--update-baseline")
        server.shutdown()
    sent = "Basic bWU6c2VjcmV0" if user else "Bearer secret-key"
    assert set(OneJudge.seen) == {("my-model", sent)}
    assert load_run(Path(".ragate/cases")).judge == f"http://{where}"
    doctor = ragate("doctor", *judge)
    assert f"judge       http://{where}\n" in doctor.out
    written = [path for folder in (".ragate", "baselines") for path in Path(folder).rglob("*.*")]
    assert {"run.json", "comment.md", "report.html", "cases.json"} <= {path.name for path in written}
    texts = [path.read_text() for path in written if path.is_file()]
    assert not [text for text in (*ended[1:], *doctor[1:], *texts) if "secret" in text]


# Bad input

GOOD = json.dumps(ITEMS[0])


def but(**changes: Any) -> str:
    """The good line with other fields; `None` removes one."""
    return json.dumps({k: v for k, v in ({**ITEMS[0], "id": "x"} | changes).items() if v is not None})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (but(question=None, questoin="Q?"), "bad.jsonl:1: question: no such column; found "),
        (but(question=None, questoin="Q?"), "did you mean 'question' by 'questoin'?"),
        (but(answer=None), "bad.jsonl:1: answer: item x has none and faithfulness needs it; add a column"),
        (f"{GOOD}\n{but(question=' ')}", "bad.jsonl:2: question: is empty"),
        (f"{GOOD}\n{GOOD}", "bad.jsonl:2: id: 'q0' was used before, at bad.jsonl:1"),
        (but(contexts=[]), "bad.jsonl:1: contexts: the list is empty"),
        (but(contexts=None), "bad.jsonl:1: contexts: item x has none and faithfulness needs it"),
        (GOOD.encode() + b'\n{"question": "caf\xe9?"}', "bad.jsonl:2: byte 254 (0xe9) is not UTF-8"),
        ("", "bad.jsonl: there are no items in it"),
        ("\n\n", "bad.jsonl: there are no items in it"),
    ],
)  # fmt: skip
def test_a_bad_test_set_is_one_sentence_with_file_line_and_field(
    ragate: Ragate, text: str | bytes, said: str
) -> None:
    Path("bad.jsonl").write_bytes(text.encode() if isinstance(text, str) else text)
    assert said in sentence(ragate("eval", "--testset", "bad.jsonl", "--metrics", "faithfulness"))
    assert not Path(".ragate").exists()


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ("qwen-0.5", "no model is called 'qwen-0.5'; did you mean 'qwen-0.5b'?"),
        ("nowhere/judge.gguf", "judge nowhere/judge.gguf: no such file or folder"),
        ("all-minilm-l6-v2", "makes embeddings and cannot judge"),
        ("http://127.0.0.1:9/v1", "judge http://127.0.0.1:9/v1: it does not say which model it serves"),
        ("http://", "judge: not a URL"),
    ],
)
def test_a_mistyped_judge_is_one_sentence_and_leaves_no_run_folder(
    ragate: Ragate, judge: str, said: str
) -> None:
    assert said in sentence(ragate("eval", "-q", "--testset", write_items(), "--judge", judge))
    assert not Path(".ragate").exists()


def test_a_line_of_a_gigabyte_is_refused_without_reading_it(ragate: Ragate) -> None:
    Path("bad.jsonl").touch()
    os.truncate("bad.jsonl", 1 << 30)
    assert "bad.jsonl:1: the line is longer than 16 MB" in sentence(ragate("eval", "--testset", "bad.jsonl"))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def unknown_type(path: Path) -> None:
    """Say of one tensor that its type is IQ4_XS (23)."""
    name = b"blk.1.ffn_down.weight"
    raw = bytearray(path.read_bytes())
    struct.pack_into("<I", raw, raw.index(name) + len(name) + 4 + 2 * 8, 23)
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("arch", "spoil", "said"),
    [
        ("llama", cut, r"judge\.gguf is not a usable GGUF file: .*: fetch it again"),
        ("llama", unknown_type, r"judge\.gguf.*blk\.1\.ffn_down\.weight has type IQ4_XS"),
        ("mamba", lambda path: None, r"judge\.gguf.*'mamba'.*qwen2"),
    ],
    ids=["truncated", "unsupported type", "unsupported architecture"],
)
def test_a_judge_that_cannot_be_served_is_named(
    ragate: Ragate, monkeypatch: pytest.MonkeyPatch, arch: str, spoil: Callable[[Path], None], said: str
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "engine")
    from tiny_gguf import write_tiny

    write_tiny(Path("judge.gguf"), arch)
    spoil(Path("judge.gguf"))
    ended = ragate(
        "eval", "-q", "--testset", write_items(), "--judge", "judge.gguf", "--metrics", "faithfulness"
    )
    assert re.search(said, sentence(ended))


# The real engine

PIPELINE = """
import time

def answer(question):
    if "raise" in question:
        raise ValueError("no index here")
    if "hang" in question:
        time.sleep(30)
    if "shape" in question:
        return {"answer": "It is 4.", "contexts": [{"page": 3}]}
    contexts = ["word " * 9000] if "long" in question else ["A cache keeps results."]
    return {"answer": "It keeps results.", "contexts": contexts}
"""


def test_what_fails_for_one_item_is_a_state_with_its_reason_and_the_run_ends(
    ragate: Ragate, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("cli_pipeline.py").write_text(PIPELINE)
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.setenv("RAGATE_TARGET_TIMEOUT", "1")
    write_items(
        items=[
            {"id": word, "question": f"{word}?", "reference": "It keeps results."}
            for word in ("fine", "raise", "hang", "shape", "long")
        ]
    )
    options = ("--target", "cli_pipeline:answer", "--judge", "smollm2-135m", "--metrics", "context_recall")
    ended = ragate("eval", "-q", "--testset", "cases.jsonl", *options)
    assert (ended.code, ended.err.partition(":")[0]) == (3, "INVALID")
    scores = {score.item: score for score in load_run(Path(".ragate/cases")).scores}
    assert (scores["fine"].state, scores["fine"].error) == ("ok", None)
    said = {
        "raise": r"the target failed: raised ValueError: no index here \(cli_pipeline.py:6\)",
        "hang": r"the target failed: no answer within 1 s",
        "shape": r"the target failed: .*contexts\[0\].*",
        "long": r"context too long: item long needs (9|1\d)\d\d\d tokens, the judge's window is 8192: .*",
    }
    for item, reason in said.items():
        assert (scores[item].state, scores[item].value) == ("error", None)
        assert re.fullmatch(reason, scores[item].error or ""), scores[item].error


def test_a_target_that_exits_with_0_is_no_pass(ragate: Ragate, fake_judge: tuple[str, ...]) -> None:
    Path("cli_exits.py").write_text("raise SystemExit(0)\n")
    ended = ragate(*fake_judge, "--target", "cli_exits:answer", "--metrics", "context_recall")
    assert "cli_exits" in sentence(ended)


class Stopped(NamedTuple):
    """What a run left that was stopped in mid-judging."""

    code: int
    err: str
    judged: int


def evaluation(out: str) -> list[str]:
    options = ["--metrics", "faithfulness", "--judge", "smollm2-135m", "--max-batch", "1", "--quiet"]
    return [sys.executable, "-m", "ragate", "eval", "--testset", "cases.jsonl", "--out", out, *options]


def judged_calls(journal: Path) -> list[str]:
    """The keys of the journal's calls, in order."""
    data = journal.read_bytes() if journal.exists() else b""
    return [entry.key for entry in read_entries(data)[0] if isinstance(entry, CallEntry)]


def stop(folder: Path, out: str, sent: signal.Signals) -> Stopped:
    """Begin an evaluation and send the signal once its journal has a judged call."""
    process = subprocess.Popen(
        evaluation(out),
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
        # a test run in the background of a shell ignores Ctrl-C, and its children would too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    journal = folder / out / "journal.jsonl"
    while process.poll() is None and not judged_calls(journal):
        time.sleep(0.02)
    process.send_signal(sent)
    _, err = process.communicate()
    return Stopped(process.returncode, err, len(judged_calls(journal)))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two items and the run that nothing disturbed, in `whole`."""
    folder = tmp_path_factory.mktemp("stopped")
    write_items(str(folder / "cases.jsonl"), ITEMS[:2])
    assert subprocess.run(evaluation("whole"), cwd=folder, check=False).returncode == 3
    assert len(judged_calls(folder / "whole/journal.jsonl")) == 4
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_run_stopped_in_mid_judging_goes_on_to_the_same_bytes_and_judges_nothing_twice(
    undisturbed: Path, sent: signal.Signals
) -> None:
    out = sent.name
    stopped = stop(undisturbed, out, sent)
    assert 1 <= stopped.judged < 4
    assert not (undisturbed / out / "run.json").exists()
    if sent is signal.SIGINT:
        assert stopped.code == 130
        assert re.search(
            rf"^interrupted: what was judged is safe in {out}; run `ragate eval .*` again to go on$",
            stopped.err,
            re.MULTILINE,
        )
        assert "Traceback" not in stopped.err
    again = subprocess.run(evaluation(out), cwd=undisturbed, check=False)
    assert again.returncode == 3
    assert (undisturbed / out / "run.json").read_bytes() == (undisturbed / "whole/run.json").read_bytes()
    keys = judged_calls(undisturbed / out / "journal.jsonl")
    assert len(keys) == len(set(keys)) == 4
    timings = json.loads((undisturbed / out / "timings.json").read_text())
    assert (timings["calls_resumed"], timings["calls_judged"]) == (stopped.judged, 4 - stopped.judged)


def test_statements_made_otherwise_are_invalid_until_the_stored_answers_are_rescored(
    ragate: Ragate, fake_judge: tuple[str, ...]
) -> None:
    asked = (*fake_judge, "--metrics", "faithfulness,context_recall")
    assert ragate(*asked, "--update-baseline").code == 0
    refused = ragate(*asked, "--statements", "sentences")
    assert refused.code == 3
    assert "statements differs: baseline none, run sentences 1" in refused.out
    rescore = ("baseline", "rescore", "--quiet", "--testset", "cases.jsonl", "--judge", "judge.gguf")
    assert ragate(*rescore, "--statements", "sentences").code == 0
    passed = ragate(*asked, "--statements", "sentences")
    assert (passed.code, "no score changed" in passed.out) == (0, True)
    assert ragate(*asked).code == 3  # and not by the judge, now
