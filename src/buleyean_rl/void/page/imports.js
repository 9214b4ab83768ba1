// Files that are imported: asked about where they were there before or have columns of their own, undone as one.

import { $, button, counted, make } from "./dom.js";
import { ask, call, insist, newUid } from "./server.js";

const MAX_BYTES = 16 * 1024 * 1024;
const ROLES = { prompt: "what was asked", answer: "the rejected answer", score: "a score or label (optional)", system: "a system prompt (optional)" };

export async function importFile(file, imported) {
  if (file.size > MAX_BYTES) throw new Error("too large: 16 MB at most");
  const state = $("import-state");
  state.textContent = `reading ${file.name}`;
  try {
    const done = await send(file, { uid: newUid(), name: file.name.slice(-255) });
    if (done) state.replaceChildren(`${counted(done.rejections, "rejection")} of ${counted(done.records, "prompt")} imported`, ...done.notes.map((note) => make("div", {}, note)));
    else state.textContent = `${file.name} is not imported`;
    await imported();
  } catch (error) {
    state.textContent = error.message;
    throw error;
  }
}

async function send(file, query) {
  const options = { method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" } };
  try {
    return await (await call(`import?${new URLSearchParams(query)}`, undefined, options)).json();
  } catch (error) {
    const { earlier, columns, sample } = error.problem ?? {};
    const more = earlier ? await askAgain(earlier) : columns && !query.prompt ? await askColumns(error.message, columns, sample) : undefined;
    if (more === undefined) throw error;
    return more && send(file, { ...query, ...more });
  }
}

// Shows the dialog; what its form holds, or null where it is cancelled.
function asked(title, nodes, words) {
  const form = make("form", { method: "dialog", class: "stack" }, make("h2", {}, title), ...nodes,
    make("div", { class: "row" }, make("button", { class: "main", value: "ok" }, words), make("button", { value: "", formnovalidate: "" }, "Cancel")));
  const dialog = $("import-dialog");
  dialog.replaceChildren(form);
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => {
    resolve(dialog.returnValue ? Object.fromEntries([...new FormData(form)].filter(([, value]) => value)) : null);
  }, { once: true }));
}

async function askAgain(earlier) {
  const when = new Date(earlier.created * 1000).toLocaleString();
  const words = `It was imported on ${when}, as ${earlier.name || "a file"}: ${counted(earlier.rejections, "rejection")}. Once more, all of them count twice.`;
  return (await asked("This file was imported before", [make("p", {}, words)], "Import again")) && { again: "1" };
}

function askColumns(problem, columns, sample) {
  const select = (role) => make("select", { name: role, ...(role === "prompt" || role === "answer" ? { required: "" } : {}) },
    make("option", { value: "" }, "none"), ...columns.map((name) => make("option", { value: name }, name)));
  const fields = Object.entries(ROLES).map(([role, words]) => make("label", { class: "field" }, words, select(role)));
  fields.push(make("label", { class: "field" }, "a score below it is a rejection", make("input", { type: "number", step: "any", name: "below", placeholder: "0.5" })));
  const rows = sample.map((row) => make("tr", {}, ...columns.map((name) => make("td", {}, row[name]))));
  const table = make("div", { class: "scroll" }, make("table", {}, make("thead", {}, make("tr", {}, ...columns.map((name) => make("th", {}, name)))), make("tbody", {}, ...rows)));
  return asked("Which columns are these?", [make("p", { class: "quiet" }, problem.split("\n")[0]), ...fields, table], "Import");
}

export async function showImports(changed) {
  const { imports } = await ask("imports");
  $("imports").replaceChildren(...imports.map((row) => {
    const change = button(row.undone ? "Redo" : "Undo", async () => {
      await insist(`imports/${row.id}/${row.undone ? "redo" : "undo"}`, {});
      await changed();
    });
    const words = `${row.name || "a file"}, ${new Date(row.created * 1000).toLocaleString()}: ${counted(row.rejections, "rejection")}${row.undone ? ", undone" : ""} `;
    return make("li", {}, words, change);
  }));
  $("imports-part").hidden = !imports.length;
}
