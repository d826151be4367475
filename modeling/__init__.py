"""What a policy computes: pure networks without queues, statistics or hidden randomness."""
