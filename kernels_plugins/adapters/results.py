"""The code that puts a result together again, from its tensors."""

from __future__ import annotations

from typing import Any

import torch

from .structure import Parts, Structure, problem_of_structures


class Unfit(Exception):  # noqa: N818 - it is the reason, and never reaches a user as an error
    """The reason why a layer or kernel cannot be an operator."""


def result_code(structure: Structure, parts: Parts, names: dict[str, Any]) -> str:
    """Return an expression that puts a result together from the list `t` of its tensors.

    Raises:
        Unfit: If there is something in it that changes from call to call, and is no tensor.
    """
    problem = problem_of_structures([structure])
    if problem is not None:
        raise Unfit(f"its result: {problem}")
    tensors, ints = iter(range(len(parts.tensors))), iter(parts.ints)
    floats, objects = iter(parts.floats), iter(parts.objects)

    def named(value: Any) -> str:
        name = f"_{len(names)}"
        names[name] = value
        return name

    def code(node: Structure) -> str:
        kind = node[0]
        if kind == "tensor":
            return f"t[{next(tensors)}]"
        if kind == "constant":
            return repr(node[1])
        if kind == "int":
            number = next(ints)
            if isinstance(number, torch.SymInt):
                raise Unfit("it returns a number that depends on the sizes of its inputs")
            return repr(number)
        if kind == "float":
            real = next(floats)
            if isinstance(real, torch.SymFloat):
                raise Unfit("it returns a number that depends on its inputs")
            return f"float({str(real)!r})"  # NaN and infinity have no other way to be written
        if kind == "dict":
            if not all(isinstance(key, str | int) for key, _ in node[1]):
                raise Unfit("it returns a dictionary with other keys than texts and integers")
            return "{" + ", ".join(f"{key!r}: {code(child)}" for key, child in node[1]) + "}"
        if kind in ("tuple", "list"):
            inside = "".join(code(child) + ", " for child in node[1])
            return f"({inside})" if kind == "tuple" else f"[{inside}]"
        if kind in ("named", "sequence"):
            inside = "".join(code(child) + ", " for child in node[1])
            made_by = named(next(objects))
            return f"{made_by}({inside})" if kind == "named" else f"{made_by}([{inside}])"
        value = next(objects)
        if isinstance(value, (torch.dtype, torch.device)):
            return named(value)
        raise Unfit(f"it returns a {(type(value) if kind == 'object' else value).__name__}")

    return code(structure)
