"""Whole models beside the libraries that people would use in their place.

``python -m benchmarks.models`` measures; what is measured is in `.transformer_step`,
`.translation`, `.rnn` and `.recurrent_layers`, and how in `.comparison`.
"""
