"""Frozen weights: where they come from, and which exact weights they are.

embedded.py     weights that are installed with pip: `embedded:NAME`
ctranslate2.py  reader of CTranslate2's file format
digest.py       names resolved to `Weights`: a folder, and the SHA-256 over its tensors
folder.py       the files of a checkpoint folder, checked before a library reads them
shipped.py      the adapters that come with this project
"""
