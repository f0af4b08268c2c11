"""Chat templates: a stranger's jinja2 program, run in a sandbox and on a budget."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ragate_engine.errors import ConfigError, ModelFileError

if TYPE_CHECKING:
    from pathlib import Path

_MAX_CHARS = 1 << 24
"""Length of the longest prompt that a template may write."""
_MAX_REPEAT = 1 << 16
"""The largest factor, exponent or range that it may use."""
_TODAY = datetime.datetime(2024, 7, 26, tzinfo=datetime.UTC)
"""What a template that asks for the date is told: a prompt must not change from one day to the next."""


class _RefusedError(Exception):
    """Raised from inside a template, through `raise_exception`."""


class _Generation(jinja2.ext.Extension):
    """The tag by which training marks what the model wrote: to a prompt it is nothing but its body."""

    tags: set[str] = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """What transformers offers to a template, except for the clock and for room to run wild."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
        )
        self.filters["tojson"] = _tojson
        self.globals |= {"raise_exception": _refuse, "strftime_now": _TODAY.strftime, "range": _short_range}

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if any(isinstance(side, (int, float)) and abs(side) > _MAX_REPEAT for side in (left, right)):
            raise jinja2.TemplateRuntimeError(f"it multiplies by more than {_MAX_REPEAT}")
        return super().call_binop(context, operator, left, right)


def _refuse(reason: str) -> None:
    raise _RefusedError(reason)


def _short_range(*bounds: int) -> range:
    steps = range(*bounds)
    if len(steps) > _MAX_REPEAT:
        raise jinja2.TemplateRuntimeError(f"it loops over more than {_MAX_REPEAT} steps")
    return steps


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


@dataclass(frozen=True)
class ChatTemplate:
    """The template of one model; `origin` is the file that errors name. Compiled when first used."""

    source: str
    origin: Path

    @cached_property
    def _compiled(self) -> jinja2.Template:
        try:
            return _Environment().from_string(self.source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ModelFileError(f"{self.origin}: its chat template cannot be compiled: {error}") from None

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool, **tokens: str) -> str:
        """The prompt of `messages`. `tokens`: the text of bos_token and eos_token.

        Raises ConfigError where the template refuses the messages, ModelFileError where it fails.
        """
        template = self._compiled
        parts: list[str] = []
        room = _MAX_CHARS
        try:
            for part in template.generate(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **tokens,
            ):
                parts.append(part)
                room -= len(part)
                if room < 0:
                    raise jinja2.TemplateRuntimeError("it writes without end")
        except _RefusedError as error:
            raise ConfigError(f"the chat template of {self.origin} refuses these messages: {error}") from None
        except Exception as error:  # whatever a stranger's program can fail with
            raise ModelFileError(f"{self.origin}: its chat template fails: {error}") from None
        return "".join(parts)
