"""An answer of a language model as statements: its sentences and list items, in order.

Prose, Markdown lists and numbered steps; abbreviations, initials, decimals and list numbers end no sentence. A lead-in
("Garlic has these benefits:") states nothing by itself, so it stays with what it leads to, and with each list item too
short to be understood alone; a courtesy ("I hope this helps!") states nothing at all and is left out, and so is a bare
refusal ("Unable to answer based on given passages."), unless there is nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

Part = TypeVar("Part")

WAY = "sentences 1"
"""For fingerprints; another number once any answer is cut otherwise."""

_MARKER = re.compile(r"^\s*(?:[-*•–‣◦]|#{1,6}|>|\(?(?:\d{1,3}[.)]|[a-zA-Z]\)))\s+")
"""A bullet, heading mark or list number at the start of a line or sentence."""
_END = re.compile(r"[.!?…؟।]+[\"'”’)\]*_]*(?=\s+[\"'“‘(\[*_]*([^\W_]))|[。！？｡]+[」』”’）)\]]*()")
"""Where a sentence may end: the next one does not begin with a small letter, where letters have two sizes."""
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[\"'“])(?:mr|mrs|ms|dr|prof|sr|jr|st|mt|ft|vs|etc|eg|e\.g|ie|i\.e|cf|al|approx|no|nos|vol|fig|eq|sec|"
    r"inc|ltd|co|corp|dept|est|gen|gov|sen|rep|rev|hon|capt|col|sgt|lt|u\.s|u\.k|u\.n|a\.m|p\.m|ph\.d|jan|feb|mar|apr|"
    r"jun|jul|aug|sept|sep|oct|nov|dec|[a-z])\.$",
    re.IGNORECASE,
)
_NUMBER_ALONE = re.compile(r"(?:^|[:;.!?]\s+|\s)\(?\d{1,3}\.$")
"""What stands before a list number inside a line: `... this. 2.`"""
_COURTESY = re.compile(
    r"(?:sure|certainly|of course|absolutely|great question|good luck|enjoy|you're welcome|thank you|thanks)[!.,]*|"
    r"(?:(?:sure|certainly|of course|absolutely|yes)[,.!]* )?(?:i can|i will|i'll|let me) (?:\w+ly )?"
    r"(?:help|assist)(?: you)?(?: (?:with|find) (?:that|this|it|your question|the question))?[.!]*|"
    r"(?:i )?hope (?:this|that|it) (?:helps|is helpful)\b.*|"
    r"(?:please )?(?:let me know|feel free)\b.*|(?:if you have|do you have) any (?:other|more|further|questions).*|"
    r"(?:is there anything|how can i|i'?m happy to|i'?d be happy to)\b.*",
    re.IGNORECASE,
)
_OF_THEM = (
    r"(?: (?:based on|from|with|given|in|using)(?: only)?(?: the| these| this| your)?(?: given| provided| available)?"
    r" (?:passages?|contexts?|documents?|sources?|information|text)(?: provided| given| alone)?)?"
)
_QUESTION = (
    r"(?: (?:to )?(?:the|this|that|your|a|an|any)(?: \w+)? (?:question|query|answer|response)| this| it)?"
)
_REFUSAL = re.compile(
    r"\W*(?:(?:note(?: that)?|therefore|thus|so|however|unfortunately|sorry|i(?:'m| am) sorry)[,:]? (?:but )?)?(?:"
    r"(?:(?:i(?:'m| am)|we are|it is) )?(?:unable|not able|not possible|impossible) to"
    rf" (?:answer|respond|provide|give|determine){_QUESTION}{_OF_THEM}|"
    rf"(?:i|we) (?:cannot|can't|can not|could not|couldn't) (?:answer|respond|provide|give){_QUESTION}{_OF_THEM}|"
    rf"(?:(?:the|these|this|your) )?(?:(?:given|provided|available) )?(?:passages?|contexts?|documents?|sources?|text)"
    r"(?: provided)? (?:do not|does not|don't|doesn't) (?:contain|provide|have|give|include)"
    r"(?: the| any| enough| sufficient| necessary)* information(?: needed| required)?"
    rf" to (?:answer|respond){_QUESTION}|"
    r"there is (?:no|not enough|insufficient) (?:sufficient )?information"
    rf"{_OF_THEM} to (?:answer|respond){_QUESTION}{_OF_THEM}|"
    rf"i (?:do not|don't) have (?:enough|sufficient|the) information to (?:answer|respond){_QUESTION}{_OF_THEM})\W*",
    re.IGNORECASE,
)
"""A sentence that says that there is no answer, and nothing else."""
_CITATION = re.compile(
    r"\s*\([^()]{0,40}?\b(?:passages?|sources?|documents?|contexts?)\s+\d[^()]{0,40}\)|\s*\[\d{1,2}(?:\s*,\s*\d{1,2})*\]",
    re.IGNORECASE,
)
_PASSAGE = re.compile(r"^(?:passage|source|document|context) \d{1,2}: *", re.IGNORECASE)
"""A citation before what it is of."""
_EMPHASIS = re.compile(r"\*\*|__")
_WORD = re.compile(r"[぀-ヿ㐀-鿿]{2}|[^\W_]{2,}")
"""Two characters at least, and no more of a script without spaces."""


SHORT_ITEM = 6
"""A list item of fewer words is not understood without its lead-in."""


def sentences_of(text: str) -> list[str]:
    """The statements of an answer: at least one unless it is blank; list markers and emphasis are dropped."""
    lines = [_CITATION.sub("", _EMPHASIS.sub("", line)) for line in text.splitlines()]
    pieces = [(piece, bool(_MARKER.match(line))) for line in lines for piece in _sentences(line)]
    found: list[str] = []
    waiting, lead = "", ""  # what must not stand alone; the lead-in of the list that we are in
    telling = [each for each in pieces if not _COURTESY.fullmatch(each[0])]
    claiming = [each for each in telling if not _REFUSAL.fullmatch(each[0].replace("’", "'"))]
    for piece, listed in claiming or telling[:1] or pieces[:1]:
        words = len(_WORD.findall(piece))
        if piece.endswith(":"):
            waiting = lead = f"{waiting} {piece}".strip()
            continue
        if not listed and not waiting:
            lead = ""
        if waiting:
            found.append(f"{waiting} {piece}")
            waiting = ""
        elif listed and lead and words < SHORT_ITEM:
            found.append(f"{lead} {piece}")
        elif words >= 2:
            found.append(piece)
        elif found:  # "Period."
            found[-1] += f" {piece}"
        else:  # "Yes."
            waiting = piece
    if waiting or not found:  # "b) " alone is no list item
        found += [waiting or " ".join(" ".join(lines).split()) or text.strip()] if text.strip() else []
    return found


def _sentences(line: str) -> list[str]:
    """The sentences of one line without their list markers."""
    pieces = []
    start = 0
    for match in _END.finditer(line):
        before = line[start : match.end()]
        if (match[1] or "").islower():
            continue
        if _ABBREVIATION.search(before) and match[0] == ".":
            continue
        if match[0] == "." and _NUMBER_ALONE.search(before) and _is_list_number(before):
            continue
        pieces.append(before)
        start = match.end()
    pieces.append(line[start:])
    return [clean for piece in pieces if (clean := _PASSAGE.sub("", _MARKER.sub("", piece)).strip())]


def _is_list_number(before: str) -> bool:
    """Whether the number that `before` ends with opens a list item: nothing, or a whole sentence, comes before it."""
    head = re.sub(r"\(?\d{1,3}\.$", "", before).rstrip()
    return not head or head[-1] in ".!?:;"


def even_parts(whole: Sequence[Part], most: int) -> list[tuple[Part, ...]]:
    """`whole` in as few parts of at most `most` as it takes, their sizes as equal as can be."""
    count = -(-len(whole) // most)
    ends = [len(whole) * i // count for i in range(count + 1)] if count else []
    return [tuple(whole[a:b]) for a, b in zip(ends, ends[1:], strict=False)]
