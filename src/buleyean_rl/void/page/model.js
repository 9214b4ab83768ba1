// A model's page: its name, verdict, files, answers before and after, and the figures under Details.

import { allow, button, complaining, differs, make, meter, toast } from "./dom.js";
import { chart } from "./chart.js";
import { copyText } from "./answer.js";
import { lookOf, modelActions, stateWords } from "./models.js";
import { ask, insist } from "./server.js";
import { showRendered } from "./text.js";
import { words } from "./strings.js";
import { isGood, verdictWords, wholePairs } from "./verdict.js";

const LOOK = 700; // milliseconds between looks at files that are being made

let shown = null, files, timer = null;
const wanted = new Set(); // kinds that are downloaded as soon as they are made

export const model = { title: () => shown?.name ?? words.models, open, refresh, leave: () => { clearTimeout(timer); wanted.clear(); } };

async function open(main, id) {
  const [run, { base, runs }] = await Promise.all([ask(`runs/${id}`), ask("models")]);
  shown = run;
  const name = make("input", { type: "text", maxlength: 80, value: run.name, "aria-label": words.nameOfModel, id: "model-name", onchange: async () => {
    if (!name.value.trim()) { name.value = run.name; return; }
    await insist(`runs/${id}/name`, { name: name.value.trim() });
    run.name = name.value.trim();
    toast(words.nameSaved);
  } });
  name.addEventListener("keydown", (event) => { if (event.key === "Enter") name.blur(); });
  files = make("section", { class: "card stack", id: "files", "aria-label": words.download });
  const changed = () => open(main, id);
  main.replaceChildren(make("div", { class: "page" },
    make("p", { class: "note" }, make("a", { href: "#models" }, words.allModels)),
    make("h1", { class: "unseen", tabindex: -1 }, run.name),
    make("div", { class: "title" }, name, make("span", { class: `tag ${lookOf(run)}` }, stateWords(run))),
    make("p", { class: "note" }, words.madeOf(run.created, run.rejections)),
    run.verdict ? make("div", { class: `card stack ${isGood(run.verdict) ? "good" : ""}` }, verdictWords(run.verdict)) : run.error ? make("p", { class: "card bad any" }, run.error) : null,
    modelActions(run, base, runs, run.usable ? null : run.problem || words.unusable, changed, { download: false }),
    run.usable ? files : null,
    run.samples.length ? make("section", { class: "stack", id: "samples" }, make("h2", {}, words.beforeAfter), wholePairs(run.samples)) : null,
    details(run)));
  if (run.usable) await showFiles(id);
}

async function refresh() {
  if (shown?.usable && files.isConnected) await showFiles(shown.id);
}

function details(run) {
  const card = make("div", { class: "text card" });
  if (run.card_html) showRendered(card, run.card_html);
  for (const wide of card.querySelectorAll("pre, table")) wide.setAttribute("tabindex", 0);
  const facts = [[words.stepsDone, words.stepsOf(run.step ?? 0, run.steps)]];
  const { rejected_nll: nll, drift = {}, stop_reason: reason } = run.verdict?.details ?? {};
  if (nll) facts.push([words.rejectedNll, words.fromTo(...nll)]);
  for (const [kind, { kl, entropy }] of Object.entries(drift)) facts.push([words.driftOf[kind] ?? kind, words.driftFigures(kl, entropy)]);
  if (reason) facts.push([words.endedEarly, reason]);
  return make("details", { id: "details" }, make("summary", {}, words.details), make("div", { class: "stack" },
    run.points.length ? chart(run.points, run.steps) : null,
    make("dl", { class: "facts" }, facts.flatMap(([label, value]) => [make("dt", {}, label), make("dd", {}, value)])),
    run.card_html ? card : null));
}

async function showFiles(id) {
  clearTimeout(timer);
  const { files: all, ollama } = await ask(`runs/${id}/files`);
  if (!files.isConnected || String(shown?.id) !== String(id)) return;
  if (all.some(({ state }) => state === "making")) timer = setTimeout(complaining(() => showFiles(id)), LOOK);
  for (const { kind, name, state } of all) {
    if (["ready", "failed"].includes(state) && wanted.delete(kind) && state === "ready") await fetchFile(id, kind, name);
  }
  if (!differs(files, all)) return;
  const focused = document.activeElement?.closest("#files [data-kind]")?.dataset.kind;
  files.replaceChildren(make("h2", {}, words.download), make("ul", { class: "plain files" }, all.map((file) => line(id, file))),
    make("div", {}, make("p", { class: "label" }, words.ollama), command(ollama), make("p", { class: "note" }, words.ollamaHow)));
  if (focused) files.querySelector(`[data-kind="${CSS.escape(focused)}"] button`)?.focus();
}

function line(id, file) {
  const { kind, name, bytes, state, phase, progress, error, possible, problem } = file;
  const bar = state === "making" ? meter(words.making(name)) : null;
  bar?.show(progress ?? null);
  const act = button(state === "making" ? words.makingShort : words.download, () => state === "ready" ? fetchFile(id, kind, name) : start(id, kind),
    { class: kind === "q8_0" && "go", "aria-label": `${words.download}: ${name}` });
  allow(act, !possible ? problem || words.impossible : state === "making" ? words.phases[phase] ?? words.makingShort : null);
  return make("li", { "data-kind": kind }, make("div", {}, make("div", { class: "any" }, name), make("small", {}, [words.kinds[kind] ?? kind, bytes ? words.size(bytes) : possible && state === "missing" && words.madeFirst].filter(Boolean).join(" · ")),
    !possible && make("small", { class: "block" }, problem), bar, state === "making" && make("small", {}, words.phases[phase] ?? ""), state === "failed" && make("small", { class: "error", role: "alert" }, error)), act);
}

async function start(id, kind) {
  wanted.add(kind);
  await ask(`runs/${id}/files/${kind}`, {});
  await showFiles(id);
}

async function fetchFile(id, kind, name) {
  const { url } = await ask(`runs/${id}/files/${kind}/link`, {});
  make("a", { href: url, download: name }).click();
}

function command(text) {
  const copy = button(words.copy, () => copyText(text, copy));
  return make("div", { class: "command" }, make("code", { tabindex: 0 }, text), copy);
}
