"""The frozen speech encoder's output on disk (`blsp encode`).

encode.py  `blsp encode`: audio files to encoder states, in one process or many
cache.py   the folder of stored states, found by audio content and encoder
content_hashes.py  hashes of the audio of rows, kept on disk, and the index of them
align.py   `blsp align`: when each token of a transcript is spoken; the adapter's place of each token
"""
