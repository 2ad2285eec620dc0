"""Tables of figures: the same text for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

NONE = "-"


@dataclass(slots=True)
class Table:
    """One table: columns, rows of text, and what the reader must know to read them."""

    title: str
    columns: tuple[str, ...]
    notes: list[str] = field(default_factory=list)
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        """One more row."""
        if len(cells) != len(self.columns):
            raise ValueError(f"{self.title}: {len(self.columns)} columns, {len(cells)} cells in {cells}")
        self.rows.append(cells)

    def text(self) -> str:
        """The table in Markdown, padded so that it reads in a terminal."""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.columns))]
        rule = tuple("-" * (width - (column > 0)) + ":" * (column > 0) for column, width in enumerate(widths))

        def row(cells: Sequence[str]) -> str:
            padded = (
                cell.rjust(width) if column else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
            )
            return "| " + " | ".join(padded) + " |"

        table = "\n".join(map(row, [self.columns, rule, *self.rows]))
        return "\n\n".join([f"## {self.title}", table, *self.notes])


def microseconds(ns: float | None) -> str:
    """A duration in µs or ms, three digits that mean something."""
    if ns is None:
        return NONE
    return f"{ns / 1e3:.0f} µs" if ns < 10e6 else f"{ns / 1e6:.0f} ms"


def milliseconds(ms: float | None) -> str:
    """A duration in ms."""
    if ms is None:
        return NONE
    return f"{ms:.2f} ms" if ms < 10 else f"{ms:.0f} ms"


def megabytes(kilobytes: float | None) -> str:
    """A size in MB."""
    if kilobytes is None:
        return NONE
    return f"{kilobytes / 1024:.1f} MB"


def times(value: float, other: float) -> str:
    """How many times `other` is in `value`."""
    return f"{value / other:.1f}x" if other else NONE
