"""The PyTorch operators: schemas, fake kernels and autograd of the linear layer with experts."""
