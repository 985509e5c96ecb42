"""DSA in one picture, with the part that a notebook is about lit: `schematic`. The course's first cells show it.

The files figures/schematic*.svg are made by `make course`, one for each choice of lit parts. A picture is SVG text of
some 5 kB with colours for light and for dark pages, on a background of its own, so that either can be read on both.
"""

import html

WIDTH, HEIGHT = 400, 334  # a phone shows 360 of them: its letters are then 11 pixels high
LEFT, BOX, CACHE_LEFT, CACHE = 8, 226, 282, 110
ROW, STEP = 56, 94  # a box's height, and from one box to the next

STAGES = (  # (function, name, what the queries bring, what comes out)
    ("index_scores", "Indexer", "q_idx [T, Hi, Di], w [T, Hi]", "scores [T, S]"),
    ("select_topk", "Selector", "the k best of each row", "indices [T, k]"),
    ("sparse_attention", "Attention", "q [T, H, D]", "out [T, H, Dv]"),
)
CACHES = (  # (name, shape, the stage that reads it, how many of its rows)
    ("k_idx", "k_idx [S, Di]", 0, "all S"),
    ("kv", "kv [S, D]", 2, "k each"),
)
PARTS = tuple(name for name, *_ in STAGES + CACHES)
SYMBOLS = ("T queries, S keys, k of them kept for each query.", "Hi index heads of Di numbers; H heads of D numbers.")

STYLE = """
svg { --page: #ffffff; --ink: #1f2328; --soft: #57606a; --box: #f3f4f6; --edge: #8c959f; --lit: #ffd866 }
@media (prefers-color-scheme: dark) {
  svg { --page: #1b1f24; --ink: #e6edf3; --soft: #a8b1bb; --box: #2b3138; --edge: #768390; --lit: #e0ac2b }
}
text { font: 13px system-ui, sans-serif; fill: var(--ink) }
.code { font: 12px ui-monospace, 'DejaVu Sans Mono', monospace }
.name { font-weight: bold }
.soft { fill: var(--soft); font-size: 12px }
.page { fill: var(--page) }
.box { fill: var(--box); stroke: var(--edge) }
.lit .box { fill: var(--lit); stroke: var(--ink); stroke-width: 3 }
.lit text { fill: #14171a }
.arrow { stroke: var(--ink); stroke-width: 1.5; fill: none }
.head { fill: var(--ink) }
"""


def schematic(lit=()) -> str:
    """Indexer, selector, attention, their shapes and what is cached, as SVG text; the parts named in `lit` are lit.

    lit: str or strs of PARTS: "index_scores", "select_topk", "sparse_attention", and the caches "k_idx" and "kv".
    Raises: TypeError and ValueError as `parts_of`.
    """
    lit, drawn = parts_of(lit), []
    for row, (function, name, brings, gives) in enumerate(STAGES):
        top = 8 + row * STEP
        words = [
            _text(LEFT + 10, top + 22, name, "name"),
            _text(LEFT + BOX - 8, top + 22, function, "code", "end"),
            _text(LEFT + 10, top + 44, brings, "code" if "[" in brings else "soft"),
        ]
        drawn += [_box(LEFT, top, BOX, words, function in lit), _arrow(LEFT + 40, top + ROW, LEFT + 40, top + STEP)]
        drawn.append(_text(LEFT + 52, top + ROW + 24, gives, "code"))
    for name, shape, row, how_many in CACHES:
        top = 8 + row * STEP
        words = [_text(CACHE_LEFT + 9, top + 22, shape, "code"), _text(CACHE_LEFT + 9, top + 44, "cached", "soft")]
        drawn.append(_box(CACHE_LEFT, top, CACHE, words, name in lit))
        drawn.append(_arrow(CACHE_LEFT, top + 36, LEFT + BOX, top + 36))
        drawn.append(_text((LEFT + BOX + CACHE_LEFT) / 2, top + 26, how_many, "soft", "middle"))
    drawn += [_text(LEFT, HEIGHT - 24 + 17 * line, words, "soft") for line, words in enumerate(SYMBOLS)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img">\n<title>{html.escape(schematic_alt(lit))}</title>\n<style>{STYLE}</style>\n'
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="8"/>\n' + "\n".join(drawn) + "\n</svg>\n"
    )


def schematic_alt(lit=()) -> str:
    """The picture in words, the lit parts named. lit, errors: as `schematic`."""
    lit = parts_of(lit)
    shown = f" Lit here: {', '.join(lit)}." if lit else ""
    return (
        "DSA: the indexer scores all S cached index keys for each of T queries; the selector keeps the k best of each; "
        "attention reads those k rows of the KV cache alone." + shown
    )


def schematic_file(lit=()) -> str:
    """The picture's name in figures/: "schematic.svg", or "schematic-kv.svg". lit, errors: as `schematic`."""
    return "-".join(("schematic", *parts_of(lit))) + ".svg"


def parts_of(lit) -> tuple:
    """`lit`, a name or several, as a tuple in the order of PARTS.

    Raises: TypeError for what is neither a str nor a list, tuple or set, ValueError for a name that is not in PARTS.
    """
    if not isinstance(lit, (str, list, tuple, set, frozenset)):
        raise TypeError(f"lit must be a str or several, got {type(lit).__name__}")
    names = {lit} if isinstance(lit, str) else set(lit)
    if unknown := sorted(map(str, names - set(PARTS))):
        raise ValueError(f"lit must be of {', '.join(PARTS)}, got {', '.join(unknown)}")
    return tuple(name for name in PARTS if name in names)


def _box(left, top, width, words, lit):
    box = f'<rect class="box" x="{left}" y="{top}" width="{width}" height="{ROW}" rx="6"/>'
    return f'<g class="{"lit" if lit else "unlit"}">{box}{"".join(words)}</g>'


def _text(x, y, words, kind, anchor="start"):
    return f'<text class="{kind}" x="{x:g}" y="{y}" text-anchor="{anchor}">{html.escape(words)}</text>'


def _arrow(x0, y0, x1, y1):
    """Down or to the left."""
    back = (x1, y1 - 7) if x0 == x1 else (x1 + 7, y1)
    wing = (4, 0) if x0 == x1 else (0, 4)
    corners = [(x1, y1), (back[0] + wing[0], back[1] + wing[1]), (back[0] - wing[0], back[1] - wing[1])]
    points = " ".join(f"{x},{y}" for x, y in corners)
    return f'<path class="arrow" d="M{x0} {y0}L{back[0]} {back[1]}"/><polygon class="head" points="{points}"/>'
