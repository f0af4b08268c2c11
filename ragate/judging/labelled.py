"""Answers that people have labelled, from a JSON Lines file: what a judge is measured on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ragate.errors import TestSetError

Subject = Literal["faithfulness", "relevance"]
"""What the label is of: the answer's faithfulness, or the usefulness of each context."""

NO_QUESTION = "Is this claim true?"
"""Stands in for the question where a file has none (WiCE's claims): ragas' relevance prompt wants one."""

_CONTEXTS = ("contexts", "context_sentences")


@dataclass(frozen=True)
class Labelled:
    """An answer, the contexts it should follow from, and what people said."""

    id: str
    question: str
    contexts: tuple[str, ...]
    answer: str
    faithful: int | None
    """1 or 0; `None` where nobody said."""
    context_relevant: tuple[int, ...] | None
    """1 or 0 a context."""
    generator: str
    """Who wrote the answer; empty where unknown."""
    cluster: str
    """Source of the item: items of one source are alike, and stay together."""

    def labelled(self, subject: Subject) -> bool:
        """Whether the item has the label that `subject` needs."""
        return (self.faithful if subject == "faithfulness" else self.context_relevant) is not None


def load_labelled(path: Path, subject: Subject) -> tuple[list[Labelled], int]:
    """(the items of `path` with the label for `subject`, how many have none), in the file's order.

    A row has `answer`, `contexts` or `context_sentences`, and `faithful` (1, 0 or null) or `context_relevant` (1 or 0
    a context; or `supporting_sentences`, sets of positions as in WiCE); `question`, `generator`, `source_id` and `id`
    where known. Without a source_id items with the same contexts are of one source. Raises TestSetError naming file,
    line and field.
    """
    try:
        # not splitlines: JSON may hold U+2028 and its like as they are
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as e:
        raise TestSetError(
            f"{path}: cannot be read: {e.strerror}; name a .jsonl file of labelled answers"
        ) from None
    except UnicodeDecodeError as e:
        raise TestSetError(f"{path}: byte {e.start} is not UTF-8; save the file as UTF-8") from None
    found: list[Labelled] = []
    ids: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        item = _item(path, number, line)
        if item.id in ids:
            raise TestSetError(f"{path}:{number}: id: {item.id!r:.80} is that of line {ids[item.id]} already")
        ids[item.id] = number
        found.append(item)
    kept = [item for item in found if item.labelled(subject)]
    if not kept:
        field = "faithful" if subject == "faithfulness" else "context_relevant"
        raise TestSetError(f"{path}: {field}: no row has it; it is 1 or 0, as people labelled the answer")
    return kept, len(found) - len(kept)


def spread(items: list[Labelled], count: int | None) -> list[Labelled]:
    """`count` of the items, evenly spaced; all where there are no more."""
    if count is None or count >= len(items):
        return items
    return [items[i * len(items) // count] for i in range(count)]


def _item(path: Path, number: int, line: str) -> Labelled:
    where = f"{path}:{number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise TestSetError(f"{where}: not JSON; write one object a line") from None
    if not isinstance(row, dict):
        raise TestSetError(f"{where}: expected a JSON object, got {row!r:.40}")
    name = next((name for name in _CONTEXTS if row.get(name) is not None), None)
    if name is None:
        raise TestSetError(f"{where}: contexts: missing; name the passages `contexts`, a list of texts")
    contexts = row[name]
    if not isinstance(contexts, list) or not contexts or not all(isinstance(c, str) for c in contexts):
        raise TestSetError(f"{where}: {name}: expected a list of texts, got {contexts!r:.60}")
    answer = row.get("answer")
    if not isinstance(answer, str) or not answer.strip():
        raise TestSetError(f"{where}: answer: expected a text, got {answer!r:.60}")
    question = row.get("question")
    if question is not None and not isinstance(question, str):
        raise TestSetError(f"{where}: question: expected a text, got {question!r:.60}")
    source = row.get("source_id")
    same = hashlib.sha256("\n".join(contexts).encode("utf-8", "replace")).hexdigest()[:16]
    item = Labelled(
        id=str(number if row.get("id") is None else row["id"]),
        question=question or NO_QUESTION,
        contexts=tuple(contexts),
        answer=answer,
        faithful=_label(where, "faithful", row.get("faithful")),
        context_relevant=_relevant(where, row, len(contexts)),
        generator=str(row.get("generator") or ""),
        cluster=same if source is None else str(source),
    )
    used = {"id": item.id, "answer": answer, "question": item.question, "generator": item.generator}
    for field, text in [*used.items(), ("source_id", item.cluster), *((name, text) for text in contexts)]:
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise TestSetError(f"{where}: {field}: half of a surrogate pair at character {e.start}") from None
    return item


def _label(where: str, field: str, value: Any) -> int | None:
    if value is None:
        return None
    if value not in (0, 1):  # true and false are 1 and 0
        raise TestSetError(f"{where}: {field}: expected 1, 0 or null, got {value!r:.40}")
    return int(value)


def _relevant(where: str, row: dict[str, Any], count: int) -> tuple[int, ...] | None:
    labels, supporting = row.get("context_relevant"), row.get("supporting_sentences")
    if labels is not None:
        if not isinstance(labels, list) or len(labels) != count or any(v not in (0, 1) for v in labels):
            raise TestSetError(
                f"{where}: context_relevant: expected 1 or 0 for each of {count} contexts, got {labels!r:.60}"
            )
        return tuple(map(int, labels))
    if supporting is None:
        return None
    sets = supporting if isinstance(supporting, list) else [supporting]
    places = [place for each in sets for place in (each if isinstance(each, list) else [each])]
    if any(type(place) is not int or not 0 <= place < count for place in places):
        raise TestSetError(
            f"{where}: supporting_sentences: expected positions below {count}, got {supporting!r:.60}"
        )
    return tuple(int(i in places) for i in range(count))
