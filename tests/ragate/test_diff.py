"""What changed between two answers and two lists of contexts, and why an item scored as it did."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import METRICS, errored_run, good_run, plain_run, worse_run
from test_terminal import DATE

from ragate.gate.baseline import baseline_of
from ragate.gate.verdict import decide
from ragate.report.charts import histogram, intervals
from ragate.report.diff import MOST_WORDS, Piece, context_changes, word_diff
from ragate.report.rows import rows_of
from ragate.report.why import CLASSES, Passages, classes_of, said, why
from ragate.run import Claim, Run, Score


def _scores(run: Run) -> dict[tuple[str, str], Score]:
    return {(score.item, score.metric): score for score in run.scores}


def _spelled(pieces: list[Piece], kind: str) -> str:
    return "".join(piece.text for piece in pieces if piece.kind in ("same", kind))


words = st.lists(
    st.sampled_from(["a", "b", "the", ",", " ", "  ", "\n", "é", "中", "文", "1.5"]), max_size=40
)


@given(words.map("".join), words.map("".join))
def test_the_pieces_spell_both_texts_and_no_two_of_a_kind_follow_each_other(old: str, new: str) -> None:
    pieces = word_diff(old, new)
    assert _spelled(pieces, "lost") == old
    assert _spelled(pieces, "added") == new
    kinds = [piece.kind for piece in pieces]
    assert all(one != next_one for one, next_one in zip(kinds, kinds[1:], strict=False))
    assert (old == new) == all(kind == "same" for kind in kinds)


def test_a_changed_word_is_a_change_of_that_word_alone() -> None:
    assert word_diff("It takes 16 tokens.", "It takes 32 tokens.") == [
        Piece("same", "It takes "),
        Piece("lost", "16"),
        Piece("added", "32"),
        Piece("same", " tokens."),
    ]


def test_neighbouring_changed_words_are_one_change() -> None:
    kinds = [piece.kind for piece in word_diff("one two three four", "one zwei drei four")]
    assert kinds == ["same", "lost", "added", "same"]


def test_a_space_before_the_first_change_is_no_change() -> None:
    assert word_diff(" a", " b") == [Piece("same", " "), Piece("lost", "a"), Piece("added", "b")]


def test_texts_too_long_to_compare_are_replaced_whole() -> None:
    old, new = "a b " * 250_000, "b a " * 250_000
    pieces = word_diff(f"same start {old} same end", f"same start {new} same end")
    assert [piece.kind for piece in pieces] == ["same", "lost", "added", "same"]
    assert len(old.split()) > MOST_WORDS


def test_contexts_are_kept_moved_new_or_lost() -> None:
    changes = [(change.text, change.old, change.new) for change in context_changes("abcb", "cadb")]
    assert changes == [("c", 3, 1), ("a", 1, 2), ("d", None, 3), ("b", 2, 4), ("b", 4, None)]


@given(st.lists(st.sampled_from("abcd"), max_size=8), st.lists(st.sampled_from("abcd"), max_size=8))
def test_each_rank_of_both_sides_is_there_once(old: list[str], new: list[str]) -> None:
    changes = context_changes(old, new)
    assert sorted(c.old for c in changes if c.old) == list(range(1, len(old) + 1))
    assert [c.new for c in changes if c.new] == list(range(1, len(new) + 1))
    assert all(old[c.old - 1] == new[c.new - 1] for c in changes if c.old and c.new)


def test_the_reason_is_that_of_the_metric_that_fell_most() -> None:
    base, run = good_run(), worse_run()
    rows = rows_of(run, baseline_of(base, commit=None, date=DATE))
    for row in rows:
        found = why(row, _scores(run), _scores(base))
        if row.change == "regressed" and found:
            drops = {cell.metric: cell.drop or 0.0 for cell in row.cells}
            assert drops[found.metric] == max(drops.values())
    first = why(rows[0], _scores(run), _scores(base))
    assert first
    assert first.reason == "No passage mentions it; the closest one speaks of another step."


def test_a_claim_that_used_to_hold_is_named_before_one_that_never_did() -> None:
    never = Claim(text="never held", verdict=0, reason="no")
    turned = Claim(text="held before", verdict=0, reason="not any more")
    old = (never, turned.model_copy(update={"verdict": 1}))
    found = said("faithfulness", (never, turned), old)
    assert found == ("faithfulness", "held before", "not any more")
    assert said("faithfulness", (never, turned)) == ("faithfulness", "never held", "no")
    assert said("faithfulness", (never,), better=True) is None


@pytest.mark.parametrize(
    ("metric", "value", "claim", "expected"),
    [
        ("faithfulness", 0.4, Claim(text="x", verdict=0), ("unsupported",)),
        ("faithfulness", 0.5, Claim(text="x", verdict=0), ()),
        ("context_recall", 0.0, Claim(text="x", verdict=0), ("retrieval",)),
        ("context_precision", 0.3, Claim(text="", verdict=0, context=0), ("retrieval",)),
        ("answer_relevance", 0.0, Claim(text="x", verdict=0, similarity=0.9), ("refusal",)),
        ("answer_relevance", 0.3, Claim(text="x", verdict=1, similarity=0.3), ("off-topic",)),
        ("a metric of tomorrow", 0.0, Claim(text="x", verdict=0), ()),
    ],
)
def test_a_poor_score_has_its_class(metric: str, value: float, claim: Claim, expected: tuple[str]) -> None:
    run = plain_run({metric: [value]})
    score = run.scores[0].model_copy(update={"claims": (claim,)})
    (row,) = rows_of(run.model_copy(update={"scores": (score,)}), None)
    assert classes_of(row, {(score.item, metric): score}) == expected


def test_a_clear_fall_has_a_class_though_the_score_is_still_good_and_a_small_one_has_none() -> None:
    base = baseline_of(plain_run({"faithfulness": [1.0, 1.0]}), commit=None, date=DATE)
    run = plain_run({"faithfulness": [0.8, 0.85]})
    found = {row.item.id: classes_of(row, _scores(run)) for row in rows_of(run, base)}
    assert found == {"q000": ("unsupported",), "q001": ()}


def test_items_without_a_score_are_a_class_of_their_own() -> None:
    run = errored_run()
    rows = rows_of(run, None)
    keys = [key for row in rows for key in classes_of(row, _scores(run))]
    assert keys.count("error") == 4
    assert {each.key for each in CLASSES} >= set(keys)


def test_what_a_claim_rests_on_is_the_sentence_with_most_of_its_words() -> None:
    passages = Passages(["Cats sleep a lot. Dogs bark at night.", "The budget of a step holds 512 tokens."])
    assert passages.closest("Each step has a budget of 512 tokens") == (
        1,
        "The budget of a step holds 512 tokens.",
    )
    assert passages.closest("Dogs bark when it is dark at night") == (0, "Dogs bark at night.")
    assert passages.closest("Nothing of this was retrieved") is None
    assert passages.closest("") is None
    assert Passages([]).closest("anything at all") is None


def test_broke_and_mended_are_from_intact_to_broken_and_back() -> None:
    base = baseline_of(plain_run({"m": [0.8, 0.79, 0.2, 1.0]}), commit=None, date=DATE)
    rows = {row.item.id: row for row in rows_of(plain_run({"m": [0.2, 0.0, 0.8, 0.3]}), base)}
    assert [(row.broke, row.mended) for _, row in sorted(rows.items())] == [
        (True, False),
        (False, False),
        (False, True),
        (False, False),
    ]


def test_an_interval_without_an_end_is_not_drawn_and_spoils_no_other() -> None:
    gate = decide(baseline_of(good_run(), commit=None, date=DATE), worse_run())
    first, *others = gate.metrics
    endless = first.model_copy(update={"lower": -math.inf, "upper": math.inf})
    assert intervals([endless]) == {}
    assert intervals([endless, *others]) == intervals(others)


def test_all_intervals_are_on_one_axis_in_the_order_of_their_numbers() -> None:
    gate = decide(baseline_of(good_run(), commit=None, date=DATE), worse_run())
    drawn = intervals(gate.metrics)
    assert set(drawn) == set(METRICS)
    places = {
        (v.metric, name): getattr(drawn[v.metric], name)
        for v in gate.metrics
        for name in ("limit", "drop", "lower", "upper")
    }
    numbers = {
        (v.metric, name): getattr(v, name)
        for v in gate.metrics
        for name in ("limit", "drop", "lower", "upper")
    }
    assert sorted(places, key=places.__getitem__) == sorted(numbers, key=numbers.__getitem__)
    assert len({round(each.zero, 9) for each in drawn.values()}) == 1
    assert all(0 <= share <= 1 for each in drawn.values() for share in each)


def test_bins_hold_what_belongs_to_them() -> None:
    assert histogram([0.3, 1.0, 0.0, 0.999]) == [0.25, 0, 0, 0.25, 0, 0, 0, 0, 0, 0.5]
    assert histogram([]) == [0.0] * 10
