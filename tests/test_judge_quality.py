"""bench/judge_quality.py: prompts made here, answered where there is no ragas, scored anywhere: the same figures."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "ragate"))

from fake_engine import FakeEngine

from bench import judge_quality
from bench.judge_pairs import pairs_of, summary
from bench.judge_quality import engine_config, main, read_rows
from ragate.judging.asks import Row
from ragate.tuning.recipe import is_held_out
from ragate.tuning.sources import cluster_of


class LoadedEngine(FakeEngine):
    """An engine as a context."""

    def __enter__(self) -> LoadedEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the three sets; the engine answers without a model."""
    monkeypatch.setattr(
        judge_quality, "Engine", SimpleNamespace(load=lambda path, config: LoadedEngine(name=path.name))
    )
    answers = [
        {
            "id": f"a{i}",
            "source_id": i // 2,
            "question": "Q?",
            "contexts": [f"{i} is one.", "two"],
            "answer": f"{i} is one. It is {i % 3}.",
            "faithful": (i + i // 2) % 2,
            "generator": f"g{i % 2}",
        }
        for i in range(24)
    ]
    claims = [
        {
            "id": f"w{i}",
            "question": None,
            "context_sentences": [f"{i} and {j}" for j in range(30)],
            "answer": f"claim {i}",
            "supporting_sentences": [[i, i + 1]],
        }
        for i in range(4)
    ]
    passages = [
        {
            "id": f"r{i}",
            "dataset": "d",
            "question": f"What is {i}?",
            "contexts": [f"{i} is one.", "two"],
            "answer": f"{i} is one.",
            "context_relevant": [1, 0],
        }
        for i in range(150)
    ]
    files = {
        "ragtruth_qa_dev": answers,
        "begin_dev": answers,
        "wice_dev": claims,
        "ragbench_validation": passages,
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for judge in ("one.gguf", "two.gguf"):
        (tmp_path / judge).touch()
    return tmp_path


def figures(path: Path) -> dict[str, Any]:
    """Figures by judge, without the folders and endings of its name, and set."""
    judges = json.loads(path.read_text())["judges"]
    return {
        Path(judge).stem: {name: {**found, "judge": ""} for name, found in entry["sets"].items()}
        for judge, entry in judges.items()
    }


def test_the_way_over_files_gives_the_figures_of_the_way_without(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--data", str(data)]
    prompts, result = data / "prompts.jsonl.gz", data / "whole.json"
    judges = [str(data / "one.gguf"), str(data / "two.gguf")]
    main([*judges, *common, "--out", str(result)])
    main([*common, "--render", str(prompts)])
    answers = [data / "one.jsonl", data / "two.jsonl"]
    for judge, out in zip(judges, answers, strict=True):
        main([judge, "--prompts", str(prompts), "--out", str(out)])
    capsys.readouterr()
    main([*common, "--answers", *map(str, answers), "--out", str(data / "parts.json")])
    assert figures(data / "parts.json") == figures(result)
    assert list(json.loads((data / "parts.json").read_text())["judges"]) == ["one", "two"]
    shown = capsys.readouterr().out
    assert shown.count("ragtruth  word overlap") == 1  # a floor is said once
    found = figures(result)["one"]
    left_out = [
        i for i in range(150) if is_held_out(cluster_of({"dataset": "d", "question": f"What is {i}?"}))
    ]
    assert 2 <= len(left_out) <= 15
    items = {"ragtruth": 24, "wice": 48, "ragbench": 2 * len(left_out), "begin": 24}
    assert {name: found[name]["items"] for name in found} == items
    assert found["wice"]["positive"] == 8
    assert figures(result)["two"]["ragtruth"]["scores"] != found["ragtruth"]["scores"]


def test_ragas_pipeline_takes_a_second_round_over_the_judges_own_statements(data: Path) -> None:
    common = ["--data", str(data), "--sets", "ragtruth", "--statements", "judge"]
    first, second = data / "first.jsonl", data / "second.jsonl"
    main([*common, "--render", str(first)])
    main([str(data / "one.gguf"), "--prompts", str(first), "--out", str(data / "said.jsonl")])
    main([*common, "--render", str(second), "--answers", str(data / "said.jsonl")])
    said = {row["id"]: row for row in read_rows(data / "said.jsonl")[1:]}
    asked = read_rows(second)
    assert {row["call"] for row in read_rows(first)} == {"statements"} and {row["call"] for row in asked} == {
        "nli"
    }
    own = json.loads(said["ragtruth:a3/statements/0"]["output"])["statements"]
    prompt = next(row["prompt"] for row in asked if row["item"] == "a3")
    assert json.dumps(own[0]) in prompt
    main([str(data / "one.gguf"), *common, "--out", str(data / "result.json")])
    assert figures(data / "result.json")["one"]["ragtruth"]["items"] == 24


def test_a_prompt_that_is_too_long_costs_its_item_alone(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = SimpleNamespace(load=lambda path, config: LoadedEngine(max_len=10))
    monkeypatch.setattr(judge_quality, "Engine", short)
    prompts, out = data / "p.jsonl", data / "a.jsonl"
    main(["--data", str(data), "--sets", "begin", "--items", "3", "--render", str(prompts)])
    main([str(data / "one.gguf"), "--prompts", str(prompts), "--out", str(out)])
    assert [row["finish"] for row in read_rows(out)[1:]] == ["too long"] * 3


def test_answering_prompts_needs_neither_ragas_nor_pydantic() -> None:
    code = (
        "import sys, bench.judge_quality; print({'ragas', 'pydantic', 'langchain_core'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=judge_quality.ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "set()", done.stderr


def test_an_adapter_is_merged_or_stays_beside_the_weights() -> None:
    options = argparse.Namespace(device="cpu", max_batch=None, beside=False)
    assert engine_config(options, Path("folder")).merge_adapter == Path("folder")
    options.beside = True
    beside = engine_config(options, Path("folder"))
    assert (beside.merge_adapter, beside.adapters) == (None, (Path("folder"),))


def test_the_gate_with_people_as_its_judge_is_known_for_each_pair_of_generators() -> None:
    rows = [
        Row(
            id=f"{name}{i}",
            label=label,
            soft=0.5,
            least=0.5,
            mean=0.5,
            hard=hard,
            overlap=1.0,
            brevity=0.0,
            generator=name,
            cluster=str(i),
            question="q",
            answer="a",
            said=(),
        )
        for i in range(40)
        for name, label, hard in (("good", 1, 1.0), ("bad", int(i % 2 == 0), 1.0 - i % 4 / 8))
    ]
    fell, rose = pairs_of(rows)[::-1]
    assert (fell.base, fell.head, fell.items) == ("good", "bad", 40)
    assert (fell.seen["people"].drop, fell.seen["people"].verdict) == (0.5, "FAIL")
    assert (fell.seen["hard"].drop, fell.seen["hard"].verdict) == (0.1875, "FAIL")
    assert fell.seen["word overlap"].verdict == "PASS"
    assert rose.seen["people"].verdict == rose.seen["hard"].verdict == "PASS"
    assert summary([fell, rose])["soft"] == {"FAIL": {"PASS": 1}, "PASS": {"PASS": 1}}
    assert pairs_of(rows[:12]) == []  # six questions say nothing
