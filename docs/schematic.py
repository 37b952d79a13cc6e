"""Draws the method as docs/method.svg and docs/method.zh-CN.svg: `python docs/schematic.py`.

N is what the mapping itself says for the losses drawn; nothing is trained.
"""

from __future__ import annotations

import json
from pathlib import Path

from repeatlab.repetition.loss_stats import LossStats
from repeatlab.repetition.mappings import Linear

LOSSES = (1.1, 0.5, 2.9, 0.8, 1.3, 4.2, 0.6, 1.0)
MAPPING = Linear(t=1.0)
WORDS = {
    "": {
        "loss": "loss of each fresh batch, at its first visit",
        "mapping": "N = f(loss)",
        "ours": "loss-driven: {updates} updates on {batches} fresh batches",
        "standard": "standard: {updates} updates on {updates} fresh batches",
        "budget": "the same budget of T = {updates} gradient updates",
    },
    ".zh-CN": json.loads(Path(__file__).with_name("chinese.json").read_text(encoding="utf-8"))[
        "drawing"
    ],
}
LEFT, CELL, UNIT, FLOOR = 30, 46, 26, 160
INK, MUTED, LINE, ONCE, AGAIN = "#1f2933", "#52606d", "#9aa5b1", "#b6cfe3", "#d1642e"


def _text(x: float, y: float, said: str, *, size: int = 14, anchor: str = "start", fill=INK) -> str:
    style = f'font-size="{size}" text-anchor="{anchor}" fill="{fill}"'
    return f'<text x="{x}" y="{y}" {style}>{said}</text>'


def _box(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="3" fill="{fill}"/>'


def draw(words: dict[str, str]) -> str:
    """Return the drawing as SVG: losses above, what is done with each batch below."""
    stats = LossStats()
    repeats = [MAPPING(loss, stats) for loss in LOSSES]
    updates = sum(repeats)
    numbers = {"updates": updates, "batches": len(LOSSES)}
    said = {name: text.format(**numbers) for name, text in words.items()}
    right = LEFT + updates * CELL
    parts, place = [], 0
    for index, (loss, count) in enumerate(zip(LOSSES, repeats, strict=True)):
        x, width = LEFT + place * CELL, count * CELL - 6
        fill = AGAIN if count > 1 else ONCE
        parts.append(_box(x, FLOOR - loss * UNIT, width, loss * UNIT, fill))
        parts.append(
            _text(
                x + width / 2,
                FLOOR - loss * UNIT - 5,
                f"{loss:g}",
                size=12,
                anchor="middle",
                fill=MUTED,
            )
        )
        parts.append(_text(x + width / 2, FLOOR + 20, f"N = {count}", size=13, anchor="middle"))
        for visit in range(count):
            at = LEFT + (place + visit) * CELL
            parts.append(_box(at, 222, CELL - 6, 30, fill))
            parts.append(_text(at + (CELL - 6) / 2, 242, f"B{index}", size=13, anchor="middle"))
        place += count
    for update in range(updates):
        at = LEFT + update * CELL
        parts.append(_box(at, 292, CELL - 6, 30, ONCE))
        parts.append(_text(at + (CELL - 6) / 2, 312, f"B{update}", size=13, anchor="middle"))
    parts += [
        f'<path d="M{LEFT} {FLOOR}H{right - 6}" stroke="{LINE}"/>',
        _text(LEFT, 24, said["loss"], fill=MUTED),
        _text(right - 6, 24, said["mapping"], anchor="end", fill=MUTED),
        _text(LEFT, 214, said["ours"]),
        _text(LEFT, 284, said["standard"]),
        f'<path d="M{LEFT} 344H{right - 6}m-8 -5l8 5l-8 5" stroke="{INK}" fill="none"/>',
        _text((LEFT + right) / 2, 366, said["budget"], anchor="middle", fill=MUTED),
    ]
    width = right + LEFT - 6
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 380" role="img"'
    font = "font-family=\"Helvetica, Arial, 'Noto Sans CJK SC', sans-serif\""
    title = f"<title>{said['ours']}; {said['standard']}</title>"
    back = f'<rect width="{width}" height="380" fill="#ffffff"/>'
    return "\n".join([f"{head} {font}>", title, back, *parts, "</svg>", ""])


def main() -> None:
    """Write the drawing in both languages beside this file."""
    for suffix, words in WORDS.items():
        path = Path(__file__).with_name(f"method{suffix}.svg")
        path.write_text(draw(words), encoding="utf-8")


if __name__ == "__main__":
    main()
