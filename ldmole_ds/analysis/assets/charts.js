"use strict";
// Plots as inline SVG: each function returns an element, and knows nothing of the page around it.

const dark = matchMedia("(prefers-color-scheme: dark)");
// From few to many; ends that stand out from the panel in either scheme.
const RAMPS = {
  light: ["#f1f5fa", "#c6dbef", "#85b8de", "#3d85c0", "#12519c", "#08306b"],
  dark: ["#1b2531", "#1f4468", "#2b6ba5", "#4c98d8", "#8cc6f5", "#d5ecff"],
};
// Below, at and above an even share.
const DIVERGING = {
  light: ["#c8692b", "#efc7a6", "#f3f4f6", "#a9cbea", "#1d5fae"],
  dark: ["#e08a4c", "#7d5134", "#232b36", "#2c5f90", "#7cbcf7"],
};

const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
const round = (x, digits = 2) => (Number.isFinite(x) ? x.toFixed(digits) : "-");
const sum = (values) => values.reduce((a, b) => a + b, 0);
const mean = (values) => (values.length ? sum(values) / values.length : NaN);

function mix(stops, t) {
  const at = clamp(t, 0, 1) * (stops.length - 1), i = Math.min(Math.floor(at), stops.length - 2), f = at - i;
  const part = (hex, k) => parseInt(hex.slice(1 + 2 * k, 3 + 2 * k), 16);
  return "rgb(" + [0, 1, 2].map((k) => Math.round(part(stops[i], k) * (1 - f) + part(stops[i + 1], k) * f)).join() + ")";
}
const ramp = (t) => mix(RAMPS[dark.matches ? "dark" : "light"], t);
// Half and double an even share are equally far from it.
const shareColour = (x) => mix(DIVERGING[dark.matches ? "dark" : "light"], 0.5 + Math.log2(Math.max(x, 1e-3)) / 4);
function inkOn(colour) {
  const [r, g, b] = colour.match(/\d+/g).map(Number);
  return 0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#14202e" : "#ffffff";
}

function svg(name, attributes = {}, children = []) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "tip") element.dataset.tip = value;
    else if (key === "text") element.textContent = value;
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}
const frame = (width, height, label, children) =>
  svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, children);

function niceTicks(low, high, count) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw - 1e-12);
  const ticks = [];
  for (let x = Math.ceil(low / step - 1e-9) * step; x <= high + step * 1e-6; x += step) ticks.push(Math.abs(x) < step / 1e6 ? 0 : x);
  return ticks;
}
const tickText = (x) => String(Number(x.toPrecision(4)));

// Every how manieth of n labels fits.
const stride = (n, room, each) => Math.max(1, Math.ceil(n / Math.max(1, Math.floor(room / each))));

function heatmap({ rows, columns, cells, low, high, chosen, onClick, label, xTitle }) {
  const left = 8 + 6.3 * Math.max(...rows.map((r) => r.length)), top = 4, bottom = 46;
  const w = clamp(1040 / columns.length, 12, 64), h = clamp(200 / rows.length, 22, 30);
  const width = Math.max(left + w * columns.length + 8, 420), height = top + h * rows.length + bottom;
  const parts = [];
  rows.forEach((name, r) => parts.push(svg("text", { x: left - 7, y: top + h * (r + 0.5) + 4, "text-anchor": "end", text: name })));
  const each = stride(columns.length, w * columns.length, 8 + 6.5 * Math.max(...columns.map((c) => c.length)));
  columns.forEach((name, c) => {
    if (c % each === 0) parts.push(svg("text", { x: left + w * (c + 0.5), y: top + h * rows.length + 15, "text-anchor": "middle", text: name }));
  });
  parts.push(svg("text", { x: left - 7, y: top + h * rows.length + 15, "text-anchor": "end", text: xTitle }));
  for (const cell of cells) {
    const t = (cell.value - low) / (high - low || 1), colour = ramp(t);
    const box = { x: left + w * cell.column + 1, y: top + h * cell.row + 1, width: w - 2, height: h - 2 };
    const rect = svg("rect", { ...box, rx: 3, fill: colour, tip: cell.tip, class: "hit cell", tabindex: 0 });
    rect.addEventListener("click", () => onClick(cell));
    rect.addEventListener("keydown", (event) => { if (event.key === "Enter") onClick(cell); });
    parts.push(rect);
    if (w >= 26) parts.push(svg("text", { x: box.x + box.width / 2, y: box.y + h / 2 + 3, "text-anchor": "middle", style: `fill:${inkOn(colour)};font-size:10px;pointer-events:none`, text: round(cell.value, 1) }));
  }
  for (const cell of cells.filter(chosen)) {
    parts.push(svg("rect", { x: left + w * cell.column + 1, y: top + h * cell.row + 1, width: w - 2, height: h - 2, rx: 3, fill: "none", class: "chosen", "pointer-events": "none" }));
  }
  parts.push(...legend(width - 232, height - 14, 180, low, high, ramp));
  const plot = frame(width, height, label, parts);
  plot.style.minWidth = `${Math.min(width, 700)}px`;
  plot.style.maxWidth = `${width * 1.15}px`;
  return plot;
}

// Numbers at both ends of a coloured bar.
function legend(x, y, width, low, high, colour) {
  const steps = 24, parts = [];
  for (let i = 0; i < steps; i++) {
    parts.push(svg("rect", { x: x + (width * i) / steps, y, width: width / steps + 0.5, height: 9, fill: colour(i / (steps - 1)) }));
  }
  parts.push(svg("text", { x: x - 5, y: y + 9, "text-anchor": "end", text: round(low) }));
  parts.push(svg("text", { x: x + width + 5, y: y + 9, text: round(high) }));
  return parts;
}

function bars({ values, names, tips, format, reference, label, xTitle }) {
  const left = 44, right = 8, top = 20, bottom = 40, width = 540, height = 250;
  const inner = width - left - right, tall = height - top - bottom, n = values.length;
  const high = Math.max(...values, reference || 0) * 1.06 || 1, y = (v) => top + tall * (1 - v / high), parts = [];
  for (const tick of niceTicks(0, high, 4)) {
    parts.push(svg("line", { x1: left, x2: width - right, y1: y(tick), y2: y(tick), class: "grid" }));
    parts.push(svg("text", { x: left - 7, y: y(tick) + 4, "text-anchor": "end", text: format(tick) }));
  }
  const step = inner / n, gap = step > 8 ? Math.min(step * 0.18, 8) : 0, each = stride(n, inner, 26);
  values.forEach((v, i) => {
    const box = { x: left + step * i + gap / 2, width: Math.max(step - gap, 0.5) };
    parts.push(svg("rect", { ...box, y: y(v), height: Math.max(y(0) - y(v), 0), rx: gap ? 3 : 0, fill: "var(--accent)", class: "bar" }));
    // The whole column answers to the pointer: some bars are very low.
    parts.push(svg("rect", { ...box, y: top, height: tall, fill: "transparent", tip: tips[i] }));
    if (i % each === 0) parts.push(svg("text", { x: left + step * (i + 0.5), y: height - bottom + 15, "text-anchor": "middle", text: names[i] }));
  });
  parts.push(svg("line", { x1: left, x2: width - right, y1: y(0), y2: y(0), class: "axis" }));
  if (reference) {
    parts.push(svg("line", { x1: left, x2: width - right, y1: y(reference), y2: y(reference), stroke: "var(--warn)", "stroke-dasharray": "5 4" }));
    parts.push(svg("line", { x1: width - right - 84, x2: width - right - 64, y1: 6, y2: 6, stroke: "var(--warn)", "stroke-dasharray": "5 4" }));
    parts.push(svg("text", { x: width - right, y: 10, "text-anchor": "end", text: "even share" }));
  }
  parts.push(svg("text", { x: left + inner / 2, y: height - 5, "text-anchor": "middle", text: xTitle }));
  return frame(width, height, label, parts);
}

// quantiles of each point: 5, 25, 50, 75, 95 per cent.
function bands({ points, names, low, high, chosen, title, label }) {
  const left = 38, right = 8, top = 24, bottom = 24, width = 300, height = 190;
  const inner = width - left - right, tall = height - top - bottom, n = names.length;
  const x = (i) => left + (n > 1 ? (inner * i) / (n - 1) : inner / 2), y = (v) => top + tall * (1 - (v - low) / (high - low || 1));
  const parts = [svg("text", { x: left, y: 12, class: "strong", text: title })];
  for (const tick of niceTicks(low, high, 4)) {
    parts.push(svg("line", { x1: left, x2: width - right, y1: y(tick), y2: y(tick), class: "grid" }));
    parts.push(svg("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end", text: tickText(tick) }));
  }
  const band = (a, b, fill) => {
    const there = points.map((p) => `${x(p.layer)},${y(p.quantiles[b])}`), back = points.map((p) => `${x(p.layer)},${y(p.quantiles[a])}`);
    return svg("polygon", { points: [...there, ...back.reverse()].join(" "), fill });
  };
  parts.push(band(0, 4, "var(--accent-faint)"), band(1, 3, "var(--accent-soft)"));
  parts.push(svg("polyline", { points: points.map((p) => `${x(p.layer)},${y(p.quantiles[2])}`).join(" "), fill: "none", stroke: "var(--accent)", "stroke-width": 2, "stroke-linejoin": "round" }));
  if (chosen !== null) parts.push(svg("line", { x1: x(chosen), x2: x(chosen), y1: top, y2: top + tall, stroke: "var(--ink)", "stroke-dasharray": "2 3" }));
  const each = stride(n, inner, 30), hit = inner / Math.max(n - 1, 1);
  for (const p of points) {
    if (points.length < 3) parts.push(svg("circle", { cx: x(p.layer), cy: y(p.quantiles[2]), r: 3.5, fill: "var(--accent)" }));
    const q = p.quantiles.map((v) => round(v));
    parts.push(svg("rect", { x: x(p.layer) - hit / 2, y: top, width: hit, height: tall, fill: "transparent", tip: `layer ${names[p.layer]}, ${title}\nlambda: median ${q[2]}, mean ${round(p.mean)}\nmiddle 50%: ${q[1]} to ${q[3]}\nmiddle 90%: ${q[0]} to ${q[4]}` }));
  }
  names.forEach((name, i) => { if (i % each === 0) parts.push(svg("text", { x: x(i), y: height - 8, "text-anchor": "middle", text: name })); });
  return frame(width, height, label, parts);
}
