// The conversations, by day.

import { $, button, differs, make, toast } from "./dom.js";
import { closePanels } from "./panels.js";
import { ask, insist } from "./server.js";
import { words } from "./strings.js";

const MANY = 15; // conversations, from which on one searches

let older = [], hasMore = false, query = "";

export function buildHistory() {
  const search = make("input", { type: "search", placeholder: words.searchConversations, "aria-label": words.searchConversations, maxlength: 200, oninput: async () => {
    query = search.value;
    await refreshHistory();
  } });
  $("history").setAttribute("aria-label", words.conversations);
  $("history").replaceChildren(
    make("div", { class: "panel-head of-history" }, make("h2", {}, words.conversations), button("×", closePanels, { id: "close-history", class: "icon bare", "aria-label": words.close })),
    make("div", { class: "stack" }, make("a", { class: "button wide", href: "#talk", id: "new", onclick: closePanels }, words.newConversation), make("div", { id: "search-conversations", hidden: true }, search)),
    make("div", { id: "conversations" }));
}

export async function refreshHistory(count = 0) {
  if (count > MANY) $("search-conversations").hidden = false;
  const { conversations, more } = await ask(`conversations?${new URLSearchParams({ q: query })}`);
  const oldest = conversations.at(-1)?.changed ?? 0;
  const earlier = query ? [] : older.filter(({ changed }) => changed < oldest);
  if (!earlier.length) hasMore = more;
  draw([...conversations, ...earlier]);
}

async function showOlder(all) {
  const { conversations, more } = await ask(`conversations?${new URLSearchParams({ q: query, before: all.at(-1).changed })}`);
  older = [...older, ...conversations];
  hasMore = more;
  draw([...all, ...conversations]);
}

function draw(all) {
  if (!differs($("conversations"), [all, hasMore, query])) return;
  const focused = document.activeElement?.closest("#conversations [data-id]")?.dataset.id;
  const nodes = [];
  let day = null, list = null;
  for (const one of all) {
    const dayName = dayOf(one.changed);
    if (dayName !== day) {
      list = make("ul", { class: "plain" });
      nodes.push(make("h2", { class: "label" }, dayName), list);
      day = dayName;
    }
    list.append(item(one));
  }
  if (!all.length) nodes.push(make("p", { class: "note empty" }, query ? words.noneFound : words.noConversations));
  if (hasMore) nodes.push(button(words.earlier, () => showOlder(all), { class: "bare wide" }));
  $("conversations").replaceChildren(...nodes);
  markCurrent();
  if (focused) $("conversations").querySelector(`[data-id="${CSS.escape(focused)}"] a`)?.focus();
}

function item({ id, title, rejected }) {
  return make("li", { "data-id": id },
    make("a", { href: `#talk/${id}`, onclick: closePanels }, make("span", {}, title), rejected && make("span", { class: "dot", role: "img", "aria-label": words.rejectedHere, title: words.rejectedHere })),
    button("×", () => remove(id), { class: "icon bare delete", "aria-label": words.deleteConversation(title), title: words.deleteConversation(title) }));
}

async function remove(id) {
  await insist(`conversations/${id}/delete`, {});
  older = older.filter((one) => one.id !== id);
  if (location.hash === `#talk/${id}`) location.hash = "talk";
  await refreshHistory();
  toast(words.deletedConversation, button(words.undo, async () => { await insist(`conversations/${id}/restore`, {}); await refreshHistory(); location.hash = `talk/${id}`; }));
}

export function markCurrent() {
  const id = location.hash.split("/")[1];
  for (const node of $("conversations").querySelectorAll("[data-id]")) {
    const current = node.dataset.id === id;
    node.toggleAttribute("data-current", current);
    if (current) node.firstChild.setAttribute("aria-current", "page");
    else node.firstChild.removeAttribute("aria-current");
  }
}

function dayOf(seconds) {
  const then = new Date(seconds * 1000).toDateString(), now = new Date();
  if (then === now.toDateString()) return words.today;
  now.setDate(now.getDate() - 1);
  return then === now.toDateString() ? words.yesterday : words.day(seconds);
}
