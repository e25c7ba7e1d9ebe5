// What is shown: turns, their recordings, answers, notices; and scrolling to the newest line.

import { render } from "./markdown.js";
import { drawWave } from "./recorder.js";

const ROUTES = { speech: "Speech", cascade: "Cascade: a recogniser, then text", text: "Text: as you would write it" };
const NEAR = 80; // pixels: a reader so close to the end counts as at the end
const $ = (id) => document.getElementById(id);

export function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

// The page stays at its end while answers grow, until the reader scrolls up; at the end it follows again.
let following = true;
let height = 0; // scroll position at the last event
addEventListener("scroll", () => {
  const left = document.documentElement.scrollHeight - innerHeight - scrollY;
  if (left < NEAR) following = true;
  else if (scrollY < height) following = false;
  height = scrollY;
});
export const follow = () => following && $("turns").children.length && scrollTo({ top: document.documentElement.scrollHeight });

export function addTurn(question) {
  $("hint").hidden = true;
  const turn = $("turn").content.cloneNode(true).firstElementChild;
  const said = turn.querySelector(".said");
  const words = turn.querySelector(".words");
  words.textContent = question.text;
  words.hidden = !question.text;
  if (question.instruction) {
    const instruction = document.createElement("p");
    instruction.className = "instruction";
    instruction.textContent = question.instruction;
    said.prepend(instruction);
  }
  if (question.blob) said.append(clip(question));
  $("turns").append(turn);
  following = true;
  follow();
  return turn;
}

const sounds = []; // the recordings of the turns

// Takes every turn away; its recording falls silent and is no longer kept.
export function clear() {
  for (const sound of sounds.splice(0)) {
    sound.pause();
    URL.revokeObjectURL(sound.src);
  }
  $("turns").replaceChildren();
}

function clip({ blob, samples }) {
  const holder = document.createElement("div");
  holder.className = "clip";
  const play = document.createElement("button");
  play.type = "button";
  const show = (playing) => {
    play.textContent = playing ? "❚❚" : "▶\uFE0E";
    play.setAttribute("aria-label", playing ? "Pause" : "Play what was sent");
  };
  show(false);
  const sound = new Audio(URL.createObjectURL(blob));
  sounds.push(sound);
  play.onclick = () => (sound.paused ? sound.play() : sound.pause());
  sound.onplay = () => show(true);
  sound.onpause = sound.onended = () => show(false);
  holder.append(play);
  if (samples) {
    const wave = document.createElement("canvas");
    wave.setAttribute("role", "img");
    wave.setAttribute("aria-label", `Waveform, ${(samples.length / 16000).toFixed(1)} seconds`);
    holder.append(wave);
    requestAnimationFrame(() => drawWave(wave, samples));
  }
  return holder;
}

export function addAnswer(turn, route) {
  const answer = $("answer").content.cloneNode(true).firstElementChild;
  answer.querySelector("h2").textContent = route === "only" ? "Answer" : ROUTES[route];
  answer.dataset.route = route;
  turn.querySelector(".answers").append(answer);
  follow();
  return answer;
}

export const write = (text, answer) => text.replaceChildren(render(answer));

// Buttons of a finished answer. Where it failed or was stopped there may be nothing to copy.
export function offer(card, answer) {
  const copy = card.querySelector(".copy"), retry = card.querySelector(".retry");
  copy.hidden = !answer;
  retry.hidden = !retry.onclick;
  copy.onclick = async () => {
    try {
      await navigator.clipboard.writeText(answer);
      copy.textContent = "Copied";
      setTimeout(() => (copy.textContent = "Copy"), 1500);
    } catch {
      notice("The browser does not let this page copy: select the text and copy it.");
    }
  };
}

// An element that is scrolled to is not hidden by the header or the form.
new ResizeObserver(() => {
  document.documentElement.style.scrollPaddingBottom = `${$("ask").offsetHeight + 16}px`;
  document.documentElement.style.scrollPaddingTop = `${document.querySelector("header").offsetHeight + 8}px`;
  follow();
}).observe($("ask"));
