"""The frozen speech encoder's output on disk (`blsp encode`).

encode.py  audio files to encoder states, on one process or many
cache.py   the folder of stored states, keyed by audio content and encoder
"""
