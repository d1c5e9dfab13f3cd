"""Pages for an image, with pictures of its tokens, and plots of the figures in logs."""
