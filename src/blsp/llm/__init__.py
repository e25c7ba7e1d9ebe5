"""The frozen text LLM. Nothing in this package knows about speech.

language_model.py   decoder, head, embeddings, log-probabilities; which LLM families are supported
prompt.py           the chat template with a place for the speech
instructions.py     every instruction text
prefix.py           key/values of the constant start of a prompt
decoding.py         the decode loop: greedy and sampled, requests join and leave between steps
kv_cache.py         the key/value cache of a running batch
teacher_forcing.py  scores and hidden states of given answers
text_stream.py      tokens to text, piece by piece
"""
