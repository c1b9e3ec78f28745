"use strict";
// The page: one selection of projections (a layer, a kind, both or neither) that every plot follows.

const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const state = { layer: null, kind: null, prompt: 0 };

const html = (name, attributes = {}, children = []) => {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "tip") element.dataset.tip = value;
    else if (key === "text") element.textContent = value;
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
};
const matches = (p) => (state.layer === null || p.layer === state.layer) && (state.kind === null || p.kind === state.kind);
const selection = () => data.projections.map((p, j) => (matches(p) ? j : -1)).filter((j) => j >= 0);
const place = (p) => `layer ${data.layers[p.layer]}, ${data.kinds[p.kind]}`;
const visible = (token) => token.replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5").replaceAll(" ", "\u2423");

const oneLine = (text) => text.replaceAll("\n", "\u21b5").replaceAll("\t", " ");

function unpack(text, type) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const view = new DataView(bytes.buffer), n = bytes.length / 2;
  return Array.from({ length: n }, (_, i) => (type === "int" ? view.getInt16(2 * i, true) : view.getUint16(2 * i, true)));
}

function select(layer, kind) {
  Object.assign(state, { layer, kind });
  at("layer").value = layer ?? "";
  at("kind").value = kind ?? "";
  draw();
}

function drawCards() {
  const t = data.totals, cards = [];
  const add = (value, text, warn) => cards.push(html("div", { class: warn ? "card warn" : "card" }, [html("b", { text: value }), html("small", { text })]));
  add(`${round(t.experts_per_token)} of ${data.max_experts}`, `experts per token, spread over tokens ${round(t.experts_per_token_std)}`);
  add(`${round(t.max_load)}\u00d7`, "load of the busiest expert over an even share (mean)", t.max_load > data.max_experts / 2);
  add(`${t.dead_experts}`, `experts that no token used, of ${t.all_experts}`, t.dead_experts > 0);
  if ("lambda_mean" in t) add(round(t.lambda_mean), `lambda, spread over tokens ${round(t.lambda_std)}`, t.lambda_std < 0.01);
  add(t.tokens.toLocaleString("en"), `tokens, through ${t.projections} projections`);
  at("cards").replaceChildren(...cards);
}

function drawHeatmap() {
  const values = data.projections.map((p) => p.mean);
  const cells = data.projections.map((p) => ({ row: p.kind, column: p.layer, value: p.mean, tip: `${p.name}\n${round(p.mean)} of ${p.experts} experts per token` }));
  const same = (cell) => state.layer === cell.column && state.kind === cell.row;
  at("heatmap").replaceChildren(heatmap({
    rows: data.kinds, columns: data.layers, cells, low: Math.min(...values), high: Math.max(...values),
    chosen: (cell) => (state.layer !== null || state.kind !== null) && matches({ layer: cell.column, kind: cell.row }),
    onClick: (cell) => (same(cell) ? select(null, null) : select(cell.column, cell.row)),
    label: "experts per token by layer and projection", xTitle: "layer",
  }));
}

function drawHistogram(chosen) {
  const counts = new Array(data.max_experts + 1).fill(0);
  for (const j of chosen) data.histograms[j].forEach((n, k) => { counts[k] += n; });
  const first = counts[0] ? 0 : 1, total = sum(counts), shown = counts.slice(first).map((n) => n / total);
  const names = shown.map((_, k) => String(k + first));
  at("histogram").replaceChildren(bars({
    values: shown, names, format: (x) => `${tickText(100 * x)}%`, label: "histogram of experts per token", xTitle: "experts",
    tips: shown.map((x, k) => `${names[k]} experts: ${round(100 * x, 1)}% of tokens`),
  }));
}

// Experts of different projections have nothing to do with one another: over several, the busiest ones are averaged,
// then the second busiest ones, and so on.
function drawLoad(chosen) {
  const single = chosen.length === 1, loads = chosen.map((j) => (single ? data.loads[j] : [...data.loads[j]].sort((a, b) => b - a)));
  const n = Math.max(...loads.map((l) => l.length));
  const values = Array.from({ length: n }, (_, i) => mean(loads.filter((l) => i < l.length).map((l) => l[i])));
  const names = values.map((_, i) => String(single ? i : i + 1));
  at("load-note").textContent = single ? "Tokens of each expert over an even share." : "Tokens of the busiest expert, the second busiest, ... over an even share; mean of the selected projections.";
  at("load").replaceChildren(bars({
    values, names, format: tickText, reference: 1, label: "load of experts", xTitle: single ? "expert" : "rank by load",
    tips: values.map((v, i) => `${single ? "expert" : "rank"} ${names[i]}: ${round(v)} of an even share`),
  }));
}

function drawLoads() {
  // As an image, one pixel an expert: large models have more cells than a page can hold elements.
  const n = data.loads.length, tall = data.max_experts, ratio = 2;
  const w = clamp(1100 / n, 2, 22), h = clamp(Math.floor(220 / tall), 2, 20);
  const canvas = html("canvas", { width: Math.round(n * w * ratio), height: tall * h * ratio, role: "img", "aria-label": "load of every expert" });
  canvas.style.cssText = `width:100%;min-width:${Math.min(n * w, 600)}px;max-width:${n * w}px;height:${tall * h}px;display:block`;
  const pen = canvas.getContext("2d"), gap = w > 3 ? 1 : 0;
  pen.scale(ratio, ratio);
  const order = data.loads.map((l) => l.map((_, e) => e).sort((a, b) => l[b] - l[a]));
  data.loads.forEach((load, j) => order[j].forEach((e, row) => {
    const dim = matches(data.projections[j]) ? 1 : 0.25;
    pen.globalAlpha = dim;
    pen.fillStyle = shareColour(load[e]);
    pen.fillRect(j * w, row * h, w - gap, h - gap);
    if (load[e] === 0 && w > 3) {
      pen.strokeStyle = getComputedStyle(document.body).color;
      pen.beginPath(); pen.moveTo(j * w, row * h); pen.lineTo(j * w + w - gap, row * h + h - gap); pen.stroke();
    }
  }));
  const cellAt = (event) => {
    const box = canvas.getBoundingClientRect();
    const j = clamp(Math.floor((n * (event.clientX - box.left)) / box.width), 0, n - 1), row = Math.floor((event.clientY - box.top) / h);
    return [j, order[j][row]];
  };
  canvas.addEventListener("mousemove", (event) => {
    const [j, e] = cellAt(event), p = data.projections[j];
    canvas.dataset.tip = e === undefined ? place(p) : `${place(p)}\nexpert ${e}: ${round(data.loads[j][e])} of an even share`;
  });
  canvas.addEventListener("click", (event) => { const p = data.projections[cellAt(event)[0]]; select(p.layer, p.kind); });
  const scale = frame(330, 16, "scale of the load", legend(36, 3, 220, 0.25, 4, (t) => shareColour(2 ** (4 * t - 2))));
  scale.style.cssText = "max-width:330px;margin-top:10px";
  at("loads").replaceChildren(canvas, scale);
}

function drawLambda() {
  if (!data.lambda) {
    at("lambda").replaceChildren(html("p", { class: "muted", text: "This adapter's router has no lambda." }));
    return;
  }
  const all = data.lambda.flatMap((line) => line.points.flatMap((p) => p.quantiles));
  const low = Math.min(...all), high = Math.max(...all), room = (high - low) * 0.05 || 0.05;
  at("lambda").replaceChildren(...data.lambda.map((line) => bands({
    points: line.points, names: data.layers, low: low - room, high: high + room, chosen: state.layer,
    title: line.label, label: `lambda over layers, ${line.label}`,
  })));
}

function drawPrompt(chosen) {
  const prompt = data.prompts[state.prompt], J = data.projections.length, N = data.groups.length;
  prompt.unpacked ??= unpack(prompt.counts, "uint");
  if (prompt.lambdas) prompt.lam ??= unpack(prompt.lambdas, "int");
  const groups = data.groups.map((members, g) => (members.some((j) => chosen.includes(j)) ? g : -1)).filter((g) => g >= 0);
  const experts = mean(chosen.map((j) => data.projections[j].experts));
  const values = prompt.tokens.map((_, t) => mean(chosen.map((j) => prompt.unpacked[t * J + j])));
  // One token far from all others would leave them one colour: the ends of the scale stand for what lies beyond.
  const sorted = [...values].sort((a, b) => a - b), rank = (q) => sorted[Math.round(q * (sorted.length - 1))];
  const low = rank(0.05), high = rank(0.95);
  const spans = prompt.tokens.map((token, t) => {
    const used = chosen.map((j) => prompt.unpacked[t * J + j]), colour = ramp((values[t] - low) / (high - low || 1));
    let tip = `${visible(token)}\n${round(values[t])} of ${round(experts, 0)} experts`;
    if (chosen.length > 1) tip += ` (mean), ${Math.min(...used)} to ${Math.max(...used)} by projection`;
    if (prompt.lam) tip += `\nlambda ${round(mean(groups.map((g) => prompt.lam[t * N + g])) / data.lambda_scale)}`;
    const text = token.includes("\n") ? token.replaceAll("\n", "\u21b5\n") : token;
    const span = html("span", { tip, text });
    span.style.background = colour;
    span.style.color = inkOn(colour);
    return span;
  });
  at("prompt-text").replaceChildren(...spans);
  const scale = frame(230, 16, "scale of the prompt's colours", legend(34, 3, 150, low, high, ramp));
  at("prompt-legend").replaceChildren(scale);
}

function drawTables() {
  const longest = Math.max(...[...data.tokens.most, ...data.tokens.fewest].map((row) => row.mean), 1e-9);
  for (const which of ["most", "fewest"]) {
    const head = html("tr", {}, ["token", "experts", "seen", "where"].map((text) => html("th", { text })));
    const rows = data.tokens[which].map((row) => {
      const bar = `background:linear-gradient(90deg, var(--accent-soft) ${(100 * row.mean) / longest}%, transparent 0)`;
      const context = html("div", {}, [
        html("span", { class: "before" }, [html("span", { text: oneLine(row.before) })]),
        html("mark", { text: oneLine(row.token) }),
        html("span", { class: "after", text: oneLine(row.after) }),
      ]);
      return html("tr", {}, [
        html("td", { class: "token", text: visible(row.token) }), html("td", { text: round(row.mean), style: bar }),
        html("td", { text: String(row.occurrences) }), html("td", { class: "context" }, [context]),
      ]);
    });
    at(which).replaceChildren(html("table", {}, [html("thead", {}, [head]), html("tbody", {}, rows)]));
  }
}

function draw() {
  let chosen = selection();
  if (!chosen.length) return select(null, null);  // not every layer has every kind of projection
  const parts = [state.layer === null ? null : `layer ${data.layers[state.layer]}`, state.kind === null ? null : data.kinds[state.kind]];
  at("selected").textContent = chosen.length === 1 ? data.projections[chosen[0]].name : `${chosen.length} of ${data.projections.length} projections`;
  at("reset").disabled = !parts.some(Boolean);
  drawHeatmap();
  drawHistogram(chosen);
  drawLoad(chosen);
  drawLoads();
  drawLambda();
  drawPrompt(chosen);
}

function start() {
  const options = (names, all) => [html("option", { value: "", text: all }), ...names.map((text, i) => html("option", { value: i, text }))];
  const value = (id) => (at(id).value === "" ? null : Number(at(id).value));
  at("layer").append(...options(data.layers, "all"));
  at("kind").append(...options(data.kinds, "all"));
  for (const id of ["layer", "kind"]) at(id).addEventListener("change", () => select(value("layer"), value("kind")));
  at("reset").addEventListener("click", () => select(null, null));
  data.prompts.forEach((prompt, i) => {
    const text = prompt.tokens.join("").replace(/\s+/g, " ").trim();
    at("prompt").append(html("option", { value: i, text: `${i + 1}: ${text.length > 60 ? "\u2026" + text.slice(-58) : text}` }));
  });
  at("prompt").addEventListener("change", () => { state.prompt = Number(at("prompt").value); drawPrompt(selection()); });
  document.addEventListener("mousemove", (event) => {
    const tip = at("tip"), text = event.target.closest?.("[data-tip]")?.dataset.tip;
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 10)}px`;
    tip.style.top = `${event.clientY + 18 + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 12 : event.clientY + 18}px`;
  });
  dark.addEventListener("change", draw);
  drawCards();
  drawTables();
  draw();
}
start();
