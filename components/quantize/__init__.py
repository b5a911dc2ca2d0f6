"""Step `quantize`: one compressed-tensors checkpoint, W8A8 tower and W4A16 decoder."""
