"""What bench/quality.py counts is right, against transformers and by hand; the page shows what was measured."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers

from bench import quality, quantization_page, verdicts
from bench.logits import Head, logits_of, states_of
from bench.quality import Format, Window, compare, compare_logits, cut
from bench.random_model import TINY, random_checkpoint, write_safetensors
from bench.verdicts import Item, Verdict, agreement
from ragate.judge import JudgeError
from ragate_engine import EngineConfig
from ragate_engine.weights import Checkpoint, open_checkpoint
from ragate_engine.weights.tokenizer import Tokenizer

CPU = EngineConfig(device="cpu")


def windows(count: int, length: int, vocab: int = TINY.vocab_size) -> list[list[int]]:
    drawn = torch.randint(3, vocab, (count, length), generator=torch.Generator().manual_seed(5))
    return [[int(token) for token in window] for window in drawn]


# ---- logits ----


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A random model on disk, and the same in transformers."""
    import transformers as tf

    torch.manual_seed(7)
    config = tf.LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0,
    )  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.data *= 1.5  # a model that is surer of itself: mistakes show
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_the_logits_of_every_position_are_transformers(llama: tuple[Path, Any], kernels: Any) -> None:
    folder, model = llama
    asked = [*windows(2, 150, 300), *windows(1, 33, 300), [7]]
    found = list(logits_of(open_checkpoint(folder), asked, EngineConfig(device="cpu", kernels=kernels)))
    assert [tuple(part.shape) for part in found] == [(len(window), 300) for window in asked]
    for part, window in zip(found, asked, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([window])).logits[0]
        assert (part - expected).abs().max() < 1e-4


def test_a_soft_cap_on_the_logits_is_kept() -> None:
    plain, capped = random_checkpoint(TINY), random_checkpoint(replace(TINY, logit_soft_cap=0.5))
    (logits,), (found,) = (list(logits_of(each, windows(1, 20), CPU)) for each in (plain, capped))
    assert float(logits.abs().max()) > 1
    torch.testing.assert_close(found, 0.5 * torch.tanh(logits / 0.5))


def compared(reference: Checkpoint, other: Checkpoint, asked: list[list[int]]) -> list[Window]:
    """Each window of `other` beside the reference, as `main` has it."""
    head, states = states_of(reference, asked, CPU)
    kept = list(states)
    other_head, found = states_of(other, asked, CPU)
    return list(compare(asked, head, kept, other_head, found))


# ---- perplexity, divergence, agreement ----


def test_perplexity_is_exp_of_the_mean_loss_of_transformers(llama: tuple[Path, Any]) -> None:
    folder, model = llama
    checkpoint, asked = open_checkpoint(folder), windows(3, 300, 300)
    found = compared(checkpoint, checkpoint, asked)
    with torch.no_grad():
        losses = [float(model(torch.tensor([w]), labels=torch.tensor([w])).loss) for w in asked]
    row = quality.row("reference", checkpoint, found, found, [], [], [])
    assert row["perplexity"] == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)
    assert [each.positions for each in found] == [299] * 3


def test_a_model_does_not_diverge_from_itself() -> None:
    checkpoint = random_checkpoint(TINY)
    for found in compared(checkpoint, checkpoint, windows(2, 140)):
        assert (found.divergence, found.agreeing) == (0.0, 139)


def test_divergence_and_agreement_are_those_of_plain_sums() -> None:
    reference, other = random_checkpoint(TINY, 0), random_checkpoint(TINY, 1)
    asked = windows(2, 200)  # more than are compared at a time
    pairs = zip(*(logits_of(each, asked, CPU) for each in (reference, other)), strict=True)
    for found, window, (one, two) in zip(compared(reference, other, asked), asked, pairs, strict=True):
        p, q = one[:-1].double().softmax(-1), two[:-1].double().softmax(-1)
        divergence = sum(float((p[i] * (p[i] / q[i]).log()).sum()) for i in range(199))
        loss = sum(-math.log(float(q[i, window[i + 1]])) for i in range(199))
        assert found.divergence == pytest.approx(divergence, rel=1e-4)
        assert found.loss == pytest.approx(loss, rel=1e-5)
        assert found.agreeing == sum(int(one[i].argmax() == two[i].argmax()) for i in range(199))


def test_figures_of_three_tokens_by_hand() -> None:
    expected = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]).log()
    found = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]).log()
    both = compare_logits(expected + 3, found - 2, torch.tensor([0, 1]))  # logits, not log-probabilities
    assert both.divergence == pytest.approx(0.25 * math.log(2))
    assert both.loss == pytest.approx(math.log(4) - math.log(0.8), rel=1e-6)
    assert (both.positions, both.agreeing) == (2, 1)


def test_standard_errors_are_those_of_the_means_of_windows() -> None:
    found, base = [Window(10, 20.0, 1.0, 9), Window(10, 30.0, 3.0, 7)], [Window(10, 19.0, 0.0, 10)] * 2
    row = quality.row("x", random_checkpoint(TINY), found, base, [], [], [])
    assert row["perplexity"] == pytest.approx(math.exp(2.5))
    assert row["nats_over"] == pytest.approx(0.6)
    assert row["nats_over_se"] == pytest.approx(
        0.5
    )  # means of 0.1 and 1.1: stdev 0.7071 over the root of two
    assert (row["kl"], row["kl_se"]) == (pytest.approx(0.2), pytest.approx(0.1))
    assert row["same_top"] == pytest.approx(0.8)
    assert row["judge"] is None


def test_the_logits_that_are_compared_are_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    logits = Head.logits

    def watched(self: Head, states: torch.Tensor) -> torch.Tensor:
        seen.append(len(states))
        return logits(self, states)

    monkeypatch.setattr(Head, "logits", watched)
    checkpoint = random_checkpoint(TINY)
    compared(checkpoint, checkpoint, windows(1, 300))
    assert seen == [128, 128, 128, 128, 44, 44]


# ---- verdicts ----


ITEMS = [Item("c", "a", faithful) for faithful in (True, True, False, False)]


def test_agreement_counts_verdicts_and_nothing_agrees_with_none() -> None:
    reference = [Verdict(True, 0.9), Verdict(False, 0.2), Verdict(True, 0.6), None]
    said = [Verdict(True, 0.7), None, Verdict(False, 0.1), Verdict(False, 0.0)]
    assert agreement(said, reference, ITEMS) == {
        "items": 3,
        "no_verdict": 1,
        "as_reference": 1,
        "as_label": 2,
        "says_faithful": 1,
        "labelled_faithful": 2,
        "p_moved": pytest.approx((0.2 + 0.5) / 2),
    }
    own = agreement(reference, reference, ITEMS)
    assert (own["items"], own["as_reference"], own["as_label"], own["p_moved"]) == (3, 3, 1, 0.0)


class FakeJudge:
    """Says yes to an answer that its context has word by word; cannot answer about `long`."""

    async def agenerate(self, prompt: str, response_model: type[BaseModel]) -> BaseModel:
        asked = json.loads(prompt.split("input: ")[-1].rpartition("}")[0] + "}")
        (statement,) = asked["statements"]
        if statement == "long":
            raise JudgeError("context too long")
        answer = {"statement": statement, "reason": "so", "verdict": int(statement in asked["context"])}
        return response_model.model_validate({"statements": [answer]})


def test_items_are_asked_with_their_own_context() -> None:
    items = [Item("it is blue", "blue", True), Item("it is blue", "red", False), Item("long", "long", True)]
    found = asyncio.run(verdicts._ask_all(FakeJudge(), items))  # type: ignore[arg-type]
    assert found == [Verdict(True, None), Verdict(False, None), None]


# ---- text and formats ----


def bytes_tokenizer() -> HfTokenizer:
    """A token for each byte, three special ones, and a merge, without which it could not be a GGUF file's."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(["<s>", "</s>", "<|im_end|>", *letters, "qz"])}
    made = HfTokenizer(models.BPE(vocab, merges=[("q", "z")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that can be talked to."""
    folder = tmp_path_factory.mktemp("model")
    write_safetensors(replace(TINY, max_len=16384), folder)
    bytes_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True})
    )
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled data of the real shape."""
    folder = tmp_path_factory.mktemp("data")
    pages = [{"context_sentences": [f"Page {i % 4}.", "word " * 40 * (1 + i % 4)]} for i in range(8)]
    answers = [
        {"contexts": [f"Fact {i}.", "More."], "answer": f"Fact {i}.", "faithful": i % 2} for i in range(6)
    ]
    for name, rows in ((quality.TEXT, pages), (verdicts.LABELLED, answers)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_windows_are_cut_evenly_and_begin_as_the_model_wants(model: Path, data: Path) -> None:
    tokenizer = open_checkpoint(model).tokenizer
    assert isinstance(tokenizer, Tokenizer) and tokenizer.add_bos
    texts = quality.load_texts(data)
    assert len(texts) == 4  # each page counts once
    stream = "".join(f"{text}\n\n" for text in texts)
    found = cut(tokenizer, texts, 5, 64)
    assert [len(window) for window in found] == [64] * 5
    assert {window[0] for window in found} == {tokenizer.bos_id}
    pieces = len(stream) // 63
    assert [tokenizer.decode(window[1:]) for window in found] == [
        stream[i * pieces // 5 * 63 :][:63] for i in range(5)
    ]
    with pytest.raises(SystemExit, match=f"text for {pieces} windows of 64 tokens"):
        cut(tokenizer, texts, pieces + 1, 64)


def test_items_are_spread_over_the_file(data: Path) -> None:
    found = verdicts.load_items(data, 3)
    assert [item.answer for item in found] == ["Fact 0.", "Fact 2.", "Fact 4."]
    assert found[1].context == "Fact 2.\nMore."
    with pytest.raises(SystemExit, match="has 6 items"):
        verdicts.load_items(data, 7)


def test_a_format_says_how_it_is_made_and_run() -> None:
    found = Format.parse("awq4-g128+packed+fp8_e4m3")
    assert (found.base, found.run) == ("awq4-g128", ("packed", "fp8_e4m3"))
    config = found.config("cuda")
    assert (config.weights, config.kv_dtype, config.device) == ("packed", "fp8_e4m3", "cuda")
    assert Format.parse("Q8_0").config("cpu") == CPU


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Q9_0", "neither a path nor a format"),
        ("Q8_0+fast", "no way to run a format"),
        ("Q8_0+packed+int8", "packed and int8 cannot be had at once"),
    ],
)
def test_a_format_that_is_none_is_refused(name: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        Format.parse(name)


def test_what_needs_a_card_is_refused_on_a_cpu() -> None:
    with pytest.raises(SystemExit, match=r"Q8_0\+packed: \+packed needs a card"):
        Format.parse("Q8_0+packed").config("cpu")


def test_the_bench_measures_every_format_and_the_page_shows_it(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = [window[:40] for window in windows(4, 60, 250)]
    monkeypatch.setattr(quality, "calibrated_on", lambda tokenizer, testset, count: calibration[:count])
    out = tmp_path / "quality-cpu-tiny.json"
    formats = ["rtn2-g32", "gptq4-g32", "Q8_0", str(model)]
    sizes = ["--windows", "3", "--length", "40", "--items", "1", "--sequences", "3"]
    arguments = [str(model), "--device", "cpu", "--formats", *formats, *sizes, "--data", str(data)]
    quality.main([*arguments, "--out", str(out)])
    found = json.loads(out.read_text())
    rows = {row["name"]: row for row in found["formats"]}
    assert list(rows) == ["reference", *formats]
    assert rows["reference"]["kl"] == rows[str(model)]["kl"] == 0.0
    assert 0 < 5 * rows["Q8_0"]["kl"] < rows["gptq4-g32"]["kl"] < 0.5 * rows["rtn2-g32"]["kl"]
    assert rows["rtn2-g32"]["perplexity"] == pytest.approx(
        rows["reference"]["perplexity"] * math.exp(rows["rtn2-g32"]["nats_over"])
    )
    assert rows[str(model)]["judge"] == rows["reference"]["judge"]
    assert rows["reference"]["judge"]["as_reference"] == rows["reference"]["judge"]["items"]
    assert found["text"]["positions"] == 3 * 39
    assert found["calibration"]["sequences"] == 3
    quantization_page.main(tmp_path, tmp_path / "page.md")
    assert f"| Q8_0 | {rows['Q8_0']['bytes'] / 1e6:,.0f} |" in (tmp_path / "page.md").read_text()


def test_a_model_with_other_tokens_is_no_format(model: Path, data: Path, tmp_path: Path) -> None:
    write_safetensors(replace(TINY, vocab_size=300), tmp_path)
    sizes = ["--windows", "2", "--length", "20", "--items", "0", "--data", str(data)]
    with pytest.raises(SystemExit, match="has 300 tokens, the reference 512"):
        quality.main([str(model), "--device", "cpu", "--formats", str(tmp_path), *sizes])


# ---- the page ----


def measured(name: str, **fields: Any) -> dict[str, Any]:
    row = {
        "name": name, "quantization": "GPTQ int4 g64", "bytes": 115e6, "bits_a_weight": 6.82, "perplexity": 22.0,
        "nats_over": math.log(1.1), "nats_over_se": 0.01, "kl": 0.1, "kl_se": 0.005, "same_top": 0.815,
        "judge": {"items": 40, "no_verdict": 0, "as_reference": 31, "as_label": 19, "says_faithful": 9,
                  "labelled_faithful": 25, "p_moved": 0.1234},
    }  # fmt: skip
    return row | fields


def write_result(folder: Path, name: str, rows: list[dict[str, Any]], **fields: Any) -> None:
    head = {
        "model": "m", "device": "cpu", "hardware": "a CPU, 2 cores", "command": f"python {name}",
        "reference": {"quantization": "Q4_1", "weights": "0" * 64}, "judge": {"file": "items.jsonl", "items": 40},
        "text": {"file": "text.jsonl", "windows": 8, "length": 512, "positions": 4088, "sha256": "1"},
        "calibration": {"testset": "t", "sequences": 4, "tokens": 2048, "sha256": "2"},
    }  # fmt: skip
    (folder / f"quality-{name}.json").write_text(json.dumps(head | fields | {"formats": rows}))


def test_the_page_has_ours_beside_what_was_published(tmp_path: Path) -> None:
    reference = measured("reference", quantization="Q4_1", perplexity=20.0, nats_over=0.0, kl=0.0)
    write_result(tmp_path, "a", [reference, measured("rtn4-g64"), measured("gptq4-g64-act")])
    write_result(
        tmp_path, "b", [reference, measured("Q2_K", judge=None), measured("Q4_1", quantization="Q4_1")]
    )
    quantization_page.main(tmp_path, tmp_path / "docs" / "page.md")
    text = (tmp_path / "docs" / "page.md").read_text()
    assert text.count("## m, on a CPU") == 1  # two runs over the same text are one table
    assert (
        text.count("| **reference** (Q4_1) | 115 | 6.82 | 20.000 | - | - | - | - | - | - | 19 of 40 | - |")
        == 1
    )
    ours = "115 | 6.82 | 22.000 | +10.00% ± 1.10%"
    assert (
        f"| rtn4-g64 | {ours} | +4.75% | 0.10000 ± 0.00500 | - | 81.5% | 31 of 40 | 19 of 40 | 0.123 |"
        in text
    )
    assert f"| gptq4-g64-act | {ours} | +4.02%; +2.93% reordered |" in text
    assert f"| Q2_K | {ours} | +56.48% | 0.10000 ± 0.00500 | 0.44513 | 81.5% | - | - | - |" in text
    assert "python a\npython b\n" in text
    words = " ".join(text.split())
    assert "itself a Q4_1 file" in words and "Q4_1 is that very format" in words
    assert "As judge it finds 9 of 40 answers faithful, people 25." in words
    assert "2,048 tokens of prompts for the test set t" in words


def test_other_text_is_another_table(tmp_path: Path) -> None:
    write_result(tmp_path, "a", [measured("reference")])
    write_result(tmp_path, "b", [measured("reference")], device="cuda")
    quantization_page.main(tmp_path, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "## m, on a CPU" in text and "## m, on a card" in text


def test_a_page_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run bench/quality\.py"):
        quantization_page.main(tmp_path, tmp_path / "page.md")
