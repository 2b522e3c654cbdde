"""One gradient a task -> one gradient."""
