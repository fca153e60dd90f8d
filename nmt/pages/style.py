"""The style sheet of all pages: one palette, light or dark like the reader's system, and rules in parts by purpose.

A page uses BASE and the parts that it names. No rule refers to anything outside the page.
"""

import re

COLOURS = {
    "page": ("#f6f6f4", "#12151a"),
    "card": ("#fff", "#1a1e25"),
    "ink": ("#1c2430", "#e4e7ec"),
    "soft": ("#5d6878", "#98a3b3"),
    "line": ("#e2e4e8", "#2b313b"),
    "track": ("#eceef1", "#262c35"),
    "load": ("#3a6ea5", "#6ba3de"),
    "importance": ("#c98a1b", "#e0ac4c"),
    "hot": ("214 96 40", "226 118 58"),
    "cold": ("58 112 190", "76 138 222"),
    "mark": ("#fde9b5", "#5a4512"),
    "chip": ("#eef2f7", "#252c37"),
    "zero": ("#eceae4", "#33322e"),
    "gain": ("#4a90d9", "#2f6fb5"),
    "loss": ("#e8853a", "#b3591a"),
}
"""Colours by name: (light, dark). `hot` and `cold` are red, green and blue values, so that rules can fade them."""

BASE = """
* { box-sizing:border-box }
body { margin:0; background:var(--page); color:var(--ink); font:15px/1.5 system-ui,-apple-system,"Segoe UI",
  Roboto,"Helvetica Neue",Arial,sans-serif; font-variant-numeric:tabular-nums }
main { max-width:1180px; margin:0 auto; padding:40px 24px 80px }
h1 { font-size:30px; line-height:1.2; margin:0; letter-spacing:-.01em }
h2 { font-size:23px; margin:56px 0 14px; padding-top:18px; border-top:2px solid var(--ink) }
h2.sub { font-size:18px; border:0; margin:18px 0 4px } h3 { font-size:15px; margin:0 }
p { margin:0 0 10px; max-width:78ch } .soft,.how { color:var(--soft) } .how { font-size:13px; margin:4px 0 14px }
nav a { color:inherit; margin-right:16px } code { font-family:ui-monospace,Menlo,Consolas,monospace }
table { border-collapse:collapse; width:100%; font-size:13px } td,th { padding:2px 8px; vertical-align:baseline;
  text-align:left } th { color:var(--soft); font-weight:400; font-size:12px; border-bottom:1px solid var(--line) }
td.n,th.n { text-align:right } .chips { display:flex; flex-wrap:wrap; gap:5px }
@media (max-width:760px) { main { padding:24px 14px } }
"""
"""Headings, text and plain tables."""

PANELS = """
.tiles { display:flex; flex-wrap:wrap; gap:1px; background:var(--line); border:1px solid var(--line);
  border-radius:10px; overflow:hidden; margin-bottom:6px }
.tiles div { flex:1 1 116px; background:var(--card); padding:12px 14px }
.tiles b { display:block; font-size:20px; font-weight:600 } .tiles span { color:var(--soft); font-size:12px }
.panels { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr)); gap:16px }
.panel,details { background:var(--card); border:1px solid var(--line); border-radius:10px }
.panel { padding:18px 20px; min-width:0 }
"""
"""Figures in tiles, and panels side by side."""

CHARTS = """
svg { display:block; width:100%; height:auto; overflow:visible }
svg text { fill:var(--soft); font-size:12px } svg text.in { fill:var(--ink); text-anchor:middle }
.load { fill:var(--load) } .importance { fill:var(--importance) }
.hot { fill:rgb(var(--hot)) } .cold { fill:rgb(var(--cold)) }
rect.hot,rect.cold { stroke:var(--line) } .fair { stroke:var(--ink); stroke-dasharray:4 3; fill:none }
.axis { stroke:var(--line) } polyline.load,polyline.importance { fill:none; stroke:var(--load); stroke-width:2 }
polyline.importance { stroke:var(--importance) }
.key { font-size:12px; color:var(--soft); margin:10px 0 0 } .key i { display:inline-block; width:10px; height:10px;
  border-radius:2px; margin:0 5px 0 14px } .key i:first-child { margin-left:0 } .key .load { background:var(--load) }
.key .importance { background:var(--importance) } .key .hot { background:rgb(var(--hot)) }
.key .cold { background:rgb(var(--cold)) } .key .fair { height:0; width:18px; border-top:2px dashed var(--ink);
  border-radius:0; vertical-align:4px }
.bar { background:var(--track); height:12px; border-radius:3px; display:block }
.bar i { display:block; height:100%; border-radius:3px; background:var(--load) }
.bar i.chance { background:var(--soft) }
"""
"""Charts of nmt/pages/charts.py."""

EXPERTS = """
.purity { margin:14px 0 18px } .purity div { display:grid; grid-template-columns:76px 1fr 52px; gap:10px;
  align-items:center; font-size:12px; color:var(--soft); margin:4px 0 }
.purity b { font-size:14px; font-weight:600 } .purity em { font-style:normal;
  font-size:12px; color:var(--soft); display:block }
details { margin:8px 0 } summary { cursor:pointer; padding:10px 16px; display:grid; align-items:center; gap:14px;
  grid-template-columns:124px 1fr 200px; list-style:none } summary::-webkit-details-marker { display:none }
summary h3 { white-space:nowrap }
summary h3::before { content:"▸"; color:var(--soft); display:inline-block; width:16px } [open]>summary h3::before {
  content:"▾" } summary:hover { background:var(--chip); border-radius:10px }
.chip { background:var(--chip); border-radius:5px; padding:1px 7px;
  font-size:13px; white-space:nowrap; max-width:24ch; overflow:hidden; text-overflow:ellipsis }
.chip,td.word,.body td:last-child { color:var(--soft) } .chip b,td b { color:var(--ink);
  font-weight:600 } .share { display:grid; grid-template-columns:1fr 60px; gap:10px; align-items:center;
  font-size:13px; text-align:right }
.body { padding:4px 16px 16px; overflow-x:auto } .facts { display:flex; flex-wrap:wrap; gap:4px 26px; font-size:13px;
  color:var(--soft); margin-bottom:10px } .facts b { color:var(--ink); font-weight:600 }
tbody.role { border-bottom:1px solid var(--line) } tbody.role tr:first-child td {
  padding-top:7px } tbody.role tr:last-child td { padding-bottom:7px } td.word { width:170px; line-height:1.35 }
.kwic { table-layout:fixed; min-width:640px } .kwic td:not(.word) { white-space:pre; overflow:hidden }
td.left { color:var(--soft); padding-right:0 } td.left span { display:flex; justify-content:flex-end }
td.right { color:var(--soft); padding-left:0; text-overflow:ellipsis }
mark { background:var(--mark); color:var(--ink); border-radius:3px; padding:1px 2px; font-weight:600 }
@media (max-width:760px) { summary { grid-template-columns:84px 1fr } .share { display:none } }
"""
"""The report on experts: bars of purity, and a card for each expert."""

EXPLANATION = """
h1 { font-size:1.35rem; margin:0 0 1rem; letter-spacing:0 }
h2 { font-size:1.1rem; margin:2.5rem 0 .25rem; padding:0; border:0 }
p { margin:.25rem 0 .75rem; max-width:60rem }
dl { display:grid; grid-template-columns:max-content 1fr; gap:.25rem 1rem; margin:0 0 1.25rem }
dt { color:var(--soft) } dd { margin:0; overflow-wrap:anywhere }
.legend { display:flex; flex-wrap:wrap; gap:.5rem 1.5rem; align-items:center; color:var(--soft) }
.ramp { display:inline-block; width:14rem; height:.9rem; border-radius:3px; vertical-align:middle;
  background:linear-gradient(to right, var(--loss), var(--zero), var(--gain)) }
table { font-size:15px; margin-top:.5rem }
td,th { padding:3px .75rem 3px 0; border-bottom:1px solid var(--line); vertical-align:middle } th { font-size:.8rem }
.place,.number { color:var(--soft); text-align:right; width:1%; white-space:nowrap }
.piece { width:1%; min-width:6rem; max-width:16rem; overflow-wrap:anywhere; font-family:ui-monospace,monospace }
.chips { gap:3px } td .chips { width:min(36rem, 55vw) }
.chip { display:block; flex:var(--gate, 0) 1 0; min-width:max-content; padding:1px 6px;
  border-radius:4px; font-size:.8rem; white-space:nowrap; overflow:hidden; background:var(--zero);
  background:color-mix(in oklab, var(--tint) var(--strength), var(--zero)) }
.map { max-width:46rem } .map svg text { font-family:ui-monospace,monospace }
.gain { --tint:var(--gain) } .loss { --tint:var(--loss) } .chip b { margin-right:.35rem }
"""
"""The explanation of a sentence: a row for each position, a chip for each expert."""

COMPARISON = """
.wide { overflow-x:auto; margin:0 0 18px } .wide table { width:auto }
td { white-space:nowrap } td.name { white-space:normal; overflow-wrap:anywhere; min-width:120px; max-width:420px }
td,th { padding:2px 7px } tr.first td { border-top:1px solid var(--line) } tr.few td { color:var(--soft) }
th.group { color:var(--ink); font-weight:600 } td.scores,th.scores { padding-left:22px }
svg.interval { width:116px; height:auto; display:block } .interval circle { fill:var(--soft) }
.interval path { stroke:var(--soft); stroke-width:2; fill:none }
.interval path.axis { stroke:var(--soft); stroke-width:1; opacity:.6 }
.interval .gain { fill:var(--gain); stroke:var(--gain) } .interval .loss { fill:var(--loss); stroke:var(--loss) }
td.plot { vertical-align:middle } b.gain { color:var(--gain) } b.loss { color:var(--loss) }
.pair { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:10px 16px; margin:10px 0;
  break-inside:avoid } .pair header { font-size:13px; color:var(--soft) } .pair header b { margin-left:8px }
.pair dl { display:grid; grid-template-columns:minmax(64px,max-content) 1fr; gap:3px 14px; margin:6px 0 0 }
.pair dt { color:var(--soft); font-size:12px; line-height:22px; max-width:180px; overflow-wrap:anywhere }
.pair dd { margin:0; overflow-wrap:anywhere; white-space:pre-wrap; min-width:0 }
mark { background:var(--mark); color:var(--ink); border-radius:3px }
@media print { main { max-width:none; padding:0 } body { background:none; font-size:12px } .wide { overflow:visible } }
"""
"""The comparison of systems: tables with intervals, and sentences with differing words marked."""


PREPARATION = """
.advice { background:var(--card); border:1px solid var(--line); border-left:4px solid var(--importance);
  border-radius:10px; padding:14px 20px; margin:16px 0 22px } .advice ul { margin:6px 0 0; padding:0; list-style:none }
.advice li { padding:7px 0 7px 26px; position:relative; max-width:90ch; overflow-wrap:anywhere }
.advice li::before { content:"!"; position:absolute; left:0; top:9px; width:17px; height:17px; border-radius:50%;
  background:var(--importance); color:var(--card); font:700 12px/17px system-ui,sans-serif; text-align:center }
.advice li.severe::before,.warning::before { background:rgb(var(--hot)) }
.advice:has(.severe),.warning { border-left-color:rgb(var(--hot)) }
.advice.fine { border-left-color:var(--load); padding:10px 20px } .advice.fine p { margin:0 }
.warning { border-left:4px solid rgb(var(--hot)); padding:6px 14px; background:var(--card); border-radius:6px;
  font-weight:600 } nav a { display:inline-block; line-height:2 } code { font-size:.88em; overflow-wrap:anywhere }
.tiles b { white-space:nowrap } .tiles span { display:block; line-height:1.35 }
.flow { margin:0 0 18px } .flow .bar { height:26px; border-radius:6px; overflow:hidden; display:flex }
.flow .bar i { border-radius:0 } .bar i.importance,i.read { background:var(--importance) } .bar i.load,i.kept {
  background:var(--load) } .key .chance { background:var(--soft) }
.key i.read,.key i.kept { display:inline-block }
.rows { background:var(--card); border:1px solid var(--line); border-radius:10px; overflow:hidden }
.rows>* { border:0; border-radius:0; border-top:1px solid var(--line) } .rows>:first-child { border-top:0 }
.row { display:grid; grid-template-columns:minmax(200px,320px) 1fr minmax(84px,auto) 84px; gap:4px 16px;
  align-items:center; padding:9px 16px 9px 34px; font-size:14px; position:relative; list-style:none }
.row.none { color:var(--soft) } .row.none b { font-weight:400 } .what { overflow-wrap:anywhere; min-width:0 }
.what b { font-weight:600 } .what code { display:block; color:var(--soft); font-size:12px }
.count,.part { text-align:right; white-space:nowrap } .part { color:var(--soft) }
summary { cursor:pointer } summary::-webkit-details-marker { display:none } summary:hover { background:var(--chip) }
summary.row::before { content:"▸"; color:var(--soft); position:absolute; left:15px; top:9px }
[open]>summary.row::before { content:"▾" } .body { padding:6px 16px 16px; border-top:1px dashed var(--line) }
.example { border:1px solid var(--line); border-radius:8px; margin:8px 0; background:var(--card); break-inside:avoid }
.example header { display:flex; flex-wrap:wrap; gap:2px 16px; padding:5px 14px 0; font-size:11px; color:var(--soft);
  overflow-wrap:anywhere }
.sides { display:grid; grid-template-columns:minmax(0,1fr) minmax(0,1fr) } .sides>* { padding:3px 14px 6px; margin:0;
  max-width:none; overflow:hidden } .sides>:last-child { border-left:1px solid var(--line) }
.sides p,.sides dd { overflow-wrap:anywhere; white-space:pre-wrap; font-size:14px }
.sides dt { font-size:11px; color:var(--soft) } .sides dd { margin:0 } .sides dd+dt { margin-top:6px }
mark { background:var(--mark); color:var(--ink); border-radius:3px } .unseen { font:600 10px/1 ui-monospace,Menlo,
  Consolas,monospace; color:var(--ink); background:var(--track); border:1px solid var(--soft); border-radius:3px;
  padding:0 2px; margin:0 1px; unicode-bidi:isolate } .read { fill:var(--importance) } .kept { fill:var(--load) }
.tip { fill:transparent } .tip:hover { fill:var(--ink); fill-opacity:.08 } .panel svg { margin:10px 0 4px }
.panel .key { margin:2px 0 0 } .chip { background:var(--chip); border-radius:5px; padding:1px 7px; font-size:12px;
  color:var(--soft); white-space:nowrap } .chip b { color:var(--ink); font-size:14px; margin-right:6px }
.more { border:0; background:none; margin-top:10px } .more summary { color:var(--soft); font-size:13px;
  margin-bottom:6px; list-style:"▸ " inside } .wide { overflow-x:auto; margin:12px 0 } .wide table { width:auto;
  min-width:min(560px,100%) } .wide td,.wide th { padding:4px 18px 4px 0 } .wide td:first-child {
  overflow-wrap:anywhere; min-width:140px }
@media (max-width:760px) { .row { grid-template-columns:1fr auto 62px; gap:4px 10px } .row .bar { grid-row:2;
  grid-column:1/-1 } .sides { grid-template-columns:minmax(0,1fr) } .sides>:last-child { border-left:0;
  border-top:1px dashed var(--line) } .body { padding:4px 8px 10px } h1 { font-size:24px; overflow-wrap:anywhere } }
@media print { main { max-width:none; padding:0 } body { background:none; font-size:12px } .wide { overflow:visible } }
"""
"""The report of a preparation: advice, rows that open to examples, and two sides of a text beside each other."""


def style_sheet(*parts: str) -> str:
    """Return the style sheet of BASE and `parts`, with the colours that they use."""
    rules = "".join((BASE, *parts))
    used = [name for name in COLOURS if re.search(rf"var\(--{name}\)", rules)]
    light, dark = ("; ".join(f"--{name}:{COLOURS[name][mode]}" for name in used) for mode in (0, 1))
    return (
        f"\n:root {{ color-scheme:light dark; {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}{rules}"
    )
