// The page one talks on: a conversation, and the question below it.

import { AskForm } from "./ask.js";
import { make } from "./dom.js";
import { ask, insist, newUid } from "./server.js";
import { startView, loadingView } from "./start.js";
import { words } from "./strings.js";
import { Turn } from "./turn.js";

const NEAR = 80; // pixels from the end, where the page follows what is written

let shown = { id: null, title: null, turns: [] };
let form, flow, inner, hint, server = {}, next = null;

export const talk = { title: () => shown.title ?? words.talk, open, hear, refresh };

async function open(main, id) {
  if (!main.querySelector("#talk")) build(main);
  if (id && id === shown.id) return;
  for (const turn of shown.turns) turn.close();
  shown = { id: id ?? null, title: null, turns: [] };
  if (id && !server.loading) {
    const conversation = await ask(`conversations/${id}`);
    if (shown.id !== id) return; // another one was chosen meanwhile
    shown.title = conversation.title;
    form.use(conversation.settings);
    shown.turns = conversation.turns.map((turn) => new Turn(turn, changed));
  }
  draw();
  flow.scrollTop = id ? flow.scrollHeight : 0;
  if (!id && next !== null) {
    form.prompt.value = next;
    next = null;
    form.show();
    form.prompt.focus();
  } else if (!id && matchMedia("(pointer: fine)").matches) form.prompt.focus({ preventScroll: true });
}

function build(main) {
  shown = { id: null, title: null, turns: [] };
  inner = make("div", { class: "inner" });
  flow = make("div", { id: "flow", tabindex: 0, role: "region", "aria-label": words.conversation }, inner);
  hint = make("p", { class: "hint note" }, words.hint);
  form = new AskForm(submit, async () => { for (const turn of shown.turns) if (turn.isOpen) await turn.stop(); });
  main.replaceChildren(make("div", { id: "talk" }, flow, form.node));
}

function draw() {
  if (server.loading) {
    const view = loadingView(server.loading);
    if (view !== inner.firstChild) inner.replaceChildren(view);
  }
  else if (shown.turns.length) inner.replaceChildren(make("h1", { class: "unseen", tabindex: -1 }, shown.title ?? words.talk), ...shown.turns.map((turn) => turn.node), hint);
  else inner.replaceChildren(startView((prompt) => submit(prompt, form.settings)));
  changed();
}

// What the answers' states mean for the rest of the page.
function changed() {
  const turns = shown.turns, answers = turns.flatMap((turn) => turn.turn.answers);
  form.show({ answering: turns.some((turn) => turn.isOpen), why: server.loading ? words.askWaiting : null, leavesOut: answers.some(({ rejections }) => rejections.length) });
  if (answers.some((answer) => answer.rejections.some(({ spans }) => spans.length))) localStorage.setItem("marked", "1");
  hint.hidden = Boolean(localStorage.getItem("marked")) || turns.length !== 1 || turns[0].isOpen;
  if (turns.length && flow.scrollHeight - flow.scrollTop - flow.clientHeight < NEAR) flow.scrollTop = flow.scrollHeight;
}

async function submit(prompt, settings) {
  form.prompt.value = "";
  const conversation = shown.id ?? newUid(), uid = newUid();
  if (!shown.id) {
    shown.id = conversation;
    shown.title = prompt.slice(0, 60);
    history.replaceState(null, "", `#talk/${conversation}`); // a reload finds it again
    document.title = words.title(shown.title);
  }
  form.show({ answering: true });
  try {
    const turn = new Turn(await insist("turns", { uid, conversation, prompt, ...settings }), changed);
    if (shown.id !== conversation) return turn.close();
    shown.turns.push(turn);
    draw();
    turn.node.scrollIntoView({ block: "start" });
  } catch (error) {
    form.prompt.value = prompt; // nothing that was typed is lost
    form.show({ answering: false });
    throw error;
  }
  return undefined;
}

function hear(news) {
  const wasLoading = server.loading;
  server = news;
  if (!form?.node.isConnected) return;
  if (news.loading || wasLoading) draw();
}

// Something was written, here or elsewhere: rejections are marked and undone in every tab.
async function refresh() {
  const { id, turns } = shown;
  if (!id || !turns.length || turns.some((turn) => turn.isOpen) || document.activeElement?.matches(".reason")) return;
  const conversation = await ask(`conversations/${id}`).catch((error) => {
    if (error.status !== 404) throw error;
    location.hash = "talk"; // it was deleted elsewhere
  });
  if (!conversation || shown.id !== id || shown.turns.length > conversation.turns.length || shown.turns.some((turn) => turn.isOpen)) return;
  conversation.turns.forEach((turn, index) => {
    if (shown.turns[index]) shown.turns[index].show(turn);
    else shown.turns.push(new Turn(turn, changed));
  });
  if (inner.querySelectorAll(".turn").length !== shown.turns.length) draw();
}

// A new conversation that begins with a question: one more press asks it.
export function proposeAgain(prompt) {
  next = prompt;
  if (location.hash === "#talk") return open(document.getElementById("main"), null);
  location.hash = "talk";
  return undefined;
}

export const panesShown = () => shown.turns.at(-1)?.panes ?? [];
