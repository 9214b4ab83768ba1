// The bar, and what lies over every page: the token's dialog, the word that the server is away.

import { $, askInDialog, button, make } from "./dom.js";
import { isToken, onServer } from "./server.js";
import { LANGUAGE, words } from "./strings.js";

let links, names, openSide, pill;

export function buildFrame() {
  document.documentElement.lang = LANGUAGE;
  $("skip").textContent = words.skip;
  $("skip").addEventListener("click", (event) => { event.preventDefault(); $("main").focus(); });
  $("away").textContent = words.away;
  const link = (page) => make("a", { href: `#${page}`, "data-page": page, hidden: page !== "talk" }, words[page], make("span", { class: "count" }));
  links = ["talk", "judge", "rejections", "models"].map(link);
  names = make("span", { id: "names", class: "note" });
  pill = make("a", { id: "pill", class: "tag", href: "#talk", hidden: true });
  openSide = button(words.train, () => {}, { id: "open-side", "aria-expanded": "false", "aria-controls": "side" });
  $("bar").replaceChildren(
    button("☰", () => {}, { id: "open-history", class: "icon bare", "aria-label": words.conversations, "aria-expanded": "false", "aria-controls": "history" }),
    make("a", { class: "name", href: "#talk" }, words.void), make("nav", { "aria-label": words.pages }, links), names, pill, openSide);
  onServer((away) => { $("away").hidden = !away; }, askToken);
}

export function hearFrame(news) {
  const counts = { talk: 0, judge: 0, rejections: news.rejections, models: news.models };
  const there = { talk: true, judge: news.batches, rejections: news.rejections, models: news.models };
  for (const link of links) {
    const { page } = link.dataset;
    link.querySelector(".count").textContent = counts[page] ? words.number(counts[page]) : "";
    link.hidden = !there[page] && page !== document.body.dataset.page;
  }
  names.textContent = names.title = news.loading ? "" : words.beside(...news.pair.map(({ name }) => name));
  openSide.textContent = words.openTraining(news.rejections);
  openSide.classList.toggle("go", Boolean(news.verdict));
  if (news.run) openSide.textContent = words.training;
  if (!news.run && news.verdict) openSide.textContent = words.result;
  pill.hidden = !news.run || document.body.dataset.page === "talk";
  pill.textContent = news.run?.seconds_left ? words.pillLeft(news.run.seconds_left) : words.training;
}

// Which page is shown: in the bar, and in the title.
export function showPage(page, title) {
  document.body.dataset.page = page;
  document.title = words.title(title);
  for (const link of links) {
    if (link.dataset.page === page) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
    if (link.dataset.page === page) link.hidden = false;
  }
}

let asking = false;
async function askToken(wrong) {
  if (asking) return;
  asking = true;
  for (let problem = wrong; ; problem = true) {
    const field = make("input", { id: "token", name: "token", type: "password", autocomplete: "off", required: true });
    const values = await askInDialog(words.tokenTitle, [problem && make("p", { class: "error", role: "alert", id: "token-problem" }, words.tokenWrong),
      make("label", { class: "field" }, words.tokenLabel, field, make("small", {}, words.tokenWhere))], words.tokenEnter, { no: null });
    if (values && isToken(values.token.trim())) {
      sessionStorage.setItem("token", values.token.trim());
      location.reload();
      return;
    }
  }
}
