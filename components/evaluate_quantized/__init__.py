"""Step `evaluate-quantized`: what quantization has cost."""
