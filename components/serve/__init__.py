"""The vLLM plugin, and how a model is started, asked and stopped through vLLM."""
