"""Other libraries' models that ours are measured against."""
