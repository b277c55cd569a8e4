"""The style sheet of the report: light and dark by the reader's system, nothing loaded."""

STYLE = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --text: #1b2330; --muted: #667085; --rule: #e3e6ec;
  --accent: #2f6fed; --good: #16803c; --bad: #c0362c; --raw: #2f6fed40;
  --c0: #2f6fed; --c1: #e07b39; --c2: #2a9d6f; --c3: #9a5bd6; --c4: #d1477a; --c5: #c2a11c;
  --c6: #1f9fb4; --c7: #8a93a3; --tint: 22%; }
@media (prefers-color-scheme: dark) { :root {
  --page: #0f131a; --card: #181e28; --text: #e4e8ef; --muted: #93a0b4; --rule: #2a3240;
  --accent: #6ea0ff; --good: #52c97b; --bad: #ff7b6e; --raw: #6ea0ff45;
  --c0: #6ea0ff; --c1: #f0975a; --c2: #4cc394; --c3: #b98af0; --c4: #ec6d9c; --c5: #dcc14a;
  --c6: #4fc3d6; --c7: #7c8799; --tint: 30%; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main, header > div { max-width: 1241px; margin: 0 auto; padding: 0 24px; }
header { background: var(--card); border-bottom: 1px solid var(--rule); padding: 28px 0 18px; }
h1 { margin: 0; font-size: 26px; letter-spacing: -0.02em; }
h2 { margin: 44px 0 4px; font-size: 20px; letter-spacing: -0.01em; }
h3 { margin: 24px 0 8px; font-size: 12px; color: var(--muted); font-weight: 600;
  text-transform: uppercase; letter-spacing: 0.07em; }
nav { display: flex; gap: 18px; margin-top: 14px; flex-wrap: wrap; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
.facts { display: flex; flex-wrap: wrap; gap: 6px; margin: 10px 0; padding: 0; list-style: none; }
.facts li { border: 1px solid var(--rule); border-radius: 999px; padding: 1px 11px;
  font-size: 13px; background: var(--card); }
.facts span { color: var(--muted); margin-right: 6px; }
.groups { display: flex; flex-wrap: wrap; gap: 0 14px; }
.group { --columns: min(var(--cards), 4); max-width: 100%;
  width: calc(var(--columns) * 287.5px + (var(--columns) - 1) * 14px); }
.grid { display: grid; gap: 14px; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 12px 14px; min-width: 0; }
.card > h4 { margin: 0 0 4px; font-size: 13px; font-weight: 600; display: flex;
  justify-content: space-between; gap: 8px; }
.card > h4 output { color: var(--muted); font-weight: 400; font-variant-numeric: tabular-nums; }
.wide { grid-column: span 2; }
@media (max-width: 700px) { .wide { grid-column: auto; } .group { width: 100%; } }
.tiles { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); }
.tile b { display: block; font-size: 24px; line-height: 1.35; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; }
.tile small { color: var(--muted); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 7px 12px; border-top: 1px solid var(--rule); }
thead th { border-top: 0; color: var(--muted); font-size: 13px; font-weight: 600; }
th:first-child, td:first-child { text-align: left; font-weight: 400; }
td small { color: var(--muted); }
svg { width: 100%; height: auto; display: block; overflow: visible; }
svg .grid { stroke: var(--rule); } svg .axis { stroke: var(--muted); fill: none; opacity: 0.6; }
svg .tick { fill: var(--muted); font-size: 10px; }
svg .line { stroke: var(--accent); stroke-width: 1.8; fill: none; stroke-linejoin: round; }
svg .raw { stroke: var(--raw); stroke-width: 1; fill: none; }
svg .point rect { fill: transparent; }
svg .point circle { fill: var(--accent); stroke: var(--card); stroke-width: 1.2; opacity: 0; }
svg .point:hover circle, svg .dots circle { opacity: 1; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px; margin: 8px 0 0;
  padding: 0; list-style: none; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 3px;
  margin-right: 6px; }
.share { display: flex; height: 12px; border-radius: 6px; overflow: hidden; margin: 10px 0 4px; }
.sample { margin-bottom: 14px; }
.prompt { white-space: pre-wrap; overflow-wrap: anywhere; color: var(--muted);
  border-left: 3px solid var(--rule); padding-left: 12px; }
.reply { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.95; }
.reply-head { font-size: 12px; color: var(--muted); margin: 12px 0 2px; }
.reply-head b { color: var(--text); font-variant-numeric: tabular-nums; }
.action { border-radius: 4px; padding: 2px 0; -webkit-box-decoration-break: clone;
  box-decoration-break: clone; }
.action:hover { outline: 1.5px solid var(--muted); }
.action span + span { border-left: 1px dotted color-mix(in srgb, var(--text) 35%, transparent); }
details { margin-top: 14px; } summary { cursor: pointer; color: var(--muted); font-size: 13px; }
pre { overflow-x: auto; font-size: 12px; line-height: 1.45; background: var(--card);
  border: 1px solid var(--rule); border-radius: 10px; padding: 12px 14px; }
.up { color: var(--good); } .down { color: var(--bad); }
footer { color: var(--muted); font-size: 12px; padding: 40px 0 30px; }
""" + "".join(
    f".fill{index} {{ fill: var(--c{index}); background: var(--c{index}); }}"
    f" .action{index} {{ background:"
    f" color-mix(in srgb, var(--c{index}) var(--tint), transparent); }}\n"
    for index in range(8)
)
