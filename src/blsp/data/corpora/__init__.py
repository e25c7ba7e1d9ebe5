"""Readers of published corpora, for `blsp prepare CORPUS --root FOLDER --out FILE`.

    reading.py        parts that all readers use: the request, files and tables with clear error messages, rows
    recognition.py    LibriSpeech, GigaSpeech, TED-LIUM 3
    multilingual.py   Common Voice, CoVoST 2, MuST-C, FLEURS
    understanding.py  Fluent Speech Commands, SLURP, SNIPS
    folders.py        a folder of audio and text files, a Kaldi data directory, Lhotse manifests
    columns.py        which columns of a table are audio and text; the utterance in a row
    tables.py         CSV, TSV, JSON Lines, NeMo's manifests
    shards.py         WebDataset, Lhotse Shar
    hub.py            any Hugging Face dataset
    no_speech.py      generated clips of silence, noise and babble

A reader is a generator. It takes a `ReadRequest` and yields utterances, and `Dropped` with a reason for rows that it
leaves out, always in the same order. It keeps no more than one recording's rows in memory. To add a corpus, write a
reader and add it to `READERS` in `data/prepare.py`, or in a file of your own (docs/extending.md).
"""
