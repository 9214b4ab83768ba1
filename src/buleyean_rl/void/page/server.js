// The server: requests, and streams of events. It says when the server is away, and when it wants another token.

import { words } from "./strings.js";

const AGAIN = 300; // milliseconds until a stream that ended is asked for again
const SILENCE = 15000; // milliseconds; the server gives a sign of life every five seconds
const AWAY = [502, 503, 504]; // what a proxy says of a server that is gone, or a server that is busy
export const isToken = (text) => /^[!-~]+$/.test(text); // a header can hold no other

const listeners = { away: () => {}, token: () => {} };
export function onServer(away, token) { Object.assign(listeners, { away, token }); }

class Away extends Error {}

function headers(more) {
  const token = sessionStorage.getItem("token");
  if (!token) return more;
  if (!isToken(token)) refuseToken(true);
  return { ...more, Authorization: `Bearer ${token}` };
}

function refuseToken(wrong) {
  sessionStorage.removeItem("token");
  listeners.token(wrong);
  throw Object.assign(new Error("the token is asked for"), { isTold: true });
}

export async function call(path, body, options = {}) {
  const post = body === undefined ? {} : { method: "POST", body: JSON.stringify(body) };
  const type = body === undefined ? {} : { "Content-Type": "application/json" };
  const request = { ...post, ...options, headers: headers({ ...type, ...options.headers }) };
  const away = (why) => Object.assign(new Away(why), { isTold: !request.method }); // what was only read is asked for again
  const reply = await fetch(`api/${path}`, request).catch((error) => {
    if (!(error instanceof TypeError)) throw error;
    listeners.away(true);
    throw away(words.notSent);
  });
  if (reply.status === 401) refuseToken("Authorization" in request.headers);
  if (!reply.ok) {
    const problem = await reply.json().catch(() => ({}));
    const why = problem.error || words.serverAnswered(reply.status);
    throw Object.assign(AWAY.includes(reply.status) ? away(why) : new Error(why), { status: reply.status, problem });
  }
  listeners.away(false);
  return reply;
}

export const ask = async (path, body) => (await call(path, body)).json();

// The same uid is sent again where the connection breaks, so that nothing is done twice.
export async function insist(path, body) {
  for (let pause = 300; ; pause = Math.min(pause * 2, 5000)) {
    try {
      return await ask(path, body);
    } catch (error) {
      if (!(error instanceof Away)) throw error; // an answer, if no good one
      listeners.away(true);
      await new Promise((resolve) => setTimeout(resolve, pause));
    }
  }
}

// Server-sent events by hand: EventSource cannot show a token.
async function listen(path, heard, signal) {
  const silence = new AbortController();
  const reply = await call(path, undefined, { signal: AbortSignal.any([signal, silence.signal]) });
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const timer = setTimeout(() => silence.abort(), SILENCE);
    const { done, value } = await reader.read().catch(() => ({ done: true })).finally(() => clearTimeout(timer));
    if (done) return;
    const events = (pending + value).split("\n\n");
    pending = events.pop();
    for (const event of events) if (event.startsWith("data: ")) heard(JSON.parse(event.slice("data: ".length)));
  }
}

export async function keepListening(path, heard, signal, finished = () => false) {
  while (!signal.aborted && !finished()) {
    try {
      await listen(path, heard, signal);
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Away) listeners.away(true);
      else if (error.name !== "AbortError") throw error;
    }
    if (signal.aborted || finished()) return;
    await new Promise((resolve) => setTimeout(resolve, AGAIN)); // where the server is gone, the next try says so
  }
}

export function newUid() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
