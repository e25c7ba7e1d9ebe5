"""Published corpora -> manifests: `blsp prepare CORPUS --root FOLDER --out FILE`.

    reading.py        what the readers share: what to read, what is missing and where to get it
    recognition.py    LibriSpeech, GigaSpeech, TED-LIUM 3
    translation.py    Common Voice, CoVoST 2, MuST-C, FLEURS
    understanding.py  Fluent Speech Commands, SLURP, SNIPS
    folders.py        a folder of audio and text files, a Kaldi data directory
    lhotse.py         Lhotse cuts, or recordings and supervisions
    hub.py            any Hugging Face dataset
    no_speech.py      silence, coloured noise and babble, made here

A reader is a generator: what to read in, utterances (and what it left out, with the reason) out, in an
order that never changes, holding no more than a recording's rows in memory. To add a corpus, write one and
name it in `READERS` of `data/prepare.py`.
"""
