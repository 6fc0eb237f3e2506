"""A training run: its loop, its folder and what is in it, how it is shown and interrupted."""
