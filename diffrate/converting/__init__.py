"""Models of other libraries as models of timm, and back."""
