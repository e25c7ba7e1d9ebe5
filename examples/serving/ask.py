"""Ask a running `blsp serve` with the `openai` package: a recording in, text out.

Try: `blsp serve` in one terminal, `python examples/serving/ask.py question.wav "Answer in one short sentence."` in
another. After `make small`, `blsp serve --model blsp-small` also translates: give it "Translate the following text into
French. Write only the translation:". Any OpenAI client works; nothing here is special to this server.
"""

from __future__ import annotations

import argparse
import base64
import os
from pathlib import Path

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recording", type=Path, help="wav, mp3, m4a, … (docs/data.md lists all)")
    parser.add_argument("instruction", nargs="?", default="", help="words to go with the speech")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--transcribe", action="store_true", help="write down what was said instead")
    options = parser.parse_args()
    client = OpenAI(base_url=options.url, api_key=os.environ.get("BLSP_API_KEY", "none"))
    model = client.models.list().data[0].id
    if options.transcribe:
        with options.recording.open("rb") as file:
            print(client.audio.transcriptions.create(model=model, file=file).text)
        return
    clip = base64.b64encode(options.recording.read_bytes()).decode()
    content: list = [{"type": "text", "text": options.instruction}] if options.instruction else []
    content.append({"type": "input_audio", "input_audio": {"data": clip, "format": options.recording.suffix[1:]}})
    stream = client.chat.completions.create(model=model, messages=[{"role": "user", "content": content}], stream=True)
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
