"""Small pieces of a chain, one idea a file."""
