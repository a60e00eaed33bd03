"""Online post-training of language models on checkable problems with Negative-aware Fine-Tuning (arXiv 2505.18116)."""
