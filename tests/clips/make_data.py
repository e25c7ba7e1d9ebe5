"""Make the few seconds of real speech that the tests hear, one clip a format, from `examples/speech/`.

Try: `python tests/clips/make_data.py` (once; the files are committed). Licences: `README.md` beside this file.
"""

import json
from pathlib import Path

import soundfile

HERE = Path(__file__).parent
CLIPS = HERE.parents[1] / "examples" / "speech"
PICKED = {  # file here: (format, subtype, manifest, text)
    "hello.wav": ("WAV", "PCM_16", "asterisk", "Hello world."),
    "sorry.flac": ("FLAC", "PCM_16", "asterisk", "I am sorry, that's not a valid extension.  Please try again."),
    "dinosaur.mp3": ("MP3", "MPEG_LAYER_III", "train", "There's no such thing as a talking dinosaur!"),
    "france.opus": ("OGG", "OPUS", "questions", "What is the capital of France?"),
}


def main() -> None:
    with (HERE / "clips.jsonl").open("w", encoding="utf-8") as manifest:
        for name, (container, subtype, source, text) in PICKED.items():
            rows = map(json.loads, (CLIPS / f"{source}.jsonl").read_text(encoding="utf-8").splitlines())
            row = next(row for row in rows if row["text"] == text)
            samples, rate = soundfile.read(CLIPS / row["audio"])
            soundfile.write(HERE / name, samples, rate, format=container, subtype=subtype)
            row = {"id": name, "audio": name, "text": text, "seconds": row["seconds"], "licence": row["licence"]}
            manifest.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
