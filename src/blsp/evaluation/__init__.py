"""The judge: every claim as text, cascade and speech on the same questions.

    blsp evaluate --suite tiny --out results/tiny

tasks.py (what is asked) → routes.py (how it is asked) → scoring.py, faults.py (what the answers are worth)
→ alignment.py (how far the LLM's behaviour differs) → report.py (what a person reads); judge.py leads the way.
"""
