"""The frozen text LLM. Nothing in this package knows about speech.

language_model.py   decoder, embeddings, logits, log-probabilities; the check of LLM families
prefix.py           the LLM behind the constant beginning of a prompt: `run_after_prefix`, `PrefixCache`
prompt.py           the chat template with a placeholder for the speech; its variables and a fixed date
template_check.py   a chat template rendered once under limits, before it is trusted
instructions.py     every instruction text
decoding.py         the decode loop: greedy and sampled, rows join and leave; the text of an answer's tokens
kv_cache.py         key/values of a running batch
teacher_forcing.py  scores and hidden states of given answers
quantise.py         weights in 16, 8 or 4 bits
attention.py        attention on a CPU; which kinds take a mask of one's own
sharding.py         an LLM spread over several processes, each reading its own part
servers.py          LLMs behind OpenAI-compatible URLs: the least busy first, one that fails left out for a while
"""
