"""Training-free merging of safety vectors into fine-tuned models."""
