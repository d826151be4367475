"""What a policy is: one validated, JSON-serialisable configuration per policy."""
