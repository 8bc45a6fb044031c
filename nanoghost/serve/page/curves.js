// Curves of a run while it learns: its events in, small SVG charts out. Colours come from the style sheet.

import { el, svg } from "./dom.js";

const [WIDTH, HEIGHT] = [340, 180];
const [LEFT, RIGHT, TOP, BOTTOM] = [44, 12, 14, 26];
const MOST = 240;  // points of a line; more cannot be seen

// What is drawn of a stage, where its events have it: [title, keys of the events (a final _ stands for all that begin so)].
const DRAWN = [
  ["Loss", ["loss"]],
  ["Held-out text, bits per byte", ["validation_bpb"]],
  ["Reward", ["reward"]],
  ["Pass rate", ["pass_rate_"]],
  ["Entropy, nats per token", ["entropy"]],
  ["Tokens per second", ["tokens_per_second"]],
];

export const STAGES = {
  pretrain: "Pretraining", sft: "Finetuning", rl: "RL", distill: "Distillation", sleep: "Sleep", adopt: "Adopted",
};

// Events by stage, in the order in which the stages came. After a resume, the last event for a step counts.
export function byStage(events) {
  const stages = new Map();
  for (const event of events) {
    if (!stages.has(event.stage)) stages.set(event.stage, new Map());
    stages.get(event.stage).set(event.step, event);
  }
  return [...stages].map(([stage, steps]) => [stage, [...steps.values()].sort((a, b) => a.step - b.step)]);
}

// [{title, lines: Map(name -> [[step, value]])}] of one stage.
export function charts(events) {
  const keys = [...new Set(events.flatMap(Object.keys))];
  return DRAWN.map(([title, wanted]) => {
    const lines = new Map();
    const fits = (key) => wanted.some((name) => key === name || (name.endsWith("_") && key.startsWith(name)));
    for (const key of keys.filter(fits)) {
      const points = events.filter((event) => Number.isFinite(event[key])).map((event) => [event.step, event[key]]);
      if (points.length > 1) lines.set(key.replace("pass_rate_", "").replaceAll("_", " "), thinned(points));
    }
    return { title, lines };
  }).filter(({ lines }) => lines.size);
}

// Means of neighbours, so that a long run stays quick to draw.
function thinned(points) {
  const size = Math.ceil(points.length / MOST);
  if (size === 1) return points;
  return Array.from({ length: Math.ceil(points.length / size) }, (_, i) => {
    const part = points.slice(i * size, (i + 1) * size);
    return [part.at(-1)[0], part.reduce((sum, [, value]) => sum + value, 0) / part.length];
  });
}

export function chart({ title, lines }) {
  const all = [...lines.values()].flat();
  const xs = all.map(([x]) => x);
  const ys = all.map(([, y]) => y).sort((a, b) => a - b);
  // The first steps fall from far above; they would flatten everything else.
  const high = ys.length > 40 ? ys[Math.floor(ys.length * 0.98)] : ys.at(-1);
  const room = (high - ys[0]) * 0.08 || Math.abs(high) * 0.1 || 1;
  const [y0, y1] = [ys[0] - room, high + room];
  const [x0, x1] = [xs.reduce((a, b) => Math.min(a, b)), xs.reduce((a, b) => Math.max(a, b))];
  const across = (x) => LEFT + ((x - x0) / (x1 - x0 || 1)) * (WIDTH - LEFT - RIGHT);
  const down = (y) => TOP + ((y1 - Math.min(Math.max(y, y0), y1)) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);

  const parts = [];
  for (const y of ticks(y0, y1, 4)) {
    parts.push(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: down(y), y2: down(y) }));
    parts.push(svg("text", { x: LEFT - 7, y: down(y) + 3.5, "text-anchor": "end" }, short(y)));
  }
  for (const x of ticks(x0, x1, 4)) parts.push(svg("text", { x: across(x), y: HEIGHT - 8, "text-anchor": "middle" }, short(x)));
  const last = [];
  [...lines].forEach(([name, points], i) => {
    const drawn = points.map(([x, y]) => `${across(x).toFixed(1)},${down(y).toFixed(1)}`).join(" ");
    parts.push(svg("polyline", { class: `line line-${i % 4}`, points: drawn }));
    const [x, y] = points.at(-1);
    parts.push(svg("circle", { class: `dot line-${i % 4}`, cx: across(x), cy: down(y), r: 3 }));
    last.push(el("span", { class: `key line-${i % 4}` }, lines.size > 1 ? `${name} ${short(y)}` : short(y)));
  });
  const label = `${title}: ${last.map((one) => one.textContent).join(", ")} at step ${short(x1)}`;
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label }, parts);
  return el("figure", { class: "chart" }, el("figcaption", {}, title, el("span", { class: "keys" }, last)), picture);
}

export function ticks(low, high, count) {
  const raw = (high - low) / count;
  if (!(raw > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((one) => one >= raw);
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high; n += 1) found.push(Number((n * step).toPrecision(10)));
  return found;
}

function short(n) {
  if (Math.abs(n) >= 10000) return `${Number((n / 1000).toPrecision(3))}k`;
  return Math.abs(n) >= 100 ? Math.round(n).toLocaleString("en") : String(Number(n.toPrecision(3)));
}
