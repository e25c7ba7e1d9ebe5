"""What was said, and in which file: audio, manifests and corpora.

First stop of the flow (corpora → manifest → continuations → ...). Nothing here imports torch, so that
`blsp prepare` and the command line start at once.

    audio.py     a path, bytes, data-URI or array -> 16 kHz mono float32
    manifest.py  Utterance, the one record that all steps share; JSONL files of any length
    row_index.py where each row of a manifest starts, and whether its key is unique
    corpora/     published corpora -> manifests (`blsp prepare`)
"""
