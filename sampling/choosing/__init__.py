"""From logits to tokens: warping, drawing, drafts, and what a verification keeps."""
