"""
The results as text: tables for the documentation, and one for a terminal.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.catalog import PEERS, WORKS
from benchmarks.results import BUSY, OURS, Results

#: Where there is no figure.
NONE = "\N{EN DASH}"


def digits(figure: float | None) -> str:
    """A figure with the digits that mean something."""
    if figure is None:
        return NONE
    if figure >= 1000:
        return f"{figure:,.0f}".replace(",", "\N{NO-BREAK SPACE}")
    return f"{figure:.0f}" if figure >= 100 else f"{figure:.1f}"


def times(ratio: float | None) -> str:
    """A multiple."""
    return NONE if ratio is None else f"{ratio:.2f}"


def as_text(results: Results) -> str:
    """The figures for a terminal."""
    names = results.peers()
    width = max(map(len, names), default=0)
    lines = [f"{'':{width}}" + "".join(f"{work:>10}" for work in results.works)]
    for peer in names:
        cells = [digits(results.median(work, peer)) for work in results.works]
        lines.append(f"{peer:{width}}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def as_rest(results: Results) -> str:
    """The part of the documentation that is generated."""
    parts = [
        ".. Written by python -m benchmarks. Changes are lost.",
        *_machine(results),
        "CPU time of the server for an operation, in µs"
        + (", and memory of an idle connection, in bytes" * _has_idle(results))
        + f"; {_rounds(results)}. Less is better.",
        _table(results, lambda work, peer: digits(results.median(work, peer))),
        *_ratios(results),
        *_notes(results),
    ]
    return "\n\n".join(parts) + "\n"


def _has_idle(results: Results) -> bool:
    return any(WORKS[work].is_idle for work in results.works)


def _rounds(results: Results) -> str:
    length = f"{results.seconds:g} s"
    if results.rounds == 1:
        return f"a single round of {length}"
    return f"the median of {results.rounds} rounds of {length}"


def _machine(results: Results) -> list[str]:
    told = {"Date": results.date, **results.machine}
    told["Versions"] = ", ".join(
        f"{name} {version}" for name, version in results.versions.items()
    )
    return ["\n".join(f":{name}: {_plain(value)}" for name, value in told.items())]


def _plain(text: str) -> str:
    """Text that reST does not take for markup."""
    return "".join(f"\\{c}" if c in "\\*`|_" else c for c in text)


def _table(results: Results, cell: Callable[[str, str], str]) -> str:
    lines = [".. list-table::", "   :header-rows: 1", "   :stub-columns: 1", ""]
    rows = [["", *results.works]]
    for peer in results.peers():
        cells = [cell(work, peer) for work in results.works]
        if PEERS[peer].is_ours:
            cells = [text if text == NONE else f"**{text}**" for text in cells]
        rows.append([peer, *cells])
    for first, *others in rows:
        lines.append(f"   * - {first}".rstrip())
        lines += [f"     - {text}" for text in others]
    return "\n".join(lines)


def _ratios(results: Results) -> list[str]:
    if not any(results.median(work, OURS) for work in results.works):
        return []
    text = (
        f"The same as multiples of {OURS}'s. These are what to compare: the figures "
        "above change with the machine, and these change less."
    )
    return [text, _table(results, lambda work, peer: times(results.ratio(work, peer)))]


def _notes(results: Results) -> list[str]:
    notes = []
    if spread := results.spread():
        notes.append(
            f"The rounds of one server were at most {spread[0]:.0%} apart "
            f"({spread[1]})."
        )
    notes += [
        f"At {work}, these had their core for less than {BUSY:.0%} of the time, since "
        "the load was slower or the machine was busy: "
        + ", ".join(f"{peer} ({part:.0%})" for peer, part in waited.items())
        + "."
        for work, waited in results.not_busy().items()
    ]
    if lost := results.failures():
        notes.append(f"Connections that were lost: {', '.join(lost)}.")
    notes += [
        f"{work} had {results.connections[work]} connections, which is what the limit "
        "of open files allows."
        for work in results.works
        if results.connections[work] < WORKS[work].connections
    ]
    notes += [f"Left out: {text}." for text in results.left_out]
    return ["\n".join(f"- {_plain(note)}" for note in notes)] if notes else []
