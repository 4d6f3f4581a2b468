"""Two kernels as one function, so that a call of the second one is dispatched once.

A kernel within a `Candidate.limit` passes on the calls that are not for it, and another forward finds the next one: a
second dispatch. Once that is published in the same frame, the first kernel can call it. All that ends a decision drops
the joint function with the others.
"""

from __future__ import annotations

import weakref
from typing import Protocol

from ..layer import Forward
from ..scopes.frame import Frame, generation, publish
from .watch import Watch


class Dispatched(Protocol):
    """The functions that one dispatcher has published: for a layer, or for calls that some of its kernels passed on."""

    prefix: str
    names: set[str]
    plain: weakref.WeakSet[Forward]
    """The kernels that are published as they are: no plugin has put something around them."""
    watch: Watch


def join(first: Dispatched, second: Dispatched, frame: Frame) -> None:
    """Publish functions that call those of `second` in place of passing calls on."""
    before = generation()  # first: `publish` drops what a change from here on has made wrong
    for name in list(first.names):  # a copy: another thread may add one
        served, following = vars(frame).get(name), published(second, frame, name.removeprefix(first.prefix))
        if served is None or following is None:
            continue
        kernel = first.watch.first_part(served)
        # Not one that a plugin has wrapped: it would take calls of the next kernel for calls of this one.
        if kernel in first.plain and (joint := joined(kernel, following)) is not None:
            first.watch.add_joint(joint, kernel, following, second.watch)
            publish(frame, name, joint, before)


def published(part: Dispatched, frame: Frame, place: str) -> Forward | None:
    """Return the function that serves at a place, such as `"_cpu_training"`: for that mode, or for both."""
    found = vars(frame).get(part.prefix + place)
    return found or vars(frame).get(part.prefix + place.removesuffix("_training").removesuffix("_inference"))


def joined(kernel: Forward, following: Forward) -> Forward | None:
    """Return a kernel that calls another function in place of passing calls on; None if its limit makes none."""
    make = vars(kernel).get("kernels_join")
    joint: Forward | None = make(following) if make is not None else None
    return joint
