"""Speech in, text out: the ways of using a trained model.

listener.py      `blsp.load()`: answers, streams and transcripts of recordings
conversation.py  several turns, with the key/values of earlier ones reused
generate.py      `blsp generate`: one answer for each row of a manifest
transcribe.py    `blsp transcribe`: one transcript for each file
chat.py          `blsp chat`: a conversation in the terminal
"""
