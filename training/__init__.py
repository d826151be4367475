"""Training: PolicyTrainer, its arguments and what a recipe says."""
