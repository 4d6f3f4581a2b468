"""The search: all minimal sets of items that make a question come true, in few questions.

Asked about a set of items, `fails` returns whether that set makes something fail by itself. The empty set does not,
all items do. For `k` culprits among `n` items, in groups that fail together:

1. *One minimal set.* Take items in order, and look by halving for the first that makes the prefix before it
   fail: it is needed. Keep it, drop the items after it, and look again among the items before it, until
   the kept ones fail by themselves. Each member costs `log2(n)` questions and one more.
2. *The next.* Leave out all members found so far. If the rest still fails, it contains another set: look there.
3. *Overlaps.* A set that shares a member with one that was found is not in the rest. So each member that does not
   fail by itself is asked about together with the rest; if that fails, there is another set around it.

That is at most `k * (ceil(log2(n)) + 4) + 1` questions, and one more per member and overlap: O(k log n).

Guarantees if a set that fails never stops failing with more items (`fails` is monotone):

- Each set is minimal: without any one of its members it does not fail.
- Without the members of all sets, nothing fails.
- Every item that fails by itself or in a pair is found. A set of three or more that shares members with several
  others may be missing, if the rest of its members interact in no other way.

If it is not monotone, such as for errors that cancel each other, the first two lines still hold but for
minimality: every set was found to fail, and the rest was found not to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

Fails = Callable[[frozenset[int]], bool]


def find_minimal_sets(count: int, fails: Fails) -> list[tuple[int, ...]]:
    """Return minimal sets of the numbers below `count` that fail, in the order in which they were found.

    `fails` should remember its answers: it is asked again about a set.

    Example:
        >>> find_minimal_sets(100, lambda items: 7 in items or {30, 60} <= items)
        [(7,), (30, 60)]
    """
    rest, found = list(range(count)), []
    known = 0  # so many items at the head of the rest do not fail
    while rest and fails(frozenset(rest)):
        members, head = _minimal_set((), rest, known, fails)
        found.append(members)
        known = sum(item not in members for item in rest[:head])
        rest = [item for item in rest if item not in members]
    waiting = [member for members in found if len(members) > 1 for member in members]
    while waiting:
        member = waiting.pop(0)
        while rest and not fails(frozenset([member])) and fails(frozenset([member, *rest])):
            others, _ = _minimal_set((member,), rest, 0, fails)
            rest = [item for item in rest if item not in others]
            found.append(tuple(sorted((member, *others))))
            waiting += others
    return found


def _minimal_set(kept: Iterable[int], items: Sequence[int], known: int, fails: Fails) -> tuple[tuple[int, ...], int]:
    """Return the items that must join `kept` for it to fail, and how many items at the head do not fail with it.

    All items do fail with `kept`; the first `known` of them do not.
    """
    context, members, head = set(kept), [], -1
    while True:
        place = _first_failing_prefix(context, items, known, fails)
        context.add(items[place - 1])
        members.append(items[place - 1])
        items, known = items[: place - 1], 0
        if head < 0:
            head = place - 1
        if not items or fails(frozenset(context)):
            return tuple(sorted(members)), head


def _first_failing_prefix(context: set[int], items: Sequence[int], low: int, fails: Fails) -> int:
    """Return the length of a prefix that fails in a context, while the one that is shorter by one does not."""
    high = len(items)
    guess = low + 1  # culprits mostly are neighbours: a kernel that is wrong is wrong in many places
    while high - low > 1:
        if fails(frozenset(context.union(items[:guess]))):
            high = guess
        else:
            low = guess
        guess = (low + high) // 2
    return high
