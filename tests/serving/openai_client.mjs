// What a page and a Node program do with OpenAI's own client: prints one JSON object.
// node openai_client.mjs CLIENT_MODULE BASE_URL KEY WAV_FILE; in a browser: use(OpenAI, baseURL, key, bytes)

export async function use(OpenAI, baseURL, apiKey, bytes) {
  const client = new OpenAI({ baseURL, apiKey, dangerouslyAllowBrowser: true, maxRetries: 0 });
  const data = btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
  const said = { type: "input_audio", input_audio: { data, format: "wav" } };
  const messages = [{ role: "user", content: [{ type: "text", text: "hello" }, said] }];
  const options = { model: "tiny", messages, max_completion_tokens: 8 };
  const whole = await client.chat.completions.create(options);
  let streamed = "", usage = null;
  for await (const chunk of await client.chat.completions.create({ ...options, stream: true, stream_options: { include_usage: true } })) {
    streamed += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  const file = () => new File([bytes], "question.wav", { type: "audio/wav" });
  const times = { response_format: "verbose_json", timestamp_granularities: ["word", "segment"] };
  const found = {
    models: (await client.models.list()).data.map((model) => model.id),
    model: (await client.models.retrieve("tiny")).id,
    whole: whole.choices[0].message.content,
    streamed,
    usage: usage.completion_tokens,
    helper: (await client.chat.completions.stream(options).finalContent()) ?? "",
    response: (await client.responses.create({ model: "tiny", input: "hello", max_output_tokens: 8 })).output_text,
    text: (await client.audio.transcriptions.create({ model: "tiny", file: file() })).text,
    words: (await client.audio.transcriptions.create({ model: "tiny", file: file(), ...times })).words.length,
    srt: await client.audio.transcriptions.create({ model: "tiny", file: file(), response_format: "srt" }),
    translated: (await client.audio.translations.create({ model: "tiny", file: file() })).text,
  };
  for (const [name, call] of Object.entries({
    refused: () => client.chat.completions.create({ ...options, n: 2 }),
    speech: () => client.audio.speech.create({ model: "tiny", voice: "alloy", input: "hello" }),
    missing: () => client.models.retrieve("gpt-4o"),
  })) {
    found[name] = await call().then(() => null, (error) => ({ status: error.status, code: error.code, param: error.param }));
  }
  return found;
}

if (typeof process !== "undefined" && process.argv[1]?.endsWith("openai_client.mjs")) {
  const { readFile } = await import("node:fs/promises");
  const [module, url, key, file] = process.argv.slice(2);
  const { default: OpenAI } = await import(module);
  console.log(JSON.stringify(await use(OpenAI, url, key, new Uint8Array(await readFile(file)))));
}
