"""Files on disk: audio, manifests, corpora and unfinished work. Nothing here imports torch.

The first part of the flow: **corpora → manifest** → continuations → speech features → training.

    audio.py      a path, bytes, data-URI or array -> 16 kHz mono float32
    addresses.py  audio inside tar, Parquet and Arrow files, in byte ranges, behind URLs
    hub_names.py  whether a name is a folder here or a repository on the hub
    containers.py which decoder reads a file to its end, and whether the file ends too early
    manifest.py   `Utterance`, the record that all steps share; JSONL files of any length, read by row number
    clips.py      the recording of a manifest's row
    partners.py   for each clip another one in which something else is said
    normalisation.py  Whisper's text normaliser, with the vowel signs of every script
    row_index.py  where each row of a manifest starts, and that its key is unique (SQLite)
    files.py      JSON Lines, atomic writes, digests
    jobs.py       unfinished work: locks, logs, headers, part files; how a killed job continues
    prepare.py    `blsp prepare`
    corpora/      published corpora -> utterances
"""
