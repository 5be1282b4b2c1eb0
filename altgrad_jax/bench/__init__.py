"""What a training step costs: rounds and their statistics, our programs, peers, the device's limits, tables."""
