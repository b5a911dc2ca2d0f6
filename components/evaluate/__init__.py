"""Steps `evaluate`, `evaluate-quantized` and the gates: what a model can do, beside what needs no picture."""
