"""LangChain users get the same engine: text, structured output, stops, seeds and usage."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
from fake_engine import FakeEngine
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from pydantic import BaseModel, Field

from ragate.errors import ConfigError
from ragate.langchain import ChatRagate

if TYPE_CHECKING:
    from collections.abc import Iterator


class Verdict(BaseModel):
    """A judgement."""

    reason: str = Field(description="why")
    tags: list[str]


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    fake = FakeEngine()
    yield fake
    fake.close()


def test_a_conversation_goes_through_the_chat_template(engine: FakeEngine) -> None:
    messages = [SystemMessage("Be brief."), HumanMessage("Hi"), AIMessage("Yes?"), HumanMessage("Why?")]
    answer = ChatRagate(engine=engine).invoke(messages)
    assert engine.prompts == ["<system>Be brief.<user>Hi<assistant>Yes?<user>Why?<assistant>"]
    assert answer.text.startswith("It is ")
    assert answer.usage_metadata["input_tokens"] == len(engine.prompts[0])
    assert answer.usage_metadata["output_tokens"] == len(answer.text)
    assert answer.response_metadata["finish_reason"] == "stop"


def test_sync_and_async_give_the_same_text(engine: FakeEngine) -> None:
    chat = ChatRagate(engine=engine)
    chain = ChatPromptTemplate.from_messages([("human", "About {topic}")]) | chat

    async def several() -> list[Any]:
        return await chain.abatch([{"topic": "blocks"}, {"topic": "pages"}])

    blocks, pages = asyncio.run(several())
    assert blocks.text == chain.invoke({"topic": "blocks"}).text != pages.text


def test_settings_come_from_the_instance_or_the_call(engine: FakeEngine) -> None:
    chat = ChatRagate(engine=engine, temperature=0.5, seed=7, max_tokens=30)
    chat.invoke("a")
    chat.invoke("a", temperature=0.0, max_tokens=3, seed=1)
    chat.bind(stop=["is"]).invoke("a")
    settings = [(p.temperature, p.seed, p.max_tokens, p.stop) for p in engine.params]
    assert settings == [(0.5, 7, 30, ()), (0.0, 1, 3, ()), (0.5, 7, 30, ("is",))]


def test_a_stop_word_ends_the_text_and_a_limit_says_length(engine: FakeEngine) -> None:
    chat = ChatRagate(engine=engine)
    assert chat.invoke("a", stop=[" is"]).text == "It"
    cut = chat.invoke("a", max_tokens=4)
    assert (cut.text, cut.response_metadata["finish_reason"]) == ("It i", "length")


def test_structured_output_is_an_instance_of_the_class(engine: FakeEngine) -> None:
    found = ChatRagate(engine=engine).with_structured_output(Verdict).invoke("Judge.")
    assert isinstance(found, Verdict)
    assert found.tags
    assert json.loads(engine.params[0].schema or "") == {
        "additionalProperties": False,
        **Verdict.model_json_schema(),
    }


def test_structured_output_of_a_dict_schema_is_a_dict(engine: FakeEngine) -> None:
    schema = Verdict.model_json_schema()
    found = ChatRagate(engine=engine).with_structured_output(schema).invoke("Judge.")
    assert list(found) == ["reason", "tags"]


def test_structured_output_with_raw_keeps_the_message_and_the_parsing_error(engine: FakeEngine) -> None:
    chain = ChatRagate(engine=engine).with_structured_output(Verdict, include_raw=True)
    found = chain.invoke("Judge.")
    assert found["parsed"] == Verdict.model_validate_json(found["raw"].text)
    assert found["parsing_error"] is None
    cut = (
        ChatRagate(engine=engine, max_tokens=5).with_structured_output(Verdict, include_raw=True).invoke("a")
    )
    assert cut["raw"].text == '{"rea'
    assert cut["parsed"] is None
    assert str(cut["parsing_error"]).startswith("the answer is not complete: 1 validation error for Verdict")


def test_a_cut_answer_is_never_mended_in_silence(engine: FakeEngine) -> None:
    chain = ChatRagate(engine=engine, max_tokens=15).with_structured_output(Verdict.model_json_schema())
    with pytest.raises(OutputParserException, match="the answer is not complete"):
        chain.invoke("Judge.")


def test_what_the_model_cannot_take_is_refused_by_name(engine: FakeEngine) -> None:
    chat = ChatRagate(engine=engine)
    with pytest.raises(ConfigError, match="unknown option top_n"):
        chat.invoke("a", top_n=3)
    with pytest.raises(ConfigError, match="not a tool message"):
        chat.invoke([ToolMessage("x", tool_call_id="1")])
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    with pytest.raises(ConfigError, match="not a human message"):
        chat.invoke([HumanMessage([image])])
    assert engine.prompts == []
