"""The pages and the pictures of a comparison, from its results."""
