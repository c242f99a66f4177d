"""torchrun's contract, on torch's own elastic agent."""
