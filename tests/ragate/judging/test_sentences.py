"""How an answer becomes statements."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragate.judging.sentences import WAY, even_parts, sentences_of

DOCUMENTS = Path("testsets/llm-serving/documents")


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        (
            "Dr. Smith paid $3.5 million in the U.S. last year. He left.",
            ["Dr. Smith paid $3.5 million in the U.S. last year.", "He left."],
        ),
        (
            "J. K. Rowling, e.g. in 1997, wrote it. Really!",
            ["J. K. Rowling, e.g. in 1997, wrote it. Really!"],
        ),
        ('She said "No way." Then she left.', ['She said "No way."', "Then she left."]),
        ("It was in 1984. 5 people came.", ["It was in 1984.", "5 people came."]),
        ("Is it open? It is. Come in!", ["Is it open?", "It is.", "Come in!"]),
        ("Yes. It opens at 9 a.m. daily.", ["Yes. It opens at 9 a.m. daily."]),
        ("first line without a stop\nsecond line", ["first line without a stop", "second line"]),
    ],
)
def test_prose_is_cut_where_a_sentence_ends_and_nowhere_else(text: str, sentences: list[str]) -> None:
    assert sentences_of(text) == sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        (
            "Garlic has these benefits:\n\n* Weight loss\n* It lowers the pressure of the blood.\n\nEat it daily.",
            [
                "Garlic has these benefits: Weight loss",
                "It lowers the pressure of the blood.",
                "Eat it daily.",
            ],
        ),
        (
            "Garlic has these benefits:\n1. Weight loss\n2. Pain relief",
            ["Garlic has these benefits: Weight loss", "Garlic has these benefits: Pain relief"],
        ),
        (
            "Steps: 1. Wash the car well. 2. Dry it.",
            ["Steps: 1. Wash the car well.", "Dry it."],
        ),
        ("- **Bold**: is dropped\n- so are the bullets", ["Bold: is dropped", "so are the bullets"]),
    ],
)
def test_list_items_are_statements_and_short_ones_keep_their_lead_in(text: str, sentences: list[str]) -> None:
    assert sentences_of(text) == sentences


def test_what_states_nothing_is_left_out() -> None:
    text = (
        "Sure! The sky is blue (Passage 1) and wide [2, 3]. I hope this helps! Let me know if you want more."
    )
    assert sentences_of(text) == ["The sky is blue and wide."]
    assert sentences_of("It rained (as mentioned in Passage 2). It was cold (2019).") == [
        "It rained.",
        "It was cold (2019).",
    ]
    assert sentences_of("**Passage 1**: It rained.\n* Source 2: It snowed.") == ["It rained.", "It snowed."]
    assert sentences_of("It has benefits:\n* Passage 1: fewer colds\n* Passage 2: better sleep") == [
        "It has benefits: fewer colds",
        "It has benefits: better sleep",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "Sure, I can help you with that!",
        "Yes, I'll help you find it.",
        "Unable to answer based on given passages.",
        "Therefore, I cannot provide a response based on the given passages.",
        "(The passages don’t contain the necessary information to answer the question.)",
    ],
)
def test_offers_and_bare_refusals_state_nothing(text: str) -> None:
    assert sentences_of(f"{text} It opens at nine.") == ["It opens at nine."]
    assert sentences_of(text) == [text]  # but where there is nothing else, they are all there is


@pytest.mark.parametrize(
    "text",
    [
        "The passages do not mention Berlin.",
        "It cannot be given to children.",
        "Unable to answer based on the passages: the fee of 2019 is not in them.",
        "It can help with headaches.",
        "No, it is not.",
        "Therefore, the answer to your question is no.",
        "You do not have to answer any questions.",
        "No response is necessary.",
        "Sure, I can help you with that: the fee is $40.",
        "Yes, I can help with that - the capital of Australia is Sydney.",
        "I will assist the director of the film in Berlin.",
    ],
)
def test_what_names_something_of_its_own_is_no_refusal(text: str) -> None:
    assert sentences_of(f"It opens at nine. {text}")[1:] == [text]


def test_an_answer_that_is_nothing_but_a_courtesy_is_still_a_statement() -> None:
    assert sentences_of("Sure!") == ["Sure!"]
    refusal = "Unable to answer based on given passages."
    assert sentences_of(f"Sure, I can help you with that! {refusal}") == [refusal]
    assert sentences_of(" \n ") == []


def test_a_list_marker_alone_is_still_a_statement() -> None:
    assert sentences_of("b) ") == ["b)"]


@given(st.text(alphabet="aß .!?:1-*\n()A", max_size=80))
def test_no_word_is_lost_or_made_up(text: str) -> None:
    found = sentences_of(text)
    assert all(sentence.strip() for sentence in found) and bool(found) == bool(text.strip())
    assert "".join(found).count("ß") >= text.count("ß")  # no marker of a list; a lead-in may come again


def test_parts_are_even_and_none_is_too_large() -> None:
    assert even_parts(range(9), 8) == [(0, 1, 2, 3), (4, 5, 6, 7, 8)]
    assert even_parts([1, 2], 8) == [(1, 2)]
    assert even_parts([], 8) == []


def test_answers_that_are_cut_otherwise_get_another_fingerprint() -> None:
    texts = [path.read_text(encoding="utf-8") for path in sorted(DOCUMENTS.glob("*.md"))]
    cut = "\n".join("\n".join(sentences_of(text)) for text in texts)
    assert len(texts) == 25
    assert (WAY, hashlib.sha256(cut.encode()).hexdigest()[:16]) == ("sentences 1", "b9ca5229341cba49")


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("Это первое предложение. Это второе.", ["Это первое предложение.", "Это второе."]),
        ("Это третье, т. е. последнее.", ["Это третье, т. е. последнее."]),
        ("Αυτή είναι μία. Αυτή είναι δύο.", ["Αυτή είναι μία.", "Αυτή είναι δύο."]),
        ("这是第一句。这是第二句！", ["这是第一句。", "这是第二句！"]),
        ("これは最初の文です。これは二番目です。", ["これは最初の文です。", "これは二番目です。"]),
        ("هل هذا سؤال؟ هذه جملة ثانية.", ["هل هذا سؤال؟", "هذه جملة ثانية."]),
        ("यह पहला वाक्य है। यह दूसरा है।", ["यह पहला वाक्य है।", "यह दूसरा है।"]),
        ("오늘은 날씨가 좋다. 내일은 비가 온다.", ["오늘은 날씨가 좋다.", "내일은 비가 온다."]),
    ],
)
def test_sentences_end_in_other_scripts_too(text: str, sentences: list[str]) -> None:
    assert sentences_of(text) == sentences
