// The models that came out of training: a card each.

import { allow, button, confirmed, differs, make, toast } from "./dom.js";
import { chart } from "./chart.js";
import { askToCompare } from "./compare.js";
import { ask, insist } from "./server.js";
import { words } from "./strings.js";
import { verdictText } from "./verdict.js";

let list, base;

export const models = { title: () => words.models, open, refresh: show };

async function open(main) {
  list = make("ul", { class: "plain models", id: "models" });
  base = make("p", { class: "note" });
  main.replaceChildren(make("div", { class: "page" }, make("div", { class: "head" }, make("h1", { tabindex: -1 }, words.models), base), list));
  await show();
}

async function show() {
  const { base: origin, runs } = await ask("models");
  if (!list.isConnected) return;
  if (!differs(list, [origin, runs])) return;
  base.textContent = words.trainedFrom(origin.name);
  const focused = document.activeElement?.closest("#models li"), at = focused && [...list.children].indexOf(focused);
  list.replaceChildren(...(runs.length ? runs.map((run) => card(run, origin, runs)) : [make("li", { class: "nothing" }, words.noModels, make("div", { class: "row" }, make("a", { class: "button", href: "#talk" }, words.talk)))]));
  if (focused) list.children[at]?.querySelector("a, button")?.focus();
}

function card(run, origin, runs) {
  const usable = run.usable ? null : run.problem || words.unusable;
  return make("li", { class: "card", "data-id": run.id },
    make("div", { class: "head" }, make("h2", {}, make("a", { href: `#models/${run.id}` }, run.name)), make("span", { class: `tag ${lookOf(run)}` }, stateWords(run))),
    make("p", { class: "note" }, words.madeOf(run.created, run.rejections)),
    make("p", {}, run.verdict ? verdictText(run.verdict) : run.error || words.states[run.state]),
    run.curve?.length > 1 ? chart(run.curve.map((loss, index) => ({ step: index + 1, loss, floor: 0, gap: loss })), run.curve.length, { small: true }) : null,
    modelActions(run, origin, runs, usable, show));
}

export const lookOf = ({ in_pair: used, state }) => used ? "good" : state === "failed" ? "bad" : "";
export const stateWords = (run) => run.in_pair ? words.inUse : words.states[run.state];

// What can be done with a model, on its card and on its page.
export function modelActions(run, origin, runs, unusable, changed, { download = true } = {}) {
  const use = button(run.in_pair ? words.unuse : words.use, async () => {
    await insist("pair", { models: run.in_pair ? ["base"] : ["base", run.model] });
    toast(run.in_pair ? words.unused : words.kept(run.name));
    await changed();
  }, { "data-do": "use" });
  allow(use, unusable);
  const compare = button(words.compare, () => askToCompare(run, [{ model: "base", name: origin.name }, ...runs.filter((one) => one.usable)]), { "data-do": "compare" });
  allow(compare, unusable);
  const get = download && make("a", { class: "button", href: `#models/${run.id}`, "data-do": "download" }, words.download);
  const remove = button(words.delete, async () => {
    if (!await confirmed(words.deleteModel(run.name), words.deleteModelAsks, words.delete)) return;
    await insist(`runs/${run.id}/delete`, {});
    if (location.hash === `#models/${run.id}`) location.hash = "models";
    else await changed();
  }, { class: "no end", "data-do": "delete" });
  allow(remove, ["running", "stopping"].includes(run.state) ? words.stillTraining : null);
  return make("div", { class: "row" }, use, compare, unusable ? null : get, remove);
}
