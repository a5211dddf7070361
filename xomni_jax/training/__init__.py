"""Training: one loop, and the stages that say what differs."""
