"""Tiny random Hugging Face folders with a tokenizer of their own, of every architecture that a GGUF file describes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

if TYPE_CHECKING:
    from pathlib import Path

SIZES: dict[str, Any] = dict(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10_000.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 200}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 128}),
    "gemma2": ("Gemma2", {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 32}),
    "gemma3": ("Gemma3Text", {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 32}),
    "phi3": ("Phi3", {"sliding_window": 200}),
}
"""By name: transformers' class, and its settings."""
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TEXTS = [
    "Hello, wörld! 123",
    "  two  spaces\n\tand a tab",
    "def f(x):\n    return x + 42",
    "ends <|im_end|> here",
    "日本語",
    "",
]


def byte_level() -> Tokenizer:
    """GPT-2's kind, split as Qwen2's is, with a few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("r", "e"), ("1", "2")]
    tokens = [*alphabet, *("".join(pair) for pair in merges)]
    hf = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    hf.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    hf.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True, normalized=False) for text in ("<|im_start|>", "<|im_end|>")]
    hf.add_tokens([*special, AddedToken("<tool>", special=False, normalized=False)])
    return hf


def sentencepiece(prefix: bool) -> Tokenizer:
    """Llama 2's kind (Gemma's without `prefix`): bytes where there is no character, spaces as ▁."""
    letters = [*"abcdefghijklmnopqrstuvwxyzH,!():+=.0123456789\n\t▁"]
    merges = [
        ("l", "l"),
        ("h", "e"),
        ("▁", "▁"),
        ("he", "ll"),
        ("H", "e"),
        ("hell", "o"),
        ("▁", "a"),
        ("▁▁", "▁▁"),
    ]
    tokens = ["<unk>", "<s>", "<|im_end|>", *(f"<0x{i:02X}>" for i in range(256)), *letters]
    tokens += ["".join(pair) for pair in merges]
    vocab = {token: i for i, token in enumerate(tokens)}
    hf = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    hf.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    tail = [decoders.Strip(" ", 1, 0)] if prefix else []
    hf.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail]
    )
    hf.add_special_tokens(["<unk>", "<s>", "<|im_end|>"])
    return hf


def save_tokenizer(folder: Path, hf: Tokenizer, bos: str | None = None) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    hf.save(str(folder / "tokenizer.json"))
    stated = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE, "add_bos_token": bos is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated | ({"bos_token": bos} if bos else {})))


def save_tiny(
    folder: Path,
    name: str,
    dtype: torch.dtype = torch.float32,
    tokenizer: Tokenizer | None = None,
    bos: str | None = None,
    **settings: Any,
) -> None:
    """Write the model of `MODELS` with random weights and norms, its vocabulary padded by some rows."""
    import transformers

    kind, own = MODELS[name]
    hf = tokenizer or byte_level()
    config = getattr(transformers, f"{kind}Config")(
        **(SIZES | own | settings),
        vocab_size=hf.get_vocab_size() + 5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(3)
    model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config)
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(torch.randn_like(weights) * (0.2 if weights.dim() == 1 else 0.06))
    model.to(dtype).save_pretrained(folder)
    save_tokenizer(folder, hf, bos)
