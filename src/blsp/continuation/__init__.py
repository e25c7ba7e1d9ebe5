"""Step 1: the LLM continues every transcript (`blsp continue`).

writer.py         the command, one process or many
requests.py       what each row is asked
work.py           prompts, equal prompts, batches and answers, resumable
engines.py        generation in this process
openai_engine.py  generation behind an OpenAI-compatible URL
topk.py           the stored top-k of the teacher's distribution
"""
