"""Text from test sets, contexts and judges made safe to show: no control characters, no terminal escapes."""

from __future__ import annotations

import re

# CSI (colours, cursor), OSC (titles, links) up to BEL or ST, and the two-character escapes of ECMA-48
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_].*?(?:\x07|\x1b\\|$)|\x1b[ -/]*[0-~]", re.DOTALL)
# C0 but tab and newline, DEL, C1, and the characters that reorder the text around them
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    """One line without escape sequences and control characters: for terminals and tables."""
    text = _ESCAPES.sub("", text.replace("\r\n", "\n"))
    text = _CONTROLS.sub("", re.sub(r"[\t\n\r\v\f\x85\u2028\u2029]+", " ", text))
    return _no_surrogates(text).strip()


def plain_lines(text: str) -> str:
    """`text` with its lines kept, each of them `plain`: for the text of an answer in a terminal."""
    lines = _ESCAPES.sub("", text.replace("\r\n", "\n")).splitlines()
    return "\n".join(plain(line) for line in lines).strip()


def visible(text: str) -> str:
    """`text` with its lines kept and each control character shown as a symbol (ESC as ␛): for the page."""
    text = re.sub(r"\r\n?|[\x85\u2028\u2029]", "\n", text)
    return _no_surrogates(_CONTROLS.sub(_picture, text))


def xml_text(text: str) -> str:
    """`visible` without the two characters that XML does not know."""
    return visible(text).replace("\ufffe", "\ufffd").replace("\uffff", "\ufffd")


def _picture(match: re.Match[str]) -> str:
    code = ord(match.group())
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"


def _no_surrogates(text: str) -> str:
    """Lone surrogates cannot be written as UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")
