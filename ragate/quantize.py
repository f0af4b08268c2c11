"""`ragate models quantize`: which model, and the text that it is calibrated on: by default what a judge is asked."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING

from ragate.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ragate.config import Settings
    from ragate.suite import Say
    from ragate_engine import Tokenizer

SEQUENCES = 128
"""Token sequences to calibrate on, at most; as many as the papers take."""
TOKENS = 512
"""Length of each, at most."""
ITEMS = 64
"""Test cases whose prompts are looked at, at most."""


def quantize(
    source: str,
    folder: Path,
    settings: Settings,
    say: Say,
    *,
    method: str,
    bits: int,
    group: int,
    symmetric: bool,
    desc_act: bool,
    text: Path | None,
    mix: str,
    adapter: str | None,
) -> None:
    """Quantize the model `source`, a catalogue name or a path, into `folder`; called again it resumes.

    The `adapter`, or else the one that it wears by itself, is added first; that of `settings` is their judge's.

    By the method `gguf` it becomes a file, `folder`, of the `mix`, whole or not at all. By others it is calibrated on
    the file `text`, else on the prompts for the test set of `settings`. Raises RagateError and the engine's errors.
    Imports torch.
    """
    from ragate import catalog
    from ragate_engine import merge_adapter, open_checkpoint, quantize_model, write_gguf

    choice = catalog.resolve_judge(
        source, progress=lambda done, total: say("fetching the model", done, total)
    )
    checkpoint = open_checkpoint(choice.path)
    if worn := adapter or choice.adapter:
        checkpoint = merge_adapter(checkpoint, worn)
    if method == "gguf":
        write_gguf(checkpoint, folder, mix, lambda done, total: say("writing", done, total), settings.device)
        return
    calibration: list[list[int]] = []
    if method != "rtn":
        if checkpoint.tokenizer is None:
            raise ConfigError(
                f"{choice.path} has no tokenizer to calibrate with; add its tokenizer.json, or take rtn"
            )
        calibration = calibration_of(checkpoint.tokenizer, settings, text)
    quantize_model(
        checkpoint,
        folder,
        method,
        bits,
        group,
        calibration,
        settings.device,
        lambda done, total: say("quantizing (layers)", done, total),
        symmetric=symmetric,
        desc_act=desc_act,
    )


def calibration_of(tokenizer: Tokenizer, settings: Settings, text: Path | None) -> list[list[int]]:
    """Up to 128 sequences of up to 512 tokens: of the file `text`, else of the test set's prompts.

    Raises ConfigError where there is neither, or no text in it; TestSetError.
    """
    if text is not None:
        try:
            documents = [
                tokenizer.encode(text.read_text(encoding="utf-8"), special=False, bos=tokenizer.add_bos)
            ]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{text} cannot be read as UTF-8 text: {error}") from None
    elif settings.testset:
        prompts = prompts_for(settings)
        documents = [tokenizer.encode_chat([{"role": "user", "content": prompt}]) for prompt in prompts]
    else:
        raise ConfigError(
            "there is no text to calibrate on; name a file with --text or a test set with --testset"
        )
    sequences = pieces(documents, tokenizer.bos_id if tokenizer.add_bos else None)
    if not sequences:
        raise ConfigError(
            f"{text or settings.testset} holds no text to calibrate on; name another with --text"
        )
    return sequences


def pieces(documents: Sequence[Sequence[int]], bos: int | None = None) -> list[list[int]]:
    """The documents cut into sequences; of the distinct ones as many as are wanted, evenly spaced.

    Prompts of a metric begin alike for some thousand tokens: those count once, and from each comes what is its own. A
    document's last sequence is cut from its end, so that it is no crumb. Each begins with `bos`, where the model never
    sees a text without it.
    """
    head = () if bos is None else (bos,)
    bare = [document[1:] if [*document[:1]] == [*head] else document for document in documents]
    size = TOKENS - len(head)
    cut = (
        (*head, *document[at : at + size])
        for document, own in zip(bare, _own(bare), strict=True)
        if document
        for at in (*range(own, len(document) - size, size), max(0, len(document) - size))
    )
    distinct = [list(piece) for piece in dict.fromkeys(cut)]
    wanted = min(SEQUENCES, len(distinct))
    return [distinct[i * len(distinct) // wanted] for i in range(wanted)]


def _own(documents: Sequence[Sequence[int]]) -> list[int]:
    """Where each document ceases to be like the one before it in the order of their tokens."""
    own = [0] * len(documents)
    order = sorted(range(len(documents)), key=lambda i: [*documents[i]])
    for before, i in itertools.pairwise(order):
        pairs = zip(documents[before], documents[i], strict=False)
        own[i] = next((at for at, (a, b) in enumerate(pairs) if a != b), len(documents[before]))
    return own


def prompts_for(settings: Settings) -> list[str]:
    """What a judge is asked about the items of the test set by each metric of `settings`."""
    from ragate.forecast import calls_of, record_of
    from ragate.testset import load_testset

    items = load_testset(settings.testset, limit=settings.limit).items
    wanted = min(ITEMS, len(items))
    records = [record_of(items[i * len(items) // wanted]) for i in range(wanted)]
    return [prompt for _, prompt in asyncio.run(calls_of(records, settings))]
