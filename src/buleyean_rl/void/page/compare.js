// Two models on the same prompts: a batch that both answer.

import { askInDialog, make } from "./dom.js";
import { insist, newUid } from "./server.js";
import { words } from "./strings.js";

const PROMPTS = 2000;

export async function askToCompare(run, models) {
  const others = models.filter(({ model }) => model !== run.model);
  const prompts = new Set([...(run.verdict?.pairs ?? []).map(({ prompt }) => prompt.replaceAll("\n", " ")), ...words.startPrompts]);
  const values = await askInDialog(words.compareTitle(run.name), [
    make("label", { class: "field" }, words.compareWith, make("select", { name: "other" }, others.map(({ model, name }) => make("option", { value: model }, name)))),
    make("label", { class: "field" }, words.comparePrompts, make("textarea", { name: "prompts", rows: 6, required: true }, [...prompts].join("\n"))),
    make("label", { class: "check" }, make("input", { type: "checkbox", name: "blind", value: "1" }), words.blind),
  ], words.compare);
  if (!values) return;
  const uid = newUid(), names = others.find(({ model }) => model === values.other);
  await insist("batches", { uid, name: words.comparison(names.name, run.name), prompts: linesOf(values.prompts), system: "", temperature: 0, max_tokens: 256, models: [values.other, run.model], blind: Boolean(values.blind) });
  location.hash = `judge/${uid}`;
}

export const linesOf = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean).slice(0, PROMPTS);
