// Nodes, and words said in passing. Every text of a model or a person becomes a text node: nothing parses HTML.

export const $ = (id) => document.getElementById(id);

export function make(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

export const button = (words, action, attributes = {}) =>
  make("button", { type: "button", onclick: complaining(action), ...attributes }, words);

let toastTimer;
export function toast(words, ...buttons) {
  $("toast").replaceChildren(words, ...buttons);
  $("toast").hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => { $("toast").hidden = true; }, buttons.length ? 10000 : 4000);
}

export const complaining = (action) => async (...words) => {
  try {
    await action(...words);
  } catch (error) {
    toast(error.message);
  }
};

export const counted = (number, what) => `${number.toLocaleString()} ${what}${number === 1 ? "" : "s"}`;
