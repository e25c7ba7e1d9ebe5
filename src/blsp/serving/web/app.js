// The page: turns of speech and text, answers streaming in, the same question by three routes.

import { base64, chat, models, recording, ServerError, setKey, transcribe } from "./api.js";
import { addAnswer, addTurn, follow, notice, offer, write } from "./cards.js";
import { decode, Recorder, toWav } from "./recorder.js";

const SHORTEST = 0.25; // seconds: less was no speech
const TAP = 400; // milliseconds: a shorter press begins, and the next one sends
const $ = (id) => document.getElementById(id);

let messages = []; // the speech route's conversation
let running = null; // AbortController while an answer comes
let recorder = null;
let recogniser = false;

function busy(controller) {
  running = controller;
  $("stop").hidden = !controller;
  $("send").hidden = Boolean(controller);
  $("talk").disabled = Boolean(controller);
  $("file").disabled = Boolean(controller);
  document.querySelectorAll(".example, .retry").forEach((button) => (button.disabled = Boolean(controller)));
}

// --- asking ------------------------------------------------------------------------------------------------

// Streams one answer into its card; returns the text, or null where it failed.
async function stream(card, conversation, signal, began = performance.now()) {
  const text = card.querySelector(".text");
  const timing = card.querySelector(".timing");
  let first = 0, answer = "";
  text.textContent = "";
  text.classList.remove("none");
  card.classList.remove("wrong");
  text.setAttribute("aria-busy", "true");
  try {
    await chat(conversation, (piece) => {
      first = first || performance.now() - began;
      answer += piece;
      write(text, answer);
      timing.textContent = `first token ${seconds(first)}`;
      follow();
    }, signal);
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

async function ask(question) {
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
    const said = { role: "user", content: await content(question) };
    const answer = await stream(card, [...past, said], controller.signal);
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
    if (!(error instanceof ServerError)) console.error(error); // the answer stands without it
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

// The text route needs what was really said: the recogniser's guess, to be mended.
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

const question = (more) => ({ text: $("text").value.trim(), instruction: $("preset").value, ...more });

function askSpoken(blob, samples) {
  const asked = question({ blob, samples });
  $("text").value = "";
  return ask(asked);
}

// --- the microphone ----------------------------------------------------------------------------------------

const levels = [];
function showLevel(rms) {
  levels.push(rms);
  if (levels.length > 120) levels.shift();
  const canvas = $("level"), pen = canvas.getContext("2d");
  pen.clearRect(0, 0, canvas.width, canvas.height);
  pen.fillStyle = getComputedStyle(canvas).getPropertyValue("--accent");
  levels.forEach((level, i) => {
    const tall = Math.max(1, Math.min(1, 1.2 * Math.sqrt(level)) * canvas.height);
    pen.fillRect((i * canvas.width) / 120, (canvas.height - tall) / 2, 1.4, tall);
  });
}

// Held: speech ends when the button is let go. Tapped: it goes on until the next press.
let pressed = 0; // when; 0: nobody listens
let opened = Infinity; // when the microphone was there
let clock = 0;
let tapped = false;
async function press() {
  if (pressed || running) return;
  pressed = performance.now();
  tapped = false;
  opened = Infinity;
  notice("");
  levels.length = 0;
  document.body.classList.add("listening");
  $("timer").textContent = "0:00";
  tellState();
  clock = setInterval(() => {
    const passed = Math.max(0, Math.floor((performance.now() - opened) / 1000));
    $("timer").textContent = `${Math.floor(passed / 60)}:${String(passed % 60).padStart(2, "0")}`;
  }, 200);
  $("talk").setAttribute("aria-pressed", "true");
  const mine = (recorder = new Recorder(showLevel));
  try {
    await mine.start();
    opened = performance.now();
    if (pressed && recorder === mine) tellState();
    if (recorder !== mine) await mine.stop(); // discarded before the microphone was there
    else if (!pressed) await release(); // let go before
  } catch (error) {
    await mine.stop();
    if (recorder !== mine) return;
    pressed = 0;
    idle();
    recorder = null;
    notice(microphoneTrouble(error));
  }
}

// What is said before the microphone is open is lost: the label waits for it.
function tellState() {
  if (opened === Infinity) $("talklabel").textContent = "Opening the microphone…";
  else $("talklabel").textContent = tapped ? "Listening… press to send" : "Listening… let go to send";
}

function letGo() {
  if (!pressed || tapped) return;
  tapped = performance.now() - pressed < TAP;
  if (tapped) tellState();
  else release();
}

async function discard() {
  pressed = 0;
  idle();
  const unwanted = recorder;
  recorder = null;
  if (unwanted?.ready) await unwanted.stop(); // else press() comes back to it
}

async function release() {
  pressed = 0;
  idle();
  if (!recorder?.ready) return; // still starting: press() comes back here
  const finished = recorder;
  recorder = null;
  const samples = await finished.stop();
  if (samples.length < SHORTEST * 16000) notice("That was too short: speak while the button is red.");
  else await askSpoken(toWav(samples), samples);
}

function idle() {
  clearInterval(clock);
  document.body.classList.remove("listening");
  $("talk").setAttribute("aria-pressed", "false");
  $("talklabel").textContent = "Hold to talk";
}

function microphoneTrouble(error) {
  if (error.name === "NotAllowedError") return "The microphone is blocked: allow it in the browser's address bar, or choose a file.";
  if (error.name === "NotFoundError") return "No microphone was found: plug one in, or choose a file.";
  if (error.name === "NotReadableError") return "The microphone is in use elsewhere: close the other program, or choose a file.";
  return error.message;
}

const talk = $("talk");
const begin = () => (pressed && tapped ? release() : press());
talk.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  talk.setPointerCapture(event.pointerId);
  begin();
});
for (const end of ["pointerup", "pointercancel"]) talk.addEventListener(end, letGo);
talk.addEventListener("keydown", (event) => {
  if (["Space", "Enter"].includes(event.code)) {
    event.preventDefault();
    if (!event.repeat) begin();
  }
});
talk.addEventListener("keyup", (event) => {
  if (["Space", "Enter"].includes(event.code)) {
    event.preventDefault();
    letGo();
  }
});
talk.addEventListener("click", (event) => {
  if (event.detail !== 0) return; // the pointer's own events have done it; a screen reader's click has none
  begin();
  tapped = Boolean(pressed);
  if (tapped) tellState();
});
talk.addEventListener("blur", () => pressed && !tapped && release());
addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (pressed) discard();
  else running?.abort();
});
talk.addEventListener("contextmenu", (event) => event.preventDefault());

// --- files, text, tools ------------------------------------------------------------------------------------

async function sendFile(file) {
  if (file) await askSpoken(file, await decode(await file.arrayBuffer()));
}

for (const example of document.querySelectorAll(".example")) {
  example.onclick = async () => {
    try {
      await sendFile(await recording(`questions/${example.dataset.clip}.opus`));
    } catch (error) {
      notice(error.message);
    }
  };
}

$("file").onchange = async (event) => {
  await sendFile(event.target.files[0]);
  event.target.value = "";
};
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", (event) => event.relatedTarget ?? document.body.classList.remove("dropping"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  sendFile(event.dataTransfer.files[0]);
});

$("ask").onsubmit = (event) => {
  event.preventDefault();
  const asked = question({});
  if (!asked.text) return notice("Type something, or hold the button and speak.");
  $("text").value = "";
  ask(asked);
};
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("stop").onclick = () => running?.abort();
$("fresh").onclick = () => {
  running?.abort();
  $("spoken").textContent = "";
  $("text").focus();
  messages = [];
  $("turns").replaceChildren();
  $("hint").hidden = false;
  notice("");
};
$("options").onclick = () => $("settings").showModal();
$("key").onchange = (event) => {
  setKey(event.target.value);
  connect();
};

async function connect() {
  try {
    const names = await models();
    recogniser = names.includes("recogniser");
    $("model").textContent = names[0];
    $("keybox").hidden = true;
    notice("");
  } catch (error) {
    $("model").textContent = "not connected";
    $("keybox").hidden = !/key/.test(error.message);
    notice(error.message);
  }
}
connect();
