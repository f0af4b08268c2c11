"""The vocabulary of a Hugging Face folder as GGUF metadata, what llama.cpp's converter makes of it.

Source: convert_hf_to_gguf.py (`get_vocab_base`, `_create_vocab_sentencepiece`) in
https://github.com/ggml-org/llama.cpp. That converter knows a byte-level vocabulary's rule for splitting text by a
checksum; here it is read out of tokenizer.json. SentencePiece scores, which tokenizer.json lacks, are the ranks of
its merges: they decide the same joins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gguf import TokenType

from ragate_engine.weights.fields import Fields, read_json
from ragate_engine.weights.tokenizer import END_OF_TURN, GPT2_SPLIT, SPLITS

if TYPE_CHECKING:
    from pathlib import Path

    from ragate_engine.weights.tokenizer import Tokenizer


def vocabulary(folder: Path, tokenizer: Tokenizer, size: int) -> dict[str, Any]:
    """The `tokenizer.*` metadata of the folder's tokenizer.json, padded to the `size` rows of the embedding.

    `tokenizer` is the one made from that folder. Raises ModelFileError for a vocabulary that GGUF has no name for.
    """
    path = folder / "tokenizer.json"
    whole = Fields(path, read_json(path))
    model = Fields(path, whole.need("model", dict))
    if model.get("type", str) not in ("BPE", None):
        whole.refuse(f"its vocabulary is of type {model.get('type', str)}, but GGUF is written for BPE alone")
    if tokenizer.vocab_size > size:
        whole.refuse(f"it has {tokenizer.vocab_size} tokens, but the model {size} embeddings: fetch it again")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.need("merges", list)]
    if not merges:
        whole.refuse("its vocabulary has no merges, which GGUF cannot say: fetch it again")
    sentencepiece = bool(model.get("byte_fallback", bool))
    unknown = model.get("unk_token", str) if sentencepiece else None

    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(TokenType.UNUSED)] * size
    for token, i in model.need("vocab", dict).items():
        tokens[i] = token
        types[i] = int(TokenType.BYTE if sentencepiece and _is_byte(token) else TokenType.NORMAL)
    for added in whole.get("added_tokens", list) or []:
        i, token, special = added["id"], added["content"], added.get("special")
        tokens[i] = token if special else token.replace("▁", " ")  # no rule of the vocabulary applies to it
        types[i] = int(TokenType.CONTROL if special else TokenType.USER_DEFINED)
    found: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if sentencepiece else "gpt2",
        "tokenizer.ggml.pre": "default" if sentencepiece else _split_rule(whole),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_bos_token": tokenizer.add_bos,
        "tokenizer.ggml.add_space_prefix": tokenizer.prefix_space,
    }
    if unknown is not None and unknown in tokens:
        types[tokens.index(unknown)] = int(TokenType.UNKNOWN)
        found["tokenizer.ggml.unknown_token_id"] = tokens.index(unknown)
    if sentencepiece:
        found["tokenizer.ggml.scores"] = _scores(tokens, merges)
    else:
        found["tokenizer.ggml.merges"] = merges
    # Other ends of an answer than eos: readers know them by their text, or by these two names.
    unsaid = (i for i in sorted(tokenizer.eos_ids) if i != tokenizer.eos_id and tokens[i] not in END_OF_TURN)
    named = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id} | dict(
        zip(("eot", "eom"), unsaid, strict=False)
    )
    found |= {f"tokenizer.ggml.{name}_token_id": i for name, i in named.items() if i is not None}
    if tokenizer.template is not None:
        found["tokenizer.chat_template"] = tokenizer.template.source
    return found


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Minus the rank of the first merge that makes a token; of a token that none makes, less than all."""
    rank: dict[str, int] = {}
    for merge in merges:
        rank.setdefault(merge.replace(" ", "", 1), len(rank))
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _split_rule(whole: Fields) -> str:
    """The value of `tokenizer.ggml.pre` whose patterns are those of the pre-tokenizer."""
    step = whole.get("pre_tokenizer", dict) or {}
    patterns: list[Any] = []
    for part in step.get("pretokenizers", [step]):
        kind = part.get("type")
        if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
            patterns.append(part.get("pattern", {}).get("Regex"))
        elif kind == "Digits" and part.get("individual_digits"):
            patterns.append(r"\p{N}")
        elif kind == "ByteLevel" and not part.get("add_prefix_space"):
            patterns += [GPT2_SPLIT] if part.get("use_regex", True) else []
        else:
            patterns.append(None)
    for name, known in SPLITS.items():
        if list(known) == patterns:
            return name
    whole.refuse(f"it splits text by a rule that GGUF has no name for: those known are {', '.join(SPLITS)}")
