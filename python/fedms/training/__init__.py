"""The resident model: the frozen foundation model with its experts, and what training it takes."""
