"""Settings: what wins over what, where each came from, and what is refused."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from ragate.config import KEYS, Settings, load_settings
from ragate.errors import ConfigError
from ragate.gate.verdict import Rule

if TYPE_CHECKING:
    from pathlib import Path

METRICS = ("context_precision", "context_recall", "faithfulness", "answer_relevance")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("RAGATE_")]:
        monkeypatch.delenv(name)


def load(folder: Path, text: str | None = None, **flags: Any) -> Settings:
    if text is not None:
        (folder / "ragate.toml").write_text(text, encoding="utf-8")
    return load_settings(flags, folder)


def refusal(folder: Path, text: str | None = None, **flags: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, text, **flags)
    return str(caught.value)


def test_the_defaults_are_the_documented_ones(tmp_path: Path) -> None:
    assert load(tmp_path).model_dump() == {
        "testset": "",
        "metrics": METRICS,
        "judge": "auto",
        "adapter": None,
        "target": "stored",
        "target_options": {},
        "target_timeout": 600.0,
        "embeddings": "all-minilm-l6-v2",
        "baseline": None,
        "threshold": 0.05,
        "threshold_mode": "relative",
        "gate": {},
        "strategy": "significant",
        "on_inconclusive": "auto",
        "reserve": "auto",
        "release": None,
        "judge_accuracy": None,
        "scores": "hard",
        "statements": "judge",
        "calibration": None,
        "device": "auto",
        "limit": None,
        "out": None,
        "max_batch": None,
        "call_timeout": 600.0,
        "kv_gib": None,
        "kv_dtype": "auto",
        "weights": "auto",
        "threads": None,
        "root": ".",
        "origins": {},
    }


def test_a_flag_wins_over_a_variable_over_the_file_over_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "threshold = 0.1\nlimit = 1\nmax_batch = 1\n"
    monkeypatch.setenv("RAGATE_LIMIT", "2")
    monkeypatch.setenv("RAGATE_SEED", "2")
    monkeypatch.setenv("RAGATE_THREADS", "")
    settings = load(tmp_path, text, max_batch=3, device=None)
    assert (settings.threshold, settings.limit, settings.max_batch, settings.threads) == (0.1, 2, 3, None)
    assert settings.origins == {
        "threshold": "ragate.toml",
        "limit": "RAGATE_LIMIT",
        "max_batch": "--max-batch",
    }


def test_every_setting_has_a_text_and_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(Settings.model_fields[name].description for name in KEYS)
    values = {
        "testset": "t.jsonl",
        "metrics": "faithfulness",
        "judge": "qwen-0.5b",
        "adapter": "mine",
        "target": "app:f",
        "target_options": '{"k": 3}',
        "target_timeout": "5",
        "embeddings": "e",
        "baseline": "b.json",
        "threshold": "0.2",
        "threshold_mode": "absolute",
        "gate": '{"faithfulness": {"min": 0.7}}',
        "strategy": "point",
        "on_inconclusive": "warn",
        "reserve": "never",
        "release": "r.json",
        "judge_accuracy": "0.75",
        "scores": "soft",
        "statements": "sentences",
        "calibration": "map.json",
        "device": "cpu",
        "limit": "3",
        "out": "o",
        "max_batch": "8",
        "call_timeout": "9",
        "kv_gib": "0.5",
        "kv_dtype": "fp8_e4m3",
        "weights": "packed",
        "threads": "2",
    }
    assert set(values) == set(KEYS)
    for name, value in values.items():
        monkeypatch.setenv(f"RAGATE_{name.upper()}", value)
    settings = load(tmp_path)
    assert settings.metrics == ("faithfulness",)
    assert settings.target_options == {"k": 3}
    assert settings.gate == {"faithfulness": Rule(min=0.7)}
    texts = {n: str(getattr(settings, n)) for n in KEYS if n not in ("metrics", "target_options", "gate")}
    assert texts == {n: v for n, v in values.items() if n in texts} | {
        "target_timeout": "5.0",
        "call_timeout": "9.0",
    }
    assert settings.origins == {name: f"RAGATE_{name.upper()}" for name in KEYS}


@pytest.mark.parametrize(
    "value",
    [
        "faithfulness, answer_relevancy,faithfulness",
        ["faithfulness", "answer_relevance"],
        ["Faithfulness", "AnswerRelevancy"],
        ["faithfulness", "ResponseRelevancy"],
        ["faithfulness", "answer-relevancy"],
    ],
)
def test_metrics_are_a_list_or_commas_in_either_spelling(tmp_path: Path, value: object) -> None:
    assert load(tmp_path, metrics=value).metrics == ("faithfulness", "answer_relevance")


def test_ragas_long_names_are_understood(tmp_path: Path) -> None:
    names = "LLMContextRecall,LLMContextPrecisionWithReference"
    assert load(tmp_path, metrics=names).metrics == ("context_recall", "context_precision")


def test_a_metric_has_a_limit_and_a_floor_of_its_own_in_either_spelling(tmp_path: Path) -> None:
    text = """
    [gate.AnswerRelevancy]
    threshold = 0.02
    threshold-mode = "absolute"
    [gate.faithfulness]
    min = 0.7
    """
    assert load(tmp_path, text).gate == {
        "answer_relevance": Rule(threshold=0.02, threshold_mode="absolute"),
        "faithfulness": Rule(min=0.7),
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "[gate.faithfulnes]\nmin = 0.2",
            "gate: there is no metric 'faithfulnes'; did you mean 'faithfulness'?",
        ),
        (
            "[gate.faithfulness]\nmin = 2",
            "gate.faithfulness.min: input should be less than or equal to 1, got 2",
        ),
        (
            "[gate.faithfulness]\nmin = true",
            "gate.faithfulness.min: input should be a valid number, got True",
        ),
        ("[gate.faithfulness]\nmni = 0.2", "gate.faithfulness.mni: extra inputs are not permitted"),
        ("[gate]\nfaithfulness = 0.2", "gate.faithfulness: input should be a valid dictionary"),
        ("[gate.faithfulness]\n[gate.Faithfulness]", "gate: faithfulness is there twice"),
        ("judge_accuracy = 0.5", "judge_accuracy: input should be greater than 0.5"),
        ('strategy = "bayes"', "strategy: input should be 'significant' or 'point', got 'bayes'"),
    ],
)
def test_a_mistaken_gate_is_one_sentence_with_its_place(tmp_path: Path, text: str, says: str) -> None:
    assert refusal(tmp_path, text).startswith(f"ragate.toml: {says}")


def test_the_release_is_a_path_of_the_settings_file(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / "sub").mkdir()
    (tmp_path / "ragate.toml").write_text('release = "baselines/release.json"')
    assert load(tmp_path / "sub").release == "../baselines/release.json"


def test_a_table_gives_the_target_its_options(tmp_path: Path) -> None:
    text = """
    testset = "t.jsonl"
    [target]
    spec = "ragate.demo:pipeline"
    timeout = 20
    [target.options]
    k = 3
    prompt = "Answer."
    """
    settings = load(tmp_path, text)
    assert (settings.target, settings.target_timeout) == ("ragate.demo:pipeline", 20)
    assert settings.target_options == {"k": 3, "prompt": "Answer."}
    assert settings.origins["target_options"] == "ragate.toml"


def test_another_target_does_not_inherit_the_options_of_the_one_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "[target]\nspec = 'app:C'\noptions = {k = 3}\n"
    assert load(tmp_path, text, target="stored").target_options == {}
    assert load(tmp_path, text, target="app:C").target_options == {"k": 3}
    monkeypatch.setenv("RAGATE_TARGET", "app:D")
    monkeypatch.setenv("RAGATE_TARGET_OPTIONS", '{"n": 1}')
    assert load(tmp_path, text).target_options == {"n": 1}


def test_dashes_and_a_byte_order_mark_are_fine_in_the_file(tmp_path: Path) -> None:
    assert load(tmp_path, "\ufeffthreshold-mode = 'absolute'\n").threshold_mode == "absolute"


def test_pyproject_holds_settings_too_and_ragate_toml_is_preferred(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\n[tool.ragate]\nlimit = 5\n")
    settings = load(tmp_path)
    assert (settings.limit, settings.origins) == (5, {"limit": "pyproject.toml"})
    assert load(tmp_path, "limit = 6").limit == 6


def test_the_file_is_searched_upward_to_the_repository_and_its_paths_follow(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / "a" / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    (tmp_path / "mine.gguf").write_bytes(b"")
    (tmp_path / "ragate.toml").write_text(
        "testset = 'tests/t.jsonl'\nbaseline = 'b.json'\nout = '/abs/o'\njudge = 'mine.gguf'\nadapter = 'lora'\n"
    )
    settings = load(inner)
    assert (settings.testset, settings.baseline) == ("../../tests/t.jsonl", "../../b.json")
    assert (settings.judge, settings.root) == ("../../mine.gguf", "../..")
    assert settings.adapter == "../../lora"
    assert (inner / str(settings.out)).resolve().as_posix() == "/abs/o"
    assert settings.origins["testset"] == "../../ragate.toml"
    assert load(inner, testset="t.jsonl").testset == "t.jsonl"
    (tmp_path / "ragate.toml").write_text("testset = 'datasets:a/b:test'\njudge = 'qwen-0.5b'\n")
    assert (load(inner).testset, load(inner).judge) == ("datasets:a/b:test", "qwen-0.5b")
    assert load(tmp_path).root == "."


def test_a_file_above_the_repository_or_without_one_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "ragate.toml").write_text("target = 'cmd:rm'\n")
    inner = tmp_path / "repository" / "inner"
    inner.mkdir(parents=True)
    assert load(inner).target == "stored"
    (tmp_path / "repository" / ".git").mkdir()
    assert load(inner).target == "stored"


# What is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("treshold = 0.1", "ragate.toml: unknown setting 'treshold'; did you mean 'threshold'?"),
        ("origins = {}", "ragate.toml: unknown setting 'origins'; "),
        ("zzz = 1", "ragate.toml: unknown setting 'zzz'; there are testset, metrics, judge, "),
        (
            "[target]\nspec = 'a:b'\noption = {}",
            "ragate.toml: [target]: unknown setting 'option'; did you mean 'options'?",
        ),
        ("[target]\noptions = {}", "ragate.toml: the table [target] needs the key 'spec'"),
        (
            "target_timeout = 1\n[target]\nspec = 'a:b'\ntimeout = 2",
            "ragate.toml: target_timeout is set twice",
        ),
        ("threshold = 0", "ragate.toml: threshold: input should be greater than 0, got 0"),
        ("threshold = 5", "ragate.toml: threshold: input should be less than or equal to 1, got 5"),
        ("threshold = nan", "ragate.toml: threshold: "),
        ("threshold = true", "ragate.toml: threshold: no setting is true or false"),
        (
            "threshold_mode = 'rel'",
            "ragate.toml: threshold_mode: input should be 'relative' or 'absolute', got 'rel'",
        ),
        ("limit = 0", "ragate.toml: limit: input should be greater than or equal to 1, got 0"),
        ("limit = 1.5", "ragate.toml: limit: input should be a valid integer"),
        ("device = 'gpu'", "ragate.toml: device: input should be 'auto', 'cpu' or 'cuda', got 'gpu'"),
        ("judge = ''", "ragate.toml: judge: string should have at least 1 character, got ''"),
        ("call_timeout = inf", "ragate.toml: call_timeout: "),
        ("metrics = []", "ragate.toml: metrics: none named; choose from context_precision, "),
        (
            "metrics = ['faithfullness']",
            "ragate.toml: metrics: there is no metric 'faithfullness'; did you mean 'faithfulness'?",
        ),
        ("metrics = 7", "ragate.toml: metrics: expected names, as a list or separated by commas"),
        ("target_options = 'k=3'", "ragate.toml: target_options: expected a JSON object"),
        ("limit = ", "not TOML: Invalid value"),
    ],
)
def test_a_bad_file_is_refused_by_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(tmp_path, text)


def test_a_bad_flag_or_variable_is_refused_by_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refusal(tmp_path, max_batch=0) == "--max-batch: input should be greater than or equal to 1, got 0"
    assert "--metrics: there is no metric 'f1'; choose from" in refusal(tmp_path, metrics="f1")
    assert "flags: unknown setting 'tresh'" in refusal(tmp_path, tresh=1)
    monkeypatch.setenv("RAGATE_LIMIT", "many")
    assert refusal(tmp_path).startswith("RAGATE_LIMIT: input should be a valid integer")
    assert refusal(tmp_path).endswith(", got 'many'")


def test_an_unreadable_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "ragate.toml").write_bytes(b"limit = 1 # caf\xe9\n")
    assert refusal(tmp_path) == f"{tmp_path}/ragate.toml: byte 15 is not UTF-8"
    (tmp_path / "ragate.toml").unlink()
    (tmp_path / "pyproject.toml").write_text("[tool]\nragate = 7\n")
    assert "tool.ragate must be a table" in refusal(tmp_path)
