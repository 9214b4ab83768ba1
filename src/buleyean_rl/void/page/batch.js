// One card at a time: R rejects, Space goes on, U takes the last verdict back.

import { Answer } from "./answer.js";
import { button, make, meter } from "./dom.js";
import { ask, insist, newUid } from "./server.js";
import { words } from "./strings.js";

let id = null, shown = null, card = null, panes = [], past = [], busy = false, bar, told, place, keys, stop;

export const batch = { title: () => shown?.name ?? words.judge, open, refresh, pressed };

async function open(main, uid) {
  [id, card, past] = [uid, null, []];
  bar = meter(words.judge);
  told = make("span", { class: "note", id: "told" });
  stop = button("", async () => { await ask(`batches/${id}/${shown.state === "answering" ? "stop" : "resume"}`, {}); await refresh(); }, { class: "bare" });
  place = make("div", { id: "card" });
  keys = make("div", { class: "keys" });
  shown = await ask(`batches/${uid}`);
  main.replaceChildren(make("div", { class: "page" }, make("div", { class: "judge" },
    make("p", { class: "note" }, make("a", { href: "#judge" }, words.allBatches)),
    make("h1", { tabindex: -1, class: "any" }, shown.name), make("div", {}, bar, make("div", { class: "row" }, told, make("span", { class: "end" }, stop))), place, keys)));
  await refresh();
  await next();
}

async function refresh() {
  const fresh = await ask(`batches/${id}`);
  if (fresh.id !== id) return;
  shown = fresh;
  bar.show(fresh.prompts ? fresh.judged / fresh.prompts : 0);
  told.textContent = [words.judgedOf(fresh.judged, fresh.prompts), words.rejectedCount(fresh.rejected), fresh.state === "answering" && words.answeredOf(fresh.answered, fresh.prompts), fresh.state === "paused" && words.paused].filter(Boolean).join(" · ");
  stop.hidden = fresh.state === "done";
  stop.textContent = fresh.state === "answering" ? words.stopAnswering : words.resumeAnswering;
  if (!card) await next();
}

async function next() {
  const { card: found, waiting } = await ask(`batches/${id}/next`);
  show(found, waiting);
}

function show(turn, waiting = false) {
  card = turn;
  const hadFocus = place.contains(document.activeElement) || keys.contains(document.activeElement);
  if (!card) {
    panes = [];
    place.replaceChildren(make("div", { class: "nothing", tabindex: -1 }, waiting ? words.judgeWaiting : words.judgeDone(shown.judged, shown.rejected),
      waiting ? null : make("div", { class: "row" }, make("a", { class: "button go", href: "#talk" }, words.train))));
  } else {
    panes = card.answers.map((answer) => new Answer(answer, { longest: card.settings.max_tokens, reject: (one, spans) => judgeCard("rejected", one.slot, spans), undo: async (one) => { await undoLast(); return one; } }));
    place.replaceChildren(make("div", { class: "sheet" }, make("h2", { class: "unseen" }, words.asked), make("p", { class: "me any" }, card.prompt), make("div", { class: `pair ${panes.length === 1 ? "one" : ""}` }, panes.map((pane) => pane.node))));
  }
  drawKeys();
  if (hadFocus) (place.querySelector(".text") ?? place.firstChild).focus();
}

function drawKeys() {
  const two = panes.length > 1;
  keys.classList.toggle("four", two);
  keys.replaceChildren(...[
    ...panes.map((pane, slot) => button([words.rejectCard(two ? pane.answer : null), make("kbd", {}, two ? String(slot + 1) : "R")], () => pane.reject(pane.selected()), { class: "no", "data-do": `reject-${slot}` })),
    card && button([words.fine, make("kbd", {}, words.space)], () => judgeCard("fine"), { "data-do": "fine" }),
    button([words.undo, make("kbd", {}, "U")], undoLast, { "data-do": "undo" }),
  ].filter(Boolean));
}

// A verdict, and the next card. Resolves to the answer as it is then.
async function judgeCard(verdict, slot = 0, spans = []) {
  if (busy || !card) return card?.answers[slot];
  busy = true;
  try {
    const judged = await insist(`turns/${card.id}/verdict`, { uid: newUid(), verdict, slot, spans, reason: "" });
    past.push(card.id);
    await next();
    await refresh();
    return judged.answers[slot];
  } finally {
    busy = false;
  }
}

async function undoLast() {
  const last = past.pop();
  if (!last || busy) return;
  const undone = await insist(`turns/${last}/verdict`, { uid: newUid(), verdict: null });
  show(undone);
  await refresh();
}

function pressed(event) {
  const onControl = event.target.closest("button, a, summary");
  if (event.key === " " && !onControl && card) {
    event.preventDefault();
    return judgeCard("fine");
  }
  const slot = { [panes.length === 1 ? "r" : "1"]: 0, 2: 1 }[event.key.toLowerCase()];
  if (slot !== undefined && panes[slot]) return panes[slot].reject(panes[slot].selected());
  if (event.key.toLowerCase() === "u") return undoLast();
  return undefined;
}
