"""The search for minimal sets: it finds them all, in the number of questions that the documentation names."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels_plugins.bisect.search import find_minimal_sets


class Question:
    """Whether items fail, asked once about each set."""

    def __init__(self, count: int, sets: list[frozenset[int]]) -> None:
        self.count = count
        self.sets = sets
        self.answers: dict[frozenset[int], bool] = {}

    def __call__(self, items: frozenset[int]) -> bool:
        assert items, "nobody needs to ask about nothing"
        if items not in self.answers:
            self.answers[items] = any(members <= items for members in self.sets)
        return self.answers[items]


def bound(count: int, culprits: int) -> int:
    return culprits * (math.ceil(math.log2(count)) + 4) + 1


@st.composite
def disjoint(draw: st.DrawFn) -> Question:
    """Up to four culprits among up to 600 items, that fail alone or in company, in no two sets."""
    count = draw(st.integers(2, 600))
    culprits = draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=4, unique=True))
    sets: list[frozenset[int]] = []
    while culprits:
        size = draw(st.integers(1, len(culprits)))
        sets.append(frozenset(culprits[:size]))
        culprits = culprits[size:]
    return Question(count, sets)


@st.composite
def pairs(draw: st.DrawFn) -> Question:
    """Single culprits and pairs that may share members, each minimal."""
    count = draw(st.integers(3, 300))
    item = st.integers(0, count - 1)
    drawn = draw(st.lists(st.frozensets(item, min_size=1, max_size=2), min_size=1, max_size=6, unique=True))
    alone = {next(iter(members)) for members in drawn if len(members) == 1}
    return Question(count, [members for members in drawn if len(members) == 1 or not members & alone])


@given(disjoint())
def test_all_sets_are_found_in_o_of_k_log_n_questions(question: Question) -> None:
    """Sets that share no member are found as they are, in the documented number of questions."""
    found = find_minimal_sets(question.count, question)
    assert sorted(map(sorted, found)) == sorted(map(sorted, question.sets))
    assert len(question.answers) <= bound(question.count, sum(map(len, question.sets)))


@given(pairs())
def test_every_item_that_fails_alone_or_in_a_pair_is_found(question: Question) -> None:
    """Pairs that share members: each set found is minimal, and together they have all culprits."""
    found = find_minimal_sets(question.count, question)
    culprits = {item for members in found for item in members}
    assert culprits == {item for members in question.sets for item in members}
    assert {frozenset(members) for members in found} <= set(question.sets)
    assert len(question.answers) <= bound(question.count, len(culprits)) + len(found)


@given(st.integers(1, 40), st.data())
def test_any_question_ends_with_sets_that_fail(count: int, data: st.DataObject) -> None:
    """Even where more items repair the fault of fewer: the search ends, and the set that it returns did fail."""
    answers: dict[frozenset[int], bool] = {frozenset(range(count)): True}

    def fails(items: frozenset[int]) -> bool:
        return answers.setdefault(items, data.draw(st.booleans()))

    found = find_minimal_sets(count, fails)
    assert found
    assert all(answers.get(frozenset(members)) for members in found)


@pytest.mark.parametrize("wrong", [1, 2, 7, 64, 128])
def test_neighbours_are_cheap(wrong: int) -> None:
    """A kernel that is wrong in many places takes two questions for each place, not a whole search."""
    question = Question(128, [frozenset([item]) for item in range(wrong)])
    assert len(find_minimal_sets(128, question)) == wrong
    assert len(question.answers) <= 2 * wrong + 8


def test_many_that_fail_together_are_one_set() -> None:
    """Small errors that add up: a set is as many as it takes."""
    answers: dict[frozenset[int], bool] = {}

    def fails(items: frozenset[int]) -> bool:
        return answers.setdefault(items, len(items) >= 10)

    (members,) = find_minimal_sets(15, fails)
    assert len(members) == 10
