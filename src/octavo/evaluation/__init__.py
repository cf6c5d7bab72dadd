"""Images in, numbers with confidence intervals out."""
