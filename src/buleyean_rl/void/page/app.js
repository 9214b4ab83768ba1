// The page begins here: which part of it is shown, and what the server tells.

import { $, complaining, toast } from "./dom.js";
import { buildFrame, hearFrame, showPage } from "./frame.js";
import { buildHistory, markCurrent, refreshHistory } from "./history.js";
import { batch } from "./batch.js";
import { judge } from "./judge.js";
import { model } from "./model.js";
import { models } from "./models.js";
import { closePanels, wirePanels } from "./panels.js";
import { rejections } from "./rejections.js";
import { keepListening } from "./server.js";
import { buildSide, hearSide } from "./side.js";
import { panesShown, talk } from "./talk.js";
import { words } from "./strings.js";

const PAUSE = 1000; // milliseconds between looks at what was written meanwhile

let latest = { loading: { what: "" }, rejections: 0, newest: [], pair: [], run: null, verdict: null, batches: 0, models: 0, changes: -1 }, current = null, place = null, due = null;

// Which page an address means: [name in the bar, page, its argument].
function pageOf([name, id]) {
  if (name === "judge") return ["judge", id ? batch : judge, id];
  if (name === "models") return ["models", id ? model : models, id];
  if (name === "rejections") return ["rejections", rejections, id];
  return ["talk", talk, id];
}

async function route() {
  const [name, page, id] = pageOf(location.hash.slice(1).split("/"));
  const moved = place !== null && place !== name + id;
  current?.leave?.();
  [current, place] = [page, name + id];
  closePanels();
  document.body.dataset.page = name;
  if (latest.loading && page !== talk) return;
  try {
    await page.open($("main"), id);
  } catch (error) {
    if (error.status === 404) location.replace(`#${name}`); // it was deleted
    throw error;
  }
  if (current !== page || place !== name + id) return;
  showPage(name, page.title());
  page.hear?.(latest, latest);
  markCurrent();
  if (moved && name !== "talk") $("main").querySelector("h1")?.focus();
}

function hear(news) {
  const before = latest;
  latest = news = { ...latest, ...news };
  hearFrame(news, before);
  hearSide(news, before);
  talk.hear(news);
  if (news.loading) return current ? undefined : complaining(route)();
  if (current !== talk) current?.hear?.(news, before);
  if (before.loading) complaining(route)();
  if (news.changes !== before.changes) due ??= setTimeout(complaining(refresh), before.changes < 0 ? 0 : PAUSE);
}

async function refresh() {
  due = null;
  if (latest.loading) return;
  await refreshHistory(latest.conversations);
  await current?.refresh?.();
  if (current) document.title = words.title(current.title());
}

// Keys of the page; in a field they are letters.
function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return undefined;
  if (event.target.closest("input, textarea, select, dialog") || !$("scrim").hidden) return undefined;
  if (current.pressed) return current.pressed(event);
  if (event.key === "/") {
    event.preventDefault();
    if (current !== talk) location.hash = "talk";
    else $("prompt")?.focus();
    return undefined;
  }
  const panes = current === talk ? panesShown() : [];
  const pane = panes[Number(event.key) - 1];
  if (pane) return pane.reject(pane.selected());
  const last = panes.flatMap((one) => one.answer.rejections.map((rejection) => ({ one, rejection }))).sort((a, b) => b.rejection.id - a.rejection.id)[0];
  if (event.key === "u" && last) return last.one.undo(last.rejection);
  return undefined;
}

const token = new URLSearchParams(location.hash.slice(1)).get("token");
if (token) { // out of the address bar, and out of what one copies from it
  sessionStorage.setItem("token", token);
  history.replaceState(null, "", location.pathname);
}
buildFrame();
buildHistory();
buildSide();
wirePanels();
addEventListener("hashchange", complaining(route));
addEventListener("keydown", complaining(pressed));
keepListening("events", hear, new AbortController().signal).catch((error) => { if (!error.isTold) toast(error.message); });
