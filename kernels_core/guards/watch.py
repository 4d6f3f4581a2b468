"""The kernels of one dispatcher about which warm calls ask: not proven to keep gradients, or not fit for tracers."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from ..layer import Forward, Layer
from ..resolution import Resolution
from ..scopes.frame import root
from ..scopes.kept import notice_checkpoint
from .gradients import needs_proof
from .proof import Unproven, until_proven
from .tensors import odd_parameters


class Watch:
    """Such kernels of one dispatcher.

    Attributes:
        unproven: The kernels whose recorded calls are checked, by their id.
        untraceable: Not empty if a call asks whether a tracer records it.
        unfit: Not empty if a call asks that, or looks at the tensors of its module.
        any: Not empty if a call asks anything.
    """

    def __init__(self, layer: Layer, decide_anew: Callable[[Any, tuple[Any, ...]], Forward]) -> None:
        self.unproven = Unproven()
        self.untraceable, self.unfit, self.any = list[bool](), list[bool](), list[bool]()
        self._layer, self._decide_anew = layer, decide_anew
        self._joint = weakref.WeakKeyDictionary[Forward, tuple[Forward, Forward, Watch]]()
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        return Watch, (self._layer, self._decide_anew)  # for a forward that is pickled by value: it decides anew

    def add(self, resolution: Resolution, kernel: Forward) -> None:
        """Let warm calls ask more, if the kernel of a decision is not proven or not fit for all calls."""
        with self._lock:  # or another thread takes the kernel before it for the last one to watch
            # In place: the generated functions have these lists, and ask only whether they are empty.
            if not resolution.can_be_traced:
                self.untraceable[:] = [True]
            if needs_proof(resolution) and id(kernel) not in self.unproven:
                self._add(kernel, resolution.origin)
            self._ask()

    def add_joint(self, joint: Forward, kernel: Forward, following: Forward, watch: Watch) -> None:
        """Let recorded calls take its two parts apart, which have proofs of their own, until both are proven.

        Args:
            joint: A function that calls `following` in place of passing calls on.
            kernel: The kernel that passes them on.
            following: The function that serves these.
            watch: Of the dispatcher that serves these.
        """
        with self._lock:
            self._joint[joint] = kernel, following, watch
            self._add(joint, "")
            if watch.untraceable:
                self.untraceable[:] = [True]
            self._ask()

    def _ask(self) -> None:
        if self.untraceable or odd_parameters:
            self.unfit[:] = [True]
        if self.unfit or self.unproven:
            self.any[:] = [True]

    def first_part(self, joint: Forward) -> Forward:
        """Return the kernel that passes calls on in a joint function; any other function as it is."""
        return self._joint[joint][0] if joint in self._joint else joint

    def _add(self, kernel: Forward, origin: str) -> None:
        number = id(kernel)  # a warm call asks by it; so it is dropped with the kernel: another one may get it
        self.unproven[number] = weakref.ref(kernel, lambda _: self.unproven.pop(number, None)), origin

    def find_proving(self, kernel: Forward) -> Forward | None:
        """Return the function that serves a recorded call in place of a kernel; None if that is proven.

        Whether it is does not depend on what is published: another thread may drop that at any time.
        """
        number = id(kernel)
        known = self.unproven.get(number)
        if known is None:
            return None
        if root.active is not root:
            notice_checkpoint()

        def forget() -> None:
            with self._lock:
                self.unproven.pop(number, None)
                if not (self.unfit or self.unproven):
                    self.any.clear()

        if kernel in self._joint:
            first, following, watch = self._joint[kernel]
            # Apart, the first part passes the call on by the dispatcher, which lets the second one be checked.
            if id(first) in self.unproven or id(following) in watch.unproven:
                return self.find_proving(first) or first
            forget()
            return None
        return until_proven(
            self._layer, kernel, kernel, origin=known[1], when_proven=forget, decide_anew=self._decide_anew
        )
