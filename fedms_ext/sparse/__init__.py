"""Sparsely activated LoRA: attaching experts, choosing the blocks that train, caching what is constant below them."""
