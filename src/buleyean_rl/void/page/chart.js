// Loss, floor and gap over the steps, as SVG.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 640, HEIGHT = 240, LEFT = 48, RIGHT = 12, TOP = 28, BOTTOM = 28;

export function chart(figure, points) {
  const svg = element("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  const last = points.at(-1);
  svg.setAttribute("aria-label", last
    ? `loss ${last.loss.toFixed(4)}, floor ${last.floor.toFixed(4)}, gap ${last.gap.toFixed(4)} at step ${last.step}`
    : "no step yet");
  const steps = Math.max(1, ...points.map((point) => point.step));
  const top = Math.max(1e-6, ...points.map((point) => point.loss));
  const x = (step) => LEFT + (WIDTH - LEFT - RIGHT) * (steps > 1 ? (step - 1) / (steps - 1) : 0);
  const y = (value) => HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top;
  svg.append(element("path", { class: "axis", d: `M${LEFT} ${TOP}V${HEIGHT - BOTTOM}H${WIDTH - RIGHT}` }));
  svg.append(text(LEFT - 6, y(top) + 4, top.toPrecision(2), { "text-anchor": "end" }));
  svg.append(text(LEFT - 6, y(0) + 4, "0", { "text-anchor": "end" }));
  svg.append(text(WIDTH - RIGHT, HEIGHT - 8, `step ${steps}`, { "text-anchor": "end" }));
  ["loss", "floor", "gap"].forEach((name, index) => {
    const line = points.map((point) => `${x(point.step).toFixed(1)},${y(Math.max(0, point[name])).toFixed(1)}`);
    svg.append(element("polyline", { class: name, points: line.join(" ") }));
    const value = last ? ` ${last[name].toFixed(4)}` : "";
    svg.append(text(LEFT + 8 + index * 130, 16, name + value, { class: name }));
  });
  figure.replaceChildren(svg);
}

function element(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function text(x, y, words, attributes) {
  const made = element("text", { x, y, ...attributes });
  made.textContent = words;
  return made;
}
