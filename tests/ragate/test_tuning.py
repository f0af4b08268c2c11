"""The lessons that judges are trained on: valid answers, labels that hold, nothing that gives them away for free."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from ragate import catalog
from ragate.errors import CatalogError, TestSetError
from ragate.metrics import INPUT_MARK
from ragate.schemas import breach, parse
from ragate.tuning import lessons
from ragate.tuning.__main__ import main
from ragate.tuning.absence import absence, refusal
from ragate.tuning.claims import Claim, scene_of, whole_answer
from ragate.tuning.edits import Names, edits_of, negated, overstated, without_support
from ragate.tuning.examples import example_of, examples_of, load_examples, save_examples
from ragate.tuning.fillers import GRAMMAR, KINDS, filler, subject_of
from ragate.tuning.recipe import build, is_held_out
from ragate.tuning.sources import Case, clean, load_cases
from ragate.tuning.text import has, nearest, overlap, sentences, window, words_of
from ragate.tuning.wording import dressed, told
from ragate_engine import Tokenizer, open_checkpoint
from ragate_engine.grammar import Grammars

TOWNS = ("Abbotsford", "Brindlewick", "Corvane", "Dunmarrow", "Eastholm", "Farleigh", "Gorsedale", "Hexworth")


def passage(i: int) -> str:
    """A made-up passage; no two towns share a figure."""
    town = TOWNS[i % len(TOWNS)]
    return (
        f"The harbour of {town} number {i} was built in {1800 + i} by engineer Olive Marsh. "
        f"Its lighthouse stands {20 + i} metres above the water and is usually painted white. "
        f"Every summer about {300 + i} fishing boats from {TOWNS[(i + 3) % 8]} visit the old market near the quay."
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 150 rows of each source, all made up."""
    folder = tmp_path_factory.mktemp("data")
    rows: dict[str, list[dict[str, object]]] = {}
    for i in range(150):
        town, own = TOWNS[i % 8], passage(i)
        rows.setdefault("ragbench_validation.jsonl", []).append(
            {
                "dataset": "ragbench_msmarco",
                "question": f"Who built the harbour of {town} number {i}?",
                "contexts": [own, passage(i + 1000), passage(i + 2000)],
                "context_relevant": [1, 0, 0],
                "answer": f"The harbour of {town} number {i} was built by Olive Marsh. It dates from {1800 + i}. "
                f"About {300 + i} fishing boats visit its old market each summer.",
                "faithful": 1,
            }
        )
        rows.setdefault("dataset_halueval_qa.jsonl", []).append(
            {
                "knowledge": own,
                "question": f"How high is the lighthouse of {town}?",
                "right_answer": f"{20 + i} metres",
                "hallucinated_answer": f"The lighthouse of {town} is nine kilometres high and made of glass.",
            }
        )
        rows.setdefault("dataset_halueval_summarization.jsonl", []).append(
            {
                "document": own + " " + passage(i + 3000),
                "right_summary": f"The harbour of {town} was built in {1800 + i}. Fishing boats visit the old market.",
                "hallucinated_summary": f"The mayor of {town} resigned over a tunnel scandal. Police found gold bars.",
            }
        )
        rows.setdefault("dataset_halueval_dialogue.jsonl", []).append(
            {
                "knowledge": own,
                "dialogue_history": f"[Human]: Do you know {town}? [Assistant]: I do. [Human]: Who built its harbour? ",
                "right_response": "Engineer Olive Marsh built the harbour.",
                "hallucinated_response": "Penguins from Antarctica dug it with spoons.",
            }
        )
    for name, lines in rows.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder


@pytest.fixture(scope="module")
def made(data: Path) -> list[lessons.Lesson]:
    return build(7, 300, data, halueval=data)


def tokenizer_of(name: str) -> tuple[Tokenizer, int]:
    try:
        checkpoint = open_checkpoint(catalog.model_path(name))
    except CatalogError as e:
        pytest.skip(str(e))
    assert checkpoint.tokenizer is not None
    return checkpoint.tokenizer, checkpoint.config.vocab_size


# Lessons


def test_every_answer_is_what_its_schema_asks_for(made: list[lessons.Lesson]) -> None:
    assert {lesson.call for lesson in made} == set(lessons.CALLS)
    for lesson in made:
        tree = json.loads(lesson.schema)
        assert breach(tree, parse(lesson.text)) is None
        strings = _strings(json.loads(lesson.text))
        pattern = next(iter(re.findall(r'"pattern":("(?:[^"\\]|\\.)*")', lesson.schema)))
        given = json.JSONDecoder().raw_decode(lesson.prompt.partition(INPUT_MARK)[2])[0]
        free = [text for text in strings if text not in given.get("statements", ())]
        longest = r"{2,159}" if lesson.call in ("nli", "precision") else r"{2,199}"
        assert free and all(re.match(json.loads(pattern).replace("{2,159}", longest), text) for text in free)


def _strings(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for part in value.values() for text in _strings(part)]
    if isinstance(value, list):
        return [text for part in value for text in _strings(part)]
    return [value] if isinstance(value, str) else []


def test_the_same_seed_makes_the_same_lessons_and_another_seed_others(
    data: Path, made: list[lessons.Lesson]
) -> None:
    assert build(7, 300, data, halueval=data) == made
    assert build(8, 300, data, halueval=data) != made


def test_held_out_clusters_are_in_no_training_lesson(data: Path, made: list[lessons.Lesson]) -> None:
    held = build(7, 100, data, halueval=data, held_out=True)
    assert all(is_held_out(lesson.cluster) for lesson in held)
    assert not {lesson.cluster for lesson in held} & {lesson.cluster for lesson in made}


def test_the_reason_of_a_claim_does_not_depend_on_its_label() -> None:
    passages = [passage(1), passage(2)]
    texts = {
        lessons.nli(passages, [Claim("Olive Marsh built the harbour.", label, "made")], "s", "c").text
        for label in (0, 1)
    }
    assert len({re.sub(r'"verdict":\d', "", text) for text in texts}) == 1


def test_statements_cover_a_long_answer_in_at_most_eight() -> None:
    answer = " ".join(f"The {i}th thing is said here in a short sentence." for i in range(1, 15))
    found = lessons.statements_of(answer)
    assert len(found) == 8
    assert " ".join(found) == answer
    assert max(map(len, found)) <= 200


def test_a_statement_too_long_is_cut_at_a_comma_and_keeps_its_end() -> None:
    found = lessons.statements_of("word " * 30 + "here, " + "tail " * 20 + "ends.")
    assert len(found) == 2
    assert found[0].endswith("here,") and found[1].endswith("ends.")


# Claims and edits


SAID = "The harbour was built by engineer Olive Marsh."
CASE = Case("s", "c", "Who built it?", (passage(4), passage(5)), (SAID,), (), None, "Olive Marsh.")
OTHER = Case("s", "d", "And?", (passage(40),), ("Trams cross the square twice an hour.",), (), None, "Trams.")


def test_a_claim_keeps_its_wording_when_its_support_is_taken_away() -> None:
    names = Names(CASE.passages)
    seen = [
        claim for seed in range(300) for claim in scene_of(CASE, OTHER, names, random.Random(seed)).claims
    ]
    removed = {claim.text for claim in seen if claim.kind == "support removed"}
    whole = {claim.text for claim in seen if claim.kind == "as written"}
    assert all(claim.label == 0 for claim in seen if claim.kind == "support removed")
    assert removed & whole


def test_claims_changed_with_their_passages_hold_and_those_left_behind_do_not() -> None:
    names = Names([passage(i) for i in range(30)])
    for seed in range(300):
        scene = scene_of(CASE, OTHER, names, random.Random(seed))
        for claim in scene.claims:
            if claim.kind.startswith(("number changed in", "name changed in")) and "claim" not in claim.kind:
                words = re.findall(r"\b(?:Olive Marsh|\d{2,})\b", claim.text)
                there = all(word in "\n".join(scene.passages) for word in words)
                assert claim.label == int("both" in claim.kind)
                assert there or not claim.label


def test_the_support_of_a_claim_is_gone_with_its_sentence() -> None:
    found = without_support("The lighthouse stands 24 metres above the water.", [passage(4)])
    assert found is not None
    rest, gone = found
    assert "lighthouse" not in rest[0] and "Olive Marsh" in rest[0]
    assert len(gone) == 1


def test_what_cannot_be_told_to_be_gone_is_not_removed() -> None:
    assert without_support("It is here.", [passage(4)]) is None


def test_an_edit_takes_what_the_passages_say_and_puts_something_else() -> None:
    names = Names([passage(i) for i in range(30)])
    claim = "The harbour of Eastholm number 4 was built in 1804 by engineer Olive Marsh."
    for seed in range(50):
        for edit in edits_of(claim, [passage(4)], names, random.Random(seed)):
            assert edit.old in claim and edit.old in passage(4)
            assert not has(claim, edit.new)


@pytest.mark.parametrize(
    ("claim", "denied"),
    [
        ("The lamp is white.", "The lamp is not white."),
        ("The lamp was never lit.", "The lamp was lit."),
        ("Boats came.", None),
    ],
)
def test_a_negation_is_put_in_or_taken_out(claim: str, denied: str | None) -> None:
    assert negated(claim) == denied


def test_a_hedge_becomes_a_certainty() -> None:
    assert overstated("It may help some people.", random.Random(0)) in (
        "It will help some people.",
        "It may help all people.",
    )


def test_a_whole_answer_keeps_its_sentences_in_order_and_what_is_added_is_unsupported() -> None:
    said = [f"The {word} boat came to the harbour in {1900 + i}." for i, word in enumerate(TOWNS[:5])]
    case = Case("s", "c", "Which boats came?", (" ".join(said),), tuple(said), (), None, "\n".join(said))
    assert whole_answer(case) == said
    seen = set()
    for seed in range(200):
        scene = scene_of(case, OTHER, Names(said), random.Random(seed))
        own = [claim for claim in scene.claims if claim.kind == "whole answer"]
        if scene.whole and "context cut" not in {claim.kind for claim in scene.claims}:
            places = [claim.text[claim.text.find("boat") :] for claim in own]
            assert places == sorted(places, key=lambda text: text[-5:])
            assert all(claim.label for claim in own)
            seen |= {(claim.kind.partition(":")[0], claim.label) for claim in scene.claims}
    assert {("whole answer", 1), ("filler", 0), ("addition", 0)} <= seen


def test_an_answer_with_a_sentence_that_nobody_knows_to_be_supported_is_no_whole_answer() -> None:
    assert (
        whole_answer(Case("s", "c", "?", (passage(4),), (SAID,), (), None, f"{SAID} It is tall and white."))
        == []
    )


# Wording


def test_what_is_missing_is_missing_and_what_is_said_to_be_is_there() -> None:
    here = ["The tower in Paris was built by Gustave Eiffel for a fair of 1889."]
    there = ["In the city of Lyon the theatre was made by Carl Langhans."]
    rng = random.Random(5)
    found = {absence(here, there, rng) for _ in range(200)}
    claims = [claim for claim in found if claim is not None]
    for text, label in claims:
        missing = any(name in text for name in ("Lyon", "Carl Langhans"))
        assert missing != any(name in text for name in ("Paris", "Gustave Eiffel")), text
        assert label == missing and re.search(r"\b(?:no|not)\b", text.lower()), text
    assert {label for _, label in claims} == {0, 1} and len(claims) > 100
    assert absence(["it rained"], ["it snowed"], rng) is None
    refusals = {refusal(rng) for _ in range(300)}
    assert len(refusals) > 100 and not any("{" in text for text, _ in [*claims, *((r, 1) for r in refusals)])


def test_fillers_have_hundreds_of_wordings_and_no_open_slot() -> None:
    symbols = {
        symbol for options in GRAMMAR.values() for text in options for symbol in re.findall(r"{(\w+)}", text)
    }
    assert symbols - {"topic", "goal", "thing", "things", "other"} <= set(GRAMMAR)
    subject = subject_of("How do I paint the harbour wall?", [passage(1)])
    assert (subject.topic, subject.goal) == ("harbour", "paint the harbour wall")
    for kind in (*KINDS, "addition"):
        made = [filler(kind, subject, random.Random(seed)) for seed in range(300)]
        assert len(set(made)) > 200
        assert not any(re.search(r"[{}]", text) for text in made)


def test_a_paraphrase_says_nothing_that_its_sentence_does_not() -> None:
    sentence = "However, in 1997, the harbour of Corvane (see map) was sold."
    made = {told(sentence, random.Random(seed)) for seed in range(50)}
    assert "The harbour of Corvane was sold in 1997." in made
    assert all(overlap(text, words_of([sentence])) == 1 for text in made)


def test_a_claim_in_the_dress_of_an_answer_is_still_all_there() -> None:
    made = {dressed(SAID, "the harbour", [passage(4)], random.Random(seed)) for seed in range(1000)}
    assert f"Passage 1 provides more details: {SAID}" in made
    assert len(made) > 20
    assert all("arbour was built by engineer Olive Marsh" in text for text in made)
    assert dressed(f"Steps: {SAID}", "it", [passage(4)], random.Random(1)) == f"Steps: {SAID}"


# Text


def test_sentences_break_where_a_source_lost_its_space_and_not_at_abbreviations() -> None:
    assert sentences("Dr. Lee left in 1846.First came Mr. Ross, e.g. by train. He paid 3.5 dollars.") == [
        "Dr. Lee left in 1846.",
        "First came Mr. Ross, e.g. by train.",
        "He paid 3.5 dollars.",
    ]


def test_the_nearest_words_are_those_that_the_claim_shares() -> None:
    claim = "The lighthouse is 24 metres high."
    found = nearest(claim, [passage(3), passage(4)])
    assert found.startswith("Its lighthouse stands 24 metres")
    assert window(found, claim, 4) == "lighthouse stands 24 metres"


def test_marks_that_no_answer_may_hold_are_cleaned_away() -> None:
    assert clean('1. He said "no\\yes" [3] , twice .') == "He said 'no/yes', twice."


# Sources


def test_a_case_that_shares_its_passage_with_the_measured_sets_is_left_out(
    data: Path, tmp_path: Path
) -> None:
    for file in data.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = load_cases(tmp_path, random.Random(0), tmp_path)
    (tmp_path / "ragtruth_qa_dev.jsonl").write_text(json.dumps({"contexts": [passage(11)]}) + "\n")
    after = load_cases(tmp_path, random.Random(0), tmp_path)
    gone = {case.cluster for case in before} - {case.cluster for case in after}
    assert len(after) < len(before) and gone
    assert not any("number 11 was" in " ".join(case.passages) for case in after)


def test_damaged_data_names_file_and_line(data: Path, tmp_path: Path) -> None:
    (tmp_path / "ragbench_validation.jsonl").write_text('{"dataset": \n')
    with pytest.raises(TestSetError, match=r"ragbench_validation.jsonl:1: not a JSON object"):
        load_cases(tmp_path, random.Random(0), data)


def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, [str(tmp_path), "--halueval", str(tmp_path)])
    assert done.exit_code == 1
    assert "ragbench_validation.jsonl: cannot be read: No such file" in done.output


def test_a_model_that_is_not_there_is_one_sentence(data: Path, tmp_path: Path) -> None:
    args = [str(data), "--size", "100", "--halueval", str(data), "--tokens", str(tmp_path / "no.gguf"), "x"]
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
    assert f"{tmp_path / 'no.gguf'}: no such file" in done.output and "lessons:" not in done.output


def test_the_command_writes_lessons_that_come_back(data: Path, tmp_path: Path) -> None:
    args = [
        str(data),
        "--size",
        "100",
        "--halueval",
        str(data),
        "--mix",
        "--out",
        str(tmp_path / "l.jsonl.gz"),
    ]
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 0, done.output
    assert "100 lessons: nli 62" in done.output
    assert "support removed" in done.output


# Examples


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen-0.5b"])
def test_the_tokens_are_those_that_the_grammar_forces_and_allows(
    name: str, made: list[lessons.Lesson]
) -> None:
    tokenizer, vocab = tokenizer_of(name)
    grammars = Grammars(tokenizer, vocab)
    for lesson in made[:40]:
        example = example_of(lesson, tokenizer)
        state, at, free = grammars.start(lesson.schema), 0, []
        while not state.complete:
            if forced := state.forced():
                assert list(example.answer[at : at + len(forced)]) == forced
                at += len(forced)
                continue
            row = np.zeros(-(-vocab // 32), np.int32)
            state.fill_mask(row)
            token = example.answer[at]
            assert (row[token // 32] >> token % 32) & 1
            state.consume(token)
            free.append(at)
            at += 1
        assert at == len(example.answer) - 1
        assert example.answer[-1] in tokenizer.eos_ids and example.weights[-1] == 0
        assert all(example.weights[i] > 0 for i in free)


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen-0.5b"])
def test_each_verdict_is_one_token_of_weight_one(name: str, made: list[lessons.Lesson]) -> None:
    tokenizer, _ = tokenizer_of(name)
    for lesson in made:
        example = example_of(lesson, tokenizer)
        assert tokenizer.decode(example.answer[:-1]) == lesson.text
        heavy = [
            tokenizer.decode([t]) for t, w in zip(example.answer, example.weights, strict=True) if w == 1
        ]
        assert heavy == re.findall(r'"(?:verdict|attributed|noncommittal)":(\d)', lesson.text)
        assert set(example.weights) <= {0.0, 0.03, 0.1, 1.0}


def test_a_lesson_too_long_is_left_out_and_files_come_back_as_they_were(
    made: list[lessons.Lesson], tmp_path: Path
) -> None:
    tokenizer, _ = tokenizer_of("smollm2-135m")
    lengths = [len(e.prompt) + len(e.answer) for e in examples_of(made, tokenizer, 10**6)]
    most = sorted(lengths)[len(lengths) // 2]
    kept = examples_of(made, tokenizer, most)
    assert len(kept) == sum(length <= most for length in lengths) < len(made)
    save_examples(kept[:30], tmp_path / "a.npz")
    save_examples(kept[30:], tmp_path / "b.npz")
    assert load_examples(tmp_path / "a.npz", tmp_path / "b.npz") == kept


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_text("no")
    with pytest.raises(TestSetError, match=r"x\.npz: no file of examples"):
        load_examples(tmp_path / "x.npz")
