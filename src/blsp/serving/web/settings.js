// The reader's settings, kept in this browser; and answers read out by its voices.

const $ = (id) => document.getElementById(id);
const FIELDS = ["preset", "system", "temperature", "length", "readout", "voice"];
const kept = stored();
function stored() {
  try {
    return { ...JSON.parse(localStorage.getItem("settings")) };
  } catch {
    return {}; // damaged, or this browser keeps nothing
  }
}
const holds = (field) => (field.type === "checkbox" ? "checked" : "value");

for (const name of FIELDS) {
  const field = $(name);
  if (name in kept) field[holds(field)] = kept[name];
}
$("settings").addEventListener("close", () => {
  for (const name of FIELDS) kept[name] = $(name)[holds($(name))];
  localStorage.setItem("settings", JSON.stringify(kept));
});
$("options").onclick = () => $("settings").showModal();

export const instruction = () => $("preset").value;
export const system = () => ($("system").value.trim() ? [{ role: "system", content: $("system").value.trim() }] : []);
export const model = () => $("models").value;

// Fields of a request. A field that is empty here is left to the server.
export const sampling = () => ({
  ...(model() && { model: model() }),
  ...($("temperature").value && { temperature: $("temperature").valueAsNumber }),
  max_completion_tokens: $("length").valueAsNumber || 256,
});

export const offerModels = (names) =>
  $("models").replaceChildren(...names.filter((name) => name !== "recogniser").map((name) => new Option(name, name)));

// --- voices -------------------------------------------------------------------------------------------------

const synthesis = window.speechSynthesis;
function offerVoices() {
  const voices = synthesis?.getVoices() ?? [];
  $("voice").replaceChildren(new Option("the browser's choice", ""), ...voices.map((voice) => new Option(`${voice.name} (${voice.lang})`, voice.voiceURI)));
  $("voice").value = kept.voice ?? "";
  if (!$("voice").value) $("voice").value = "";
}
offerVoices();
synthesis?.addEventListener?.("voiceschanged", offerVoices);
if (!synthesis) $("readout").disabled = true;

export function readOut(text) {
  if (!$("readout").checked || !synthesis || !text.trim()) return;
  const utterance = new SpeechSynthesisUtterance(text);
  const voice = synthesis.getVoices().find((each) => each.voiceURI === $("voice").value);
  if (voice) [utterance.voice, utterance.lang] = [voice, voice.lang];
  synthesis.speak(utterance);
}
export const hush = () => synthesis?.cancel();
