"""`Tokenizer`: text to ids and back, and the chat template, out of GGUF metadata or a tokenizer.json."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer

from ragate_engine.errors import ModelFileError
from ragate_engine.weights.chat import ChatTemplate
from ragate_engine.weights.fields import Fields, read_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from ragate_engine.weights.gguf import GGUFFile

END_OF_TURN = frozenset(
    {"<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|eot|>", "<|end_of_turn|>"}
    | {"<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"}
)
"""Special tokens that end an answer in the model families we serve, whatever a file calls its eos."""

# Values of tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_DEFAULT_SPLITS = (r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]")

SPLITS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT_SPLITS,
    "gpt-2": (GPT2_SPLIT,),
    "smollm": (r"\p{N}", GPT2_SPLIT),
    "starcoder": (r"\p{N}", GPT2_SPLIT),
    "qwen2": (_QWEN2_SPLIT,),
    "deepseek-r1-qwen": (_QWEN2_SPLIT,),
    "llama-bpe": (_LLAMA3_SPLIT,),
    "llama3": (_LLAMA3_SPLIT,),
    "llama-v3": (_LLAMA3_SPLIT,),
}
"""Byte-level pre-tokenizers by `tokenizer.ggml.pre`: patterns applied in turn, each match a piece of its own.

Source: llama.cpp, llama-vocab.cpp.
"""

_MAX_PIECE = 512
"""Characters of the longest ordinary token: merges are sought in time quadratic in it."""


def _byte_spelling() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, as {character: byte}."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


_BYTES = _byte_spelling()


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to token ids and back. Made by `from_gguf` or `from_folder`; safe to share between threads."""

    hf: HfTokenizer
    """The `tokenizers.Tokenizer` behind it; `encode` uses neither its post-processor nor truncation."""
    pieces: Sequence[bytes]
    """The bytes that each id stands for; empty for an id that stands for no text."""
    special_ids: frozenset[int]
    bos_id: int | None
    eos_id: int | None
    """The token that the file itself calls its end."""
    eos_ids: frozenset[int]
    """Every token that ends an answer."""
    add_bos: bool
    """Does the model want `bos_id` before the prompt? (`encode` adds it only when told.)"""
    prefix_space: bool
    """Does `encode` put a space before the text? Then `decode` takes one off."""
    template: ChatTemplate | None
    identity: str
    """sha256, hex, of all that decides the output: vocabulary, merges, rules and chat template."""

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id; the model's logits may be wider."""
        return len(self.pieces)

    @cached_property
    def _plain(self) -> HfTokenizer:
        """A copy that reads special-token text as ordinary text."""
        copy = HfTokenizer.from_str(self.hf.to_str())
        copy.encode_special_tokens = True
        return copy

    def encode(self, text: str, *, special: bool = True, bos: bool = False) -> list[int]:
        """Token ids of `text`. `special`: text like `<|im_end|>` becomes that token; `bos`: begin with it.

        Bytes that the vocabulary lacks are dropped, as llama.cpp and `tokenizers` do (SmolLM2 has no 0x04).
        """
        ids: list[int] = (self.hf if special else self._plain).encode(text, add_special_tokens=False).ids
        if bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; empty for an id that stands for no text."""
        return self.pieces[token] if 0 <= token < len(self.pieces) else b""

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of `ids`, special tokens included unless `skip_special`; broken UTF-8 becomes U+FFFD."""
        raw = b"".join(self.token_bytes(i) for i in ids if not (skip_special and i in self.special_ids))
        return (raw[1:] if self.prefix_space and raw[:1] == b" " else raw).decode("utf-8", errors="replace")

    def render_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation ({"role", "content"} each), by the model's own template.

        A model without one gets `Role: content` paragraphs, closed by `Assistant:`. Raises ConfigError where
        the template refuses the messages (roles out of order, say), ModelFileError where it is broken.
        """
        if self.template is None:
            turns = [f"{message['role'].capitalize()}: {message['content']}\n\n" for message in messages]
            return "".join(turns) + ("Assistant:" if add_generation_prompt else "")
        bos, eos = ("" if i is None else self.token_bytes(i).decode() for i in (self.bos_id, self.eos_id))
        return self.template.render(messages, add_generation_prompt, bos_token=bos, eos_token=eos)

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, ready for the assistant's turn, with the model's BOS where it wants one.

        Only the template makes special tokens: text like `<|im_end|>` inside a message gets a space after its
        first character, so that a retrieved passage cannot end the user's turn.
        """
        safe = [{**message, "content": self._without_special(message["content"])} for message in messages]
        return self.encode(self.render_chat(safe), bos=self.add_bos)

    def _without_special(self, text: str) -> str:
        for token in self._special_texts:
            if token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    @cached_property
    def _special_texts(self) -> tuple[str, ...]:
        texts = (self.token_bytes(i).decode("utf-8", "replace") for i in sorted(self.special_ids))
        return tuple(text for text in texts if len(text) > 1)

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> Tokenizer:
        """The tokenizer that the metadata describes. Raises ModelFileError for a kind we do not know."""
        return _from_gguf(file)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer | None:
        """The tokenizer of a Hugging Face folder, from its tokenizer.json; `None` where it has none."""
        return _from_folder(folder) if (folder / "tokenizer.json").exists() else None


# --- GGUF -----------------------------------------------------------------------------------------------


def _from_gguf(file: GGUFFile) -> Tokenizer:
    meta = Fields(file.path, file.metadata, "tokenizer.")
    model = meta.need("ggml.model", str)
    tokens = meta.need("ggml.tokens", list)
    types = meta.get("ggml.token_type", list) or [_NORMAL] * len(tokens)
    if not tokens or not all(isinstance(token, str) for token in tokens) or len(types) != len(tokens):
        meta.refuse("its vocabulary is broken: fetch or convert it again")
    if model == "gpt2":
        prefix, spell = False, _byte_level_bytes
        hf = _byte_level(meta, tokens)
    elif model == "llama":
        stated = meta.get("ggml.add_space_prefix", bool)
        prefix, spell = stated is not False, _sentencepiece_bytes
        hf = _sentencepiece(meta, tokens, types, prefix)
    else:
        meta.refuse(f"its tokenizer is of kind {model[:40]!r}: this engine knows gpt2 and llama")
    # Phi-3's turns swallow the newline that its template writes after their marks (llama.cpp does the same).
    swallow = model == "llama" and file.metadata.get("general.architecture") == "phi3"
    added, special, ends = [], [], []
    pieces: list[bytes] = []
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        whole = kind in (_CONTROL, _USER_DEFINED)
        pieces.append(b"" if kind == _UNUSED else token.encode() if whole else spell(token))
        if kind in (_CONTROL, _UNKNOWN):
            special.append(i)
        if kind == _CONTROL and token in END_OF_TURN:
            ends.append(i)
        if whole and token:
            rstrip = swallow and token.startswith("<|") and token != "<|endoftext|>"
            added.append(AddedToken(token, normalized=False, special=kind == _CONTROL, rstrip=rstrip))
    hf.add_tokens(added)

    def token_id(key: str) -> int | None:
        value = meta.get(key, int)
        if value is not None and not 0 <= value < len(tokens):
            meta.refuse(f"tokenizer.{key} is {value}, beyond its {len(tokens)} tokens")
        return value

    named = (token_id(f"ggml.{key}_token_id") for key in ("eos", "eot", "eom"))
    template = meta.get("chat_template", str)
    add_bos = meta.get("ggml.add_bos_token", bool)
    rules = {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")}
    return Tokenizer(
        hf=hf,
        pieces=pieces,
        special_ids=frozenset(special),
        bos_id=token_id("ggml.bos_token_id"),
        eos_id=token_id("ggml.eos_token_id"),
        eos_ids=frozenset(ends).union(i for i in named if i is not None),
        add_bos=model == "llama" if add_bos is None else add_bos,
        prefix_space=prefix,
        template=None if template is None else ChatTemplate(template, file.path),
        identity=hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest(),
    )


def _byte_level(meta: Fields, tokens: list[str]) -> HfTokenizer:
    """GPT-2's BPE over bytes: the text is split by the file's rule, then its merges are applied."""
    pre = meta.get("ggml.pre", str) or "default"
    if pre not in SPLITS:
        known = ", ".join(SPLITS)
        meta.refuse(
            f"its tokenizer splits text by the rule {pre[:40]!r}, which this engine does not know: {known}"
        )
    splits = SPLITS[pre]
    # The first token of a spelling keeps it; a later twin can be decoded but is never written.
    vocab = {token: i for i, token in reversed(list(enumerate(tokens)))}
    merges = meta.need("ggml.merges", list)
    try:
        pairs = [tuple(merge.split(" ")) for merge in merges]
        # Llama 3 takes a piece that is a token whole, whatever the merges would make of it.
        hf = HfTokenizer(models.BPE(vocab, pairs, ignore_merges=splits == (_LLAMA3_SPLIT,)))
    except Exception as error:  # `tokenizers` raises bare exceptions
        meta.refuse(f"its merges do not fit its vocabulary ({error}): fetch or convert it again")
    hf.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    hf.decoder = decoders.ByteLevel()
    return hf


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes(_BYTES[char] for char in token)
    except KeyError:
        return token.encode()


def _sentencepiece(meta: Fields, tokens: list[str], types: list[int], prefix: bool) -> HfTokenizer:
    """SentencePiece BPE: of all neighbours whose join is a token, the join with the best score is made first.

    That is BPE with every split of every ordinary token as a merge, ranked by the token's score. Control and
    user-defined tokens are matched whole before, so they take no part.
    """
    scores = meta.need("ggml.scores", list)
    if len(scores) != len(tokens) or not all(isinstance(score, float) for score in scores):
        meta.refuse("its vocabulary has no score for each token: fetch or convert it again")
    vocab = {token: i for i, token in reversed(list(enumerate(tokens)))}
    plain = {token for token, kind in zip(tokens, types, strict=True) if kind == _NORMAL}
    if max(map(len, plain), default=0) > _MAX_PIECE:
        meta.refuse(f"its vocabulary has a token of more than {_MAX_PIECE} characters: fetch it again")
    merges: list[tuple[float, int, str, str]] = []
    for token in plain:
        rank = -scores[vocab[token]]
        for cut in range(len(token) - 1, 0, -1):
            left, right = token[:cut], token[cut:]
            if left in plain and right in plain:
                merges.append((rank, -cut, left, right))
    merges.sort()
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    try:
        pairs = [(left, right) for _, _, left, right in merges]
        hf = HfTokenizer(models.BPE(vocab, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    except Exception as error:  # `tokenizers` raises bare exceptions
        meta.refuse(f"its vocabulary cannot be used ({error}): fetch or convert it again")
    spaces = normalizers.Replace(" ", "▁")
    hf.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    tail = [decoders.Strip(" ", 1, 0)] if prefix else []
    hf.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail]
    )
    return hf


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace("▁", " ").encode()


# --- tokenizer.json -------------------------------------------------------------------------------------


def _from_folder(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    try:
        raw = path.read_bytes()
        hf = HfTokenizer.from_buffer(raw)
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # `tokenizers` raises bare exceptions
        raise ModelFileError(f"{path} is not a usable tokenizer: {str(error)[:200]}") from None
    wants_bos = hf.encode("", add_special_tokens=True).ids
    hf.no_truncation()
    hf.no_padding()

    decoder = json.loads(hf.decoder.__getstate__()) if hf.decoder is not None else {}
    steps = decoder.get("decoders", [decoder])
    kinds = [step.get("type") for step in steps]
    if "ByteLevel" in kinds:
        spell = _byte_level_bytes
    elif "ByteFallback" in kinds:
        spell = _sentencepiece_bytes
    else:
        raise ModelFileError(
            f"{path} is neither byte-level nor SentencePiece BPE, the kinds this engine knows"
        )
    added = hf.get_added_tokens_decoder()
    vocab = hf.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocab.values(), default=-1) + 1)
    for token, i in vocab.items():
        pieces[i] = token.encode() if i in added else spell(token)

    configs = [Fields(folder / name, read_json(folder / name)) if (folder / name).exists() else None
               for name in ("tokenizer_config.json", "generation_config.json", "config.json")]  # fmt: skip
    stated = configs[0] or Fields(path, {})
    bos_id, eos_id = (_named_token(stated, key, vocab) for key in ("bos_token", "eos_token"))
    ends = {i for i, token in added.items() if token.special and token.content in END_OF_TURN}
    for config in configs[1:]:
        found = config.values.get("eos_token_id") if config else None
        ends.update(i for i in (found if isinstance(found, list) else [found]) if type(i) is int)
    template = _folder_template(folder, stated)
    digest = hashlib.sha256(raw)
    digest.update(json.dumps([template, bos_id, eos_id, sorted(ends)]).encode())
    return Tokenizer(
        hf=hf,
        pieces=pieces,
        special_ids=frozenset(i for i, token in added.items() if token.special),
        bos_id=bos_id,
        eos_id=eos_id,
        eos_ids=frozenset(ends if eos_id is None else ends | {eos_id}),
        add_bos=bos_id is not None and (stated.get("add_bos_token", bool) or wants_bos[:1] == [bos_id]),
        prefix_space=any(step.get("type") == "Strip" and step.get("start") == 1 for step in steps),
        template=None if template is None else ChatTemplate(template, folder),
        identity=digest.hexdigest(),
    )


def _named_token(stated: Fields, key: str, vocab: dict[str, int]) -> int | None:
    """The id of a token that tokenizer_config.json names, as text or as {"content": text}."""
    value = stated.values.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    return vocab.get(value) if isinstance(value, str) else None


def _folder_template(folder: Path, stated: Fields) -> str | None:
    """chat_template.jinja, or the template in tokenizer_config.json (of several, the default)."""
    beside = folder / "chat_template.jinja"
    if beside.exists():
        try:
            return beside.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelFileError(f"{beside} cannot be read: {error}") from None
    value = stated.values.get("chat_template")
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None
