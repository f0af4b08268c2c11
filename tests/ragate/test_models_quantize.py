"""`ragate models quantize`: the text it calibrates on, what it makes, and what it says when it cannot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from bench.random_model import TINY, random_adapter, write_safetensors
from ragate import catalog, quantize
from ragate.cli import run
from ragate.config import load_settings
from ragate.quantize import calibration_of, pieces, prompts_for
from ragate_engine import write_adapter
from ragate_engine.weights import open_checkpoint

ITEMS = [
    {"id": f"q{i}", "question": f"What does part {i} keep?", "reference": f"Part {i} keeps results."}
    for i in range(9)
]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model, whose tokens are bytes, in an otherwise empty folder."""
    monkeypatch.chdir(tmp_path)
    write_safetensors(TINY, tmp_path / "tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True)])
    tokenizer.save(str(tmp_path / "tiny" / "tokenizer.json"))
    return Path("tiny")


def write_items(items: list[dict[str, str]] = ITEMS) -> str:
    Path("cases.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return "cases.jsonl"


def ended(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code, and what was said on stderr."""
    code = run(["models", "quantize", *arguments])
    return code, capsys.readouterr().err


def test_documents_are_cut_into_distinct_sequences_that_end_where_they_end() -> None:
    head = list(range(600))
    documents = [[*head, 1000 + i] for i in range(3)] + [[7, 8], []]
    assert pieces(documents) == [
        head[:512],
        *([*head[89:], 1000 + i] for i in range(3)),
        [7, 8],
    ]


def test_every_sequence_begins_as_the_model_expects() -> None:
    document = [1, *range(2, 1000)]
    assert pieces([document], bos=1) == [[1, *range(2, 513)], [1, *range(489, 1000)]]
    assert pieces([document[1:]], bos=1) == pieces([document], bos=1)


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("--method", "gguf", "--bits", "8"), "--bits"),
        (("--method", "gguf", "--text", "nofile"), "--text"),
        (("--method", "rtn", "--type", "Q8_0"), "--type"),
        (("--method", "awq", "--symmetric"), "--symmetric"),
    ],
)
def test_an_option_of_another_method_is_refused(
    arguments: tuple[str, ...], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = ended(capsys, "qwen-0.5b", "out", *arguments)
    assert code == 4
    assert f"--method {arguments[1]} does not look at {option}: leave it out" in said


def test_of_many_sequences_evenly_spaced_ones_are_taken() -> None:
    found = pieces([[i] for i in range(300)])
    assert found == [[i * 300 // 128] for i in range(128)]


def test_the_prompts_are_those_of_the_judge_about_these_items(model: Path) -> None:
    settings = load_settings({"testset": write_items(), "metrics": "faithfulness,context_recall"}, Path.cwd())
    prompts = prompts_for(settings)
    assert len(prompts) == 9 * (2 + 1)  # statements and verdicts; recall
    assert all(any(f"part {i} keep" in prompt for prompt in prompts) for i in range(9))
    # where nothing has answered or retrieved yet, the reference stands in
    assert sum("Part 3 keeps results." in prompt for prompt in prompts) == 3


def test_calibration_is_what_the_model_reads_of_those_prompts(model: Path) -> None:
    tokenizer = open_checkpoint(model).tokenizer
    assert tokenizer is not None
    settings = load_settings({"testset": write_items(), "metrics": "context_recall"}, Path.cwd())
    sequences = calibration_of(tokenizer, settings, None)
    text = [tokenizer.decode(sequence) for sequence in sequences]
    assert max(map(len, sequences)) == 512 and len({tuple(sequence) for sequence in sequences}) == len(
        sequences
    )
    assert sum(part.endswith("Assistant:") for part in text) == 9
    Path("text.txt").write_text("a text of <|im_end|> its own")
    assert calibration_of(tokenizer, settings, Path("text.txt")) == [
        tokenizer.encode("a text of <|im_end|> its own", special=False)
    ]


@pytest.mark.parametrize(
    ("method", "options", "name"),
    [
        ("gptq", ["--bits", "3"], "GPTQ"),
        ("gptq", ["--desc-act", "--symmetric"], "GPTQ"),
        ("awq", [], "AWQ"),
        ("rtn", ["--bits", "8"], "GPTQ"),
    ],
)
def test_a_model_is_quantized_and_opens(
    method: str, options: list[str], name: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ["--testset", write_items()] if method != "rtn" else []
    arguments = ["tiny", "small", "--method", method, "--group", "32", "--device", "cpu", *source, *options]
    code, said = ended(capsys, *arguments)
    assert code == 0, said
    assert "quantizing (layers): 2 of 2" in said
    made = open_checkpoint("small")
    assert name in made.quantization and made.config == open_checkpoint(model).config
    assert made.tokenizer is not None and made.tokenizer.identity == open_checkpoint(model).tokenizer.identity


def test_what_a_judge_wears_is_added_before_it_is_quantized(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter("mine", random_adapter(TINY, leaves=("q",)), "tiny", {})
    choice = catalog.JudgeChoice("tiny-judge", model, None, True, Path("mine"))
    monkeypatch.setattr(catalog, "resolve_judge", lambda name, *_, **__: choice)
    fixed = ("--method", "rtn", "--bits", "8", "--group", "32", "--device", "cpu")
    assert ended(capsys, "tiny-judge", "worn", *fixed)[0] == 0
    monkeypatch.setattr(catalog, "resolve_judge", lambda name, *_, **__: replace(choice, adapter=None))
    assert ended(capsys, "tiny", "named", *fixed, "--adapter", "mine")[0] == 0
    assert ended(capsys, "tiny", "plain", *fixed)[0] == 0
    worn, named, plain = (
        open_checkpoint(each).load("layers.0.q").dequantize(torch.float32)  # type: ignore[union-attr]
        for each in ("worn", "named", "plain")
    )
    assert torch.equal(worn, named)
    assert (worn - plain).norm() > 0.1 * plain.norm()
    code, said = ended(capsys, "tiny", "other", *fixed, "--adapter", "nothing")
    assert code == 4 and "nothing has no adapter_config.json" in said


def test_an_interrupted_run_says_how_to_go_on_and_does(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["tiny", "small", "--group", "32", "--device", "cpu", "--testset", write_items()]
    real = quantize.calibration_of

    def stopped(*settings: object) -> list[list[int]]:
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize, "calibration_of", stopped)
    code, said = ended(capsys, *arguments)
    assert code == 130
    assert (
        "run `ragate models quantize tiny small --group 32 --device cpu --testset cases.jsonl` again" in said
    )
    monkeypatch.setattr(quantize, "calibration_of", real)
    assert ended(capsys, *arguments)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["tiny", "small"],
            "there is no text to calibrate on; name a file with --text or a test set with --testset",
        ),
        (["tiny", "small", "--text", "none.txt"], "none.txt cannot be read as UTF-8 text"),
        (["tiny", "small", "--text", "empty.txt"], "empty.txt holds no text to calibrate on"),
        (
            ["tiny", "small", "--method", "rtn", "--bits", "6"],
            "rtn cannot be stored with 6 bits: take 2, 3, 4, 8",
        ),
        (["tiny", "small", "--method", "rtn", "--group", "100"], "do not divide into groups of 100: take 64"),
        (["tiny", "tiny", "--method", "rtn", "--group", "32"], "tiny already holds files"),
        (["other", "small"], "other"),
        (["bare", "small"], "bare has no tokenizer to calibrate with"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(
    arguments: list[str], sentence: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty.txt").write_text("")
    write_safetensors(TINY, Path("bare"))
    code, said = ended(capsys, *arguments, "--device", "cpu")
    assert code == 4
    assert said.startswith("error: ") and said.count("\n") == 1 and "unexpected" not in said
    assert sentence in said
    assert not Path("small").exists()


def test_what_prompts_begin_with_is_calibrated_on_once() -> None:
    shared, size = list(range(900)), 512
    prompts = [[*shared, *range(1000 * i, 1000 * i + 300)] for i in (1, 2, 3)]
    found = pieces(prompts)
    assert [*map(len, found)] == [size] * len(found)
    # the first prompt whole, of each other the end alone
    assert found[:3] == [prompts[0][:512], prompts[0][512:1024], prompts[0][-512:]]
    assert found[3:] == [prompt[-512:] for prompt in prompts[1:]]


def test_a_sequence_begins_with_the_token_that_every_text_begins_with() -> None:
    found = pieces([[7, *range(100, 700)], [7, 5, 6]], bos=7)
    assert [piece[0] for piece in found] == [7, 7, 7]
    assert found == [[7, *range(100, 611)], [7, *range(189, 700)], [7, 5, 6]]
