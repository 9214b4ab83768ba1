// What it should unlearn, and training on it.

import { $, allow, announce, button, differs, make, meter, toast } from "./dom.js";
import { closePanels } from "./panels.js";
import { insist, newUid, ask } from "./server.js";
import { proposeAgain } from "./talk.js";
import { words } from "./strings.js";
import { isGood, shortPairs, verdictText, verdictWords } from "./verdict.js";

let sentence, trainButton, progress, left, stop, trainPart, runPart, verdictPart, list, run = null;

export function buildSide() {
  $("side").setAttribute("aria-label", words.train);
  list = make("div", { class: "card" });
  sentence = make("p", { id: "sentence" });
  trainButton = button(words.train, train, { id: "train", class: "go wide" });
  progress = meter(words.training);
  left = make("p", { class: "note", id: "left" });
  stop = button(words.trainStop, () => ask(`runs/${run.id}/stop`, {}), { id: "stop", class: "wide" });
  trainPart = make("div", { class: "stack" }, sentence, trainButton);
  runPart = make("div", { class: "stack", hidden: true }, make("p", {}, make("b", {}, words.training)), progress, left, stop);
  allow(trainButton, words.trainNothing); // until the server says what there is
  list.hidden = true;
  verdictPart = make("section", { id: "verdict", "aria-label": words.result, hidden: true, tabindex: -1 });
  $("side").replaceChildren(
    make("div", { class: "panel-head of-side" }, make("h2", {}, words.train), button("×", closePanels, { id: "close-side", class: "icon bare", "aria-label": words.close })),
    verdictPart, make("h2", { class: "label" }, words.unlearn), list,
    make("h2", { class: "label" }, words.train), make("div", { class: "card" }, trainPart, runPart));
}

async function train() {
  await insist("runs", { uid: newUid() });
  stop.focus();
}

export function hearSide(news, before) {
  run = news.run;
  drawList(news);
  trainPart.hidden = Boolean(run);
  runPart.hidden = !run;
  if (run) drawRun(run);
  else {
    sentence.textContent = news.rejections ? words.trainSentence(news.plan.rejections, news.plan.seconds) : words.trainNothing;
    allow(trainButton, news.rejections ? null : words.trainNothing);
  }
  if (before.run && !run && document.activeElement === document.body) (news.verdict ? verdictPart : trainButton).focus({ preventScroll: true });
  if (JSON.stringify(news.verdict) !== JSON.stringify(before.verdict)) drawVerdict(news.verdict);
  const ended = before.run && news.verdict?.id === before.run.id ? news.verdict : null;
  if (ended) announce(words.runEnded(ended.verdict ? verdictText(ended.verdict) : ended.error || words.trainStopped));
}

function drawList({ newest, rejections }) {
  list.hidden = false;
  if (!differs(list, [newest, rejections])) return undefined;
  if (!newest.length) return list.replaceChildren(make("p", { class: "note" }, words.unlearnNothing));
  return list.replaceChildren(make("div", {},
    make("ul", { class: "plain" }, newest.map(({ text, reason }) => make("li", {}, make("div", {}, make("span", { class: "clamped" }, words.quoted(text)), reason && make("small", { class: "clamped" }, reason))))),
    rejections > newest.length && make("a", { class: "note", href: "#rejections", onclick: closePanels }, words.unlearnMore(rejections - newest.length))));
}

function drawRun({ phase, state, step, steps, seconds_left: seconds }) {
  const stopping = state === "stopping", starting = !step;
  progress.show(phase === "training" && step ? step / steps : phase === "checking" ? 1 : null);
  left.textContent = stopping ? words.trainingStopping : phase === "checking" ? words.trainingEnding
    : seconds === null || starting ? words.trainingLoading : words.trainingLeft(seconds);
  stop.textContent = stopping || starting ? words.trainStopNow : words.trainStop;
}

function drawVerdict(ended) {
  verdictPart.hidden = !ended;
  if (!ended) return;
  const { verdict } = ended, look = verdict ? isGood(verdict) && "good" : "bad";
  const dismiss = async () => {
    await insist(`runs/${ended.id}/back`, {});
    if (ended.usable) toast(words.wentBack);
    trainButton.focus();
  };
  verdictPart.replaceChildren(make("h2", { class: "label" }, words.result), make("div", { class: `card ${look || ""}` }, make("div", { class: "stack" },
    verdict ? verdictWords(verdict) : [make("p", {}, make("b", { class: "error" }, ended.state === "failed" ? words.trainFailed : words.trainStopped)), ended.error && make("p", { class: "any" }, ended.error)],
    ended.usable ? make("div", { class: "choices" },
      button(words.keep, async () => { await insist(`runs/${ended.id}/keep`, {}); closePanels(); toast(words.kept(ended.name)); proposeAgain(verdict?.pairs[0]?.prompt ?? ""); }, { class: ["good", "partly"].includes(verdict?.outcome) && "go", "data-do": "keep" }),
      button(words.goBack, dismiss, { "data-do": "back" }),
      make("a", { class: "button", href: `#models/${ended.id}`, "data-do": "download", onclick: closePanels }, words.download))
      : make("div", { class: "row" }, button(words.close, dismiss, { "data-do": "back" })),
    verdict?.pairs.length ? make("div", { class: "pairs" }, shortPairs(verdict.pairs)) : null)));
}
