"""Images in, numbers with intervals out."""
