// All rejections: searched, their reasons edited, several at once; imports and export.

import { $, allow, askInDialog, button, complaining, differs, make, toast } from "./dom.js";
import { importFile, showImports } from "./imports.js";
import { ask, call, insist } from "./server.js";
import { words } from "./strings.js";

let query = "", page = 0, chosen = new Set(), body, where, newer, later, several, chosenText, imports, all, found, wait = null;

export const rejections = { title: () => words.rejections, open, refresh: show };

async function open(main) {
  [query, page, chosen] = ["", 0, new Set()];
  const search = make("input", { type: "search", class: "search", id: "search", placeholder: words.searchRejections, "aria-label": words.searchRejections, maxlength: 200, oninput: () => {
    [query, page] = [search.value, 0];
    clearTimeout(wait);
    wait = setTimeout(complaining(show), 150);
  } });
  const file = make("input", { type: "file", id: "import-file", class: "unseen", tabindex: -1, "aria-hidden": "true", accept: ".jsonl,.json,.csv,.tsv,.parquet" });
  file.addEventListener("change", complaining(async () => {
    const [picked] = file.files;
    file.value = ""; // the same file may be picked again
    if (picked && await importFile(picked)) await show();
  }));
  all = make("input", { type: "checkbox", "aria-label": words.chooseAll, onchange: () => {
    const { checked } = all;
    for (const box of body.querySelectorAll("input[type=checkbox]")) choose(box, checked);
  } });
  body = make("tbody", { id: "rows" });
  const table = make("table", { class: "list" }, make("caption", { class: "unseen" }, words.rejections),
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, all), words.rejectionColumns.map((label) => make("th", { scope: "col" }, label)), make("th", { scope: "col" }, make("span", { class: "unseen" }, words.actions)))), body);
  where = make("span", { class: "note", id: "where", role: "status" });
  newer = button(words.newer, () => turn(-1), { id: "newer" });
  later = button(words.older, () => turn(1), { id: "older" });
  found = make("div", {}, make("div", { class: "scroll" }, table), make("p", { class: "row" }, newer, where, later));
  chosenText = make("span", { class: "note" });
  several = make("div", { class: "several row", role: "group", "aria-label": words.chosenGroup, hidden: true }, chosenText,
    button(words.setReason, reasonOfChosen, { "data-do": "reason" }), button(words.undo, () => undo([...chosen]), { class: "no", "data-do": "undo-chosen" }), button("×", () => { chosen.clear(); return show(); }, { class: "icon bare", "aria-label": words.cancel }));
  imports = make("div");
  main.replaceChildren(make("div", { class: "page" },
    make("div", { class: "head" }, make("h1", { tabindex: -1 }, words.rejections),
      make("div", { class: "row" }, file, button(words.importFile, () => file.click(), { id: "import" }), button(words.export, exportRecords, { id: "export" }))),
    search, found, several, make("div", { class: "nothing", id: "nothing", hidden: true }), imports));
  await show();
}

async function turn(by) {
  page += by;
  await show();
  body.closest(".scroll").scrollIntoView();
}

async function show() {
  if (!body.isConnected || document.activeElement?.matches("#rows input[type=text]")) return; // one is writing there
  const { rows, total, page_size: size } = await ask(`rejections?${new URLSearchParams({ page, q: query })}`);
  if (differs(body, [rows, [...chosen]])) {
    const focused = document.activeElement?.closest("#rows tr")?.dataset.id;
    body.replaceChildren(...rows.map(row));
    if (focused) (body.querySelector(`[data-id="${focused}"] button`) ?? $("search")).focus();
  }
  const pages = Math.max(1, Math.ceil(total / size));
  where.textContent = words.pageOf(total, page + 1, pages);
  allow(newer, page === 0 ? words.firstPage : null);
  allow(later, page + 1 >= pages ? words.lastPage : null);
  newer.hidden = later.hidden = pages === 1;
  found.hidden = total === 0;
  $("nothing").hidden = total > 0;
  $("nothing").textContent = query ? words.noneFound : words.noRejections;
  allow($("export"), total || query ? null : words.noRejections);
  showChosen();
  await showImports(imports, show);
}

function row({ id, prompt, answer, spans, reason, source, cut }) {
  const box = make("input", { type: "checkbox", "aria-label": words.chooseOne(prompt.slice(0, 60)), checked: chosen.has(id), onchange: () => choose(box, box.checked) });
  const field = make("input", { type: "text", maxlength: 1000, value: reason, placeholder: words.addReason, "aria-label": words.reasonOf(prompt.slice(0, 60)), onchange: async () => {
    await insist(`rejections/${id}/reason`, { reason: field.value });
    toast(words.reasonSaved);
  } });
  field.addEventListener("keydown", (event) => { if (event.key === "Enter") field.blur(); });
  const made = make("tr", { "data-id": id },
    make("td", { class: "mark" }, box),
    make("td", { class: "long" }, make("div", { class: "clamped any" }, prompt)),
    make("td", { class: "long" }, make("div", { class: "clamped any" }, marked(answer, spans)), cut && make("small", {}, words.shownInPart)),
    make("td", {}, field), make("td", { class: "note" }, words.sources[source] ?? source),
    make("td", { class: "actions" }, button(words.undo, () => undo([id]), { class: "no", "aria-label": words.undoOf(prompt.slice(0, 60)) })));
  made.toggleAttribute("data-chosen", chosen.has(id));
  return made;
}

// A long answer begins a little before the part that was rejected.
function marked(answer, spans) {
  const characters = Array.from(answer), cutOff = (from, to) => characters.slice(from, to).join("");
  if (!spans.length) return [make("del", {}, answer)];
  const nodes = [];
  let at = Math.max(0, spans[0][0] - 60);
  if (at) nodes.push("…");
  for (const [start, end] of spans) {
    nodes.push(cutOff(at, start), make("del", {}, cutOff(start, end)));
    at = end;
  }
  return [...nodes, cutOff(at)];
}

function choose(box, is) {
  const line = box.closest("tr");
  box.checked = is;
  line.toggleAttribute("data-chosen", is);
  if (is) chosen.add(Number(line.dataset.id));
  else chosen.delete(Number(line.dataset.id));
  showChosen();
}

function showChosen() {
  several.hidden = !chosen.size;
  chosenText.textContent = words.chosen(chosen.size);
  const boxes = [...body.querySelectorAll("input[type=checkbox]")];
  all.checked = boxes.length > 0 && boxes.every((box) => box.checked);
}

async function undo(ids) {
  await insist("rejections/undo", { ids });
  for (const id of ids) chosen.delete(id);
  await show();
  toast(words.undoneSome(ids.length), button(words.redo, async () => { await insist("rejections/redo", { ids }); await show(); }));
}

async function reasonOfChosen() {
  const values = await askInDialog(words.setReason, make("label", { class: "field" }, words.reasonForAll(chosen.size), make("input", { name: "reason", type: "text", maxlength: 1000 })), words.apply);
  if (!values) return;
  await insist("rejections/reason", { ids: [...chosen], reason: values.reason });
  chosen.clear();
  await show();
}

async function exportRecords() {
  const reply = await call("export");
  const link = make("a", { href: URL.createObjectURL(await reply.blob()), download: "records.jsonl" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
