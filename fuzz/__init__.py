"""Fuzzing of everything that reads bytes of a peer; see docs/fuzzing.md.

`targets.py` says what is called and what must hold, `mutate.py` makes inputs that get deep, `corpus.py` keeps the
inputs worth keeping, `flat.py` measures time per byte. `python -m fuzz` runs atheris over all targets.
"""
