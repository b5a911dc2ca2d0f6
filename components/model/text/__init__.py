"""Texts: conversations, chat templates, control tokens, tokenizers, prompts."""
