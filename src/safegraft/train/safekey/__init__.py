"""SafeKey (arXiv:2505.16186): spans of a trace in tokens, the losses, and the Trainer that minimises them."""
