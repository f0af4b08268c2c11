"""What an answer of the judge may look like: bounded JSON schemas from ragas' output models.

Importing this module imports ragas (seconds).
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ragate.errors import ConfigError
from ragate.metrics import INPUT_MARK, keep_quiet
from ragate.verdicts import VERDICT_NAMES

keep_quiet()

from ragas.metrics.collections.faithfulness.util import NLIStatementOutput  # noqa: E402

if TYPE_CHECKING:
    from pydantic import BaseModel

STATEMENT_CHARS = 200
REASON_CHARS = 160
LEAST_CHARS = 3
MOST_ITEMS = 8
"""Entries of a list and characters of a string in an answer: so it always ends, and fits its token limit."""

DECODING = (
    f"greedy, JSON schema, lists of 1 to {MOST_ITEMS}, statements of {LEAST_CHARS} to {STATEMENT_CHARS} "
    f"characters, reasons of {LEAST_CHARS} to {REASON_CHARS}"
)
"""The decoding settings in words, for the fingerprint."""


@dataclass(frozen=True)
class AnswerSchema:
    """What an answer may look like, as compact JSON text in generation order, and how long it can get."""

    text: str
    chars: int
    """Characters of the longest answer: its tokens, when each is plain ASCII."""
    octets: int
    """Its UTF-8 bytes when every free character takes four: no answer has more tokens."""

    @functools.cached_property
    def tree(self) -> dict[str, Any]:
        """The schema as data."""
        tree: dict[str, Any] = json.loads(self.text)
        return tree


def answer_schema(response_model: type[BaseModel], prompt: str) -> AnswerSchema:
    """The schema that the answer to `prompt` must match.

    It is the model's own with verdicts in {0, 1}, lists of 1 to 8, and strings of bounded length without
    control characters, quotes and backslashes, so that nothing needs an escape. The statements of an NLI call
    are constants in the order sent: only reason and verdict are free.
    """
    if response_model is not NLIStatementOutput:
        return _model_schema(response_model)
    answers = [
        _object({"statement": _constant(statement), "reason": _string(REASON_CHARS), "verdict": _VERDICT})
        for statement in _input_of(prompt)["statements"]
    ]
    tree = {
        "type": "array",
        "prefixItems": [answer.tree for answer in answers],
        "items": False,
        "minItems": len(answers),
        "maxItems": len(answers),
    }
    chars = 2 + sum(answer.chars + 1 for answer in answers)
    octets = 2 + sum(answer.octets + 1 for answer in answers)
    return _finished(_object({"statements": _Part(tree, chars, octets)}))


@dataclass(frozen=True)
class _Part:
    tree: Any
    chars: int
    octets: int


def _finished(part: _Part) -> AnswerSchema:
    return AnswerSchema(
        json.dumps(part.tree, separators=(",", ":"), ensure_ascii=False), part.chars, part.octets
    )


@functools.cache
def _model_schema(response_model: type[BaseModel]) -> AnswerSchema:
    schema = response_model.model_json_schema()
    return _finished(_part(schema, schema.get("$defs", {}), ""))


def _part(node: dict[str, Any], defs: dict[str, Any], name: str) -> _Part:
    if "$ref" in node:
        return _part(defs[node["$ref"].rpartition("/")[2]], defs, name)
    match node.get("type"):
        case "object":
            return _object({key: _part(value, defs, key) for key, value in node["properties"].items()})
        case "array":
            item = _part(node["items"], defs, name)
            tree = {"type": "array", "items": item.tree, "minItems": 1, "maxItems": MOST_ITEMS}
            return _Part(tree, 2 + MOST_ITEMS * (item.chars + 1), 2 + MOST_ITEMS * (item.octets + 1))
        case "string":
            return _string(REASON_CHARS if name == "reason" else STATEMENT_CHARS)
        case "integer" if name in VERDICT_NAMES:
            return _VERDICT
        case "integer":
            return _Part({"type": "integer", "minimum": -(10**9), "maximum": 10**9}, 11, 11)
        case "boolean":
            return _Part({"type": "boolean"}, 5, 5)
    raise ConfigError(f"the judge cannot fill the field {name or 'of the answer'}: no bounded form of {node}")


_VERDICT = _Part({"enum": [0, 1]}, 1, 1)


def _string(limit: int) -> _Part:
    clean = r"\"\\\x00-\x1f\x7f-\x9f"
    pattern = rf"^[^ {clean}][^{clean}]{{{LEAST_CHARS - 1},{limit - 1}}}$"
    return _Part({"type": "string", "pattern": pattern}, limit + 2, 4 * limit + 2)


def _constant(text: str) -> _Part:
    length = len(json.dumps(text))  # the longest spelling: what is not ASCII as an escape
    return _Part({"const": text}, length, length)


def _object(properties: dict[str, _Part]) -> _Part:
    tree = {
        "type": "object",
        "properties": {name: part.tree for name, part in properties.items()},
        "required": list(properties),
        "additionalProperties": False,
    }
    frame = 2 + sum(len(json.dumps(name)) + 2 for name in properties)
    return _Part(
        tree,
        frame + sum(part.chars for part in properties.values()),
        frame + sum(part.octets for part in properties.values()),
    )


def _input_of(prompt: str) -> dict[str, Any]:
    """The item that a ragas prompt carries, read back from its text."""
    data, _ = json.JSONDecoder().raw_decode(prompt.partition(INPUT_MARK)[2])
    return dict(data)


def parse(text: str) -> Any:
    """The value of an answer's JSON text. Raises ValueError, also for a key given twice in one object."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of two verdicts under one name neither is the judge's."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"the key {name!r:.80} is there twice")
        fields[name] = value
    return fields


def breach(tree: Any, value: Any, where: str = "the answer") -> str | None:
    """How `value` breaks a schema of ours, or `None`: what ragas does not check and an endpoint may ignore.

    Text is not compared, and a free list may be long: neither the wording nor the length makes a score wrong.
    """
    if "enum" in tree:
        return None if type(value) is int and value in tree["enum"] else f"{where} is {value!r}, not 0 or 1"
    if "const" in tree:
        tree = {"type": "string"}
    if not isinstance(value, _KINDS[tree["type"]]):
        return f"{where} is {value!r}, not a {tree['type']}"
    if isinstance(value, dict):
        if stray := [name for name in value if name not in tree["properties"]]:
            return f"{where} has the key {stray[0]!r:.80}, which was not asked for"
        parts = [(t, value.get(k), f"{where}.{k}") for k, t in tree["properties"].items()]
    elif isinstance(value, list):
        trees = tree.get("prefixItems") or [tree["items"]] * max(len(value), tree["minItems"])
        if len(value) != len(trees):
            return f"{where} has {len(value)} entries, not {len(trees)}"
        parts = [(t, v, f"{where}[{i}]") for i, (t, v) in enumerate(zip(trees, value, strict=True))]
    else:
        return None
    return next((fault for part in parts if (fault := breach(*part))), None)


_KINDS: dict[str, type] = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}


def portable(tree: Any) -> Any:
    """Our schema in the words that every endpoint knows: no patterns, no constants, no tuples."""
    if "const" in tree:
        return {"type": "string"}
    if "enum" in tree:
        return {"type": "integer", **tree}
    match tree["type"]:
        case "object":
            return tree | {"properties": {k: portable(v) for k, v in tree["properties"].items()}}
        case "array":
            item = tree["prefixItems"][0] if "prefixItems" in tree else tree["items"]
            limits = {"minItems": tree["minItems"], "maxItems": tree["maxItems"]}
            return {"type": "array", "items": portable(item), **limits}
    return {"type": tree["type"]}


def sample(tree: Any) -> Any:
    """The plainest value that a schema allows."""
    if "const" in tree or "enum" in tree:
        return tree["const"] if "const" in tree else tree["enum"][-1]
    match tree["type"]:
        case "object":
            return {name: sample(part) for name, part in tree["properties"].items()}
        case "array":
            return [sample(part) for part in tree.get("prefixItems") or [tree["items"]]]
    return {"string": "sample", "integer": 0, "boolean": False}[tree["type"]]
