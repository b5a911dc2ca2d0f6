"""Pictures and clips: from decoded media to the embeddings that stand for them."""
