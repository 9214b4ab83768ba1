// A rendered answer: shown, and read back. The server renders markdown; every run of visible text is in a leaf that says
// which characters of the answer it came from (data-from, data-to), so that a selection becomes such characters.

// The one place where HTML is parsed: the server has rendered it with raw HTML off, and sanitised it.
export function showRendered(node, html) {
  const template = document.createElement("template");
  template.innerHTML = html;
  node.replaceChildren(template.content);
}

const characters = (text) => Array.from(text).length; // the browser counts UTF-16 units

// The characters of the answer that a range covers, as [start, end]; null where it covers none.
export function spanOf(root, range) {
  const leaves = [...root.querySelectorAll("[data-from]")].filter((leaf) => leaf.firstChild && covers(range, leaf));
  if (!leaves.length) return null;
  const start = positionIn(leaves[0], range.startContainer, range.startOffset, "from");
  const end = positionIn(leaves.at(-1), range.endContainer, range.endOffset, "to");
  return end > start ? [start, end] : null;
}

function covers(range, leaf) {
  const within = document.createRange();
  within.selectNodeContents(leaf.firstChild); // its text: the edge of a leaf and that of its text are two places
  return range.compareBoundaryPoints(Range.END_TO_START, within) < 0 && range.compareBoundaryPoints(Range.START_TO_END, within) > 0;
}

// A boundary outside the leaf is the leaf's own; inside a leaf that is not written as it is read, it takes all of it.
function positionIn(leaf, container, offset, edge) {
  const from = Number(leaf.dataset.from), to = Number(leaf.dataset.to);
  if (!leaf.contains(container) || characters(leaf.textContent) !== to - from) return edge === "from" ? from : to;
  const before = document.createRange();
  before.selectNodeContents(leaf);
  before.setEnd(container, offset);
  return from + characters(before.toString());
}

// The range that is selected within a node; null where there is none.
export function selectedIn(root) {
  const selection = getSelection();
  if (!selection.rangeCount || selection.isCollapsed) return null;
  const range = selection.getRangeAt(0);
  return range.intersectsNode(root) && root.contains(range.commonAncestorContainer) ? range : null;
}

// Arrow keys walk word by word through a text; with Shift they select, with Ctrl by character.
export function selectByKey(event, root) {
  if (!["ArrowLeft", "ArrowRight"].includes(event.key) || event.altKey || event.metaKey) return;
  event.preventDefault();
  const selection = getSelection();
  if (!root.contains(selection.anchorNode)) selection.collapse(root, 0);
  selection.modify(event.shiftKey ? "extend" : "move", event.key === "ArrowLeft" ? "backward" : "forward", event.ctrlKey ? "character" : "word");
}
