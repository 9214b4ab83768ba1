// A run's curve as SVG: loss, floor and gap over the planned steps. Where there is no floor, loss and gap are one line.

import { words } from "./strings.js";

const SVG = "http://www.w3.org/2000/svg";
const EQUAL = 1e-6; // below it loss and gap are drawn as one
const SMALL = { height: 72, left: 4, right: 4, top: 6, bottom: 6 };
const LARGE = { height: 240, left: 52, right: 14, top: 34, bottom: 30 };

// Returns a figure, which is drawn anew for every width: its texts stay as large as they are.
export function chart(points, planned, { small = false } = {}) {
  const figure = document.createElement("figure");
  figure.className = small ? "chart small" : "chart";
  new ResizeObserver(() => figure.replaceChildren(draw(points, planned, figure.clientWidth || 320, small ? SMALL : LARGE, small))).observe(figure);
  return figure;
}

function linesOf(points) {
  const one = points.every(({ loss, gap }) => Math.abs(loss - gap) < EQUAL);
  return one ? [["loss", words.lossAndGap]] : [["loss", words.loss], ["floor", words.floor], ["gap", words.gap]];
}

function draw(points, planned, width, { height, left, right, top, bottom }, small) {
  const last = points.at(-1), lines = linesOf(points);
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": words.chart(last, planned, lines.map(([name]) => name)) });
  const steps = Math.max(1, planned ?? 0, last?.step ?? 0);
  const largest = Math.max(1e-6, ...points.map(({ loss }) => loss));
  const x = (step) => left + (width - left - right) * (steps > 1 ? (step - 1) / (steps - 1) : 0);
  const y = (value) => height - bottom - (height - top - bottom) * Math.max(0, value) / largest;
  svg.append(element("path", { class: "axis", d: small ? `M${left} ${y(0)}H${width - right}` : `M${left} ${top}V${height - bottom}H${width - right}` }));
  for (const [name] of lines.toReversed()) {
    const at = points.map((point) => [x(point.step), y(point[name])].map((number) => number.toFixed(1)).join());
    svg.append(element("polyline", { class: name, points: at.join(" ") }));
    if (at.length === 1) svg.append(element("circle", { class: name, cx: x(points[0].step), cy: y(points[0][name]), r: 3 }));
  }
  if (small) return svg;
  svg.append(text(left - 8, y(largest) + 4, largest.toPrecision(2), "end"), text(left - 8, y(0) + 4, "0", "end"));
  svg.append(text(left, height - 8, words.step(1), "start"), text(width - right, height - 8, words.step(steps), "end"));
  const room = (width - left) / lines.length;
  lines.forEach(([name, label], index) => svg.append(text(left + index * room, 16, last ? `${label} ${last[name].toFixed(3)}` : label, "start", name)));
  return svg;
}

function element(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function text(x, y, content, anchor, name = "") {
  const made = element("text", { x, y, "text-anchor": anchor, class: name });
  made.textContent = content;
  return made;
}
