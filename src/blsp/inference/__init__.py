"""Speech in, text out: the ways of using a trained model.

listener.py      `blsp.load()`: answers, streams and transcripts of recordings
conversation.py  several turns, with the key/values of earlier ones reused
generate.py      `blsp generate`: one answer for each row of a manifest
transcript.py    transcripts of recordings of any length, with times
pauses.py        where speech is in a recording; recordings cut into pieces
word_times.py    when each word is spoken
subtitles.py     words with times → cues, SRT and WebVTT
transcribe.py    `blsp transcribe`: transcripts and subtitles of files
chat.py          `blsp chat`: a conversation in the terminal
"""
