"""Drills: what a run, a cache and a reader do when they are killed, damaged, out of space, or given hostile files."""
