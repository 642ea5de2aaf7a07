"""seqmodels: which sequence architecture is better, by how much, and at what cost."""
