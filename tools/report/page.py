"""The page of a report: style and layout. One file, nothing is loaded from anywhere."""

from __future__ import annotations

import re

from jinja2 import Environment, StrictUndefined

CSS = """
:root { color-scheme: light dark; --ink: #17202b; --soft: #5a6675; --line: #dfe4ea;
  --back: #f4f6f9; --panel: #ffffff; --head: #0f2a43; --accent: #0072b2; --good: #1a7f37;
  --bad: #c62828; --warn: #9a6700; --stripe: #f7f9fb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #98a3b3; --line: #2f3742;
  --back: #11151a; --panel: #1a2027; --head: #0b1620; --accent: #56b4e9; --good: #4cc66a;
  --bad: #ff6b66; --warn: #e0b341; --stripe: #1e252d; }
  img.plot { filter: invert(.9) hue-rotate(180deg); }
  img.plot.map { filter: none; background: #fff; border-radius: .3rem; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 3.5rem; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
.wide { max-width: 76rem; margin: 0 auto; padding: 0 1.25rem; }
header { background: var(--head); color: #fff; padding: 2rem 0 3.6rem; }
header h1 { margin: 0 0 .5rem; font-size: clamp(1.5rem, 4vw, 2.2rem); line-height: 1.2;
  letter-spacing: -.01em; }
header p { margin: 0; color: #c4d2e0; font-size: .9rem; max-width: 62rem; }
.cards { display: grid; gap: .8rem; margin-top: -2.4rem;
  grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: .6rem;
  padding: .8rem 1rem; box-shadow: 0 2px 8px rgb(0 0 0 / 7%); }
.card b { display: block; font-size: 1.35rem; line-height: 1.2; color: var(--accent);
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.card.good b { color: var(--good); } .card.bad b { color: var(--bad); }
.card span { font-size: .82rem; color: var(--soft); }
nav { position: sticky; top: 0; z-index: 3; background: var(--back); margin-top: 1rem;
  border-bottom: 1px solid var(--line); }
nav div { display: flex; gap: .2rem; overflow-x: auto; scrollbar-width: none; }
nav a { color: var(--soft); text-decoration: none; font-size: .88rem; white-space: nowrap;
  padding: .7rem .6rem; }
nav a:hover { color: var(--accent); }
section { background: var(--panel); border: 1px solid var(--line); border-radius: .6rem;
  padding: 1.2rem 1.4rem 1.4rem; margin: 1.2rem 0; }
h2 { margin: 0 0 .2rem; font-size: 1.3rem; } h3 { margin: 1.4rem 0 .4rem; font-size: 1rem; }
p.text { color: var(--soft); margin: 0 0 .6rem; max-width: 60rem; }
p.note { color: var(--soft); font-size: .82rem; overflow-wrap: anywhere; margin: .4rem 0 0;
  max-width: 64rem; }
.banner { background: #b3261e; color: #fff; padding: .7rem 1.25rem; margin: 0;
  font-weight: 600; text-align: center; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .4rem; }
table { border-collapse: collapse; font-size: .84rem; width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: left; vertical-align: top; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line);
  vertical-align: bottom; white-space: normal; min-width: 4.8rem; line-height: 1.25; }
tbody tr:nth-child(even) td { background: var(--stripe); }
tbody td { background: var(--panel); }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--panel); z-index: 1;
  min-width: 10rem; white-space: normal; }
.num { text-align: right; }
td.long:not(:first-child) { white-space: normal; min-width: 16rem; overflow-wrap: anywhere; }
.pass { color: var(--good); font-weight: 600; } .fail { color: var(--bad); font-weight: 700; }
.would { color: var(--warn); }
.plots { display: grid; gap: 1rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); }
figure { margin: 0; max-width: 46rem; } figure img { width: 100%; height: auto; display: block; }
figcaption { font-size: .82rem; color: var(--soft); }
details { margin-top: 1rem; } summary { cursor: pointer; color: var(--accent); font-size: .9rem; }
.pairs { display: grid; gap: .6rem; }
.pairs figure { max-width: none; display: grid; gap: .2rem 1rem; align-items: center;
  grid-template-columns: 12rem minmax(0, 1fr); }
.pairs figure div { display: grid; gap: .35rem;
  grid-template-columns: repeat(10, minmax(0, 6rem)); }
.pairs img { width: 100%; image-rendering: pixelated; display: block; border-radius: .15rem; }
pre { background: var(--stripe); border: 1px solid var(--line); border-radius: .4rem;
  padding: .7rem 1rem; overflow-x: auto; font-size: .8rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
footer { color: var(--soft); font-size: .8rem; padding: .5rem 0 2rem; }
@media (max-width: 40rem) { .wide { padding: 0 .7rem; } section { padding: .9rem .8rem; }
  .cards { grid-template-columns: repeat(2, 1fr); }
  .pairs figure { grid-template-columns: minmax(0, 1fr); }
  .pairs figure div { grid-template-columns: repeat(5, minmax(0, 1fr)); }
  th, td { padding: .35rem .5rem; }
  th:first-child, td:first-child { min-width: 6.5rem; box-shadow: 1px 0 0 var(--line); }
  .few thead { display: none; } .few tr, .few td { display: block; }
  .few tr { padding: .4rem 0; } .few tr + tr { border-top: 1px solid var(--line); }
  .few tbody td, .few td.long:not(:first-child) { position: static; background: none;
    min-width: 0; padding: .15rem .6rem; text-align: left; white-space: normal;
    overflow-wrap: anywhere; box-shadow: none; }
  .few td:first-child { font-weight: 600; } .few td:not(:first-child) { display: flex; gap: .6rem; }
  .few td:not(:first-child)::before { content: attr(data-label); color: var(--soft);
    flex: 0 0 40%; } }
@media print { @page { margin: 12mm; } nav, summary, footer { display: none; }
  body { font-size: 10pt; background: #fff; }
  header { background: none; color: #000; padding: 0; } header p { color: #444; }
  .wide { max-width: none; padding: 0; } .cards { margin-top: .8rem; }
  .card { box-shadow: none; break-inside: avoid; } .card b { font-size: 14pt; }
  section { border: 0; padding: 0; } h2, h3 { break-after: avoid; }
  figure, tr { break-inside: avoid; } .scroll { overflow: visible; border: 0; }
  .plots { grid-template-columns: 1fr 1fr; }
  details::details-content { content-visibility: visible; block-size: auto; }
  table { font-size: 6.8pt; } th { min-width: 0; }
  th, td { padding: .12rem .25rem; white-space: normal; } .num { white-space: nowrap; }
  td.long { overflow-wrap: anywhere; }
  th:first-child, td:first-child { position: static; min-width: 0; } td.long { min-width: 0; } }
"""

PAGE = """{% macro show(t, under) %}
{% if t.title != under %}<h3>{{ t.title }}</h3>{% endif %}<div class="scroll">
<table{% if t | few %} class="few"{% endif %}><thead><tr>
{% for c in t.columns %}<th class="{{ t | side(loop.index0) }}">{{ c }}</th>{% endfor %}
</tr></thead><tbody>
{% for row in t.rows %}<tr>{% for cell in row %}
<td class="{{ cell | look }} {{ t | side(loop.index0) }}"
data-label="{{ t.columns[loop.index0] }}">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% if t.note %}<p class="note">{{ t.note }}</p>{% endif %}{% endmacro %}<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>{{ css | safe }}</style></head><body>
{% for warning in warnings %}<p class="banner">{{ warning }}</p>{% endfor %}
<header><div class="wide"><h1>{{ title }}</h1><p>{{ subtitle }}</p></div></header>
<main class="wide">
{% if cards %}<div class="cards">{% for card in cards %}
<div class="card {{ card.look }}"><b>{{ card.value }}</b><span>{{ card.label }}</span></div>
{% endfor %}</div>{% endif %}
<nav><div>{% for s in sections %}<a href="#{{ s.anchor }}">{{ s.title }}</a>{% endfor %}</div></nav>
{% for s in sections %}<section id="{{ s.anchor }}"><h2>{{ s.title }}</h2>
{% if s.text %}<p class="text">{{ s.text }}</p>{% endif %}
{% for t in s.tables %}{{ show(t, s.title) }}{% endfor %}
{% if s.plots %}<div class="plots">{% for plot in s.plots %}
<figure><img class="plot {{ plot.look }}" alt="{{ plot.caption }}" src="{{ plot.data }}"></figure>
{% endfor %}</div>{% endif %}
{% if s.data %}<details><summary>All numbers</summary>
{% for t in s.data %}{{ show(t, s.title) }}{% endfor %}</details>{% endif %}
{% for p in s.pairs %}<h3>{{ p.title }}</h3>
<div class="pairs">{% for row in p.rows %}<figure><figcaption>{{ row.name }}</figcaption><div>
{% for image in row.images %}<img alt="{{ row.name }}, image {{ loop.index0 }}" src="{{ image }}">
{% endfor %}</div></figure>{% endfor %}</div>{% endfor %}
{% if s.pictures %}<div class="plots">{% for picture in s.pictures %}
<figure><img alt="{{ picture.caption }}" src="{{ picture.data }}">
<figcaption>{{ picture.caption }}</figcaption></figure>{% endfor %}</div>{% endif %}
{% if s.code %}<h3>Commands</h3><pre>{{ s.code }}</pre>{% endif %}
</section>{% endfor %}
<footer>{{ footer }}</footer>
</main></body></html>
"""

LOOKS = {"pass": "pass", "FAIL": "fail", "would fail": "would"}
FEW = 3  # rows; on a phone such a table is a list of cells instead
LONG = 40  # characters; longer cells may break
NUMBER = re.compile(r"(about )?[-+]?[0-9.]+(e[-+]?[0-9]+)?( ?%|x| dB)?( [(±].*)?|-")


def look(cell: str) -> str:
    """The style class of a table cell."""
    return LOOKS.get(cell, "long" if len(cell) > LONG else "")


def few(table: object) -> bool:
    """Whether a table is short enough to be a list on a phone."""
    return len(table.rows) <= FEW  # type: ignore[attr-defined]


def side(table: object, column: int) -> str:
    """The style class of a column: numbers stand to the right, but never in the first one."""
    cells = [row[column] for row in table.rows]  # type: ignore[attr-defined]
    return "num" if column and all(NUMBER.fullmatch(cell) for cell in cells) else ""


def render(**values: object) -> str:
    """The page as HTML; every value is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"look": look, "side": side, "few": few}
    return environment.from_string(PAGE).render(css=CSS, **values)
