"""The fair comparison: mixers at matched size, each at its own learning rate, several seeds, quality beside cost."""
