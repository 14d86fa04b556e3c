"""Choosing how strongly to merge, by measuring: strength and damping for one fine-tune and one vector."""
