"""The evaluation: the same questions as text, through a cascade and as speech.

    blsp evaluate --suite tiny --out results/tiny

tasks.py       tasks and suites, read from YAML
judge.py       `blsp evaluate`: calls the files below in the order of this list
routes.py      one question by three routes: transcript, recogniser's transcript, speech vectors
recogniser.py  the speech recogniser of the cascade
endpoints.py   other models behind a URL: in a further column, or as a judge of open answers
answers.py     the logs of answers, with which a killed run continues
scoring.py     metrics and faults of the answers
bootstrap.py   confidence intervals
alignment.py   divergence between the routes, token by token
following.py   whether the answers to speech do what was asked
layers.py      the same inside the LLM, layer by layer
results.py     results.json and samples.jsonl
report.py      report.md and the table for the screen
summary.py     sentences, figures and tables of the report
pictures.py    pictures of the report
"""
