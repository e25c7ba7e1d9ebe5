// The server's OpenAI-compatible routes.

export class ServerError extends Error {}

let key = sessionStorage.getItem("key") || "";
export const setKey = (value) => sessionStorage.setItem("key", (key = value));
const headers = () => (key ? { Authorization: `Bearer ${key}` } : {});

async function checked(response) {
  if (response.ok) return response;
  let message = `the server answered ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* not the server's own refusal */ }
  if (response.status === 413) message = "This conversation has become too large to send: start a new one, or choose a shorter recording.";
  throw new ServerError(message);
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

// Calls onText(piece) for every piece of the answer.
export async function chat(messages, onText, signal) {
  const response = await reach("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ messages, stream: true, max_completion_tokens: 256 }),
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
