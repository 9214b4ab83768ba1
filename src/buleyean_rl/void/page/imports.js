// A file of rejections: what is in it is shown before it is taken; it is undone as one.

import { askInDialog, button, differs, make, toast } from "./dom.js";
import { ask, call, insist, newUid } from "./server.js";
import { words } from "./strings.js";

const MAX_BYTES = 16 * 1024 * 1024;
const ROLES = ["prompt", "answer", "score", "system"];

// Returns whether something was taken.
export async function importFile(file) {
  if (file.size > MAX_BYTES) throw new Error(words.importTooLarge);
  toast(words.importReading(file.name));
  const preview = await upload(file, {});
  if (!preview) return false;
  const values = await askInDialog(words.importTitle(file.name), previewNodes(preview), preview.rejections ? (preview.earlier ? words.importAgain : words.importTake(preview.rejections)) : null, { large: true });
  if (!values) {
    await insist(`imports/${preview.uid}/drop`, {});
    return false;
  }
  const taken = await insist(`imports/${preview.uid}/take`, { again: Boolean(preview.earlier) });
  toast(words.importTaken(taken.rejections), button(words.undo, () => insist(`imports/${taken.id}/undo`, {})));
  return true;
}

// The preview; the columns are asked for where the server does not know them. Null where one gives up.
async function upload(file, columns) {
  const options = { method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" } };
  const query = { uid: newUid(), name: file.name.slice(-255), ...columns };
  try {
    return await (await call(`imports?${new URLSearchParams(query)}`, undefined, options)).json();
  } catch (error) {
    if (!error.problem?.columns) throw error;
    const named = await askColumns(error.message, error.problem);
    return named && upload(file, named);
  }
}

function previewNodes({ format, records, rejections, notes, sample, earlier }) {
  return [
    earlier && make("div", { class: "card bad" }, make("p", {}, words.importEarlier(earlier.name, words.moment(earlier.created)))),
    make("p", {}, make("b", {}, words.importFound(rejections, records)), " ", make("span", { class: "note" }, words.importFormat(format))),
    notes.length ? make("div", {}, make("p", { class: "label" }, words.importDropped), make("ul", {}, notes.map((note) => make("li", { class: "note" }, note)))) : null,
    sample.length ? make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": words.importSample }, make("table", { class: "list" },
      make("thead", {}, make("tr", {}, words.rejectionColumns.slice(0, 2).map((label) => make("th", {}, label)))),
      make("tbody", {}, sample.map(({ prompt, answer }) => make("tr", {}, make("td", {}, make("div", { class: "clamped any" }, prompt)), make("td", {}, make("div", { class: "clamped any" }, make("del", {}, answer)))))))) : null,
  ];
}

// A select above every column: what it holds is chosen there.
async function askColumns(problem, { columns, sample }) {
  const select = (column) => make("select", { name: `column-${column}`, "aria-label": words.columnHolds(column) }, make("option", { value: "" }, words.columnNothing),
    ROLES.map((role) => make("option", { value: role }, words.columnRoles[role])));
  const table = make("table", { class: "sample" },
    make("thead", {}, make("tr", {}, columns.map((column) => make("th", {}, make("label", { class: "field" }, column, select(column)))))),
    make("tbody", {}, sample.map((line) => make("tr", {}, columns.map((column) => make("td", {}, make("div", {}, line[column] ?? "")))))));
  const below = make("label", { class: "field" }, words.columnBelow, make("input", { type: "number", step: "any", name: "below", placeholder: "0.5" }));
  const values = await askInDialog(words.columnsTitle, [make("p", { class: "note" }, problem.split("\n")[0]), make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": words.columnsTitle }, table), below], words.importPreview, { large: true });
  if (!values) return null;
  const named = values.below ? { below: values.below } : {};
  for (const column of columns) if (values[`column-${column}`]) named[values[`column-${column}`]] = column;
  if (named.prompt && named.answer) return named;
  toast(words.columnsMissing);
  return askColumns(problem, { columns, sample });
}

// The files that were imported.
export async function showImports(part, changed) {
  const { imports } = await ask("imports");
  if (!differs(part, imports)) return;
  if (!imports.length) return part.replaceChildren();
  const focused = [...part.querySelectorAll("button")].indexOf(document.activeElement);
  const line = ({ id, name, created, rejections, undone }) => make("li", {},
    make("div", {}, make("div", { class: "any" }, name || words.aFile), make("small", {}, `${words.moment(created)} · ${words.importCount(rejections)}${undone ? ` · ${words.importUndone}` : ""}`)),
    button(undone ? words.redo : words.undo, async () => { await insist(`imports/${id}/${undone ? "redo" : "undo"}`, {}); await changed(); }, { "aria-label": `${undone ? words.redo : words.undo}: ${name || words.aFile}` }));
  part.replaceChildren(make("section", { class: "card", id: "imports" }, make("h2", {}, words.imports), make("ul", { class: "plain files" }, imports.map(line))));
  if (focused >= 0) part.querySelectorAll("button")[focused]?.focus();
  return undefined;
}
