"""Number formats of training: bf16 and FP8 recipes, and which layers are eligible."""
