"""The look of the page, in light, dark and print, and the script that shows values under the
pointer. The page reads whole without the script.
"""

CSS = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --text: #1b2430; --weak: #56616f; --rule: #d9dee5; --grid: #e7eaef;
  --band: #0f766e33; --accent: #1d4ed8; --good: #166534; --good-back: #dcfce7; --bad: #b91c1c;
  --bad-back: #fee2e2; --warn: #92400e; --warn-back: #fef3c7; --live-back: #dbeafe;
  --c0: #1d4ed8; --c1: #c2410c; --c2: #15803d; --c3: #9333ea; --c4: #be185d; --c5: #0e7490; --c6: #a16207;
  --c7: #475569; --c8: #9aa5b4; }
@media (prefers-color-scheme: dark) { :root {
  --page: #11161d; --card: #1a212b; --text: #e6eaf0; --weak: #a3aebd; --rule: #323c4a; --grid: #2a3340;
  --band: #2dd4bf33; --accent: #7aa7ff; --good: #86efac; --good-back: #14352a; --bad: #fca5a5;
  --bad-back: #481d20; --warn: #fcd34d; --warn-back: #40300f; --live-back: #1c3157;
  --c0: #6ea0ff; --c1: #fb923c; --c2: #4ade80; --c3: #c08cff; --c4: #f472b6; --c5: #22d3ee; --c6: #facc15;
  --c7: #94a3b8; --c8: #5b6675; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--text); overflow-wrap: anywhere;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main, header { max-width: 1240px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 24px; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 36px 0 10px; padding-top: 10px; border-top: 1px solid var(--rule); }
h3 { font-size: 15px; margin: 20px 0 8px; }
p { margin: 6px 0; max-width: 80ch; }
a { color: var(--accent); }
.note, small, .sub { color: var(--weak); }
.sub { margin: 0 0 12px; }
nav ul, .legend { list-style: none; padding: 0; margin: 8px 0; display: flex; flex-wrap: wrap;
  gap: 4px 16px; }
.state { display: inline-block; padding: 1px 10px; border-radius: 999px; font-weight: 600; font-size: 13px;
  background: var(--live-back); color: var(--accent); white-space: nowrap; }
.state.done, .state.good { background: var(--good-back); color: var(--good); }
.state.failed, .state.bad { background: var(--bad-back); color: var(--bad); }
.state.preempted, .state.stopped, .state.warn { background: var(--warn-back); color: var(--warn); }
.tiles { display: grid; gap: 10px; margin: 14px 0;
  grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); }
.tile, figure, .box { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
.tile { padding: 8px 12px; }
.tile b { display: block; font-size: 17px; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile span { color: var(--weak); font-size: 13px; }
.charts { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 350px), 1fr)); }
figure { margin: 0; padding: 10px 12px; min-width: 0; }
figcaption { font-weight: 600; font-size: 14px; margin-bottom: 4px; }
figcaption small { font-weight: 400; }
svg.chart { display: block; width: 100%; height: auto; overflow: visible; }
svg.bar { display: block; width: 100%; height: 22px; border-radius: 4px; }
svg.swatch { margin-right: 6px; vertical-align: 0; }
svg text { font-size: 11px; fill: var(--weak); font-variant-numeric: tabular-nums; }
svg text.left { text-anchor: end; }
svg text.below { text-anchor: middle; }
.grid { stroke: var(--grid); stroke-width: 1; }
.axis { stroke: var(--weak); stroke-width: 1; }
.band { fill: var(--band); }
.mark { stroke: var(--weak); stroke-width: 1; stroke-dasharray: 2 3; }
.cross { stroke: var(--bad); stroke-width: 1.5; fill: none; }
.line { fill: none; stroke-width: 1.7; stroke-linejoin: round; stroke-linecap: round; }
.faint { opacity: 0.55; stroke-width: 1; }
.line0 { stroke: var(--c0); } .line1 { stroke: var(--c1); stroke-dasharray: 6 3; }
.line2 { stroke: var(--c2); stroke-dasharray: 2 3; } .line3 { stroke: var(--c3); stroke-dasharray: 9 3 2 3; }
.line4 { stroke: var(--c4); stroke-dasharray: 5 5; } .line5 { stroke: var(--c5); stroke-dasharray: 1 3; }
.line6 { stroke: var(--c6); stroke-dasharray: 9 4; } .line7 { stroke: var(--c7); stroke-dasharray: 4 2 1 2; }
.line8 { stroke: var(--c8); }
.fill0 { fill: var(--c0); } .fill1 { fill: var(--c1); } .fill2 { fill: var(--c2); }
.fill3 { fill: var(--c3); } .fill4 { fill: var(--c4); } .fill5 { fill: var(--c5); }
.fill6 { fill: var(--c6); } .fill7 { fill: var(--c7); }
.fill8 { fill: var(--c8); }
.scroll { overflow-x: auto; width: fit-content; max-width: 100%; margin: 10px 0; background: var(--card);
  border: 1px solid var(--rule); border-radius: 8px; }
.scroll:focus-visible, summary:focus-visible, a:focus-visible { outline: 2px solid var(--accent); }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 8px 12px 4px; }
th, td { text-align: left; vertical-align: top; padding: 5px 12px; border-top: 1px solid var(--rule);
  overflow-wrap: normal; white-space: nowrap; }
thead th { border-top: 0; color: var(--weak); font-weight: 600; font-size: 13px; }
tbody th { font-weight: 500; }
.number { text-align: right; }
.wide, td .note { display: block; width: max-content; max-width: min(60ch, 70vw); white-space: normal;
  overflow-wrap: anywhere; margin: 0; }
td .note { max-width: 30ch; font-size: 13px; }
.gallery { display: grid; gap: 10px; margin: 10px 0;
  grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); }
.gallery figure { padding: 8px; font-size: 12px; line-height: 1.35; }
.gallery img { width: 100%; height: auto; }
img { display: block; border-radius: 4px; margin-bottom: 4px; background: var(--grid); }
img.small { image-rendering: pixelated; }
td img { width: 72px; height: 72px; object-fit: contain; }
.predictions { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
.right-guess { border-left: 4px solid var(--good); } .wrong-guess { border-left: 4px solid var(--bad); }
.verdict { font-weight: 600; } .right-guess .verdict { color: var(--good); }
.wrong-guess .verdict { color: var(--bad); }
details { margin: 10px 0; } td details { margin: 0; } summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; padding: 10px 12px; font: 12.5px/1.45 ui-monospace, "Liberation Mono", monospace;
  overflow-wrap: normal; }
.tip { position: absolute; pointer-events: none; padding: 4px 8px; border-radius: 6px; font-size: 12px;
  background: var(--text); color: var(--card); white-space: pre-line; z-index: 2; }
footer { max-width: 1240px; margin: 30px auto; padding: 0 20px; color: var(--weak); font-size: 13px; }
@media (max-width: 600px) { main, header, footer { padding-left: 12px; padding-right: 12px; }
  .tiles { grid-template-columns: repeat(2, 1fr); } .predictions { grid-template-columns: repeat(2, 1fr); } }
@media print { :root { color-scheme: light;
  --page: #fff; --card: #fff; --text: #000; --weak: #444; --rule: #bbb; --grid: #ddd; --band: #0f766e33;
  --accent: #1d4ed8; --good: #166534; --good-back: #dcfce7; --bad: #b91c1c; --bad-back: #fee2e2;
  --warn: #92400e; --warn-back: #fef3c7; --live-back: #dbeafe; --c0: #1d4ed8; --c1: #c2410c;
  --c2: #15803d; --c3: #9333ea; --c4: #be185d; --c5: #0e7490; --c6: #a16207; --c7: #475569; --c8: #9aa5b4; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { font-size: 11pt; } nav { display: none; } .scroll { overflow: visible; }
  th, td { white-space: normal; padding: 4px 6px; } .wide, td .note { width: auto; max-width: none; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  figure, tr, .tile { break-inside: avoid; } h2, h3, caption { break-after: avoid; }
  .charts { grid-template-columns: repeat(2, 1fr); } }
"""

# Values are read back from the paths: the scales stand in data-x and data-y of each chart.
SCRIPT = """
"use strict";
const tip = document.createElement("div");
tip.className = "tip"; tip.hidden = true; document.body.append(tip);
const round = value => Number(value.toPrecision(4)).toLocaleString("en", { maximumSignificantDigits: 4 });
for (const chart of document.querySelectorAll("svg.chart")) {
  const [x0, x1, left, right] = chart.dataset.x.split(" ").map(Number);
  const [y0, y1, bottom, top, log, fraction] = chart.dataset.y.split(" ").map(Number);
  const pointsOf = path => (path.getAttribute("d") || "").split(/[ML]/).slice(1)
    .map(point => point.split(" ").map(Number));
  const lines = [...chart.querySelectorAll("path[data-label]")]
    .map(path => ({ label: path.dataset.label, points: pointsOf(path) }));
  const value = pixel => {
    const part = (pixel - bottom) / (top - bottom);
    return log ? y0 * Math.pow(y1 / y0, part) : y0 + part * (y1 - y0);
  };
  chart.addEventListener("pointermove", event => {
    const box = chart.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * chart.viewBox.baseVal.width;
    const texts = [];
    for (const { label, points } of lines) {
      if (!points.length) continue;
      const near = points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a);
      const step = Math.round(x0 + (near[0] - left) / (right - left) * (x1 - x0));
      const shown = fraction ? round(100 * value(near[1])) + "%" : round(value(near[1]));
      texts.push(`${label}: ${shown} near step ${step.toLocaleString("en")}`);
    }
    tip.textContent = texts.join("\\n"); tip.hidden = !texts.length;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = Math.max(4, Math.min(event.pageX + 14, room)) + "px";
    tip.style.top = event.pageY + 14 + "px";
  });
  chart.addEventListener("pointerleave", () => { tip.hidden = true; });
}
"""
