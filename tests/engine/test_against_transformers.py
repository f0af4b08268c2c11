"""The engine's numbers against transformers: tiny random models to 1e-4, real models token by token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import PROMPTS, cached_model

from bench.logits import logits_of as every_logit
from ragate_engine import Engine, EngineConfig, SamplingParams
from ragate_engine.weights import open_checkpoint

TINY = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def tiny_config(name: str):
    import transformers as tf

    configs = {
        "llama": lambda: tf.LlamaConfig(**TINY),
        "llama3-rope": lambda: tf.LlamaConfig(
            **TINY,
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=10000.0,
                factor=4.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
        ),
        "qwen2": lambda: tf.Qwen2Config(**TINY, tie_word_embeddings=True),
        "qwen3": lambda: tf.Qwen3Config(**TINY, head_dim=32),
        "mistral": lambda: tf.MistralConfig(**TINY, sliding_window=24),
        "gemma3": lambda: tf.Gemma3TextConfig(
            **{**TINY, "num_hidden_layers": 7}, head_dim=32, query_pre_attn_scalar=24, sliding_window=24
        ),
    }
    return configs[name]()


def logits_of(folder: Path, tokens: list[int], kernels: str) -> torch.Tensor:
    """Logits after every token of a sequence, computed in one step by the engine's own runner."""
    config = EngineConfig(device="cpu", kernels=kernels)  # type: ignore[arg-type]
    (found,) = every_logit(open_checkpoint(folder), [tokens], config)
    return found


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("name", ["llama", "llama3-rope", "qwen2", "qwen3", "mistral", "gemma3"])
def test_logits_of_a_tiny_random_model_equal_transformers(name: str, kernels: str, tmp_path: Path) -> None:
    import transformers as tf

    torch.manual_seed(7)
    model = tf.AutoModelForCausalLM.from_config(tiny_config(name), attn_implementation="eager").eval()
    for (
        p_name,
        p,
    ) in model.named_parameters():  # norms and biases are 1 and 0 when fresh: that would hide mistakes
        if p.ndim == 1:
            p.data += torch.randn_like(p) * 0.2
        assert torch.isfinite(p).all(), p_name
    model.save_pretrained(tmp_path)
    tokens = torch.randint(3, TINY["vocab_size"], (90,))
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    found = logits_of(tmp_path, tokens.tolist(), kernels)
    assert (found - expected).abs().max() < 1e-4
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == found.shape[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "qwen-0.5b", "gemma-3-270m"])
def test_greedy_text_of_a_real_model_equals_transformers(name: str) -> None:
    """20 prompts, 64 tokens: equal, or the first difference lies where transformers' own two best are within 1e-3."""
    import transformers as tf

    path = cached_model(name)
    reference = tf.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    with Engine.load(path, EngineConfig(device="cpu")) as engine:
        bos = [engine.tokenizer.bos_id] if engine.tokenizer.add_bos else []
        prompts = [[*bos, *engine.tokenizer.encode(text)] for text in PROMPTS]
        params = SamplingParams(max_tokens=64, ignore_eos=True)
        futures = [engine.submit(prompt, params) for prompt in prompts]
        found = [[token.id for token in future.result().tokens] for future in futures]
    unexplained = []
    for prompt, tokens in zip(prompts, found, strict=True):
        with torch.no_grad():  # teacher forcing: one pass tells what transformers would say at every place
            logits = reference(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        for place, token in enumerate(tokens):
            best = int(logits[place].argmax())
            if best != token:
                gap = float(logits[place, best] - logits[place, token])
                if gap >= 1e-3:
                    unexplained.append((prompt[:8], place, token, best, gap))
                break
    assert unexplained == []
