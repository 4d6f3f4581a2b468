"""`Choice`: measured cells, for one or several machines, as a value and as a file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels_core import ArgumentError, Page, Table, Tabular, as_json, of_format, read_json, require_type, set_module

from ..files import alone_in, write_file
from .cell import REFERENCE, ChoiceCell
from .machine import MeasuredOn, libraries, machine_of
from .page import choice_page, choice_table

FORMAT = 1


@dataclass(frozen=True)
class Choice(Tabular):
    """Which candidate serves a layer for which shapes, as measured.

    `str` gives a plain table, `rich.print` one with colours.

    Attributes:
        machines: What was measured, by machine.

    Example:
        >>> cell = ChoiceCell("Norm", "cpu", "eager", "inference", "float32", 64, 3, {"reference": 2e-6, "fast": 1e-6})
        >>> Choice((MeasuredOn(machine_of(torch.device("cpu")), (cell,)),)).cells_on("cpu")[0].winner
        'fast'
    """

    machines: tuple[MeasuredOn, ...] = ()

    def cells_on(self, device: str | torch.device, *, strict: bool = False) -> tuple[ChoiceCell, ...]:
        """Return the cells that hold for a device of this machine.

        Args:
            device: The device.
            strict: Whether the versions of Python and of libraries have to be equal, too.

        Raises:
            ArgumentError: If there is no such device here.
        """
        require_type(device, (str, torch.device), "device")
        require_type(strict, bool, "strict")
        try:
            here, versions = machine_of(torch.device(device)), libraries() if strict else {}
        except (RuntimeError, AssertionError) as error:  # PyTorch asserts that it was built for CUDA
            raise ArgumentError(f"The device {device!r} cannot be used here: {error}") from error
        found = (one for one in self.machines if one.machine == here and not (strict and one.libraries != versions))
        return tuple(cell for one in found for cell in one.cells)

    def merged(self, newer: Choice) -> Choice:
        """Return both: the cells of other machines are kept, and of two about the same calls, the newer one."""
        require_type(newer, Choice, "newer")
        kept = list(self.machines)
        for one in newer.machines:
            places = [place for place, old in enumerate(kept) if old.machine == one.machine]
            if places:
                kept[places[0]] = kept[places[0]].merged(one)
            else:
                kept.append(one)
        return Choice(tuple(kept))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a file, or add to one: cells of other calls and machines are kept. Whole or not at all.

        Args:
            path: The file.

        Returns:
            The path.

        Raises:
            ArgumentError: If there is another kind of file. It is not touched.
            OSError: If it cannot be written.
        """
        require_type(path, (str, os.PathLike), "path")
        where = Path(path)
        with alone_in(where.parent):  # two processes that measure for one file would drop what the other one adds
            kept = Choice.load(where).merged(self) if where.exists() else self
            write_file(where, kept.to_json() + "\n")
        return where

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Choice:
        """Read a file.

        Args:
            path: The file.

        Raises:
            ArgumentError: If it cannot be read, or is no such file; names the problem.
        """
        require_type(path, (str, os.PathLike), "path")
        remedy = "kernels-core choose, or choosing(save=...), makes one; it never overwrites another kind of file"
        return read_json(path, cls.read, "file of a choice", remedy)

    @classmethod
    def read(cls, value: Any) -> Choice:
        """Make a choice of its parsed JSON.

        Args:
            value: What `to_json` wrote, parsed.

        Raises:
            ArgumentError: If that is no choice.
        """
        return of_format(value, "format", FORMAT, lambda found: cls(tuple(map(MeasuredOn.read, found["machines"]))))

    def to_json(self) -> str:
        """Return the content of a file, as JSON.

        Example:
            >>> Choice().to_json()
            '{"format": 1, "machines": []}'
        """
        machines = [{**vars(one), "cells": [vars(cell) for cell in one.cells]} for one in self.machines]
        return as_json({"format": FORMAT, "machines": machines}, indent=1 if machines else None)

    def as_page(self) -> Page:
        """Return the page: how much is won, then each layer by the shapes of its calls."""
        return choice_page(self.machines)

    def to_html(self) -> str:
        """Return the page as one file.

        Example:
            >>> Choice().to_html()[:15]
            '<!doctype html>'
        """
        return self.as_page().to_html()

    def _repr_html_(self) -> str:
        return self.as_page()._repr_html_()

    def as_table(self) -> Table:
        """Return a row for all calls of a layer that the same candidate serves, and below it how the others did."""
        return choice_table(self.machines, self.summary)

    @property
    def summary(self) -> str:
        """One line: how many cells were measured, and how often a kernel wins."""
        cells = [cell for one in self.machines for cell in one.cells]
        won = sum(cell.winner != REFERENCE for cell in cells)
        return f"{len(cells)} measured, {won} won by a kernel, {len(cells) - won} by the reference"


set_module("kernels_plugins", globals())
