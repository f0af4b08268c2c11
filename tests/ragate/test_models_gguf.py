"""`ragate models quantize --method gguf`: one file of the wanted mix."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bench.random_model import TINY, write_safetensors
from ragate.cli import run
from ragate_engine.weights import gguf_write, open_checkpoint


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model with a byte-level tokenizer, in an otherwise empty folder."""
    monkeypatch.chdir(tmp_path)
    write_safetensors(TINY, tmp_path / "tiny")
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate(alphabet)}, [("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tiny" / "tokenizer.json"))
    return Path("tiny")


def test_a_model_becomes_a_file_of_the_wanted_mix(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(
        [
            "models",
            "quantize",
            "tiny",
            "small.gguf",
            "--method",
            "gguf",
            "--type",
            "Q5_K_M",
            "--device",
            "cpu",
        ]
    )
    out, err = capsys.readouterr()
    assert (code, out) == (0, "small.gguf\n"), err
    assert "writing" in err
    made = open_checkpoint("small.gguf")
    assert made.quantization == "Q5_K_M" and made.parameters == open_checkpoint(model).parameters


def test_an_unknown_mix_is_bad_input(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(["models", "quantize", "tiny", "small.gguf", "--method", "gguf", "--type", "Q9"])
    assert code == 4
    assert (
        "there is no GGUF mix 'Q9': take one of Q2_K, Q4_0, Q4_K_M, Q5_K_M, Q6_K, Q8_0"
        in capsys.readouterr().err
    )
    assert not Path("small.gguf").exists()


def test_an_interrupted_run_leaves_nothing(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_write, "encode", stopped)
    code = run(["models", "quantize", "tiny", "small.gguf", "--method", "gguf", "--device", "cpu"])
    assert code == 130
    assert "interrupted: nothing was written" in capsys.readouterr().err
    assert not list(Path().glob("*small*"))
