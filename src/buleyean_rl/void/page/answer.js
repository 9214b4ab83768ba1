// An answer: its text, what was rejected of it, and what can be done with it.

import { allow, button, make, toast } from "./dom.js";
import { barIsAt, barOffers, hideBar, hideBarSoon, showBar, whenSelected } from "./marking.js";
import { insist, newUid } from "./server.js";
import { selectByKey, selectedIn, showRendered, spanOf } from "./text.js";
import { words } from "./strings.js";

export const isOpen = (answer) => answer.state === "waiting" || answer.state === "writing";
const isWhole = (rejection) => !rejection.spans.length;

export class Answer {
  // `actions`: reject(answer, spans) and undo(answer, rejection) resolve to the answer as it is then; again and resume, if any.
  constructor(answer, actions) {
    this.actions = actions;
    this.name = make("h3");
    this.tag = make("span", { class: "tag" });
    this.text = make("div", { class: "text", tabindex: 0, role: "group", onkeydown: (event) => this.pressed(event) });
    this.text.addEventListener("click", (event) => this.offerUndo(event.target));
    this.text.addEventListener("pointerover", (event) => {
      if (event.pointerType === "mouse" && event.target.closest("del")) this.offerUndo(event.target);
      else if (barIsAt(this.text) && barOffers("undo-here")) hideBarSoon();
    });
    this.text.addEventListener("focusin", (event) => this.offerUndo(event.target));
    this.text.addEventListener("focusout", (event) => { if (event.target.matches("del") && !event.relatedTarget?.closest("#marking")) hideBar(); });
    this.state = make("div", { class: "state note" });
    this.first = button("", () => this.whole ? this.undo(this.whole) : this.reject([]), { class: "no", "data-do": "reject" });
    this.copy = button(words.copy, () => copyText(this.answer.text, this.copy), { "data-do": "copy" });
    this.again = actions.again ? button(words.again, () => actions.again(this.answer), { "data-do": "again" }) : null;
    this.node = make("article", { class: "answer" }, make("header", {}, this.name, this.tag), this.text, this.state,
      make("footer", {}, this.first, this.copy, this.again));
    this.node.pane = this;
    this.show(answer);
  }

  get whole() { return this.answer.rejections.find(isWhole); }
  get canBeRejected() { return !isOpen(this.answer) && this.answer.state !== "failed" && Boolean(this.answer.text); }

  show(answer) {
    const earlier = this.answer;
    this.answer = answer;
    const name = answer.name ?? words.answerBlind(answer.slot), parts = answer.rejections.length && !this.whole;
    this.name.textContent = this.name.title = name;
    this.node.setAttribute("aria-label", words.answerOf(name));
    this.text.setAttribute("aria-label", words.answerOf(name));
    const [tag, look] = this.whole ? [words.rejected, "bad"] : parts ? [words.partRejected, "bad"]
      : answer.name === undefined ? ["", ""] : answer.model === "base" ? [words.base, ""] : [words.trained, "good"];
    this.tag.textContent = tag;
    this.tag.className = `tag ${look}`;
    this.tag.hidden = !tag;
    this.node.classList.toggle("rejected", Boolean(this.whole));
    this.node.classList.toggle("failed", answer.state === "failed" && !answer.text);
    if (earlier?.html !== answer.html || earlier?.id !== answer.id) this.showText();
    this.text.setAttribute("aria-busy", String(isOpen(answer)));
    this.showState(earlier);
    this.first.textContent = this.whole ? words.undo : words.reject;
    this.first.setAttribute("aria-label", `${this.first.textContent}: ${words.answerOf(name)}`);
    allow(this.first, this.canBeRejected ? null : words.notFinished);
    allow(this.copy, answer.text ? null : words.notFinished);
    if (this.again) allow(this.again, isOpen(answer) ? words.notFinished : null);
  }

  showText() {
    if (barIsAt(this.text)) hideBar();
    showRendered(this.text, this.answer.html);
    for (const pre of this.text.querySelectorAll("pre")) {
      const copy = button("", () => copyText(pre.textContent, copy), { "data-words": words.codeCopy, "aria-label": words.codeCopy });
      const box = make("div", { class: "code" });
      pre.setAttribute("tabindex", 0);
      pre.replaceWith(box);
      box.append(copy, pre);
    }
    for (const table of this.text.querySelectorAll("table")) table.setAttribute("tabindex", 0);
    const seen = new Set();
    for (const part of this.text.querySelectorAll("del")) { // a part is many leaves; the first is its handle
      const rejection = this.rejectionAt(part);
      if (!rejection || seen.has(rejection.id)) continue;
      seen.add(rejection.id);
      part.setAttribute("tabindex", 0);
      part.setAttribute("role", "button");
      part.setAttribute("aria-label", words.rejectedPart(part.textContent));
    }
  }

  showState(earlier) {
    const { answer } = this, last = answer.rejections.at(-1);
    if (earlier?.state === answer.state && earlier?.rejections.at(-1)?.id === last?.id && earlier.id === answer.id) return;
    const said = { waiting: words.waiting, writing: words.writing, stopped: words.stopped, cut: words.cut(answer.tokens ?? this.actions.longest ?? 512) }[answer.state];
    const nodes = said ? [make("span", {}, said)] : [];
    if (answer.state === "failed") nodes.push(make("span", { class: "error", role: "alert" }, answer.error));
    if ((answer.state === "cut" || answer.state === "stopped") && this.actions.resume && !answer.rejections.length) {
      nodes.push(button(words.continue, () => this.actions.resume(answer), { "data-do": "continue" }));
    }
    if (last) {
      nodes.push(reasonField(last));
      if (!this.whole) nodes.push(button(words.undo, () => this.undo(last), { class: "no", "data-do": "undo-part" }));
    }
    this.state.replaceChildren(...nodes);
  }

  async pressed(event) {
    selectByKey(event, this.text);
    if (!event.target.matches("del") || (event.key !== "Enter" && event.key !== " ")) return;
    event.preventDefault();
    await this.undo(this.rejectionAt(event.target));
  }

  rejectionAt(part) {
    const from = Number(part.dataset.from);
    return this.answer.rejections.findLast(({ spans }) => spans.some(([start, end]) => start <= from && from < end));
  }

  offerUndo(target) {
    const part = target.closest("del"), rejection = part && this.rejectionAt(part);
    if (selectedIn(this.text) || this.whole) return;
    if (!rejection && barIsAt(this.text)) hideBar();
    if (rejection) showBar(this.text, part, words.undoPart, () => this.undo(rejection), { "data-do": "undo-here" });
  }

  // The characters that are selected in it, if any, as spans.
  selected() {
    const range = selectedIn(this.text), span = range && spanOf(this.text, range);
    return span ? [span] : [];
  }

  offerMarking() {
    const range = selectedIn(this.text);
    if (!range || !this.canBeRejected || this.whole || !spanOf(this.text, range)) return false;
    showBar(this.text, range, words.rejectPart, (event) => this.reject(this.selected(), event), { "data-do": "reject-part" });
    return true;
  }

  async reject(spans, event) {
    if (!this.canBeRejected || this.whole) return;
    this.show(await this.actions.reject(this.answer, spans));
    getSelection().removeAllRanges();
    if (event?.detail === 0) this.state.querySelector("input")?.focus(); // by keyboard: the button is gone
  }

  async undo(rejection) {
    const hadFocus = this.node.contains(document.activeElement);
    await this.state.querySelector(".reason")?.save(); // what was typed and not sent
    this.show(await this.actions.undo(this.answer, rejection));
    if (hadFocus && !this.node.contains(document.activeElement)) this.text.focus();
  }
}

function reasonField(rejection) {
  const field = make("input", { class: "reason", type: "text", maxlength: 1000, placeholder: words.reason, "aria-label": words.reasonLabel, value: rejection.reason });
  field.addEventListener("keydown", (event) => { if (event.key === "Enter") field.blur(); });
  field.save = async () => {
    if (field.value === rejection.reason) return;
    rejection.reason = field.value;
    await insist(`rejections/${rejection.id}/reason`, { reason: field.value }).catch((error) => toast(error.message));
  };
  field.addEventListener("change", field.save);
  return field;
}

export async function copyText(text, control) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    throw new Error(words.notCopied);
  }
  const label = control.textContent;
  if (label) control.textContent = words.copied;
  else control.dataset.words = words.copied;
  setTimeout(() => { if (label) control.textContent = label; else control.dataset.words = words.codeCopy; }, 1500);
}

// What a conversation does with its answers.
export const rejectAnswer = async (answer, spans) => (await insist("rejections", { uid: newUid(), answer: answer.id, spans, reason: "" })).answer;
export const undoRejection = async (answer, rejection) => (await insist(`rejections/${rejection.id}/undo`, { answer: answer.id })).answer;

// A selection in an answer brings the bar; without one it goes.
whenSelected(() => {
  const anchor = getSelection().anchorNode, node = anchor?.parentElement?.closest(".answer");
  if (!node?.pane?.offerMarking() && barOffers("reject-part")) hideBar();
});
