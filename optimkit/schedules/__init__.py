"""Step count -> rate."""
