"""From a model to text: prefill and decode, sampling, and sessions (what a model has read, as a value)."""
