// The small bar at a selection, or at a part that is rejected: one at a time.

import { button, make } from "./dom.js";

const GAP = matchMedia("(pointer: coarse)").matches ? 56 : 8; // on a phone, above the system's own handles

const LINGER = 400; // milliseconds in which the mouse finds the bar

let bar = null, leaving = null;

// The mouse has left the words: the bar goes, unless the mouse is on its way to it.
export function hideBarSoon() {
  clearTimeout(leaving);
  leaving = setTimeout(() => { if (!bar?.matches(":hover, :focus-within")) hideBar(); }, LINGER);
}

export function hideBar() {
  clearTimeout(leaving);
  bar?.remove();
  bar = null;
}

export const barIsAt = (owner) => bar?.owner === owner;
export const barOffers = (what) => Boolean(bar?.querySelector(`[data-do="${what}"]`));

// Shows the bar with one action above a range or an element; it stands after `owner`, so that Tab leads to it.
export function showBar(owner, place, label, action, attributes = {}) {
  hideBar();
  const act = button(label, async (event) => { hideBar(); await action(event); }, { class: "no", ...attributes });
  act.addEventListener("pointerdown", (event) => event.preventDefault()); // keeps the selection
  bar = make("div", { id: "marking" }, act);
  bar.owner = owner;
  bar.place = place;
  owner.after(bar);
  placeBar();
  return act;
}

function placeBar() {
  if (!bar) return;
  const { place } = bar, box = place.getClientRects()[0] ?? place.getBoundingClientRect(), all = place.getBoundingClientRect();
  const above = box.top - bar.offsetHeight - GAP;
  bar.style.top = `${above > 64 ? above : Math.min(all.bottom + GAP, innerHeight - bar.offsetHeight - 8)}px`;
  bar.style.left = `${Math.max(8, Math.min(box.left, innerWidth - bar.offsetWidth - 8))}px`;
}

// While the mouse is drawn over words, what is selected is not yet what is meant.
let isDrawing = false;
export function whenSelected(offer) {
  const look = () => { if (!isDrawing) offer(); };
  document.addEventListener("pointerdown", (event) => {
    if (event.target.closest("#marking")) return;
    isDrawing = true;
    hideBar();
  });
  for (const end of ["pointerup", "pointercancel"]) document.addEventListener(end, () => { isDrawing = false; setTimeout(look); });
  document.addEventListener("selectionchange", look);
}

addEventListener("scroll", placeBar, { capture: true, passive: true });
addEventListener("resize", placeBar);
