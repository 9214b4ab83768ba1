// The two panels: beside the conversation where there is room, over it where there is not.

import { $ } from "./dom.js";

const NARROW = { history: matchMedia("(max-width: 900px)"), side: matchMedia("(max-width: 1100px)") };
const OTHERS = ["bar", "main", "history", "side"];
let opener = null;

export function openPanel(name) {
  if (!NARROW[name].matches) return;
  opener = document.activeElement;
  $(name).toggleAttribute("data-open", true);
  $(`open-${name}`).setAttribute("aria-expanded", "true");
  $("scrim").hidden = false;
  for (const other of OTHERS) $(other).inert = other !== name;
  $(name).querySelector("button, a, input")?.focus();
}

export function closePanels() {
  if ($("scrim").hidden) return;
  for (const name of Object.keys(NARROW)) {
    $(name).toggleAttribute("data-open", false);
    $(`open-${name}`).setAttribute("aria-expanded", "false");
  }
  $("scrim").hidden = true;
  for (const other of OTHERS) $(other).inert = false;
  opener?.focus();
  opener = null;
}

export function wirePanels() {
  for (const [name, narrow] of Object.entries(NARROW)) {
    $(`open-${name}`).addEventListener("click", () => openPanel(name));
    $(`close-${name}`).addEventListener("click", closePanels);
    narrow.addEventListener("change", closePanels);
  }
  $("scrim").addEventListener("click", closePanels);
  addEventListener("keydown", (event) => { if (event.key === "Escape") closePanels(); });
}
