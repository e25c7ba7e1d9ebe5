// The page's controls: the microphone, held or hands-free; files, examples, text; the connection.

import { models, recording, setKey } from "./api.js";
import { clear, notice } from "./cards.js";
import { allowRecogniser, ask, askSpoken, forget, interrupt, question, running, WAIT } from "./conversation.js";
import { decode, Recorder, toWav } from "./recorder.js";
import * as settings from "./settings.js";
import { BEFORE, Turns } from "./turns.js";

const SHORTEST = 0.25; // seconds: a shorter recording is not sent
const TAP = 400; // milliseconds: a shorter press starts a recording that the next press sends
const $ = (id) => document.getElementById(id);
let recorder = null;

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

const minutes = (seconds) => `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;

// Held: speech ends when the button is let go. Tapped: it goes on until the next press.
let pressed = 0; // the time of the press; 0: not recording
let opened = Infinity; // the time at which the microphone was open
let clock = 0;
let open = null; // the recorder of the hands-free mode
let tapped = false;
async function press() {
  if (pressed || running) return;
  settings.hush();
  pressed = performance.now();
  tapped = false;
  opened = Infinity;
  notice("");
  levels.length = 0;
  document.body.classList.add("listening");
  $("timer").textContent = "0:00";
  tellState();
  clock = setInterval(() => {
    $("timer").textContent = minutes(Math.max(0, (performance.now() - opened) / 1000));
  }, 200);
  $("talk").setAttribute("aria-pressed", "true");
  const mine = (recorder = new Recorder(showLevel));
  try {
    await mine.start();
    opened = performance.now();
    if (pressed && recorder === mine) tellState();
    if (recorder !== mine) await mine.stop(); // the recording was cancelled before the microphone was open
    else if (!pressed) await release(); // the button was let go before that
  } catch (error) {
    await mine.stop();
    if (recorder !== mine) return;
    pressed = 0;
    idle();
    recorder = null;
    notice(microphoneTrouble(error));
  }
}

// Speech before the microphone is open is lost, so the label asks to speak only after that.
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
  if (unwanted?.ready) await unwanted.stop(); // otherwise press() stops it
}

async function release() {
  pressed = 0;
  idle();
  if (!recorder?.ready) return; // still opening: press() calls this again
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

// --- hands-free ---------------------------------------------------------------------------------------------

// The microphone stays open; a turn begins and ends by voice. Speech stops the answer that is being given.
async function handsFree() {
  notice("");
  $("talklabel").textContent = "Speak: press to end";
  $("talk").setAttribute("aria-pressed", "true");
  document.body.classList.add("listening");
  const turns = new Turns(interrupt, async () => askWhenFree(await mine.take()));
  const mine = (open = new Recorder((level, seconds) => {
    showLevel(level);
    turns.hear(level, seconds);
    if (!turns.speaking) mine.keep(BEFORE);
    $("timer").textContent = turns.speaking ? minutes(turns.length) : "0:00";
  }));
  try {
    await mine.start();
    if (open !== mine) await mine.stop();
  } catch (error) {
    await mine.stop();
    endHandsFree();
    notice(microphoneTrouble(error));
  }
}

async function askWhenFree(samples) {
  while (running) await new Promise((later) => setTimeout(later, 50)); // until the stopped answer has ended
  await askSpoken(toWav(samples), samples);
}

function endHandsFree() {
  const unwanted = open;
  open = null;
  $("handsfree").checked = false;
  idle();
  if (unwanted?.ready) unwanted.stop();
}

$("settings").addEventListener("close", () => {
  if ($("handsfree").checked && !open) handsFree();
  else if (!$("handsfree").checked && open) endHandsFree();
});

const talk = $("talk");
function begin() {
  if (open) endHandsFree();
  else if (running) return; // the button is not disabled, so that it keeps the focus
  else if (pressed && tapped) release();
  else press();
}
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
  if (event.detail !== 0) return; // handled by the pointer events already; a screen reader clicks without them
  begin();
  tapped = Boolean(pressed);
  if (tapped) tellState();
});
talk.addEventListener("blur", () => pressed && !tapped && release());
addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || $("settings").open) return;
  if (pressed) discard();
  else if (open && !running) endHandsFree();
  else interrupt();
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
  if (running) return notice(WAIT);
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
$("stop").onclick = interrupt;
$("fresh").onclick = () => {
  forget();
  $("spoken").textContent = "";
  $("text").focus();
  clear();
  $("hint").hidden = false;
  notice("");
};
$("models").onchange = () => ($("model").textContent = settings.model());
$("key").onchange = (event) => {
  setKey(event.target.value);
  connect();
};

async function connect() {
  try {
    const names = await models();
    allowRecogniser(names.includes("recogniser"));
    settings.offerModels(names);
    $("model").textContent = settings.model();
    $("keybox").hidden = true;
    notice("");
  } catch (error) {
    $("model").textContent = "not connected";
    $("keybox").hidden = !/key/.test(error.message);
    notice(error.message);
  }
}
connect();
