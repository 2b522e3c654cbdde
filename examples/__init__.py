"""Programs that use only the public interface of optimkit; run them from the repository root."""
