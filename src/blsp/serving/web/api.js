// The server's OpenAI-compatible routes.

export class ServerError extends Error {
  constructor(message, code) {
    super(message);
    this.code = code; // the server's, where it gave one
  }
}

let key = sessionStorage.getItem("key") || "";
export const setKey = (value) => sessionStorage.setItem("key", (key = value));
const headers = () => (key ? { Authorization: `Bearer ${key}` } : {});

async function checked(response) {
  if (response.ok) return response;
  let message = `the server answered ${response.status}`;
  let code;
  try {
    ({ message, code } = (await response.json()).error);
  } catch { /* not the server's own refusal */ }
  if (response.status === 413) message = "This conversation has become too large to send: start a new one, or choose a shorter recording.";
  throw new ServerError(message, code);
}

async function reach(url, options = {}) {
  try {
    return await checked(await fetch(url, { ...options, headers: { ...headers(), ...options.headers } }));
  } catch (error) {
    if (error instanceof ServerError || error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached. Is it still running?");
  }
}

export const models = async () => (await (await reach("v1/models")).json()).data.map((each) => each.id);

export const recording = async (url) => (await reach(url)).blob();

export async function transcribe(blob, model, signal) {
  const form = new FormData();
  form.append("file", blob, "speech.wav");
  form.append("model", model);
  return (await (await reach("v1/audio/transcriptions", { method: "POST", body: form, signal })).json()).text;
}

// Calls onText(piece) for every piece of the answer. more: further fields of the request.
export async function chat(messages, onText, signal, more) {
  const response = await reach("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ messages, stream: true, ...more }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(chunk.error.message);
      const piece = chunk.choices?.[0]?.delta?.content;
      if (piece) onText(piece);
    }
  }
}

export const base64 = async (blob) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.split(",", 2)[1]);
    reader.onerror = () => reject(new ServerError("The recording cannot be read."));
    reader.readAsDataURL(blob);
  });
