"""FedMS: two-stage federated fine-tuning of a frozen foundation model with LoRA experts, a gate and SAL."""
