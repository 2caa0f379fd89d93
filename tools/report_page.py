"""The page of a report: style and layout. One file, nothing is loaded from anywhere."""

from __future__ import annotations

from jinja2 import Environment, StrictUndefined

CSS = """
:root { color-scheme: light dark; --ink: #1a1d21; --soft: #5b6470; --line: #d9dee5;
  --back: #ffffff; --panel: #f5f7fa; --good: #1a7f37; --bad: #c62828; --warn: #9a6700; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #9aa4b2; --line: #333a44;
  --back: #14171b; --panel: #1d2127; --good: #4cc66a; --bad: #ff6b66; --warn: #e0b341; }
  img.plot { filter: invert(.92) hue-rotate(180deg); }
  img.plot.map { filter: none; background: #fff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); line-height: 1.5;
  font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.7rem; margin: .5rem 0; } h2 { margin: 2.2rem 0 .6rem; font-size: 1.3rem;
  border-bottom: 1px solid var(--line); padding-bottom: .2rem; } h3 { margin: 1.4rem 0 .4rem;
  font-size: 1.05rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; } a { color: inherit; }
p.note { color: var(--soft); font-size: .88rem; overflow-wrap: anywhere; }
.banner { border: 2px solid var(--bad); color: var(--bad); padding: .6rem 1rem; font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; } th { background: var(--panel); }
td:not(:first-child), th:not(:first-child) { white-space: nowrap; } td.wide { white-space: normal;
  min-width: 16rem; }
.pass { color: var(--good); } .fail { color: var(--bad); font-weight: 600; }
.would { color: var(--warn); }
.plots { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; background: var(--panel); border-radius: .5rem; padding: .6rem; }
figure img { width: 100%; height: auto; display: block; }
figcaption { font-size: .85rem; color: var(--soft); }
.pairs { display: grid; gap: .4rem; align-items: center; font-size: .8rem; }
.pairs img { width: 100%; image-rendering: pixelated; display: block; }
pre { background: var(--panel); padding: .7rem; overflow-x: auto; font-size: .82rem; }
@media print { nav { display: none; } body { font-size: 10pt; } h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; } .scroll { overflow: visible; } table { font-size: 7pt; }
  th, td { padding: .15rem .3rem; white-space: normal !important; } }
"""

PAGE = """{% macro show(t) %}<h3>{{ t.title }}</h3><div class="scroll"><table><thead><tr>
{% for c in t.columns %}<th>{{ c }}</th>{% endfor %}</tr></thead><tbody>
{% for row in t.rows %}<tr>{% for cell in row %}<td class="{{ cell | look }}">{{ cell }}</td>
{% endfor %}</tr>{% endfor %}</tbody></table></div>
{% if t.note %}<p class="note">{{ t.note }}</p>{% endif %}{% endmacro %}<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>{{ css | safe }}</style></head><body><main>
<h1>{{ title }}</h1>
{% for warning in warnings %}<p class="banner">{{ warning }}</p>{% endfor %}
<nav>{% for s in sections %}<a href="#{{ s.anchor }}">{{ s.title }}</a>{% endfor %}</nav>
{% for s in sections %}<section id="{{ s.anchor }}"><h2>{{ s.title }}</h2>
{% if s.text %}<p class="note">{{ s.text }}</p>{% endif %}
{% if s.tables %}{{ show(s.tables[0]) }}{% endif %}
{% if s.plots %}<div class="plots">{% for plot in s.plots %}
<figure><img class="plot {{ plot.look }}" alt="{{ plot.caption }}" src="{{ plot.data }}">
<figcaption>{{ plot.caption }}</figcaption></figure>{% endfor %}</div>{% endif %}
{% for t in s.tables[1:] %}{{ show(t) }}{% endfor %}
{% for p in s.pairs %}<h3>{{ p.title }}</h3>
<div class="scroll"><div class="pairs"
style="grid-template-columns: 6.5rem repeat({{ p.count }}, 3.4rem)">
{% for row in p.rows %}<span>{{ row.name }}</span>
{% for image in row.images %}<img alt="{{ row.name }}, image {{ loop.index0 }}" src="{{ image }}">
{% endfor %}{% endfor %}</div></div>{% endfor %}
{% for picture in s.pictures %}<figure><img alt="{{ picture.caption }}" src="{{ picture.data }}">
<figcaption>{{ picture.caption }}</figcaption></figure>{% endfor %}
{% if s.code %}<pre>{{ s.code }}</pre>{% endif %}
</section>{% endfor %}
</main></body></html>
"""

LOOKS = {"pass": "pass", "FAIL": "fail", "would fail": "would"}
WIDE = 40  # characters; longer cells may break


def look(cell: str) -> str:
    """The style class of a table cell."""
    return LOOKS.get(cell, "wide" if len(cell) > WIDE else "")


def render(**values: object) -> str:
    """The page as HTML; every value is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["look"] = look
    return environment.from_string(PAGE).render(css=CSS, **values)
