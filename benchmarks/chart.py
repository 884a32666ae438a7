"""
The results as a picture: bars in groups, one for each kind of work, as SVG.

It brings its own background, and has colours for light and for dark, of which the
viewer takes those that it prefers.
"""

from __future__ import annotations

from xml.etree import ElementTree as ET

from benchmarks.catalog import PEERS, WORKS
from benchmarks.report import digits, times
from benchmarks.results import OURS, Results

WIDTH = 760
MARGIN = 20
NAMES = 130  # The width of the names, left of the bars.
FIGURES = 130  # That of the figures, right of them.
BAR, GAP = 15, 5
HEAD = 64  # Above the first group.
TITLE = 26  # Above the bars of each group.
BETWEEN = 22  # Between groups.

STYLE = """
text { font: 12px system-ui, "DejaVu Sans", sans-serif; fill: #24292f; }
.paper { fill: #ffffff; }
.head { font-size: 16px; font-weight: bold; }
.work { font-size: 13px; font-weight: bold; }
.about, .what { fill: #57606a; }
.what { font-weight: normal; font-size: 12px; }
.name { text-anchor: end; }
.bar { fill: #a9b4c0; }
.ours { fill: #0b66c3; }
.ours2 { fill: #6ba7e5; }
.bold { font-weight: bold; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; }
  .paper { fill: #15191f; }
  .about, .what { fill: #9aa5b1; }
  .bar { fill: #566270; }
  .ours { fill: #4ea3ff; }
  .ours2 { fill: #2f6cb0; }
}
"""


def _text(parent: ET.Element, x: float, y: float, kind: str, text: str) -> ET.Element:
    made = ET.SubElement(parent, "text", {"x": f"{x:g}", "y": f"{y:g}", "class": kind})
    made.text = text
    return made


def _rect(parent: ET.Element, kind: str, **sizes: float) -> None:
    values = {name: f"{size:.1f}" for name, size in sizes.items()}
    ET.SubElement(parent, "rect", {**values, "class": kind})


def _kind(peer: str) -> str:
    if peer == OURS:
        return "ours"
    return "ours2" if PEERS[peer].is_ours else "bar"


def _group(parent: ET.Element, results: Results, name: str, top: float) -> float:
    """Draw the bars of one work. Returns where they end."""
    work = WORKS[name]
    figures = results.medians(name)
    longest = max(1e-9, *figures.values())
    title = _text(parent, MARGIN, top + 13, "work", f"{name} ")
    ET.SubElement(title, "tspan", {"class": "what"}).text = work.title
    y = top + TITLE
    for peer, figure in figures.items():
        is_first = peer == OURS
        middle = y + BAR - 3
        _text(parent, MARGIN + NAMES, middle, "name bold" * is_first or "name", peer)
        left = MARGIN + NAMES + 10
        # Noise can make the memory of a connection nothing, or less.
        length = max(1.0, figure / longest * (WIDTH - left - FIGURES - MARGIN))
        _rect(parent, _kind(peer), x=left, y=y, width=length, height=BAR, rx=2)
        told = f"{digits(figure)} {work.unit}"
        ratio = results.ratio(name, peer)
        if ratio is not None and not is_first:
            told += f"  ({times(ratio)} \N{MULTIPLICATION SIGN})"
        _text(parent, left + length + 6, middle, "bold" if is_first else "", told)
        y += BAR + GAP
    return y


def as_svg(results: Results) -> str:
    """The chart."""
    root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "role": "img"})
    ET.SubElement(root, "title").text = "CPU time of TCP servers for an operation"
    ET.SubElement(root, "style").text = STYLE
    paper = ET.SubElement(root, "rect", {"class": "paper", "width": "100%"})
    _text(
        root,
        MARGIN,
        28,
        "head",
        "CPU time of the server for an operation: less is better",
    )
    _text(
        root,
        MARGIN,
        48,
        "about",
        f"{results.machine['Python']}, {results.date[:10]}. "
        f"In brackets: multiples of {OURS}. Each group has a scale of its own.",
    )
    y = float(HEAD)
    for work in results.works:
        if results.medians(work):
            y = _group(root, results, work, y) + BETWEEN
    height = y - BETWEEN + MARGIN
    paper.set("height", f"{height:g}")
    root.set("viewBox", f"0 0 {WIDTH} {height:g}")
    root.set("width", str(WIDTH))
    root.set("height", f"{height:g}")
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"
