"""Hugging Face folders: tiny models as transformers saves them, older configurations, broken folders."""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ragate_engine import ModelFileError
from ragate_engine.config import RopeConfig
from ragate_engine.weights import names, open_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

SIZE = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def save_model(
    folder: Path, kind: str, dtype: torch.dtype = torch.float32, **settings: Any
) -> dict[str, torch.Tensor]:
    """Save a tiny random model of transformers' class `kind`; returns its weights by their own names."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZE, **settings)
    model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config).to(dtype)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "norm" in name:
                weights.normal_()
    model.save_pretrained(folder)
    return {name: weights.detach() for name, weights in model.state_dict().items()}


def rewrite(folder: Path, remove: tuple[str, ...] = (), **changes: Any) -> None:
    """Change fields of the folder's config.json."""
    path = folder / "config.json"
    stated = {key: value for key, value in json.loads(path.read_text()).items() if key not in remove}
    path.write_text(json.dumps(stated | changes))


def refusal(folder: Path) -> str:
    """What opening `folder` says: one sentence."""
    with pytest.raises(ModelFileError) as caught:
        open_checkpoint(folder)
    text = str(caught.value)
    assert str(folder) in text
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True, "head_dim": 16}),
        ("Mistral", {"sliding_window": 8}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 16}),
        ("Gemma2", {"head_dim": 16}),
        ("Gemma3Text", {"head_dim": 16, "sliding_window": 8}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_weight_is_read_under_its_canonical_name(tmp_path, kind, settings):
    stored = save_model(tmp_path, kind, **settings)
    checkpoint = open_checkpoint(tmp_path)
    gemma = kind.startswith("Gemma")
    seen = set()
    for name, weights in stored.items():
        ours = names.from_hf(name, gemma)
        if ours == "lm_head" and checkpoint.config.tie_embeddings:
            continue
        seen.add(ours)
        expected = 1 + weights if gemma and ours.endswith("norm") else weights
        assert torch.equal(checkpoint.load(ours), expected), name
    assert seen == checkpoint.names
    assert checkpoint.config.tie_embeddings == ("lm_head" not in checkpoint.names)
    assert checkpoint.quantization == "float32"
    assert checkpoint.tokenizer is None


def test_fused_matrices_of_phi3_are_split(tmp_path):
    stored = save_model(tmp_path, "Phi3", pad_token_id=0, sliding_window=9)
    checkpoint = open_checkpoint(tmp_path)
    fused = torch.cat([checkpoint.load(f"layers.6.{part}") for part in "qkv"])
    assert torch.equal(fused, stored["model.layers.6.self_attn.qkv_proj.weight"])
    assert checkpoint.load("layers.6.k").shape == (16, 32)
    stacked = torch.cat([checkpoint.load("layers.0.gate"), checkpoint.load("layers.0.up")])
    assert torch.equal(stacked, stored["model.layers.0.mlp.gate_up_proj.weight"])
    assert checkpoint.config.window == 9


def test_half_precision_weights_keep_their_dtype_but_for_the_norms_of_gemma(tmp_path):
    stored = save_model(tmp_path, "Gemma3Text", torch.bfloat16, head_dim=16)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.quantization == "bfloat16"
    assert checkpoint.load("layers.0.q").dtype == torch.bfloat16
    norm = checkpoint.load("final_norm")
    assert norm.dtype == torch.float32
    assert torch.equal(norm, 1 + stored["model.norm.weight"].float())


# --- configurations -------------------------------------------------------------------------------------


def test_a_gemma3_configuration_has_two_ropes_and_slides_between_each_sixth_layer(tmp_path):
    save_model(tmp_path, "Gemma3Text", head_dim=16, sliding_window=8, query_pre_attn_scalar=64)
    config = open_checkpoint(tmp_path).config
    assert [config.window_of(i) for i in range(7)] == [8] * 5 + [None, 8]
    assert (config.rope_of(5).theta, config.rope_of(4).theta) == (1_000_000.0, 10_000.0)
    assert (config.attn_scale, config.embed_scale) == (0.125, math.sqrt(32))
    assert (config.qk_norm, config.sandwich_norm, config.activation) == (True, True, "gelu_tanh")
    assert (config.attn_soft_cap, config.logit_soft_cap) == (None, None)


def test_older_configurations_say_the_same_in_other_fields(tmp_path):
    save_model(tmp_path, "Gemma3Text", head_dim=16, sliding_window=8)
    new = open_checkpoint(tmp_path).config
    old = {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0, "sliding_window_pattern": 6}
    rewrite(tmp_path, ("rope_parameters", "layer_types"), **old)
    assert open_checkpoint(tmp_path).config == new

    save_model(tmp_path, "Llama", rope_parameters=LLAMA3)
    new = open_checkpoint(tmp_path).config
    assert new.rope == RopeConfig(500_000.0, "llama3", 8.0, 1.0, 4.0, 16)
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    rewrite(tmp_path, ("rope_parameters",), rope_theta=500_000.0, rope_scaling=scaling)
    assert open_checkpoint(tmp_path).config == new


def test_gemma2_caps_its_logits_and_slides_every_other_layer(tmp_path):
    save_model(tmp_path, "Gemma2", head_dim=16, sliding_window=8)
    config = open_checkpoint(tmp_path).config
    assert (config.attn_soft_cap, config.logit_soft_cap) == (50.0, 30.0)
    assert config.window_layers == (True, False, True, False, True, False, True)


def test_a_qwen2_slides_only_where_it_says_that_it_does(tmp_path):
    save_model(tmp_path, "Qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=3)
    config = open_checkpoint(tmp_path).config
    assert config.qkv_bias
    assert [config.window_of(i) for i in range(7)] == [None] * 3 + [8] * 4
    rewrite(tmp_path, ("layer_types",))
    assert open_checkpoint(tmp_path).config == config
    rewrite(tmp_path, use_sliding_window=False)
    assert open_checkpoint(tmp_path).config.window is None


def test_the_text_half_of_a_gemma3_that_sees_is_enough(tmp_path):
    stored = save_model(tmp_path, "Gemma3Text", head_dim=16)
    alone = open_checkpoint(tmp_path)
    up = alone.load("layers.3.up")
    inner = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": inner}))
    renamed = {
        f"language_model.{name}": weights.clone()
        for name, weights in stored.items()
        if name != "lm_head.weight"
    }
    save_file(renamed | {"vision_tower.patch.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    whole = open_checkpoint(tmp_path)
    assert whole.config == alone.config
    assert torch.equal(whole.load("layers.3.up"), up)
    with pytest.raises(ModelFileError, match="changed while it was read"):
        alone.load("layers.3.up")


# --- files ----------------------------------------------------------------------------------------------


def test_shards_are_read_as_the_index_says(tmp_path):
    stored = save_model(tmp_path, "Qwen3", head_dim=16)
    parts = {"a.safetensors": {}, "b.safetensors": {}}
    for i, (name, weights) in enumerate(stored.items()):
        parts["ab"[i % 2] + ".safetensors"][name] = weights.clone()
    for file, tensors in parts.items():
        save_file(tensors, tmp_path / file)
    where = {name: file for file, tensors in parts.items() for name in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (tmp_path / "model.safetensors").unlink()
    checkpoint = open_checkpoint(tmp_path)
    assert [file.name for file in checkpoint.files] == ["a.safetensors", "b.safetensors", "config.json"]
    assert torch.equal(checkpoint.load("layers.2.down"), stored["model.layers.2.mlp.down_proj.weight"])
    (tmp_path / "b.safetensors").unlink()
    assert "b.safetensors is missing" in refusal(tmp_path)


def test_the_identity_of_a_folder_covers_its_weights_and_its_configuration(tmp_path):
    save_model(tmp_path, "Llama")
    first = open_checkpoint(tmp_path).identity
    sums = [
        hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "config.json")
    ]
    listing = f"{sums[0]}  model.safetensors\n{sums[1]}  config.json\n"
    assert first == hashlib.sha256(listing.encode()).hexdigest()
    rewrite(tmp_path, rms_norm_eps=1e-3)
    assert open_checkpoint(tmp_path).identity != first


def test_a_head_that_is_stored_though_tied_is_left_alone(tmp_path):
    save_model(tmp_path, "Llama", tie_word_embeddings=False)
    rewrite(tmp_path, tie_word_embeddings=True)
    assert "lm_head" not in open_checkpoint(tmp_path).names


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mamba2"}, "'mamba2'"),
        ({"model_type": None}, "does not serve"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "32"}, "expected int"),
        ({"hidden_size": 64}, "has shape"),
        ({"num_hidden_layers": 10**9}, "cannot be"),
        ({"num_hidden_layers": 8}, "lacks the tensor layers.7."),
        ({"num_hidden_layers": 6}, "no place"),
        ({"num_attention_heads": 10**30}, "has shape"),
        ({"head_dim": None, "num_attention_heads": 24}, "cannot be turned"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"rms_norm_eps": 10**400}, "finite"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "relu"}, "'relu'"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "GGUF"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, "rope"),
        ({"rope_parameters": 7}, "expected dict"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_in_one_sentence(tmp_path, changes, said):
    save_model(tmp_path, "Llama")
    rewrite(tmp_path, **changes)
    assert said in refusal(tmp_path)


def test_a_broken_folder_is_refused_in_one_sentence(tmp_path):
    assert "no config.json" in refusal(tmp_path)
    save_model(tmp_path, "Llama")
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole = weights.read_bytes()
    for size in (0, 7, 100, len(whole) - 1):
        weights.write_bytes(whole[:size])
        assert "model.safetensors" in refusal(tmp_path)
    weights.write_bytes(b"\xff" * 8 + whole[8:])
    assert "model.safetensors" in refusal(tmp_path)
    weights.unlink()
    assert "no *.safetensors" in refusal(tmp_path)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    save_file(
        tensors | {"model.layers.0.mlp.up_proj.weight": torch.zeros(40, 32, dtype=torch.int16)}, weights
    )
    assert "type I16" in refusal(tmp_path)
    save_file(tensors | {"model.layers.0.extra.weight": torch.zeros(2)}, weights)
    assert "model.layers.0.extra.weight" in refusal(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../../etc/passwd.safetensors"}}'
    )
    assert "beside it" in refusal(tmp_path)
    for text in ("{", "[1]", "\xff", "[" * 100_000):
        config.write_text(text, encoding="latin-1")
        assert "config.json" in refusal(tmp_path)
