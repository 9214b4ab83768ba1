// A run's verdict in words, and its answers before and after.

import { button, make, toast } from "./dom.js";
import { showRendered } from "./text.js";
import { words } from "./strings.js";

export const verdictText = (verdict) => [words.unlearned(verdict.unlearned, verdict.asked), words.otherText[verdict.other_text], words.unlearnedHow[verdict.outcome]].filter(Boolean).join(" ");

export const isGood = (verdict) => verdict.outcome === "good";

export function verdictWords(verdict) {
  const other = words.otherText[verdict.other_text];
  return [
    make("p", { class: "verdict" }, make("b", {}, words.unlearned(verdict.unlearned, verdict.asked)), verdict.asked > 0 && explained(words.compared(verdict.asked)),
      " ", other, other && explained(words.drift)),
    words.unlearnedHow[verdict.outcome] && make("p", {}, words.unlearnedHow[verdict.outcome]),
  ];
}

// A mark that says more: on hover, and where it is pressed.
const explained = (text) => button("?", () => toast(text), { class: "what", title: text, "aria-label": `${words.whatIsThis} ${text}` });

// Three at most, one above the other: for the side.
export const shortPairs = (pairs) => pairs.map(({ prompt, rejected, after }) => make("div", { class: "before-after" },
  make("b", { class: "any" }, prompt),
  make("div", {}, make("span", { class: "label" }, words.before), make("div", {}, make("del", { class: "clamped" }, rejected))),
  make("div", {}, make("span", { class: "label" }, words.after), make("div", { class: "any" }, after))));

// All, rendered and side by side: for a model's page.
export const wholePairs = (pairs) => pairs.map((pair) => make("section", { class: "stack" }, make("h3", { class: "any" }, pair.prompt),
  make("div", { class: "twins" }, twin(words.before, pair.before_html, pair.before, pair.whole), twin(words.after, pair.after_html, pair.after))));

function twin(label, html, text, isRejected = false) {
  const body = make("div", { class: `text ${isRejected ? "struck" : ""}` });
  if (html) showRendered(body, html);
  else body.append(make("div", { class: "any" }, text));
  return make("div", {}, make("h4", { class: "label" }, label), body);
}
