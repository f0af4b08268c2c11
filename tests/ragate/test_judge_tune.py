"""`ragate judge tune`, and a judge that wears what it makes."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from filelock import FileLock

from bench.random_model import TINY, write_safetensors
from ragate import session, suite
from ragate.catalog import JudgeChoice
from ragate.cli_judge import judge
from ragate.config import Settings
from ragate.errors import CatalogError, ConfigError
from ragate.tuning.examples import save_examples
from ragate.tuning.tune import card, curve
from ragate_engine import Engine, EngineConfig, Example, TuneRecipe


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model, lessons for it, and nothing else."""
    monkeypatch.chdir(tmp_path)
    write_safetensors(TINY, Path("tiny"))
    lessons = [Example((1, 2, 3, i), (40 + i, 7), (0.1, 1.0)) for i in range(6)]
    save_examples(lessons[:4], Path("some-00.npz"))
    save_examples(lessons[4:], Path("held-00.npz"))
    return tmp_path


def tune(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(judge, ["tune", *arguments], standalone_mode=False)
    return done.exit_code if done.exception else int(done.return_value), done.output + str(
        done.exception or ""
    )


def test_lessons_become_an_adapter_that_a_judge_wears(tiny: Path) -> None:
    code, said = tune(
        "tiny", "mine", "--examples", "some-00.npz", "--held-out", "held-00.npz", "--batch", "2", "--epochs", "3",
        "--rank", "2", "--learning-rate", "0.05", "--device", "cpu", "--quiet",
    )  # fmt: skip
    assert code == 0 and "6 steps" in said and "wear it with --judge tiny --adapter mine" in said
    assert json.loads(Path("mine/adapter_config.json").read_text())["r"] == 2
    losses = [row["loss"] for row in json.loads(Path("mine/tuning.json").read_text())["steps"]]
    assert losses[-1] < losses[0] - 0.5
    text = Path("mine/README.md").read_text()
    assert "| rank | 2 |" in text and "6 steps" in text and "some-00.npz" in text
    ElementTree.parse("mine/learning-curve.svg")

    settings = Settings(judge="tiny", adapter="mine")
    choice = suite.named_judge(settings, lambda what, done, total: None)
    assert isinstance(choice, JudgeChoice)
    assert choice.title == "tiny + mine" and not choice.proven
    session.configure(EngineConfig(device="cpu", kv_bytes=1 << 20))
    try:
        worn = session.open_engine(choice.path, adapter=choice.adapter)
        plain = session.open_engine(choice.path)
        assert worn is session.open_engine(Path("tiny").resolve(), adapter=Path("mine"))
        assert "merged_adapter" in worn.describe() and "merged_adapter" not in plain.describe()
    finally:
        session.close_engines()


def test_packed_weights_have_an_adapter_beside_them(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[EngineConfig] = []
    monkeypatch.setattr(Engine, "load", lambda path, config, progress: loaded.append(config))
    for weights in ("packed", "auto"):
        session.configure(EngineConfig(weights=weights))  # type: ignore[arg-type]
        monkeypatch.setattr(session, "_engines", {})
        session.open_engine(Path("tiny"), adapter=Path("mine"))
    packed, dense = loaded
    assert (packed.merge_adapter, packed.adapters) == (None, (Path("mine"),))
    assert (dense.merge_adapter, dense.adapters) == (Path("mine"), ())


def test_lessons_come_from_one_place(tiny: Path) -> None:
    for arguments in ((), ("--data", ".", "--examples", "some-00.npz")):
        code, said = tune("tiny", "mine", *arguments)
        assert code != 0 and "--data" in said and "--examples" in said
    assert not Path("mine").exists()


def test_two_at_once_do_not_write_into_one_folder(tiny: Path) -> None:
    Path("mine").mkdir()
    options = ("--size", "3", "--batch", "1", "--device", "cpu", "--quiet")
    with FileLock("mine/.lock"):
        _, said = tune("tiny", "mine", "--examples", "some-00.npz", *options)
    assert "mine: another `ragate judge tune` is writing there" in said
    code, said = tune("tiny", "mine", "--examples", "some-00.npz", *options)
    assert code == 0 and "3 steps" in said  # of the four lessons the first three


def test_a_judge_that_cannot_wear_an_adapter_says_so(tiny: Path) -> None:
    def named(settings: Settings) -> object:
        return suite.named_judge(settings, lambda what, done, total: None)

    with pytest.raises(CatalogError, match=r"adapter tiny: no folder with an adapter_config\.json"):
        named(Settings(judge="tiny", adapter="tiny"))
    with pytest.raises(ConfigError, match="a judge behind a URL wears its own"):
        named(Settings(judge="http://127.0.0.1:9/v1#m", adapter="mine"))


def test_the_curve_is_smoothed_and_marks_what_was_held_out() -> None:
    rows = [{"step": i + 1, "loss": 2.0 if i % 2 else 1.0} for i in range(200)]
    rows[99]["held_out"] = 1.25
    drawn = ElementTree.fromstring(curve(rows))
    line = next(each for each in drawn if each.tag.endswith("polyline"))
    heights = [float(point.split(",")[1]) for point in line.get("points", "").split()]
    assert len(heights) == 200
    assert max(heights[50:]) - min(heights[50:]) < 1  # four steps a point: ups and downs are gone
    marks = [each for each in drawn if each.tag.endswith("circle")]
    assert len(marks) == 1 and float(marks[0].get("cy", "0")) > heights[-1]
    ElementTree.fromstring(curve([{"step": 1, "loss": 0.0}]))


def test_the_card_names_what_is_not_known(tmp_path: Path) -> None:
    from ragate.tuning.tune import Source
    from ragate_engine.training.recipe import TuneReport

    report = TuneReport(tmp_path, 10, 0.5, None, 100, 2000, 1000, 3.0, None)
    text = card("base", tmp_path / "mine", Source(tmp_path, None, 40_000, 7), TuneRecipe(), report)
    assert text.startswith("# mine\n") and "40,000 lessons, seed 7" in text and "not looked at" in text
    assert "calibrate DATA.jsonl --judge base --adapter mine" in text
