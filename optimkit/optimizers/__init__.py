"""One file a method: the recipe of a paper as a chain of pieces."""
