"""Text to tokens to batches: sources, readers, repair, tokenizers, a cache of tokens, the order of training."""
