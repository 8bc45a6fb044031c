// Training curves: the events of a run as small SVG charts. Colors come from the style sheet.

import { el, svg } from "./dom.js";

const [WIDTH, HEIGHT] = [340, 180];
const [LEFT, RIGHT, TOP, BOTTOM] = [44, 12, 14, 26];
const MAX_POINTS = 240;  // of a line; more cannot be seen

// [title, keys of events]: a chart is drawn if the events of a stage have one of the keys. A final _ makes a key a prefix.
const CHARTS = [
  ["Loss", ["loss"]],
  ["Validation, bits per byte", ["validation_bpb"]],
  ["Reward", ["reward"]],
  ["Pass rate", ["pass_rate_"]],
  ["Entropy, nats per token", ["entropy"]],
  ["Tokens per second", ["tokens_per_second"]],
];

export const STAGES = {
  pretrain: "Pretraining", sft: "SFT", rl: "RL", distill: "Distillation", sleep: "Sleep", adopt: "Adopted",
};

// Events by stage, in the order of the stages. After a resume, the last event of a step counts.
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
  return CHARTS.map(([title, chartKeys]) => {
    const lines = new Map();
    const belongs = (key) => chartKeys.some((name) => key === name || (name.endsWith("_") && key.startsWith(name)));
    for (const key of keys.filter(belongs)) {
      const points = events.filter((event) => Number.isFinite(event[key])).map((event) => [event.step, event[key]]);
      if (points.length > 1) lines.set(key.replace("pass_rate_", "").replaceAll("_", " "), averagePoints(points));
    }
    return { title, lines };
  }).filter(({ lines }) => lines.size);
}

// Averages of adjacent points, so that a long run is quick to draw.
function averagePoints(points) {
  const size = Math.ceil(points.length / MAX_POINTS);
  if (size === 1) return points;
  return Array.from({ length: Math.ceil(points.length / size) }, (_, i) => {
    const group = points.slice(i * size, (i + 1) * size);
    return [group.at(-1)[0], group.reduce((sum, [, value]) => sum + value, 0) / group.length];
  });
}

export function chart({ title, lines }) {
  const all = [...lines.values()].flat();
  const xs = all.map(([x]) => x);
  const ys = all.map(([, y]) => y).sort((a, b) => a - b);
  // The top is cut off: the first steps have much higher values, which would flatten the rest of the curve.
  const high = ys.length > 40 ? ys[Math.floor(ys.length * 0.98)] : ys.at(-1);
  const margin = (high - ys[0]) * 0.08 || Math.abs(high) * 0.1 || 1;
  const [y0, y1] = [ys[0] - margin, high + margin];
  const [x0, x1] = [xs.reduce((a, b) => Math.min(a, b)), xs.reduce((a, b) => Math.max(a, b))];
  const toX = (x) => LEFT + ((x - x0) / (x1 - x0 || 1)) * (WIDTH - LEFT - RIGHT);
  const toY = (y) => TOP + ((y1 - Math.min(Math.max(y, y0), y1)) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);

  const parts = [];
  for (const y of ticks(y0, y1, 4)) {
    parts.push(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: toY(y), y2: toY(y) }));
    parts.push(svg("text", { x: LEFT - 7, y: toY(y) + 3.5, "text-anchor": "end" }, formatNumber(y)));
  }
  for (const x of ticks(x0, x1, 4)) {
    parts.push(svg("text", { x: toX(x), y: HEIGHT - 8, "text-anchor": "middle" }, formatNumber(x)));
  }
  const legend = [];
  [...lines].forEach(([name, points], i) => {
    const coordinates = points.map(([x, y]) => `${toX(x).toFixed(1)},${toY(y).toFixed(1)}`).join(" ");
    parts.push(svg("polyline", { class: `line line-${i % 4}`, points: coordinates }));
    const [x, y] = points.at(-1);
    parts.push(svg("circle", { class: `dot line-${i % 4}`, cx: toX(x), cy: toY(y), r: 3 }));
    legend.push(el("span", { class: `key line-${i % 4}` }, lines.size > 1 ? `${name} ${formatNumber(y)}` : formatNumber(y)));
  });
  const label = `${title}: ${legend.map((entry) => entry.textContent).join(", ")} at step ${formatNumber(x1)}`;
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label }, parts);
  return el("figure", { class: "chart" }, el("figcaption", {}, title, el("span", { class: "keys" }, legend)), picture);
}

// Round values between two limits, at most about `count`.
export function ticks(low, high, count) {
  const minStep = (high - low) / count;
  if (!(minStep > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(minStep));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= minStep);
  const values = [];
  for (let n = Math.ceil(low / step); n * step <= high; n += 1) values.push(Number((n * step).toPrecision(10)));
  return values;
}

function formatNumber(n) {
  if (Math.abs(n) >= 10000) return `${Number((n / 1000).toPrecision(3))}k`;
  return Math.abs(n) >= 100 ? Math.round(n).toLocaleString("en") : String(Number(n.toPrecision(3)));
}
