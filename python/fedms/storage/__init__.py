"""What must survive a crash: records, checkpoints and the private state of a node."""
