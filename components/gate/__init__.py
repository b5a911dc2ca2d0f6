"""Steps `gate` and `gate-quantized`: whether a measured model may go on."""
