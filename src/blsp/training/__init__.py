"""Step 2: alignment training (`blsp train`). Start with loop.py, step.py and losses.py.

loop.py       the training loop
step.py       one micro-batch to its loss
losses.py     every loss
dataset.py    data files and their measured rows
examples.py   rows to examples
augmentation.py  speed, volume, noise, hidden spans
batches.py    the order of the data, and the examples of each step, read ahead
run.py        everything before the first step
verdict.py    whether the adapter listens, at the end of a run; warnings at its start
run_state.py  run folder, settings, checkpoints, stop signal
optimiser.py  AdamW, schedules, averaging
probes.py     clips that are measured during training: divergence and read-out error
reporting.py  metrics.jsonl and its picture
adapter_card.py  the model card
tracking.py   trackers, speed, memory, a trace of some steps
"""
