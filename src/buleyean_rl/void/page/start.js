// Before the first question: what the page is for, in three steps; or how far the model is loaded.

import { button, make, meter } from "./dom.js";
import { words } from "./strings.js";

export function startView(choose) {
  return make("section", { class: "start" },
    make("header", {}, make("h1", { tabindex: -1 }, words.startTitle), make("p", { class: "measure" }, words.startText)),
    make("ol", { class: "steps" }, words.startSteps.map(([what, how]) => make("li", {}, make("h2", {}, what), make("p", { class: "note" }, how)))),
    make("div", { class: "prompts" }, make("p", { class: "label", id: "prompts-label" }, words.startPromptsLabel),
      words.startPrompts.map((prompt) => button(prompt, () => choose(prompt)))),
    make("p", { class: "note" }, words.startFile, " ", make("a", { href: "#rejections" }, words.startImport), " · ", make("a", { href: "#judge" }, words.startJudge)));
}

let loading = null; // what is shown while it loads: one node, so that its bar moves

export function loadingView({ what, share = null, seconds_left: seconds = null, error }) {
  if (error) return make("section", { class: "start" }, make("div", { class: "card bad stack", role: "alert" }, make("h1", {}, words.loadingFailed(what)), make("p", { class: "any" }, error)));
  if (loading?.what !== what) {
    const bar = meter(words.loading(what)), left = make("p", { class: "note" });
    loading = { what, bar, left, node: make("section", { class: "start" }, make("div", { class: "card stack" }, make("h1", {}, words.loading(what)), bar, left)) };
  }
  loading.bar.show(share);
  loading.left.textContent = words.loadingLeft(seconds);
  return loading.node;
}
