// The question below the conversation, and how it is asked.

import { allow, askInDialog, button, make } from "./dom.js";
import { words } from "./strings.js";

const USUAL = { system: "", temperature: 0, max_tokens: 512, blind: false };
const LENGTHS = [128, 256, 512, 1024, 2048];

export class AskForm {
  // `submit(prompt, settings)` asks; `stop()` ends the answers under way.
  constructor(submit, stop) {
    this.settings = { ...USUAL, ...JSON.parse(sessionStorage.getItem("settings") ?? "{}") };
    this.answering = false;
    this.why = null;
    this.leavesOut = false;
    this.prompt = make("textarea", { id: "prompt", rows: 1, maxlength: 8000, placeholder: words.askPlaceholder, "aria-label": words.askLabel });
    this.options = button(words.options, () => this.change(), { id: "options" });
    this.send = button(words.ask, () => this.answering ? stop() : submit(this.prompt.value, this.settings), { id: "send" });
    this.told = make("p", { class: "why note" });
    this.node = make("form", { id: "ask" }, make("div", { class: "box" }, this.prompt, this.options, this.send), this.told);
    this.node.addEventListener("submit", (event) => event.preventDefault());
    this.prompt.addEventListener("input", () => this.show());
    this.prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        if (!this.answering) this.send.click();
      }
      if (event.key === "Escape") this.prompt.blur();
    });
    this.show();
  }

  // What the button does now; `why` says why nothing can be asked, `leavesOut` whether something here was rejected.
  show({ answering = this.answering, why = this.why, leavesOut = this.leavesOut } = {}) {
    Object.assign(this, { answering, why, leavesOut });
    this.send.textContent = answering ? words.stop : words.ask;
    this.send.classList.toggle("go", !answering);
    allow(this.send, answering ? null : why ?? (this.prompt.value.trim() ? null : words.askEmpty));
    const { system, temperature, max_tokens: length, blind } = this.settings;
    const settings = words.settingsTold({ system, temperature, length: length === USUAL.max_tokens ? null : length, blind });
    this.told.textContent = [settings, leavesOut && words.leavesOut].filter(Boolean).join(" · ");
    this.told.hidden = !this.told.textContent;
  }

  use(settings) {
    this.settings = { ...USUAL, ...settings };
    sessionStorage.setItem("settings", JSON.stringify(this.settings));
    this.show();
  }

  async change() {
    const { system, temperature, max_tokens: length, blind } = this.settings;
    const warmth = make("output", {}, words.number(temperature));
    const range = make("input", { type: "range", name: "temperature", min: 0, max: 1.5, step: 0.1, value: temperature, oninput: () => { warmth.textContent = words.number(Number(range.value)); } });
    const values = await askInDialog(words.optionsTitle, [
      make("label", { class: "field" }, make("span", { class: "label" }, words.systemPrompt),
        make("textarea", { name: "system", rows: 3, maxlength: 8000 }, system), make("small", {}, words.systemPromptHint)),
      make("label", { class: "field" }, make("span", { class: "label row" }, words.temperature, warmth), range, make("small", {}, words.temperatureHint)),
      make("label", { class: "field" }, make("span", { class: "label" }, words.length), make("select", { name: "max_tokens" },
        [...new Set([...LENGTHS, length])].sort((one, other) => one - other).map((count) => make("option", { value: count, selected: count === length }, words.lengthTokens(count))))),
      make("label", { class: "check" }, make("input", { type: "checkbox", name: "blind", value: "1", checked: blind }), words.blind),
    ], words.apply);
    if (values) this.use({ system: values.system, temperature: Number(values.temperature), max_tokens: Number(values.max_tokens), blind: Boolean(values.blind) });
  }
}
