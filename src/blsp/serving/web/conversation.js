// The conversation: questions, streamed answers, the same question by three routes (speech, text, cascade).

import { base64, chat, ServerError, transcribe } from "./api.js";
import { addAnswer, addTurn, follow, notice, offer, write } from "./cards.js";
import { toWav } from "./recorder.js";
import * as settings from "./settings.js";

export const WAIT = "An answer is being given: stop it first, or wait.";
const $ = (id) => document.getElementById(id);

let messages = []; // the speech route's conversation
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

export async function ask(question) {
  if (running) return;
  notice("");
  const turn = addTurn(question);
  const comparing = $("compare").checked && question.blob;
  const card = addAnswer(turn, comparing ? "speech" : "only");
  const begun = messages; // "New conversation" puts another list in its place
  if ($("compare").checked && !question.blob) remark(card, "Nothing was compared: a written question takes one way only.");
  card.querySelector(".retry").onclick = () => messages === begun.next && respond(card, question, begun);
  await respond(card, question, begun, (signal) => comparing && compare(turn, question, begun, signal));
}

// Streams the answer to `question` after the turns `past`, then what `more(signal)` adds.
async function respond(card, question, past, more = () => {}) {
  if (running) return;
  const controller = new AbortController();
  const before = messages;
  busy(controller);
  try {
    settings.hush();
    const [said, answer] = await answerTo(card, question, past, controller.signal);
    if (answer && !controller.signal.aborted) settings.readOut(card.querySelector(".text").innerText);
    if (messages === before) {
      messages = answer ? [...past, said, { role: "assistant", content: answer }] : [...past];
      past.next = messages; // as long as this is the conversation, the answer can be asked for again
    }
    if (question.blob) tellHeard(card, question.blob);
    if (!controller.signal.aborted) await more(controller.signal);
  } catch (error) {
    notice(error.message);
  } finally {
    busy(null);
  }
}

// The user's turn and the answer. A recording that the server cannot decode is sent once more, as the browser decoded it.
async function answerTo(card, question, past, signal) {
  for (;;) {
    const said = { role: "user", content: await content(question) };
    const answer = await stream(card, [...past, said], signal);
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

async function compare(turn, question, past, signal) {
  const cascade = addAnswer(turn, "cascade");
  const began = performance.now();
  let heard = "";
  if (!recogniser) {
    fail(cascade, new ServerError("This server has no recogniser (pip install 'blsp[cascade]')."));
  } else {
    try {
      heard = await transcribe(question.blob, "recogniser", signal);
      remark(cascade, heard ? `It wrote down: “${heard}”` : "It wrote nothing down.");
      await stream(cascade, [...past, { role: "user", content: written(question, heard) }], signal, began);
    } catch (error) {
      fail(cascade, error);
    }
  }
  const text = addAnswer(turn, "text");
  text.querySelector(".text").before(transcriptField(text, question, past, heard));
  if (heard) await stream(text, [...past, { role: "user", content: written(question, heard) }], signal);
  else text.querySelector(".text").setAttribute("aria-busy", "false");
}

// The text route needs what was really said: the user corrects the recogniser's transcript.
function transcriptField(card, question, past, heard) {
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
    if (field.value.trim()) stream(card, [...past, { role: "user", content: written(question, field.value.trim()) }]);
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
  messages = [];
}
