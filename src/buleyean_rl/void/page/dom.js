// Nodes, and words said in passing. Texts of people and models become text nodes; HTML comes from the server's
// sanitiser alone, in one place: see `showRendered` in text.js.

import { words } from "./strings.js";

export const $ = (id) => document.getElementById(id);

// make("p", { class: "note", onclick: act }, child, ...): attributes that are false or null are left out.
export function make(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), complaining(value));
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

export const button = (label, action, attributes = {}) => make("button", { type: "button", onclick: action, ...attributes }, label);

// Where a control cannot be used, it can still be reached, and says why.
export function allow(control, why) {
  control.toggleAttribute("data-refused", Boolean(why));
  if (why) control.setAttribute("aria-disabled", "true");
  else control.removeAttribute("aria-disabled");
  control.title = why ?? "";
}

export const complaining = (action) => async (event) => {
  const refused = event?.currentTarget?.closest?.("[data-refused]");
  if (refused && event.type === "click") {
    event.preventDefault();
    toast(refused.title);
    return;
  }
  try {
    await action(event);
  } catch (error) {
    if (!error.isTold) toast(error.message);
  }
};

// Whether a node is to be drawn anew: what it shows has changed. Redrawing for nothing would take the focus away.
const drawn = new WeakMap();
export function differs(node, value) {
  const now = JSON.stringify(value);
  if (drawn.get(node) === now) return false;
  drawn.set(node, now);
  return true;
}

let toastTimer;
export function toast(text, ...buttons) {
  $("toast").replaceChildren(make("span", {}, text), ...buttons);
  $("toast").hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => { $("toast").hidden = true; }, buttons.length ? 10000 : 5000);
}

// Only an answer that is there and a run that ended are said aloud.
export function announce(text) {
  $("said").textContent = "";
  requestAnimationFrame(() => { $("said").textContent = text; });
}

export function meter(label) {
  const bar = make("i"), node = make("div", { class: "meter", role: "progressbar", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 100 }, bar);
  node.show = (share) => { // null: under way, nobody knows how far
    node.classList.toggle("unknown", share === null);
    bar.style.width = share === null ? "" : `${Math.round(100 * share)}%`;
    if (share === null) node.removeAttribute("aria-valuenow");
    else node.setAttribute("aria-valuenow", Math.round(100 * share));
  };
  return node;
}

// A question in a dialog: what its form holds, or null where it is cancelled. `content` is nodes.
export function askInDialog(title, content, yes, { large = false, no = words.cancel, danger = false } = {}) {
  const form = make("form", { method: "dialog", class: "stack" },
    make("h2", { id: "dialog-title" }, title), content,
    make("div", { class: "row last" }, no && make("button", { value: "", formnovalidate: true }, no), yes && make("button", { class: danger ? "no" : "go", value: "ok" }, yes)));
  const dialog = make("dialog", { "aria-labelledby": "dialog-title", class: large && "large" }, form);
  document.body.append(dialog);
  $("toast").hidden = true;
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => {
    const values = dialog.returnValue ? Object.fromEntries(new FormData(form)) : null;
    dialog.remove();
    resolve(values);
  }, { once: true }));
}

export const confirmed = async (title, text, yes) => (await askInDialog(title, make("p", {}, text), yes, { danger: true })) !== null;
