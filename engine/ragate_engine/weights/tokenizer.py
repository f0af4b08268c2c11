"""`Tokenizer`: text to ids and back, and the chat template, out of GGUF metadata or a tokenizer.json."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.sandbox
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer

from ragate_engine.errors import ConfigError, ModelFileError

if TYPE_CHECKING:
    from pathlib import Path

    from ragate_engine.weights.gguf import GGUFFile

END_OF_TURN = frozenset({
    "<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>",
    "<|eot|>", "<|end_of_turn|>", "<EOT>", "</s>", "<eos>",
})  # fmt: skip
"""Control tokens that end a turn in the model families we serve, whatever the file calls its eos."""

# Values of tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_DEFAULT_SPLITS = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]")

_BYTE_LEVEL_SPLITS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT_SPLITS,
    "gpt-2": (_GPT2_SPLIT,),
    "smollm": (r"\p{N}", _GPT2_SPLIT),
    "starcoder": (r"\p{N}", _GPT2_SPLIT),
    "qwen2": (_QWEN2_SPLIT,),
    "deepseek-r1-qwen": (_QWEN2_SPLIT,),
    "llama-bpe": (_LLAMA3_SPLIT,),
    "llama3": (_LLAMA3_SPLIT,),
    "llama-v3": (_LLAMA3_SPLIT,),
}
"""Pre-tokenizers by `tokenizer.ggml.pre`: patterns applied in turn, each match a piece (llama.cpp, llama-vocab.cpp)."""

_MAX_CHAT_CHARS = 1 << 24  # no template may blow a conversation up past this


def _byte_spelling() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, as {character: byte}."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


_BYTES = _byte_spelling()


class Tokenizer:
    """Text to token ids and back. Built by `from_gguf` or `from_folder`; immutable, safe to share between threads."""

    def __init__(
        self,
        hf: HfTokenizer,
        pieces: Sequence[bytes],
        special_ids: frozenset[int],
        bos_id: int | None,
        eos_ids: frozenset[int],
        add_bos: bool,
        strip_prefix: bool,
        template: str | None,
        identity: str,
        source: Path,
    ) -> None:
        self.hf = hf
        """The `tokenizers.Tokenizer` behind it, with neither truncation, padding nor post-processing in use."""
        self.special_ids = special_ids
        self.bos_id = bos_id
        self.eos_ids = eos_ids
        """Every token that ends an answer."""
        self.add_bos = add_bos
        """Does the model want `bos_id` before the prompt? (`encode` adds it only when told.)"""
        self.template = template
        self._pieces = pieces
        self._strip_prefix = strip_prefix
        self._identity = identity
        self._source = source
        self._chat = None if template is None else _compile(template, source)

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id; the model's logits may be wider."""
        return len(self._pieces)

    @property
    def identity(self) -> str:
        """sha256, hex, of all that decides its output: vocabulary, merges, rules and chat template."""
        return self._identity

    @cached_property
    def _plain(self) -> HfTokenizer:
        """A copy that reads special-token text as ordinary text."""
        copy = HfTokenizer.from_str(self.hf.to_str())
        copy.encode_special_tokens = True
        return copy

    def encode(self, text: str, *, special: bool = True, bos: bool = False) -> list[int]:
        """Token ids of `text`. `special`: text such as `<|im_end|>` becomes that token; `bos`: begin with bos_id."""
        ids: list[int] = (self.hf if special else self._plain).encode(text, add_special_tokens=False).ids
        if bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; empty for an id that stands for no text."""
        return self._pieces[token] if 0 <= token < len(self._pieces) else b""

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of `ids`, special tokens included unless `skip_special`; broken UTF-8 becomes U+FFFD."""
        raw = b"".join(self.token_bytes(i) for i in ids if not (skip_special and i in self.special_ids))
        if self._strip_prefix and raw[:1] == b" ":
            raw = raw[1:]
        return raw.decode("utf-8", errors="replace")

    def render_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation ({"role", "content"} each), by the model's own template.

        A model without a template gets `Role: content` paragraphs, closed by `Assistant:`. Raises ConfigError
        where the template refuses the messages (roles out of order, say), ModelFileError where it is broken.
        """
        if self._chat is None:
            turns = "".join(f"{message['role'].capitalize()}: {message['content']}\n\n" for message in messages)
            return turns + ("Assistant:" if add_generation_prompt else "")
        bos = "" if self.bos_id is None else self.hf.id_to_token(self.bos_id)
        eos = self.hf.id_to_token(min(self.eos_ids)) if self.eos_ids else ""
        parts: list[str] = []
        size = 0
        try:
            for part in self._chat.generate(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                bos_token=bos,
                eos_token=eos,
                tools=None,
                documents=None,
            ):
                size += len(part)
                if size > _MAX_CHAT_CHARS:
                    raise ModelFileError(f"{self._source}: its chat template writes without end")
                parts.append(part)
        except _RefusedError as error:
            raise ConfigError(f"the chat template of {self._source} refuses these messages: {error}") from None
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise ModelFileError(f"{self._source}: its chat template fails: {error}") from None
        return "".join(parts)

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> Tokenizer:
        """The tokenizer that a GGUF file's metadata describes. Raises ModelFileError for an unknown kind."""
        return _from_gguf(cls, file)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer | None:
        """The tokenizer of a Hugging Face folder (tokenizer.json); `None` where there is no such file."""
        if not (folder / "tokenizer.json").exists():
            return None
        raise NotImplementedError


# --- GGUF ---------------------------------------------------------------------------------------------------------


def _from_gguf(cls: type[Tokenizer], file: GGUFFile) -> Tokenizer:
    meta = file.metadata

    def get(key: str, kind: type, default: Any) -> Any:
        value = meta.get(f"tokenizer.ggml.{key}", default)
        if value is not default and not isinstance(value, kind):
            raise ModelFileError(f"{file.path}: metadata tokenizer.ggml.{key} is not of type {kind.__name__}")
        return value

    model = get("model", str, None)
    tokens: list[str] = get("tokens", list, [])
    types: list[int] = get("token_type", list, [_NORMAL] * len(tokens))
    if not tokens or not isinstance(tokens[0], str) or len(types) != len(tokens):
        raise ModelFileError(f"{file.path} has no usable vocabulary: fetch or convert it again")
    added = [
        AddedToken(token, normalized=False, special=kind == _CONTROL)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_CONTROL, _USER_DEFINED) and token
    ]
    if model == "gpt2":
        hf = _byte_level(file, tokens, get("merges", list, None), get("pre", str, "default"))
        spell = _bytes_of_byte_level
        prefix = False
    elif model == "llama":
        prefix = get("add_space_prefix", bool, True)
        hf = _sentencepiece(file, tokens, get("scores", list, None), types, prefix)
        spell = _bytes_of_sentencepiece
    else:
        raise ModelFileError(
            f"{file.path} has a tokenizer of kind {str(model)[:40]!r}, which this engine does not know: gpt2 (byte-level "
            "BPE) and llama (SentencePiece) are"
        )
    hf.add_tokens(added)
    pieces = [
        b"" if kind == _UNUSED else token.encode() if kind in (_CONTROL, _USER_DEFINED) else spell(token)
        for token, kind in zip(tokens, types, strict=True)
    ]

    def token_id(key: str) -> int | None:
        value = get(key, int, None)
        return value if value is not None and 0 <= value < len(tokens) else None

    named = {token_id(key) for key in ("eos_token_id", "eot_token_id", "eom_token_id")} - {None}
    ends = {i for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind == _CONTROL and token in END_OF_TURN}  # fmt: skip
    template = meta.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise ModelFileError(f"{file.path}: metadata tokenizer.chat_template is not text")
    rules = {key: value for key, value in meta.items() if key.startswith("tokenizer.")}
    return cls(
        hf=hf,
        pieces=pieces,
        special_ids=frozenset(i for i, kind in enumerate(types) if kind in (_CONTROL, _UNKNOWN)),
        bos_id=token_id("bos_token_id"),
        eos_ids=frozenset(named | ends),
        add_bos=get("add_bos_token", bool, model == "llama"),
        strip_prefix=prefix,
        template=template,
        identity=hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest(),
        source=file.path,
    )


def _byte_level(file: GGUFFile, tokens: list[str], merges: list[str] | None, pre: str) -> HfTokenizer:
    splits = _BYTE_LEVEL_SPLITS.get(pre)
    if splits is None:
        raise ModelFileError(
            f"{file.path} splits text by the rule {pre[:40]!r}, which this engine does not know: "
            f"it knows {', '.join(sorted(_BYTE_LEVEL_SPLITS))}"
        )
    if merges is None:
        raise ModelFileError(f"{file.path} has no tokenizer.ggml.merges: convert it again")
    # The first token of a spelling keeps it; later twins can be decoded but are never written.
    vocab = {token: i for i, token in reversed(list(enumerate(tokens)))}
    try:
        pairs = [(left, right) for left, right in (merge.split(" ", 1) for merge in merges)]
        hf = HfTokenizer(models.BPE(vocab, pairs, ignore_merges=splits == (_LLAMA3_SPLIT,)))
    except Exception as error:  # `tokenizers` raises bare exceptions
        raise ModelFileError(f"{file.path}: its merges do not fit its vocabulary: {error}") from None
    hf.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in splits]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    hf.decoder = decoders.ByteLevel()
    return hf


def _bytes_of_byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTES[char] for char in token)
    except KeyError:
        return token.encode()


def _bytes_of_sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def _sentencepiece(
    file: GGUFFile, tokens: list[str], scores: list[float] | None, types: list[int], prefix: bool
) -> HfTokenizer:
    raise NotImplementedError


# --- chat templates -----------------------------------------------------------------------------------------------


class _RefusedError(Exception):
    """Raised from inside a template, by `raise_exception`."""


def _refuse(reason: str) -> None:
    raise _RefusedError(reason)


def _compile(template: str, source: Path) -> jinja2.Template:
    """The template in a sandbox that offers what transformers offers, but for the clock."""
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    env.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    env.globals["raise_exception"] = _refuse
    # A prompt must not change from one day to the next: templates that ask the time get this day.
    env.globals["strftime_now"] = datetime.datetime(2024, 7, 26, tzinfo=datetime.UTC).strftime
    try:
        return env.from_string(template)
    except jinja2.TemplateError as error:
        raise ModelFileError(f"{source}: its chat template cannot be compiled: {error}") from None
