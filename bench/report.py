"""Results of a measurement: medians of interleaved rounds against a peer, as JSON, as a table and as a plot."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import escape

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One figure. ``ratio`` is ours/peer; without a peer it and the peer's fields are None."""

    name: str
    unit: str
    ours: float
    peer: float | None
    peer_name: str | None
    ratio: float | None
    better: Literal["higher", "lower"]
    rounds: int

    @classmethod
    def of(
        cls,
        name: str,
        unit: str,
        ours: list[float],
        peer: list[float] | None,
        peer_name: str | None,
        better: Literal["higher", "lower"],
    ) -> Row:
        mine, other = statistics.median(ours), statistics.median(peer) if peer else None
        ratio = mine / other if other else None
        return cls(name, unit, mine, other, peer_name, ratio, better, len(ours))

    @property
    def wins(self) -> bool | None:
        if self.ratio is None:
            return None
        return self.ratio >= 1 if self.better == "higher" else self.ratio <= 1


def write(part: str, rows: list[Row]) -> Path:
    """Write ``bench/results/PART.json`` and ``PART.svg``, and print the table."""
    RESULTS.mkdir(exist_ok=True)
    result = {
        "part": part,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} CPUs, {platform.machine()}, Linux {platform.release()}",
        "load": os.getloadavg()[0],
        "rows": [asdict(row) for row in rows],
    }
    target = RESULTS / f"{part}.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    target.with_suffix(".svg").write_text(_plot(part, rows))
    _print(rows)
    sys.stdout.write(f"{target} and {target.with_suffix('.svg').name}; load {result['load']:.1f}\n")
    return target


def _print(rows: list[Row]) -> None:
    lines = [("", "unit", "ours", "peer", "ratio", "better", "rounds", "")]
    for row in rows:
        peer = f"{row.peer:.2f} ({row.peer_name})" if row.peer is not None else "-"
        ratio = f"{row.ratio:.2f}" if row.ratio is not None else "-"
        verdict = {True: "ahead", False: "behind", None: ""}[row.wins]
        lines.append((row.name, row.unit, f"{row.ours:.2f}", peer, ratio, row.better, str(row.rounds), verdict))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        sys.stdout.write(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n"
        )


def _plot(part: str, rows: list[Row]) -> str:
    """Ratios as bars from the line of the peer: to the right where we are ahead, each doubling equally long."""
    compared = [(row, row.ratio) for row in rows if row.ratio]
    doublings = [math.log2(ratio) * (1 if row.better == "higher" else -1) for row, ratio in compared]
    span = max([1.0, *map(abs, doublings)])
    middle, half, height = 740, 200, 60 + 26 * len(compared)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="1000" height="{height}" font-family="sans-serif">',
        "<style>text {font-size: 13px}</style>",
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="10" y="22" font-weight="bold">{escape(part)}: ours / peer</text>',
        f'<text x="{middle - 8}" y="40" text-anchor="end" fill="#c63">the peer is ahead</text>',
        f'<text x="{middle + 8}" y="40" fill="#2a7">ours is ahead</text>',
    ]
    for index, ((row, ratio), doubling) in enumerate(zip(compared, doublings, strict=True)):
        y, width = 50 + 26 * index, abs(doubling) / span * half
        ahead = doubling >= 0
        left = middle if ahead else middle - width
        at, anchor = (middle + width + 6, "start") if ahead else (middle - width - 6, "end")
        color = "#2a7" if ahead else "#c63"
        less = ", less is better" if row.better == "lower" else ""
        label = f"{escape(row.name)} <tspan fill='#777'>/ {escape(row.peer_name or '')}{less}</tspan>"
        parts += [
            f'<text x="10" y="{y + 15}">{label}</text>',
            f'<rect x="{left:.1f}" y="{y + 2}" width="{width:.1f}" height="18" fill="{color}"/>',
            f'<text x="{at:.1f}" y="{y + 15}" text-anchor="{anchor}">{ratio:.2f}</text>',
        ]
    parts.append(f'<line x1="{middle}" y1="28" x2="{middle}" y2="{height}" stroke="#333"/>')
    return "\n".join([*parts, "</svg>", ""])
