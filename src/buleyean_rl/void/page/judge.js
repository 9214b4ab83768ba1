// Judging many: prompts are pasted or read from a file, answered in the background, and judged one by one.

import { $, button, complaining, confirmed, make, meter } from "./dom.js";
import { linesOf } from "./compare.js";
import { ask, call, insist, newUid } from "./server.js";
import { words } from "./strings.js";

let list;

export const judge = { title: () => words.judge, open, refresh: show };

async function open(main) {
  const prompts = make("textarea", { id: "prompts", rows: 8, placeholder: words.judgePlaceholder, oninput: () => tell() });
  const count = make("span", { class: "note", role: "status" });
  const tell = () => { count.textContent = words.promptCount(linesOf(prompts.value).length); };
  const file = make("input", { type: "file", class: "unseen", id: "prompts-file", tabindex: -1, "aria-hidden": "true", accept: ".txt,.jsonl,.json,.csv" });
  file.addEventListener("change", complaining(async () => {
    const [picked] = file.files;
    file.value = "";
    if (!picked) return;
    const options = { method: "POST", body: picked, headers: { "Content-Type": "application/octet-stream" } };
    const { prompts: read, notes } = await (await call(`batches/prompts?${new URLSearchParams({ name: picked.name.slice(-255) })}`, undefined, options)).json();
    prompts.value = read.map((prompt) => prompt.replaceAll("\n", " ")).join("\n");
    tell();
    if (notes.length) count.textContent += ` · ${notes.join(" · ")}`;
  }));
  const form = make("form", { class: "card stack" }, make("label", { class: "field" }, make("span", { class: "label" }, words.judgePrompts), prompts),
    make("div", { class: "row" }, file, button(words.judgeFile, () => file.click()), count,
      make("button", { class: "go end", type: "submit", id: "begin" }, words.judgeBegin)));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("submit", complaining(async () => {
    const lines = linesOf(prompts.value);
    if (!lines.length) throw new Error(words.judgeNone);
    const uid = newUid();
    await insist("batches", { uid, name: lines[0].slice(0, 60), prompts: lines, system: "", temperature: 0, max_tokens: 256, blind: false });
    location.hash = `judge/${uid}`;
  }));
  list = make("ul", { class: "plain models", id: "batches" });
  main.replaceChildren(make("div", { class: "page" }, make("h1", { tabindex: -1 }, words.judge), make("p", { class: "measure note" }, words.judgeText), form, list));
  tell();
  await show();
}

async function show() {
  const { batches } = await ask("batches");
  if (!list.isConnected || list.contains(document.activeElement)) return;
  list.replaceChildren(...batches.map((batch) => {
    const bar = meter(words.judgedOf(batch.judged, batch.prompts));
    bar.show(batch.judged / batch.prompts);
    return make("li", { class: "card" }, make("h2", {}, make("a", { href: `#judge/${batch.id}` }, batch.name)), bar,
      make("p", { class: "note" }, `${words.judgedOf(batch.judged, batch.prompts)} · ${words.rejectedCount(batch.rejected)}${batch.state === "answering" ? ` · ${words.answeredOf(batch.answered, batch.prompts)}` : ""}`),
      make("div", { class: "row" }, make("a", { class: "button", href: `#judge/${batch.id}` }, words.goOn), button(words.delete, async () => {
        if (!await confirmed(words.deleteBatch(batch.name), words.deleteBatchAsks, words.delete)) return;
        await insist(`batches/${batch.id}/delete`, {});
        $("main").querySelector("h1").focus();
        await show();
      }, { class: "no end" })));
  }));
}
