// A turn of a conversation: the question, and its answers as they come.

import { Answer, isOpen, rejectAnswer, undoRejection } from "./answer.js";
import { announce, button, make, toast } from "./dom.js";
import { ask, keepListening } from "./server.js";
import { words } from "./strings.js";

export class Turn {
  // `changed(turn)` hears of every state of its answers.
  constructor(turn, changed) {
    this.changed = changed;
    this.pair = make("div", { class: "pair" });
    this.reveal = make("p", { class: "reveal" }, button(words.reveal, async () => { this.show(await ask(`turns/${this.turn.id}/reveal`, {})); this.panes[0].text.focus(); }, { "data-do": "reveal" }));
    this.node = make("section", { class: "turn", "aria-label": turn.prompt.slice(0, 80) }, make("h2", { class: "unseen" }, words.you),
      make("p", { class: "me any" }, turn.prompt), this.pair, this.reveal);
    this.show(turn);
  }

  get isOpen() { return this.turn.answers.some(isOpen); }

  show(turn) {
    const listens = this.listening && !this.listening.signal.aborted;
    this.turn = turn;
    if (this.panes?.length === turn.answers.length) this.panes.forEach((pane, slot) => pane.show(turn.answers[slot]));
    else {
      this.panes = turn.answers.map((answer) => new Answer(answer, this.actions()));
      this.pair.replaceChildren(...this.panes.map((pane) => pane.node));
      this.pair.classList.toggle("one", this.panes.length === 1);
    }
    this.reveal.hidden = !turn.blind || turn.revealed || this.isOpen;
    if (this.isOpen && !listens) this.listen();
    this.changed(this);
  }

  actions() {
    return {
      longest: this.turn.settings.max_tokens,
      reject: rejectAnswer,
      undo: undoRejection,
      again: async (answer) => this.show(await ask(`answers/${answer.id}/again`, {})),
      resume: async (answer) => this.show(await ask(`answers/${answer.id}/continue`, {})),
    };
  }

  async listen() {
    this.listening = new AbortController();
    const { signal } = this.listening;
    try {
      await keepListening(`turns/${this.turn.id}/stream`, (answer) => this.hear(answer), signal, () => !this.isOpen);
      if (signal.aborted) return;
      announce(this.turn.answers.every((answer) => answer.name) ? words.answered(this.turn.answers.map((answer) => answer.name)) : words.answersHere);
    } catch (error) {
      toast(error.message);
    } finally {
      this.listening.abort();
    }
  }

  hear(answer) {
    const slot = this.turn.answers.findIndex(({ id }) => id === answer.id);
    if (slot < 0) return; // of an attempt that another one replaced
    this.turn.answers[slot] = answer;
    this.panes[slot].show(answer);
    this.reveal.hidden = !this.turn.blind || this.turn.revealed || this.isOpen;
    this.changed(this);
  }

  stop = async () => this.show(await ask(`turns/${this.turn.id}/stop`, {}));
  close() { this.listening?.abort(); }
}
