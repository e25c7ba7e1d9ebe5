"""Step 1, `blsp continue`: the LLM continues every transcript.

writer.py         the command, for one process or many, and its --score-only
requests.py       the prompts of each row: behaviours, orders, mixtures
text_model.py     the LLM of step 1, and the variables of its chat template
prompt_plan.py    equal prompts, the plan of batches, the answers so far, with which a killed job continues
engines.py        the LLM in this process
openai_engine.py  an LLM behind OpenAI-compatible URLs
topk.py           the stored top-k of the teacher's distribution
"""
