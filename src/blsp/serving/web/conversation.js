// The conversation: questions, streamed answers, the same question by three routes (speech, text, cascade).

import { base64, chat, ServerError, transcribe } from "./api.js";
import { addAnswer, addTurn, follow, notice, offer, write } from "./cards.js";
import { toWav } from "./recorder.js";
import * as settings from "./settings.js";

export const WAIT = "An answer is being given: stop it first, or wait.";
const $ = (id) => document.getElementById(id);

let exchanges = []; // the turns: the question, the turns before it, and the messages of each route
let recogniser = false;
export let running = null; // AbortController while an answer comes

export const allowRecogniser = (there) => (recogniser = there);

// The focus stays where it is: a disabled button would lose it, and a hidden one hands it to Talk.
function busy(controller) {
  const focused = document.activeElement;
  running = controller;
  $("stop").hidden = !controller;
  $("send").hidden = Boolean(controller);
  $("talk").setAttribute("aria-disabled", Boolean(controller) && !$("handsfree").checked);
  $("file").disabled = Boolean(controller);
  document.querySelectorAll(".example").forEach((button) => (button.disabled = Boolean(controller)));
  document.querySelectorAll(".retry").forEach((button) => button.setAttribute("aria-disabled", Boolean(controller)));
  if (focused.disabled || !focused.getClientRects().length) $("talk").focus();
  if (!controller && $("notice").textContent === WAIT) notice("");
}

// Streams one answer into its card; returns the text, or null where it failed.
async function stream(card, conversation, signal, began = performance.now()) {
  const text = card.querySelector(".text");
  const timing = card.querySelector(".timing");
  let first = 0, answer = "";
  text.textContent = "";
  text.classList.remove("none");
  card.classList.remove("wrong");
  delete card.dataset.code;
  text.setAttribute("aria-busy", "true");
  try {
    await chat([...settings.system(), ...conversation], (piece) => {
      first = first || performance.now() - began;
      answer += piece;
      write(text, answer);
      timing.textContent = `first token ${seconds(first)}`;
      follow();
    }, signal, settings.sampling());
    if (!answer.trim()) {
      text.textContent = "It said nothing.";
      text.classList.add("none");
    }
    timing.textContent = `${first ? `first token ${seconds(first)}, ` : ""}whole answer ${seconds(performance.now() - began)}`;
    $("spoken").textContent = `${card.querySelector("h2").textContent}: ${text.innerText}`;
    return answer;
  } catch (error) {
    fail(card, error);
    return answer || null;
  } finally {
    text.setAttribute("aria-busy", "false");
    offer(card, answer);
    follow();
  }
}

function fail(card, error) {
  const stopped = error.name === "AbortError";
  card.querySelector(".timing").textContent = stopped ? "stopped" : error.message;
  $("spoken").textContent = stopped ? "Stopped" : error.message;
  card.classList.toggle("wrong", !stopped);
  card.dataset.code = error.code ?? "";
  card.querySelector(".text").setAttribute("aria-busy", "false");
  if (!stopped && !(error instanceof ServerError)) console.error(error);
}

const seconds = (ms) => `${(ms / 1000).toFixed(2)}\u00a0s`;

// The user's message: instruction and text first, then the speech.
async function content({ text, instruction, blob }) {
  const words = [instruction, text].filter(Boolean).join("\n");
  if (!blob) return words;
  const audio = { type: "input_audio", input_audio: { data: await base64(blob), format: "wav" } };
  return words ? [{ type: "text", text: words + "\n" }, audio] : [audio];
}

const written = (question, transcript) =>
  [question.instruction, question.text, transcript].filter(Boolean).join("\n");

// What was said before, as `route` was asked and answered. A turn that went one way only is in every route's past.
const past = (exchange, route) => exchange.before.flatMap((earlier) => earlier[route] ?? earlier.speech);

export async function ask(question) {
  if (running) return;
  notice("");
  const turn = addTurn(question);
  const comparing = $("compare").checked && question.blob;
  const card = addAnswer(turn, comparing ? "speech" : "only");
  const exchange = { question, before: exchanges, speech: [], ...(comparing && { cascade: [], text: [] }) };
  exchanges = [...exchanges, exchange];
  if ($("compare").checked && !question.blob) remark(card, "Nothing was compared: a written question takes one way only.");
  card.querySelector(".retry").onclick = () => exchanges.at(-1) === exchange && respond(card, exchange);
  await respond(card, exchange, (signal) => comparing && compare(turn, exchange, signal));
}

// Streams the answer to the question, then what `more(signal)` adds.
const respond = (card, exchange, more = () => {}) =>
  alone(async (signal) => {
    const { question } = exchange;
    const [said, answer] = await answerTo(card, exchange, signal);
    if (answer && !signal.aborted) settings.readOut(card.querySelector(".text").innerText);
    exchange.speech = asMessages(said, answer);
    if (question.blob) tellHeard(card, question.blob);
    if (!signal.aborted) await more(signal);
  });

// One answer at a time: `work(signal)` is not begun while another goes on.
async function alone(work) {
  if (running) return;
  const controller = new AbortController();
  busy(controller);
  try {
    settings.hush();
    await work(controller.signal);
  } catch (error) {
    notice(error.message);
  } finally {
    busy(null);
  }
}

// The messages of a turn: none where there is no answer.
const asMessages = (said, answer) => (answer ? [said, { role: "assistant", content: answer }] : []);

// The user's turn and the answer. A recording that the server cannot decode is sent once more, as the browser decoded it.
async function answerTo(card, exchange, signal) {
  const { question } = exchange;
  for (;;) {
    const said = { role: "user", content: await content(question) };
    const answer = await stream(card, [...past(exchange, "speech"), said], signal);
    if (card.dataset.code !== "invalid_audio" || !question.samples || question.decoded) return [said, answer];
    question.blob = toWav(question.samples);
    question.decoded = true;
  }
}

function remark(card, words) {
  card.querySelector(".heard").textContent = words;
  card.querySelector(".heard").hidden = false;
}

// The transcript by the same model. It is asked for after the answer, so that the answer does not wait.
async function tellHeard(card, blob) {
  if (!card.querySelector(".heard").hidden) return;
  try {
    const heard = await transcribe(blob, $("model").textContent);
    remark(card, heard ? `It heard: “${heard}”` : "It heard no words.");
    follow();
  } catch (error) {
    if (!(error instanceof ServerError)) console.error(error); // the answer is shown all the same
  }
}

async function compare(turn, exchange, signal) {
  const { question } = exchange;
  const cascade = addAnswer(turn, "cascade");
  const began = performance.now();
  let heard = "";
  if (!recogniser) {
    fail(cascade, new ServerError("This server has no recogniser (pip install 'blsp[cascade]')."));
  } else {
    try {
      heard = await transcribe(question.blob, "recogniser", signal);
      remark(cascade, heard ? `It wrote down: “${heard}”` : "It wrote nothing down.");
      await answerWritten(cascade, exchange, heard, signal, began);
    } catch (error) {
      fail(cascade, error);
    }
  }
  const text = addAnswer(turn, "text");
  text.querySelector(".text").before(transcriptField(text, exchange, heard));
  if (heard) await answerWritten(text, exchange, heard, signal);
  else text.querySelector(".text").setAttribute("aria-busy", "false");
}

// The answer of a route that reads `words` instead of hearing them.
async function answerWritten(card, exchange, words, signal, began) {
  const { route } = card.dataset;
  const said = { role: "user", content: written(exchange.question, words) };
  exchange[route] = asMessages(said, await stream(card, [...past(exchange, route), said], signal, began));
}

// The text route needs what was really said: the user corrects the recogniser's transcript.
function transcriptField(card, exchange, heard) {
  const holder = document.createElement("form");
  holder.className = "transcript";
  const label = document.createElement("label");
  label.textContent = "What you said (mend it and press Enter)";
  const field = document.createElement("input");
  field.value = heard;
  label.append(field);
  holder.append(label);
  holder.onsubmit = (event) => {
    event.preventDefault();
    if (running) return notice(WAIT);
    const words = field.value.trim();
    if (words) alone((signal) => answerWritten(card, exchange, words, signal));
  };
  return holder;
}

export const question = (more) => ({ text: $("text").value.trim(), instruction: settings.instruction(), ...more });

export function askSpoken(blob, samples) {
  if (running) return notice(WAIT);
  const asked = question({ blob, samples });
  $("text").value = "";
  return ask(asked);
}

// Stops the answer that is being given or read out.
export function interrupt() {
  settings.hush();
  running?.abort();
}

export function forget() {
  interrupt();
  exchanges = [];
}
