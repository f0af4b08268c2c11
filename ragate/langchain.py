"""The engine for LangChain users: a chat model and the embeddings, through langchain-core alone.

`ChatRagate(model="smollm2-135m").invoke("Hello")`, or `ChatRagate(engine=…)` over one that is there.
"""

from __future__ import annotations

import asyncio
import json
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from langchain_core.embeddings import Embeddings
from langchain_core.exceptions import OutputParserException
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, convert_to_openai_messages
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import Runnable, RunnableLambda, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema
from pydantic import BaseModel, Field

from ragate.errors import ConfigError

if TYPE_CHECKING:
    from concurrent.futures import Future
    from pathlib import Path

    from ragate.embeddings import MiniLM
    from ragate_engine import Completion, Engine


class ChatRagate(BaseChatModel):  # type: ignore[misc]
    """A chat model that the engine of this process serves; one engine a model, however many instances.

    Greedy unless `temperature` is above 0; the same `seed` gives the same text. `temperature`, `max_tokens`,
    `seed` and `stop` can also be given to `invoke` or `bind`, for one call.
    """

    model: str = "auto"
    """A name of `ragate models list`, a .gguf file or a model folder; unused when `engine` is given."""
    engine: Any = Field(default=None, exclude=True, repr=False)
    """A `ragate_engine.Engine`, to share one."""
    temperature: float = 0.0
    max_tokens: int = 256
    seed: int = 0

    @property
    def _llm_type(self) -> str:
        return "ragate"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
        }

    def with_structured_output(
        self, schema: dict[str, Any] | type, *, include_raw: bool = False, **kwargs: Any
    ) -> Runnable:
        """A runnable that answers in `schema`: an instance of a pydantic class, else a dict.

        The engine decodes under the schema's grammar, so the output always has its form; only running into
        `max_tokens` makes it fail to parse. With `include_raw`: {"raw", "parsed", "parsing_error"}.
        """
        if kwargs:
            raise ConfigError(f"with_structured_output: unknown option {', '.join(kwargs)}")
        model = schema if isinstance(schema, type) and issubclass(schema, BaseModel) else None
        tree = model.model_json_schema() if model else convert_to_json_schema(schema)

        def parse(message: AIMessage) -> Any:
            try:
                return model.model_validate_json(message.text) if model else json.loads(message.text)
            except ValueError as e:  # LangChain's own parsers would mend a cut answer without a word
                raise OutputParserException(
                    f"the answer is not complete: {e}", llm_output=message.text
                ) from e

        parser = RunnableLambda(parse)
        writer = self.bind(schema=json.dumps(_closed(tree), separators=(",", ":")))
        if not include_raw:
            return writer | parser
        parsed = RunnablePassthrough.assign(
            parsed=itemgetter("raw") | parser, parsing_error=RunnableLambda(lambda _: None)
        )
        failed = RunnablePassthrough.assign(parsed=RunnableLambda(lambda _: None))
        return {"raw": writer} | parsed.with_fallbacks([failed], exception_key="parsing_error")

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: Any = None,
        **kwargs: Any,
    ) -> ChatResult:
        return _result(self._submit(messages, stop, kwargs).result(), self.model)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: Any = None,
        **kwargs: Any,
    ) -> ChatResult:
        if self.engine is None:
            await asyncio.to_thread(self._engine)  # loading takes seconds
        return _result(await asyncio.wrap_future(self._submit(messages, stop, kwargs)), self.model)

    def _engine(self) -> Engine:
        if self.engine is None:
            from ragate.catalog import resolve_judge
            from ragate.session import open_engine

            choice = resolve_judge(self.model)
            self.engine = open_engine(choice.path, adapter=choice.adapter)
        engine: Engine = self.engine
        return engine

    def _submit(
        self, messages: list[BaseMessage], stop: list[str] | None, options: dict[str, Any]
    ) -> Future[Completion]:
        from ragate.session import worn
        from ragate_engine import SamplingParams

        params = SamplingParams(
            max_tokens=options.pop("max_tokens", self.max_tokens),
            temperature=options.pop("temperature", self.temperature),
            seed=options.pop("seed", self.seed),
            stop=tuple(stop or ()),
            schema=options.pop("schema", None),
        )
        options.pop("ls_structured_output_format", None)
        if options:
            raise ConfigError(f"ChatRagate: unknown option {', '.join(sorted(options))}")
        engine = self._engine()
        prompt = engine.chat_prompt([_turn(message) for message in messages])
        return engine.submit(prompt, params, worn(engine))


class RagateEmbeddings(Embeddings):  # type: ignore[misc]
    """all-MiniLM-L6-v2 on the CPU: 384 numbers a text, the same that answer relevance is scored with."""

    def __init__(self, path: Path | None = None) -> None:
        """Take the model from a folder, or from the catalogue; it is loaded on first use."""
        self._path = path
        self._model: MiniLM | None = None

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """One embedding a text."""
        if self._model is None:
            from ragate.embeddings import MiniLM

            self._model = MiniLM(self._path)
        return [self._model.embed_text(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        """The embedding of one text."""
        return self.embed_documents([text])[0]


def _closed(tree: Any) -> Any:
    """The schema with no room for keys that it does not name, where it does not say otherwise."""
    if isinstance(tree, list):
        return [_closed(part) for part in tree]
    if not isinstance(tree, dict):
        return tree
    closed = {name: _closed(part) for name, part in tree.items()}
    return {"additionalProperties": False, **closed} if isinstance(tree.get("properties"), dict) else closed


def _turn(message: BaseMessage) -> dict[str, str]:
    turn = convert_to_openai_messages(message, text_format="string")
    if not isinstance(turn.get("content"), str) or turn["role"] not in ("system", "user", "assistant"):
        raise ConfigError(
            f"ChatRagate: takes system, human and AI messages of text, not a {message.type} message"
        )
    return {"role": turn["role"], "content": turn["content"]}


def _result(completion: Completion, model: str) -> ChatResult:
    message = AIMessage(
        content=completion.text,
        response_metadata={"finish_reason": completion.finish, "model_name": model},
        usage_metadata={
            "input_tokens": completion.prompt_tokens,
            "output_tokens": len(completion.tokens),
            "total_tokens": completion.prompt_tokens + len(completion.tokens),
            "input_token_details": {"cache_read": completion.cached_tokens},
        },
    )
    return ChatResult(generations=[ChatGeneration(message=message)])
