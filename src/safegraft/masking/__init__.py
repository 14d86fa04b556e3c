"""Learning which part of fine-tunes is safe to keep: what is masked, in what memory, and the whole run (SOMF)."""
