"""Whole training runs: against PEFT, killed and resumed, twice the same, and what stops them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import cached_model
from safetensors.torch import load_file
from test_training import decoder_of, judged

from bench.random_model import TINY, random_checkpoint
from ragate_engine import (
    ConfigError,
    Engine,
    EngineConfig,
    Example,
    OutOfMemoryError,
    SamplingParams,
    TrainingError,
    TuneRecipe,
    TuneStep,
    open_checkpoint,
    tune_adapter,
)
from ragate_engine.layers import dense
from ragate_engine.lora import WEIGHTS, read_adapter
from ragate_engine.training.decoder import TunedDecoder
from ragate_engine.training.layout import lay_out
from ragate_engine.training.packs import Pack
from ragate_engine.training.state import LOG, STATE
from ragate_engine.training.vector import Vector
from ragate_engine.weights import Checkpoint, names

QUICK = TuneRecipe(rank=4, batch=4, epochs=2, learning_rate=5e-3, warmup=0)


def log_of(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / LOG).read_text())["steps"]


# --- against PEFT ---------------------------------------------------------------------------------------


def transformers_model(source: Checkpoint):
    """A Llama in transformers with the weights of `source`, unpacked to float32."""
    import transformers as tf

    config = source.config
    made = tf.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_layers,
        intermediate_size=config.intermediate_size, num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads, rms_norm_eps=config.norm_eps, tie_word_embeddings=True,
        max_position_embeddings=config.max_len,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
    )  # fmt: skip
    model = tf.LlamaForCausalLM(made)
    weights = {
        names.to_hf(name, False): dense(source.load(name), torch.float32, torch.device("cpu"))
        for name in source.names
    }
    missing, unknown = model.load_state_dict(weights, strict=False)
    assert (missing, unknown) == (["lm_head.weight"], [])
    return model


def test_ten_steps_have_the_losses_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    source = open_checkpoint(cached_model("smollm2-135m"))
    assert source.tokenizer is not None
    encode = source.tokenizer.encode
    head = "You judge whether a statement follows from a passage. Answer yes or no, and say why in a few words.\n"
    facts = ["Water boils at 100 degrees.", "The moon is made of stone, not of cheese.", "Seven is a prime."]
    facts += [
        "The Nile is long.",
        "Iron rusts in wet air, gold does not.",
        "Bees dance.",
        "Ice floats.",
        "Oil burns.",
    ]
    examples = []
    for i, fact in enumerate(facts):
        prompt = encode(f"{head}Passage: {fact}\nStatement: {facts[i - i % 2]}\nAnswer:")
        answer = encode(f" {'no' if i % 2 else 'yes'}, for it says so.")
        weights = [3.0, *[0.5] * (len(answer) - 2), 0.0]
        examples.append(Example(tuple(prompt), tuple(answer), tuple(weights)))
    recipe = TuneRecipe(batch=4, epochs=5, learning_rate=1e-3, warmup=0, weight_decay=0.01)
    order: list[list[int]] = []

    # theirs: each example alone, in one padded batch
    model = transformers_model(source)
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=list(linears))
    )
    vector = Vector(source.config, recipe)
    leaves = dict(zip(linears, ("q", "k", "v", "o", "gate", "up", "down"), strict=True))
    first = vector.by_leaf(vector.initial(recipe.seed))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                _, _, _, _, layer, _, linear, *_ = name.split(".")
                bound = parameter.shape[1] ** -0.5
                a = first[int(layer)][leaves[linear]][0]
                assert 0.9 * bound < float(a.abs().max()) <= bound  # drawn as PEFT draws it
                assert parameter.abs().max() <= bound
                parameter.copy_(a)

    ours: list[float] = []
    report = tune_adapter(source, examples, tmp_path / "a", recipe, "cpu", lambda s: ours.append(s.loss))
    assert report.steps == 10

    import numpy as np
    from transformers import get_cosine_schedule_with_warmup

    for epoch in range(5):
        drawn = np.random.default_rng((recipe.seed, epoch)).permutation(8).tolist()
        order += [drawn[:4], drawn[4:]]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, 10)
    theirs = []
    for batch in order:
        optimizer.zero_grad()
        loss = peft_loss(model, [examples[i] for i in batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        theirs.append(float(loss.detach()))
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert ours[-1] < 0.5 * ours[0]

    # what we wrote is what PEFT reads
    read = peft.PeftModel.from_pretrained(transformers_model(source), tmp_path / "a")
    with torch.no_grad():
        assert float(peft_loss(read, examples)) == pytest.approx(float(peft_loss(model, examples)), abs=1e-3)


def peft_loss(model, examples: list[Example]) -> torch.Tensor:
    """The weighted mean of -ln p over a batch padded on the right."""
    longest = max(len(e.prompt) + len(e.answer) for e in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.int64)
    weights = torch.zeros(len(examples), longest)
    for row, e in enumerate(examples):
        whole = e.prompt + e.answer
        ids[row, : len(whole)] = torch.tensor(whole)
        weights[row, len(e.prompt) : len(whole)] = torch.tensor(e.weights)
    mask = torch.arange(longest) < torch.tensor([[len(e.prompt) + len(e.answer)] for e in examples])
    logits = model(input_ids=ids, attention_mask=mask.long()).logits
    losses = -logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return (losses * weights[:, 1:]).sum() / weights.sum()


def test_a_real_model_learns_eight_answers_by_heart(tmp_path: Path) -> None:
    source = open_checkpoint(cached_model("smollm2-135m"))
    assert source.tokenizer is not None
    words = ["blue", "seven", "north", "copper", "Tuesday", "goat", "violin", "nine"]
    examples = []
    for i, word in enumerate(words):
        prompt = source.tokenizer.encode(f"The password of door number {i} is")
        answer = source.tokenizer.encode(f" {word}.")
        examples.append(Example(tuple(prompt), tuple(answer), (1.0,) * len(answer)))
    recipe = TuneRecipe(batch=8, epochs=25, learning_rate=3e-3)
    report = tune_adapter(source, examples, tmp_path / "a", recipe, "cpu", held_out=examples)
    assert log_of(tmp_path / "a")[0]["loss"] > 3
    assert report.loss < 0.05
    assert report.held_out is not None and report.held_out < 0.05
    # and what was learned is answered: by quantized weights with the adapter beside them, trained on them unpacked
    config = EngineConfig(device="cpu", adapters=(tmp_path / "a",))
    with Engine(source, config) as engine:
        asked = [
            engine.submit(list(e.prompt), SamplingParams(max_tokens=len(e.answer)), adapter="a")
            for e in examples
        ]
        assert [tuple(token.id for token in answer.result().tokens) for answer in asked] == [
            e.answer for e in examples
        ]


# --- runs -----------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(tmp_path: Path) -> None:
    source, examples = random_checkpoint(TINY), judged(10)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tune_adapter(source, examples, tmp_path / name, replace(QUICK, seed=seed), "cpu")
    a, b, c = ((tmp_path / name / WEIGHTS).read_bytes() for name in "abc")
    assert a == b
    assert a != c


RUN = """
import sys
from pathlib import Path
from bench.random_model import TINY, random_checkpoint
from ragate_engine import TuneRecipe, tune_adapter
from test_training import judged
recipe = TuneRecipe(rank=4, batch=4, epochs=12, learning_rate=5e-3, save_seconds=float(sys.argv[2]))
tune_adapter(random_checkpoint(TINY), judged(10), Path(sys.argv[1]), recipe, "cpu", lambda s: print(s.step, flush=True))
"""


def start(folder: Path, save_seconds: float) -> subprocess.Popen[str]:
    here = Path(__file__).parent
    code = f"import sys; sys.path[:0] = [{str(here)!r}, {str(here.parent.parent)!r}]\n{RUN}"
    command = [sys.executable, "-c", code, str(folder), str(save_seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_run_that_was_killed_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole" / "judge", tmp_path / "killed" / "judge"
    for folder in (whole, killed):
        folder.parent.mkdir()
    with start(whole, 1e9) as process:
        process.communicate()
        assert process.returncode == 0
    with start(killed, 0) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 7:
                process.kill()
                break
    saved = int(load_file(killed / STATE)["step"])
    assert 7 <= saved < 36
    assert not (killed / WEIGHTS).exists()
    with start(killed, 0) as process:
        said, _ = process.communicate()
    assert [int(line) for line in said.split()] == list(range(saved + 1, 37))
    assert (killed / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    losses = [[row["loss"] for row in log_of(folder)] for folder in (whole, killed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 36
    assert not (killed / STATE).exists()


def test_a_run_tells_its_steps_and_looks_at_what_is_held_out(tmp_path: Path) -> None:
    source, examples, held_out = random_checkpoint(TINY), judged(10), judged(3, seed=50)
    steps: list[TuneStep] = []
    recipe = replace(QUICK, evaluate_every=4)
    report = tune_adapter(source, examples, tmp_path / "a", recipe, "cpu", steps.append, held_out=held_out)
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6]
    assert [step.held_out is not None for step in steps] == [False, False, False, True, False, True]
    alone = sum(example.length for example in examples)
    assert report.tokens == 2 * alone
    assert report.computed_tokens < report.tokens
    assert [row["tokens"] for row in log_of(tmp_path / "a")][:3] != [0, 0, 0]
    # the loss that was held out is that of the adapter that was written
    decoder = decoder_of(source, recipe)
    adapter = read_adapter(tmp_path / "a", source.config)
    vector = decoder.vector.initial(0)
    for i, layer in enumerate(decoder.vector.by_leaf(vector)):
        for leaf, pair in layer.items():
            for mine, written in zip(pair, adapter.pairs[f"layers.{i}.{leaf}"], strict=True):
                mine.copy_(written)
    with torch.no_grad():
        total = sum(
            float(decoder.loss(vector, lay_out(held_out, [Pack(0, (i,))], torch.device("cpu"))))
            for i in range(3)
        )
    weight = sum(sum(example.weights) for example in held_out)
    assert report.held_out == pytest.approx(total / weight, rel=1e-3)  # written in bfloat16


# --- what stops a run -----------------------------------------------------------------------------------


def test_a_folder_is_trained_in_once_and_resumed_with_the_same_settings_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, examples = random_checkpoint(TINY), judged(10)
    folder = tmp_path / "a"

    def stop(step: TuneStep) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_adapter(source, examples, folder, replace(QUICK, save_seconds=0), "cpu", stop)
    with pytest.raises(ConfigError, match=r"an unfinished run with another rank \(4\): give another folder"):
        tune_adapter(source, examples, folder, replace(QUICK, rank=8), "cpu")
    with pytest.raises(ConfigError, match=r"another count \(10\), examples: give another folder"):
        tune_adapter(source, examples[1:], folder, QUICK, "cpu")
    with monkeypatch.context() as patched:
        patched.setattr(torch, "__version__", "1.0")
        with pytest.raises(ConfigError, match=r"an unfinished run with another torch \(\d"):
            tune_adapter(source, examples, folder, QUICK, "cpu")
    tune_adapter(source, examples, folder, QUICK, "cpu")
    with pytest.raises(ConfigError, match="holds a finished adapter"):
        tune_adapter(source, examples, folder, QUICK, "cpu")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="already holds files"):
        tune_adapter(source, examples, tmp_path / "b", QUICK, "cpu")


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    from ragate_engine import ModelFileError

    source, examples = random_checkpoint(TINY), judged(10)
    recipe = replace(QUICK, learning_rate=1e30, save_seconds=0)
    with pytest.raises(TrainingError):
        tune_adapter(source, examples, tmp_path / "a", recipe, "cpu")
    state = tmp_path / "a" / STATE
    state.write_bytes(state.read_bytes()[:-40])
    with pytest.raises(ModelFileError, match=r"tuning\.safetensors is damaged"):
        tune_adapter(source, examples, tmp_path / "a", recipe, "cpu")


def test_a_loss_that_is_no_number_stops_with_the_state_before_it(tmp_path: Path) -> None:
    recipe = replace(QUICK, learning_rate=1e30)
    with pytest.raises(TrainingError, match=r"of step 2 is not finite, .* take a lower learning_rate"):
        tune_adapter(random_checkpoint(TINY), judged(10), tmp_path / "a", recipe, "cpu")
    assert int(load_file(tmp_path / "a" / STATE)["step"]) == 1
    assert len(log_of(tmp_path / "a")) == 1
    assert not (tmp_path / "a" / WEIGHTS).exists()


def test_too_little_memory_says_what_to_reduce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(TunedDecoder, "loss", fail)
    said = r"\(CUDA out of memory\): take fewer pass_tokens than 20480 or checkpointing or base packed"
    with pytest.raises(OutOfMemoryError, match=said):
        tune_adapter(random_checkpoint(TINY), judged(10), tmp_path / "a", QUICK, "cpu")
