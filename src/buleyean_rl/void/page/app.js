// The page. Every text of a model or a person becomes a text node: nothing here parses HTML.

import { chart } from "./chart.js";
import { $, button, complaining, counted, make, toast } from "./dom.js";
import { importFile, showImports } from "./imports.js";
import { ask, call, insist, isToken, keepListening, newUid, onServer } from "./server.js";

const state = { question: null, panes: [], last: null, page: 0, events: null, stream: null, stepsTouched: false, known: {} };

// Offsets here are in UTF-16 units; the server counts characters.
const characters = (text, units) => Array.from(text.slice(0, units)).length;
const units = (text, count) => Array.from(text).slice(0, count).join("").length;

function showMarked(node, text, spans) {
  const pieces = [];
  let at = 0;
  for (const [start, end] of spans) {
    const from = units(text, start), to = units(text, end);
    pieces.push(text.slice(at, from), make("mark", {}, text.slice(from, to)));
    at = to;
  }
  node.replaceChildren(...pieces, text.slice(at));
}

// --- talking ----------------------------------------------------------------------------------------------

function pane(answer, slot) {
  const title = make("h2", {}, "");
  const text = make("div", { class: "text", tabindex: "0", role: "group", "aria-busy": "true" });
  const key = make("kbd", {}, String(slot + 1));
  const whole = make("button", { type: "button", class: "no", "data-slot": slot }, "Reject\u00a0", key);
  const part = make("button", { type: "button", class: "no", "data-part": slot }, "Reject selection");
  const said = make("div", { class: "row said" });
  const made = { slot, title, text, whole, part, said, full: answer.text ?? "", done: answer.text !== null, noes: [] };
  whole.disabled = true;
  part.hidden = true;
  whole.addEventListener("click", complaining(() => reject(made, [])));
  part.addEventListener("mousedown", (event) => event.preventDefault()); // keeps the selection
  part.addEventListener("click", complaining(async () => {
    const spans = selectionIn(made);
    if (spans.length) await reject(made, spans); // without a selection it would mean the whole answer
  }));
  text.addEventListener("keydown", (event) => selectByKey(event, made));
  made.node = make("article", { "aria-label": `Answer ${slot + 1}` }, title, text, make("div", { class: "row" }, whole, part), said);
  return made;
}

function showQuestion(question) {
  state.stream?.abort();
  state.stream = new AbortController();
  state.question = question;
  $("asked").textContent = question.prompt;
  $("asked").hidden = false;
  state.panes = question.answers.map(pane);
  $("answers").replaceChildren(...state.panes.map((made) => made.node));
  nameSides(question);
  state.panes.forEach((made, index) => showNoes(made, question.answers[index].rejections));
  const noes = state.panes.flatMap((made) => made.noes.map(({ id }) => ({ id, made })));
  if (noes.length) state.last = noes.reduce((one, other) => (one.id > other.id ? one : other));
  const finished = () => state.panes.every((made) => made.done);
  if (finished()) return;
  keepListening(`questions/${question.id}/stream`, hear, state.stream.signal, finished).catch((error) => toast(error.message));
}

function nameSides(question) {
  state.panes.forEach((made, index) => {
    const answer = question.answers[index];
    made.title.textContent = answer.side ? `${answer.side}: ${answer.model}` : `Answer ${index + 1}`;
  });
  $("reveal-row").hidden = question.revealed;
}

function hear(event) {
  const made = state.panes[event.slot];
  made.full = made.full.slice(0, event.offset) + event.text;
  made.done = event.done;
  made.error = event.error;
  draw(made);
}

function draw(made) {
  if (made.error) made.text.replaceChildren(make("span", { class: "error" }, made.error));
  else showMarked(made.text, made.full, united(made.noes.flatMap((no) => no.whole ? [[0, characters(made.full, made.full.length)]] : no.spans)));
  made.text.setAttribute("aria-busy", String(!made.done));
  made.whole.disabled = !made.done || Boolean(made.error) || made.noes.some((no) => no.whole);
}

function selectionIn(made) {
  const selection = getSelection();
  if (!selection.rangeCount || selection.isCollapsed) return [];
  const range = selection.getRangeAt(0);
  if (!made.text.contains(range.startContainer) || !made.text.contains(range.endContainer)) return [];
  const before = document.createRange();
  before.selectNodeContents(made.text);
  before.setEnd(range.startContainer, range.startOffset);
  const start = before.toString().length;
  const end = start + range.toString().length;
  return end > start ? [[characters(made.full, start), characters(made.full, end)]] : [];
}

// Arrow keys walk word by word through an answer; with Shift they select.
function selectByKey(event, made) {
  if (!["ArrowLeft", "ArrowRight"].includes(event.key) || event.altKey || event.metaKey) return;
  event.preventDefault();
  const selection = getSelection();
  if (!made.text.contains(selection.anchorNode)) selection.collapse(made.text, 0);
  selection.modify(event.shiftKey ? "extend" : "move", event.key === "ArrowLeft" ? "backward" : "forward", event.ctrlKey ? "character" : "word");
}

function united(spans) {
  const found = [];
  for (const [start, end] of [...spans].sort((a, b) => a[0] - b[0])) {
    if (found.length && start <= found.at(-1)[1]) found.at(-1)[1] = Math.max(end, found.at(-1)[1]);
    else found.push([start, end]);
  }
  return found;
}

async function reject(made, spans) {
  const whole = !spans.length;
  if (!made?.done || made.error || (whole && made.noes.some((no) => no.whole))) return;
  const sent = { uid: newUid(), question: state.question.id, slot: made.slot, spans };
  const { id, reason } = await insist("rejections", sent); // a reason that was given before it was undone is there again
  getSelection().removeAllRanges();
  state.last = { id, made };
  showNoes(made, [...made.noes.filter((no) => no.id !== id), { id, spans, reason }]);
}

// What was rejected of an answer, here or elsewhere: a reload finds it too.
function showNoes(made, noes) {
  made.noes = noes.map((no) => ({ ...no, whole: !no.spans.length }));
  draw(made);
  const last = made.noes.at(-1);
  if (last?.id === made.asked) return;
  made.saveReason?.(); // what was typed and not sent
  made.saveReason = null;
  if (last) made.said.replaceChildren(askWhy(made, last));
  else made.said.replaceChildren(make("span", { class: "quiet" }, "Undone."));
  made.asked = last?.id;
}

function askWhy(made, no) {
  const reason = make("input", { type: "text", maxlength: "1000", placeholder: "Why? (optional)", "aria-label": "Reason", value: no.reason });
  const form = make("form", { class: "row" }, make("span", { class: "quiet" }, "Rejected."), reason,
    make("button", { type: "submit" }, "Say why"), button("Undo", () => undo(no.id, made)));
  made.saveReason = complaining(async () => {
    if (reason.value === no.reason) return;
    no.reason = reason.value;
    await insist(`rejections/${no.id}/reason`, { reason: no.reason });
    toast("Reason saved");
  });
  reason.addEventListener("change", made.saveReason);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    reason.blur();
    made.saveReason?.();
  });
  return form;
}

async function undo(id, made) {
  const no = made?.noes.find((one) => one.id === id);
  await made?.saveReason?.();
  await insist(`rejections/${id}/undo`, {});
  if (state.last?.id === id) state.last = null;
  if (made) showNoes(made, made.noes.filter((one) => one.id !== id));
  toast("Undone ", button("Redo", async () => {
    await insist(`rejections/${id}/redo`, {});
    if (made) state.last = { id, made };
    if (no) showNoes(made, [...made.noes, no]);
    toast("Rejected again");
    await refresh();
  }));
}

async function submitQuestion() {
  const prompt = $("prompt").value;
  if (!prompt.trim()) return;
  const uid = newUid();
  location.hash = `talk/${uid}`; // a reload finds the question again
  state.question = { id: uid };
  showQuestion(await insist("questions", { uid, prompt, blind: $("blind").checked }));
  $("answers").querySelector(".text")?.focus({ preventScroll: true });
}

// --- rejections -------------------------------------------------------------------------------------------

async function showRejections() {
  const { rows, total, page_size: size } = await ask(`rejections?page=${state.page}`);
  $("rows").replaceChildren(...rows.map((row) => {
    const answer = make("div", { class: "clamp" });
    showMarked(answer, row.answer, row.spans);
    const take = button("Undo", async () => { await undo(row.id); await showRejections(); });
    return make("tr", {},
      make("td", { "data-label": "times" }, String(row.times)), make("td", { class: "long" }, row.prompt),
      make("td", { class: "long" }, answer), make("td", { class: "long", "data-label": "reason" }, row.reason), make("td", {}, take));
  }));
  const pages = Math.max(1, Math.ceil(total / size));
  $("where").textContent = `${counted(total, "rejected answer")}, page ${state.page + 1} of ${pages}`;
  $("newer").disabled = state.page === 0;
  $("older").disabled = state.page + 1 >= pages;
  await showImports(showRejections);
}

async function exportRecords() {
  const reply = await call("export");
  const link = make("a", { href: URL.createObjectURL(await reply.blob()), download: "records.jsonl" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// --- runs -------------------------------------------------------------------------------------------------

async function showRuns() {
  const { runs } = await ask("runs");
  $("runs").replaceChildren(...(runs.length ? runs : []).map((run) => make("li", {},
    make("a", { href: `#runs/${run.id}` }, `Run ${run.id}`),
    ` ${run.state}, ${counted(run.records, "record")}, ${run.step ?? 0} of ${counted(run.steps, "step")}`,
    ...(run.error ? [make("div", { class: "error" }, run.error)] : []))));
  if (!runs.length) $("runs").replaceChildren(make("li", {}, "No run yet: reject something, then train."));
}

async function showRun(id) {
  const run = await ask(`runs/${id}`);
  $("run-title").textContent = `Run ${run.id}`;
  $("run-state").textContent = `${run.state}${run.error ? `: ${run.error}` : ""}, ${counted(run.records, "record")}, ${run.points.length} of ${counted(run.steps, "step")}`;
  $("verdict").textContent = run.verdict ? verdictWords(run.verdict) : "";
  chart($("run-chart"), run.points);
  $("samples").replaceChildren(...run.samples.flatMap((sample) => [
    make("p", { class: "asked" }, sample.prompt),
    make("div", { class: "pair" },
      make("article", {}, make("h2", {}, "before"), make("div", { class: "text" }, sample.before)),
      make("article", {}, make("h2", {}, "after"), make("div", { class: "text" }, sample.after)))]));
  if (!run.samples.length) $("samples").replaceChildren(make("p", { class: "quiet" }, "They come when the run is done."));
  $("card").replaceChildren(...cardNodes(run.card));
}

const TEXTS = { own: "Text the base wrote itself", bundled: "Other text" };

function verdictWords({ rejected_nll: [before, after], drift, stop_reason: reason }) {
  const words = [`Rejected answers: ${after > before ? "less likely" : "no less likely"}.`];
  for (const [kind, { kl, entropy }] of Object.entries(drift)) words.push(`${TEXTS[kind]}: drift ${kl.toFixed(3)} (KL, nats per token), entropy ${entropy[0].toFixed(2)} to ${entropy[1].toFixed(2)}.`);
  if (reason) words.push(`Ended early: ${reason}.`);
  return words.join(" ");
}

// The model card is Markdown that we write ourselves: headings, a table, paragraphs, code.
function cardNodes(markdown) {
  const body = markdown.replace(/^---[\s\S]*?---\n/, "");
  const nodes = [];
  let table = null;
  for (const line of body.split("\n")) {
    const cells = line.startsWith("|") ? line.split("|").slice(1, -1).map((cell) => cell.trim()) : null;
    if (cells) {
      if (cells.every((cell) => /^-*$/.test(cell))) continue;
      if (!table) nodes.push(table = make("table"));
      table.append(make("tr", {}, ...cells.map((cell) => make("td", {}, cell))));
    } else {
      table = null;
      if (line.startsWith("# ")) nodes.push(make("h2", {}, line.slice(2)));
      else if (line.startsWith("    ")) nodes.push(make("code", {}, line.trim()));
      else if (line.trim() && !line.startsWith("![")) nodes.push(make("p", {}, line));
    }
  }
  return nodes.length ? nodes : [make("p", { class: "quiet" }, "It is written when the run is done.")];
}

async function train() {
  const { id } = await insist("runs", { uid: newUid(), steps: Number($("steps").value) });
  toast(`Run ${id} begins`);
}

// --- what the server tells --------------------------------------------------------------------------------

const hearState = complaining(async (news) => {
  const before = state.known;
  state.known = news;
  $("count").textContent = news.rejections.toLocaleString();
  $("models").textContent = news.models.trained ? `base: ${news.models.base}, trained: ${news.models.trained}` : `base: ${news.models.base}; nothing trained yet`;
  if (!state.stepsTouched) $("steps").value = Math.max(12, Math.ceil(news.rejections * 0.75));
  const run = news.running;
  $("train-button").disabled = Boolean(run) || !news.rejections;
  $("stop").hidden = $("train-progress").hidden = !run;
  if (run) {
    const point = run.points[0];
    $("stop").dataset.run = run.id;
    $("stop").textContent = run.state === "stopping" ? "Stop at once" : "Stop";
    $("train-progress").max = run.steps;
    $("train-progress").value = point?.step ?? 0;
    $("train-state").textContent = run.state === "stopping" ? `run ${run.id}: stopping, with what it has learnt` : point
      ? point.step < run.steps ? `run ${run.id}: step ${point.step} of ${run.steps}, loss ${point.loss.toFixed(4)}, gap ${point.gap.toFixed(4)}` : `run ${run.id}: measuring, and loading the new model`
      : `run ${run.id}: loading the model`;
    chart($("live-chart"), (await ask(`runs/${run.id}`)).points);
    $("live-chart").hidden = false;
  } else if (before.running) {
    const ended = (await ask(`runs/${before.running.id}`));
    const fate = ended.state === "done" ? "is done" : `${ended.state}${ended.error ? `: ${ended.error}` : ""}`;
    $("train-state").textContent = `run ${ended.id} ${fate}${ended.verdict ? `: ask again to hear it. ${verdictWords(ended.verdict)}` : ""}`;
  }
  if (news.changes !== before.changes) await refresh();
});

async function refresh() {
  const [page, id] = location.hash.slice(1).split("/");
  if (page === "rejections") await showRejections();
  if (page === "talk" && id && state.question?.answers && state.question.id === id) {
    const { question, last } = state;
    const { answers } = await ask(`questions/${id}`);
    if (state.question !== question || state.last !== last) return; // it tells of a moment ago
    const ids = (noes) => noes.map((no) => no.id).join();
    state.panes.forEach((made, index) => { // drawn again, an answer would lose what is selected in it
      if (ids(made.noes) !== ids(answers[index].rejections)) showNoes(made, answers[index].rejections);
    });
  }
  if (page === "runs" && !id) await showRuns();
  if (page === "runs" && id) await showRun(id);
}

async function route() {
  const [page, id] = (location.hash.slice(1) || "talk").split("/");
  const shown = page === "runs" && id ? "run" : ["rejections", "runs"].includes(page) ? page : "talk";
  for (const name of ["talk", "rejections", "runs", "run"]) $(`page-${name}`).hidden = name !== shown;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.getAttribute("href") === `#${page}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (shown === "talk" && id && state.question?.id !== id) {
    const question = await ask(`questions/${id}`);
    $("prompt").value = question.prompt;
    showQuestion(question);
  }
  await refresh();
}

// --- wiring -----------------------------------------------------------------------------------------------

$("ask").addEventListener("submit", complaining(async (event) => { event.preventDefault(); await submitQuestion(); }));
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
  if (event.key === "Escape") $("prompt").blur();
});
$("reveal").addEventListener("click", complaining(async () => nameSides(await ask(`questions/${state.question.id}/reveal`, {}))));
$("steps").addEventListener("input", () => { state.stepsTouched = true; });
$("train").addEventListener("submit", complaining(async (event) => { event.preventDefault(); await train(); }));
$("stop").addEventListener("click", complaining(() => ask(`runs/${$("stop").dataset.run}/stop`, {})));
$("export").addEventListener("click", complaining(exportRecords));
$("import-file").addEventListener("change", complaining(async (event) => {
  const [file] = event.target.files;
  event.target.value = "";
  if (file) await importFile(file, showRejections);
}));
$("newer").addEventListener("click", complaining(async () => { state.page -= 1; await showRejections(); }));
$("older").addEventListener("click", complaining(async () => { state.page += 1; await showRejections(); }));
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const token = $("token").value.trim();
  $("token-problem").hidden = isToken(token);
  if (!isToken(token)) return;
  sessionStorage.setItem("token", token);
  location.reload();
});
document.addEventListener("selectionchange", () => {
  for (const made of state.panes) made.part.hidden = !made.done || !selectionIn(made).length;
});
document.addEventListener("keydown", complaining(async (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, dialog")) return;
  if (event.key === "1" || event.key === "2") {
    const made = state.panes[Number(event.key) - 1];
    if (made) await reject(made, selectionIn(made));
  } else if (event.key === "u" && state.last) {
    await undo(state.last.id, state.last.made);
  } else if (event.key === "/") {
    event.preventDefault();
    location.hash = state.question ? `talk/${state.question.id}` : "talk";
    $("prompt").select();
    $("prompt").focus();
  }
}));
addEventListener("hashchange", complaining(route));
onServer((away) => { $("away").hidden = !away; }, (wrong) => {
  $("token-problem").hidden = !wrong;
  if (!$("token-dialog").open) $("token-dialog").showModal();
});

const shown = new URLSearchParams(location.hash.slice(1)).get("token");
if (shown) { // out of the address bar, and out of what one copies from it
  sessionStorage.setItem("token", shown);
  history.replaceState(null, "", location.pathname);
}
complaining(route)();
keepListening("events", hearState, new AbortController().signal).catch((error) => toast(error.message));
