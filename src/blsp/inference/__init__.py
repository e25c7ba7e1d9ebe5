"""Speech in, text out.

listener.py      `blsp.load()`: answers, transcripts and streams for recordings
conversation.py  several turns with kept key/values
generate.py      `blsp generate`: one answer for each row of a manifest
transcribe.py    `blsp transcribe`
chat.py          `blsp chat`
"""
