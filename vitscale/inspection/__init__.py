"""What a trained ViT has learned, as arrays and figures (paper, Figures 6, 7 and 14)."""
